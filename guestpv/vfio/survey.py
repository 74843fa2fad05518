"""Which virtio functions this machine has, who uses them, and whether they can be driven."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from ..errors import GuestpvError, UsageError
from ..pci.capabilities import identify, type_name, virtio_capabilities
from ..spec.pci import VENDOR_ID
from ..system import SYSTEM, System
from .uses import Use, find_uses

DEVICES = "/sys/bus/pci/devices"
VFIO_DRIVER = "vfio-pci"
NO_IOMMU_GROUP = "vfio-noiommu"
IOMMU = 23
"""Virtio device id of virtio-iommu."""
PEACEFUL_DRIVERS = (None, VFIO_DRIVER, "pci-stub", "pcieport")
"""Drivers of group members that leave the group viable."""

NO_IOMMU_GROUP_PROBLEM = "no IOMMU group: the machine has no IOMMU, or its kernel does not use it"
IOMMU_HINT = (
    "give the guest an IOMMU (QEMU: `-machine q35,kernel-irqchip=split -device intel-iommu,intremap=on,"
    "caching-mode=on`, and `iommu_platform=on` on the virtio device) and boot it with `intel_iommu=on`"
)


@dataclass(frozen=True, slots=True)
class Member:
    """Another function of an IOMMU group.

    Attributes:
        driver: kernel driver bound, or None.
        what: ``virtio-blk``, ``bridge`` or ``8086:10d3``.
        blocks: True while its driver keeps the group from being used.
    """

    address: str
    driver: str | None
    what: str
    blocks: bool

    @property
    def command(self) -> str:
        """What to run so that it no longer blocks the group."""
        if self.what.startswith("virtio-"):
            return f"guestpv bind {self.address}"
        return f"driverctl set-override {self.address} {VFIO_DRIVER}"


@dataclass(frozen=True, slots=True)
class Function:
    """A virtio-pci function as the kernel shows it.

    Attributes:
        type: virtio device id (chapter 5); ``name`` is its short name.
        kind: ``modern``, ``transitional`` or ``legacy`` (no virtio capabilities: cannot be driven). Without
            the right to read all of configuration space a legacy function shows as transitional.
        driver: kernel driver bound, or None.
        group: IOMMU group, or None without an IOMMU.
        members: the other functions of the group.
        uses: what the machine uses it for.
        problem: why it cannot be driven, or an empty string; ``hint`` is what to do about it.
    """

    address: str
    device_id: int
    type: int
    name: str
    kind: str
    driver: str | None
    group: int | None
    members: tuple[Member, ...]
    uses: tuple[Use, ...]
    problem: str
    hint: str

    @property
    def drivable(self) -> bool:
        """Whether binding and opening it should succeed."""
        return not self.problem

    def obstacle(self, noiommu: bool = False) -> tuple[str, str]:
        """``problem`` and ``hint``; with ``noiommu``, those that are left where nobody asks for an IOMMU."""
        if not noiommu or self.group is not None:
            return self.problem, self.hint
        return _problem(self.address, self.type, self.kind, 0, (), self.uses)

    @property
    def blockers(self) -> tuple[Member, ...]:
        """Members of the group that have to be bound to vfio-pci too."""
        return tuple(member for member in self.members if member.blocks)


def survey(system: System = SYSTEM) -> list[Function]:
    """Every virtio-pci function of the machine, by address.

    Raises:
        GuestpvError: libudev is missing.
    """
    try:
        addresses = system.pci_addresses()
    except ImportError as error:
        raise GuestpvError(f"udev cannot be asked: {error}", hint="apt install libudev1") from error
    found = []
    for address in addresses:
        with suppress(FileNotFoundError):
            if _is_virtio(address, system):
                found.append(_examine(address, system))
    return found


def look_up(address: str, system: System = SYSTEM) -> Function:
    """One function by its address, with or without PCI domain (``0000:00:03.0``, ``00:03.0``).

    Raises:
        UsageError: not a PCI address, no such function, or not a virtio one.
    """
    match = re.fullmatch(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[01][0-9a-f]\.[0-7])", address.lower())
    hint = "`guestpv list` shows the virtio functions of this machine"
    if match is None:
        raise UsageError(f"{address!r} is not a PCI address such as 0000:00:03.0", hint=hint)
    full = f"{match[1] or '0000'}:{match[2]}"
    if not system.exists(f"{DEVICES}/{full}"):
        raise UsageError("no such PCI function", where=full, hint=hint)
    if not _is_virtio(full, system):
        vendor, device = _number(full, "vendor", system), _number(full, "device", system)
        raise UsageError(f"PCI id {vendor:04x}:{device:04x} is not a virtio function", where=full, hint=hint)
    return _examine(full, system)


def driver_of(address: str, system: System = SYSTEM) -> str | None:
    """The kernel driver bound to a PCI function."""
    return _link_name(f"{DEVICES}/{address}/driver", system)


def group_of(address: str, system: System = SYSTEM) -> int | None:
    """The IOMMU group of a PCI function; None without an IOMMU, also where VFIO made up a group for it."""
    group = _link_name(f"{DEVICES}/{address}/iommu_group", system)
    if group is None:
        return None
    with suppress(OSError):
        if system.read_text(f"/sys/kernel/iommu_groups/{group}/name") == NO_IOMMU_GROUP:
            return None
    return int(group)


def members_of(group: int, system: System = SYSTEM) -> tuple[Member, ...]:
    """All functions of an IOMMU group."""
    return tuple(
        _member(address, system) for address in system.listdir(f"/sys/kernel/iommu_groups/{group}/devices")
    )


def noiommu_group_of(address: str, system: System = SYSTEM) -> int | None:
    """The group that VFIO made up for a function without an IOMMU, in its no-IOMMU mode; else None."""
    group = _link_name(f"{DEVICES}/{address}/iommu_group", system)
    return int(group) if group is not None and group_of(address, system) is None else None


def cdev_of(address: str, system: System = SYSTEM) -> str | None:
    """The character device of a function that is bound to vfio-pci, None where the kernel makes none."""
    with suppress(OSError):
        for name in system.listdir(f"{DEVICES}/{address}/vfio-dev"):
            # Every VFIO device has a name there; only with VFIO_DEVICE_CDEV has it a number and a node.
            if system.exists(f"{DEVICES}/{address}/vfio-dev/{name}/dev"):
                return f"/dev/vfio/devices/{name}"
    return None


def nodes_of(group: int, system: System = SYSTEM) -> list[str]:
    """Nodes through which functions of an IOMMU group are driven: the group's, and those of its members."""
    cdevs = [cdev_of(member.address, system) for member in members_of(group, system)]
    return [f"/dev/vfio/{group}", f"/dev/vfio/noiommu-{group}", *filter(None, cdevs)]


def _examine(address: str, system: System) -> Function:
    vendor, device = _number(address, "vendor", system), _number(address, "device", system)
    identity = identify(vendor, device)
    device_type = identity[0] if identity else _number(address, "subsystem_device", system)
    kind = _kind(address, identity is not None and not identity[1], system)
    driver, group = driver_of(address, system), group_of(address, system)
    members = tuple(m for m in members_of(group, system) if m.address != address) if group is not None else ()
    uses = tuple(find_uses(address, device_type, system)) if driver not in PEACEFUL_DRIVERS else ()
    problem, hint = _problem(address, device_type, kind, group, members, uses)
    return Function(
        address,
        device,
        device_type,
        type_name(device_type),
        kind,
        driver,
        group,
        members,
        uses,
        problem,
        hint,
    )


def _problem(
    address: str,
    device_type: int,
    kind: str,
    group: int | None,
    members: tuple[Member, ...],
    uses: tuple[Use, ...],
) -> tuple[str, str]:
    if device_type == IOMMU:
        return "the IOMMU itself, which the kernel needs for all the others", ""
    if kind == "legacy":
        return (
            "a legacy-only function: it has no virtio capabilities (VIRTIO 1.4 section 4.1.4)",
            "QEMU: `disable-legacy=on,disable-modern=off` on the device",
        )
    if group is None:
        return NO_IOMMU_GROUP_PROBLEM, IOMMU_HINT
    if uses:
        return (
            "in use: " + "; ".join(use.detail for use in uses),
            f"stop using it first, or `guestpv bind --force {address}` takes it away all the same",
        )
    blockers = [member for member in members if member.blocks]
    if blockers:
        return not_viable(group, blockers)
    return "", ""


def not_viable(group: int, blockers: Iterable[Member]) -> tuple[str, str]:
    """Message and hint for a group that other drivers hold members of."""
    blockers = list(blockers)
    names = ", ".join(f"{m.address} ({m.what}, driver {m.driver})" for m in blockers)
    return (
        f"IOMMU group {group} is not viable: the kernel still drives {names}",
        "a group is given away as a whole: " + "; ".join(f"`{m.command}`" for m in blockers),
    )


def _kind(address: str, modern: bool, system: System) -> str:
    config = _config_space(address, system)
    if len(config) >= 256:

        def read(offset: int, width: int) -> int:
            return int.from_bytes(config[offset : offset + width], "little")

        if not virtio_capabilities(read):
            return "legacy"
    return "modern" if modern else "transitional"


def _config_space(address: str, system: System) -> bytes:
    """Configuration space as far as we may read it: 64 bytes without CAP_SYS_ADMIN."""
    fd = system.open(f"{DEVICES}/{address}/config", os.O_RDONLY)
    try:
        return system.pread(fd, 256, 0)
    finally:
        system.close(fd)


def _member(address: str, system: System) -> Member:
    driver = driver_of(address, system)
    vendor, device = _number(address, "vendor", system), _number(address, "device", system)
    bridge = _number(address, "class", system) >> 16 == 0x06
    identity = identify(vendor, device)
    what = f"{vendor:04x}:{device:04x}"
    if identity:
        what = f"virtio-{type_name(identity[0])}"
    elif bridge:
        what = "bridge"
    return Member(address, driver, what, not bridge and driver not in PEACEFUL_DRIVERS)


def _is_virtio(address: str, system: System) -> bool:
    """Vendor and device id in virtio's range (4.1.2); 1000-103f holds every legacy and transitional id."""
    device = _number(address, "device", system)
    return _number(address, "vendor", system) == VENDOR_ID and 0x1000 <= device <= 0x107F


def _number(address: str, attribute: str, system: System) -> int:
    return int(system.read_text(f"{DEVICES}/{address}/{attribute}"), 0)


def _link_name(path: str, system: System) -> str | None:
    try:
        return system.readlink(path).rpartition("/")[2]
    except OSError:
        return None
