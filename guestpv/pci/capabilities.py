"""Finding the virtio structures of a PCI function (4.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import Refused
from ..spec import pci as spec
from ..spec.features import DEVICE_NAMES

ConfigRead = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class VirtioCapability:
    """Where one virtio structure lies: ``length`` bytes at ``offset`` in BAR ``bar``.

    ``position`` is the capability's own offset in configuration space, ``extra`` the 32-bit word after
    the common part (``notify_off_multiplier`` for the notification structure, else 0).
    """

    cfg_type: int
    bar: int
    id: int
    offset: int
    length: int
    position: int
    extra: int = 0


def walk(read: ConfigRead) -> Iterator[tuple[int, int]]:
    """Positions and ids of the capabilities in configuration space; a looping list ends after 48."""
    if not read(spec.PCI_CONFIG_STATUS, 2) & spec.PCI_STATUS_CAPABILITIES:
        return
    position = read(spec.PCI_CONFIG_CAPABILITIES, 1) & 0xFC
    seen: set[int] = set()
    while position >= 0x40 and position not in seen and len(seen) < 48:
        seen.add(position)
        yield position, read(position, 1)
        position = read(position + 1, 1) & 0xFC


def virtio_capabilities(read: ConfigRead) -> list[VirtioCapability]:
    """All virtio structure capabilities with a known type and a valid BAR, in the device's order.

    Reserved ``cfg_type`` and ``bar`` values are passed over (DRV-PCI: they MUST be ignored), and a
    ``cap_len`` larger than known is accepted.
    """
    found = []
    known = {int(kind) for kind in spec.CfgType}
    fields = spec.CAPABILITY
    for position, kind in walk(read):
        if kind != spec.PCI_CAP_VENDOR:
            continue

        def field(name: str, at: int = position) -> int:
            return read(at + fields[name].offset, fields[name].width)

        length = field("cap_len")
        cfg_type, bar = field("cfg_type"), field("bar")
        if length < fields.size or cfg_type not in known or bar > 5:
            continue
        extra = 0
        if cfg_type == spec.CfgType.NOTIFY and length >= spec.CAPABILITY_NOTIFY_MULTIPLIER + 4:
            extra = read(position + spec.CAPABILITY_NOTIFY_MULTIPLIER, 4)
        found.append(
            VirtioCapability(cfg_type, bar, field("id"), field("offset"), field("length"), position, extra)
        )
    return found


def first(capabilities: list[VirtioCapability], kind: spec.CfgType) -> VirtioCapability | None:
    """The first instance of a structure, which the device prefers (4.1.4.1)."""
    return next((cap for cap in capabilities if cap.cfg_type == kind), None)


def identify(vendor: int, device: int) -> tuple[int, bool] | None:
    """Virtio device id of a PCI function and whether its id is a transitional one (4.1.2).

    Returns None for what is not virtio.
    """
    if vendor != spec.VENDOR_ID:
        return None
    if spec.MODERN_DEVICE_BASE <= device < spec.MODERN_DEVICE_BASE + 0x40:
        return device - spec.MODERN_DEVICE_BASE, False
    if device in spec.TRANSITIONAL_DEVICES:
        return spec.TRANSITIONAL_DEVICES[device], True
    return None


def require_virtio(name: str, read: ConfigRead) -> int:
    """The virtio device id of a function.

    Raises:
        Refused: the function is not a virtio device.
    """
    vendor, device = read(spec.PCI_CONFIG_VENDOR, 2), read(spec.PCI_CONFIG_DEVICE, 2)
    identity = identify(vendor, device)
    if identity is None:
        raise Refused(
            f"PCI id {vendor:04x}:{device:04x} is not a virtio device (vendor 1af4, device 1000-107f)",
            where=name,
            hint="`guestpv list` shows the virtio functions of this machine",
        )
    return identity[0]


def type_name(device_type: int) -> str:
    """Short name of a virtio device type: ``net``, or ``type 42`` for one without a driver here."""
    return DEVICE_NAMES.get(device_type, f"type {device_type}")
