#!/bin/busybox sh
# First process of a bundle: stacks a writable layer on the root that lies beside it, runs the suite, powers off.
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /dev /proc /sys /lower /upper /new
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
# The kernel's own words would break lines of the report.
echo 1 >/proc/sys/kernel/printk
load() {
    for module in "$1"/*.ko; do
        insmod "$module" 2>/dev/null || echo "init: cannot load $module"
    done
}
load /modules
if grep -q 'console=hvc' /proc/cmdline || grep -qs 0x1057 /sys/bus/pci/devices/*/device; then
    load /virtio
fi
mount -t squashfs -o ro,loop /root.squashfs /lower
mount -t tmpfs -o size=75% upper /upper
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /new
tar -xf /checkout.tar -C /new/src
mount --move /dev /new/dev
mount --move /proc /new/proc
mount --move /sys /new/sys
mkdir -p /new/dev/pts /new/dev/shm /new/dev/vfio
mount -t devpts -o mode=620,ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs -o mode=1777 shm /new/dev/shm
mount -t tmpfs -o mode=755 run /new/run
mount -t tmpfs -o mode=1777 tmp /new/tmp
mknod -m 666 /new/dev/vfio/vfio c 10 196
hostname guest
ifconfig lo 127.0.0.1 up
chroot /new /usr/sbin/ldconfig
chroot /new /usr/bin/env -i PATH=/opt/venv/bin:/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8 TERM=dumb \
    python -P /src/tools/guestvm/suite.py >/dev/console 2>&1
sync
poweroff -f
