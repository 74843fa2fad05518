"""How a software function presents itself in PCI configuration space: as usual, or odd but lawful."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec.pci import CfgType

ORDER = (CfgType.COMMON, CfgType.ISR, CfgType.NOTIFY, CfgType.DEVICE, CfgType.PCI_CFG)


@dataclass(frozen=True, slots=True)
class Looks:
    """Everything here may differ between devices, and a driver has to find its way (4.1.2, 4.1.4).

    Attributes:
        vendor, device, revision: ids instead of the ordinary ones; device 0x1000 to 0x103f is a transitional
            id, and the device type then stands in the subsystem id.
        bar: the BAR that holds the virtio structures, 1 to 4.
        shift: bytes before the first structure in that BAR, a multiple of 4096.
        order: the virtio capabilities in the list's order; one that is missing is not presented.
        first: bodies (from cap_len on) of further vendor capabilities before them.
        longer: bytes that every virtio capability is longer than known.
        spare: bytes that the structures are said to be longer than known; device configuration really is.
    """

    vendor: int | None = None
    device: int | None = None
    revision: int | None = None
    bar: int = 4
    shift: int = 0
    order: tuple[CfgType, ...] = ORDER
    first: tuple[bytes, ...] = ()
    longer: int = 0
    spare: int = 0


def reserved_type(bar: int = 4, kind: int = 0x77) -> bytes:
    """A virtio capability of a reserved ``cfg_type`` (4.1.4.1): a driver passes it over."""
    return bytes((16, kind, bar, 0, 0, 0)) + bytes(4) + (4096).to_bytes(4, "little")


def reserved_bar(kind: CfgType = CfgType.COMMON) -> bytes:
    """A virtio capability in BAR 7, which is reserved: a driver passes it over."""
    return bytes((16, kind, 7, 0, 0, 0)) + bytes(4) + (4096).to_bytes(4, "little")
