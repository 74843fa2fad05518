"""QEMU's zoned disk over a zoned block device of the kernel: in the guest are null_blk and a newer QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestvm import Machine
from peers import tree

QEMU = """#!/bin/sh
export QEMU_MODULE_DIR=/mnt/usr/lib/x86_64-linux-gnu/qemu
exec {command} -L /mnt/usr/share/qemu "$@"
"""

CHECK = """
import fcntl, os, struct, sys
import guestpv
from guestpv.drivers.blk import Blk
from guestpv.drivers.blk_errors import BlkIoError
from guestpv.drivers.blk_zoned import Zones
from guestpv.spec import blk as spec

ZONE, COUNT = 64 << 20, 16
BLKREPORTZONE = 0xC0101282

def kernels_view():
    # struct blk_zone_report: sector, nr_zones, flags; then 64 bytes a zone: start, len, wp, type, cond.
    raw = bytearray(struct.pack("<QII", 0, COUNT, 0) + bytes(64 * COUNT))
    fd = os.open("/dev/nullb0", os.O_RDONLY)
    fcntl.ioctl(fd, BLKREPORTZONE, raw)
    os.close(fd)
    return [struct.unpack_from("<QQQBB", raw, 16 + 64 * n) for n in range(COUNT)]

def agree():
    ours, theirs = zones.report(), kernels_view()
    assert len(ours) == len(theirs) == COUNT
    for mine, (start, length, pointer, kind, condition) in zip(ours, theirs):
        assert (mine.start, mine.kind) == (start * 512, kind), (mine, start, kind)
        # An open zone may be closed behind our back; everything else has one truth.
        opened = {spec.ZS_IOPEN, spec.ZS_EOPEN, spec.ZS_CLOSED}
        assert mine.state == condition or {mine.state, condition} <= opened, (mine, condition)
        if mine.pointer is not None:
            assert mine.pointer == pointer * 512, (mine, pointer)

node = "driver=host_device,node-name=disk,filename=/dev/nullb0,cache.direct=on"
device = f"qtest:virtio-blk-pci?qemu=/root/qemu&answer_limit=200&blockdev={node}"
with guestpv.open(device) as transport, Blk(transport, timeout=300.0) as disk:
    zones = Zones(disk)
    assert disk.model == spec.Z_HM
    assert (len(zones), zones.zone_bytes) == (COUNT, ZONE)
    agree()
    conventional, *rest = zones.report()
    assert conventional.kind == spec.ZT_CONV and {zone.kind for zone in rest} == {spec.ZT_SWR}
    disk.write(0, b"c" * 4096)
    disk.write(ZONE, b"a" * 4096)
    assert [zones.append(ZONE, bytes([n]) * 4096) for n in (1, 2)] == [ZONE + 4096, ZONE + 8192]
    assert disk.read(ZONE, 12288).tobytes() == b"a" * 4096 + bytes([1]) * 4096 + bytes([2]) * 4096
    agree()
    try:
        disk.write(ZONE, b"again" + bytes(4091))
        raise SystemExit("a write that is not at the write pointer was taken")
    except BlkIoError:
        # QEMU leaves the judgement to the kernel's device, which says no more than this.
        pass
    agree()
    zones.open(2 * ZONE)
    zones.close(2 * ZONE)
    zones.finish(3 * ZONE)
    agree()
    assert zones.report(3 * ZONE, 1)[0].state == spec.ZS_FULL
    zones.reset(ZONE)
    agree()
    assert zones.report(ZONE, 1)[0].pointer == ZONE
    disk.write(ZONE, b"n" * 4096)
    zones.reset_all()
    agree()
    assert {zone.state for zone in zones.report()[1:]} == {spec.ZS_EMPTY}
print("agreed")
"""


@pytest.mark.requirement("DRV-BLK-06", "DRV-BLK-29", "DRV-BLK-30")
@pytest.mark.timeout(1800)
def test_the_kernel_and_qemu_agree_with_us_about_zones(tmp_path: Path) -> None:
    peers = tree.get("qemu")
    command = [word.replace(str(peers.root), "/mnt") for word in peers.program("qemu-system-x86_64")]
    with Machine(
        "6.12",
        devices=[],
        memory=2048,
        iommu="none",
        limit=1500,
        extra=[
            *("-fsdev", f"local,id=tree,path={peers.root},security_model=none,readonly=on"),
            *("-device", "virtio-9p-pci,fsdev=tree,mount_tag=tree"),
        ],
    ) as vm:
        vm.run("modprobe -a 9p 9pnet_virtio && mount -t 9p -o trans=virtio,ro,cache=loose tree /mnt").check()
        vm.run(
            "modprobe null_blk nr_devices=1 gb=1 queue_mode=2 bs=4096 memory_backed=1 zoned=1 zone_size=64 "
            "zone_nr_conv=1 && ls /dev/nullb0"
        ).check()
        vm.write_file("/root/qemu", QEMU.format(command=" ".join(command)).encode(), 0o755)
        vm.write_file("/root/check.py", CHECK.encode())
        assert vm.run(["python", "/root/check.py"], timeout=1200).check().stdout.endswith("agreed\n")
