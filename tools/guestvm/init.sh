#!/bin/busybox sh
# Runs from the initramfs: loads the modules that reach the root, stacks a writable layer on it, starts the agent.
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /dev /proc /sys /lower /upper /new
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*.ko; do
    insmod "$module" || echo "init: cannot load $module"
done

root=
tries=0
while [ -z "$root" ]; do
    for serial in /sys/block/vd*/serial; do
        [ "$(cat "$serial" 2>/dev/null)" = guestroot ] && root=/dev/$(basename "${serial%/serial}")
    done
    tries=$((tries + 1))
    [ $tries -gt 600 ] && { echo "init: no disk with the serial guestroot"; poweroff -f; }
    [ -z "$root" ] && sleep 0.05
done
mount -t squashfs -o ro "$root" /lower
mount -t tmpfs -o size=75% upper /upper
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /new

tar -xf /checkout.tar -C /new/src
mount --move /dev /new/dev
mount --move /proc /new/proc
mount --move /sys /new/sys
mkdir -p /new/dev/pts /new/dev/shm /new/dev/hugepages
mount -t devpts -o mode=620,ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs -o mode=1777 shm /new/dev/shm
mount -t hugetlbfs hugetlbfs /new/dev/hugepages
mount -t tmpfs -o mode=755 run /new/run
mount -t tmpfs -o mode=1777 tmp /new/tmp
mkdir /new/run/root
mount --move /lower /new/run/root
ln -s /proc/self/fd /new/dev/fd
hostname guest
ifconfig lo 127.0.0.1 up

# Nodes that systemd would make, so that opening them loads their modules, with udev's modes.
while read -r _ name number; do
    case $name in
    net/tun | vfio/vfio)
        mkdir -p "/new/dev/${name%/*}"
        major=${number#c}
        mknod -m 666 "/new/dev/$name" c "${major%:*}" "${number#*:}"
        ;;
    esac
done <"/new/lib/modules/$(uname -r)/modules.devname"

# In the background, while Python starts; the agent waits for /run/settled.
chroot /new /bin/sh -c '(/usr/sbin/ldconfig; /usr/sbin/modprobe -aq MODULES_AT_BOOT; : >/run/settled) &'
exec switch_root -c /dev/console /new /opt/venv/bin/python -I -S /src/tools/guestvm/agent.py
