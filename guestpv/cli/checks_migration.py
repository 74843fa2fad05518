"""What a guest can see of its own chances to be migrated live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from ..system import SYSTEM, System

PCI: Final = "/sys/bus/pci/devices"
DEVICES: Final = {
    (
        "0x1b36",
        "0x0010",
    ): "is an NVMe controller, which QEMU moves only in newer versions (7.2 and 10.0 refuse, 11.1 does)",
    ("0x1af4", "0x1110"): "is shared memory (ivshmem), which QEMU moves only with master=on",
}
SHARES: Final = {
    "9p": "is a 9p share, and QEMU refuses to migrate while one is mounted",
    "virtiofs": "is a virtiofs share, whose state only newer versions of QEMU and virtiofsd move together",
}
UNSEEN: Final = (
    "nothing seen against it; a device served over vfio-user does not survive it, and a guest cannot see that"
)


def obstacles(system: System = SYSTEM) -> Iterator[tuple[str, str]]:
    """What stands in the way, in words, and what to do about it."""
    mounts = ""
    with suppress(OSError):
        mounts = system.read_text("/proc/self/mountinfo")
    for line in mounts.splitlines():
        place, _, what = line.partition(" - ")
        kind, point = what.split(" ", 1)[0], place.split()[4]
        if kind in SHARES:
            yield f"{point} {SHARES[kind]}", f"umount {point}"
    units: list[str] = []
    with suppress(OSError):
        units = system.listdir("/sys/class/iommu")
    if any(unit.startswith("ivhd") for unit in units):
        yield (
            "QEMU's amd-iommu does not migrate unless it is made with pci-id= (seen with 7.2, 10.0 and 11.1)",
            "QEMU: -device intel-iommu or virtio-iommu-pci instead",
        )
    addresses: list[str] = []
    with suppress(OSError):
        addresses = system.listdir(PCI)
    for address in addresses:
        with suppress(OSError):
            identity = tuple(system.read_text(f"{PCI}/{address}/{name}") for name in ("vendor", "device"))
            if identity in DEVICES:
                yield f"{address} {DEVICES[identity]}", f"unplug it first: QMP device_del, for {address}"
