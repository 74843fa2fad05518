"""PCI configuration space of the software function: header, BARs, capabilities (4.1.2, 4.1.4, PCI 3.0)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..spec import pci
from ..spec.pci import CfgType

SIZE = 4096
HEADER_END = 0x40
CLASS = 0x09
HEADER_SUBSYSTEM_VENDOR = 0x2C
BAR_64 = 0x4

MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
FLR_CAPABLE = 1 << 28
INITIATE_FLR = 1 << 15
STATUS_INTERRUPT = 1 << 3


@dataclass(frozen=True, slots=True)
class Structure:
    """A virtio structure to be found by a capability: ``length`` bytes at ``offset`` of BAR ``bar``."""

    kind: CfgType
    bar: int
    offset: int
    length: int
    extra: bytes = b""


def msix_capability(vectors: int, table: tuple[int, int], pending: tuple[int, int]) -> bytes:
    """Body of the MSI-X capability; table and pending bits as (BAR, offset)."""
    parts = (vectors - 1).to_bytes(2, "little")
    for bar, offset in (table, pending):
        parts += (offset | bar).to_bytes(4, "little")
    return parts


def express_capability() -> bytes:
    """Body of a PCI Express endpoint capability, version 2, with function level reset."""
    body = bytearray(58)
    body[0:2] = (0x0002).to_bytes(2, "little")
    body[2:6] = (FLR_CAPABLE | 1 << 15).to_bytes(4, "little")
    body[10:14] = (0x11).to_bytes(4, "little")
    body[16:18] = (0x11).to_bytes(2, "little")
    return bytes(body)


class ConfigSpace:
    """Bytes with a mask of what the driver may write; writes elsewhere have no effect.

    Args:
        device_type: virtio device id.
        pci_class: 24-bit class code.
        bars: BAR index to size in bytes, a power of two; each is a 64-bit memory BAR.

    Attributes:
        positions: capability name to its offset: ``msix``, ``express``, or a ``CfgType``.
        written: called with offset and width after a write.
    """

    def __init__(self, device_type: int, pci_class: int, bars: dict[int, int]) -> None:
        self.data = bytearray(SIZE)
        self.mask = bytearray(SIZE)
        self.positions: dict[str | CfgType, int] = {}
        self.written: Callable[[int, int], None] = lambda offset, width: None
        self._link = pci.PCI_CONFIG_CAPABILITIES
        self._next = HEADER_END
        device = pci.MODERN_DEVICE_BASE + device_type
        self.put(pci.PCI_CONFIG_VENDOR, 2, pci.VENDOR_ID)
        self.put(pci.PCI_CONFIG_DEVICE, 2, device)
        self.put(pci.PCI_CONFIG_STATUS, 2, pci.PCI_STATUS_CAPABILITIES)
        self.put(pci.PCI_CONFIG_REVISION, 1, 1)
        self.put(CLASS, 3, pci_class)
        self.put(HEADER_SUBSYSTEM_VENDOR, 2, pci.VENDOR_ID)
        self.put(pci.PCI_CONFIG_SUBSYSTEM, 2, device)
        self.put(pci.PCI_CONFIG_INTERRUPT_PIN, 1, 1)
        writable = pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER | pci.COMMAND_INTX_DISABLE | 1 << 6 | 1 << 8
        self.put(pci.PCI_CONFIG_COMMAND, 2, 0, writable)
        self.put(0x3C, 1, 0, 0xFF)
        for index, size in bars.items():
            at = pci.PCI_CONFIG_BAR0 + 4 * index
            self.put(at, 8, BAR_64, (1 << 64) - size)

    def identify(self, vendor: int | None, device: int | None, revision: int | None) -> None:
        """Show these ids instead of the ordinary ones; a transitional one has its type in subsystem."""
        if vendor is not None:
            self.put(pci.PCI_CONFIG_VENDOR, 2, vendor)
        if device is not None:
            kind = self.get(pci.PCI_CONFIG_DEVICE, 2) - pci.MODERN_DEVICE_BASE
            self.put(pci.PCI_CONFIG_DEVICE, 2, device)
            self.put(pci.PCI_CONFIG_SUBSYSTEM, 2, kind if device < pci.MODERN_DEVICE_BASE else device)
        if revision is not None:
            self.put(pci.PCI_CONFIG_REVISION, 1, revision)

    def put(self, offset: int, width: int, value: int, mask: int = 0) -> None:
        """Set a field and which of its bits the driver may write."""
        self.data[offset : offset + width] = value.to_bytes(width, "little")
        self.mask[offset : offset + width] = mask.to_bytes(width, "little")

    def get(self, offset: int, width: int) -> int:
        """A field as the driver would read it."""
        return int.from_bytes(self.data[offset : offset + width], "little")

    def add_capability(self, name: str | CfgType, id: int, body: bytes) -> int:
        """Link a capability with this id and what follows id and next pointer; returns its offset."""
        at = self._next
        self.data[self._link] = at
        self.data[at] = id
        self.data[at + 2 : at + 2 + len(body)] = body
        self._link = at + 1
        self._next = -(-(at + 2 + len(body)) // 4) * 4
        self.positions[name] = at
        return at

    def add_structures(self, structures: Iterable[Structure]) -> None:
        """Link the virtio capabilities; the PCI access capability gets writable fields (4.1.4.9)."""
        for item in structures:
            body = bytes((16 + len(item.extra), item.kind, item.bar, 0, 0, 0))
            body += item.offset.to_bytes(4, "little") + item.length.to_bytes(4, "little") + item.extra
            at = self.add_capability(item.kind, pci.PCI_CAP_VENDOR, body)
            if item.kind == CfgType.PCI_CFG:
                self.mask[at + 4] = 0xFF
                self.mask[at + 8 : at + 20] = b"\xff" * 12

    def read(self, offset: int, width: int) -> int:
        """1, 2 or 4 bytes; beyond the space zeroes."""
        return self.get(offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        """1, 2 or 4 bytes, through the mask."""
        new = value & (1 << 8 * width) - 1
        for byte in range(offset, min(offset + width, SIZE)):
            mask = self.mask[byte]
            self.data[byte] = self.data[byte] & ~mask | new & mask
            new >>= 8
        self.written(offset, width)

    def reset(self) -> None:
        """Clear what the driver wrote."""
        for byte, mask in enumerate(self.mask):
            if mask:
                self.data[byte] &= ~mask

    def command(self) -> int:
        """The command register."""
        return self.get(pci.PCI_CONFIG_COMMAND, 2)

    def structure_at(self, bar: int, offset: int, length: int) -> CfgType | None:
        """The virtio structure that holds these bytes of a BAR, if one does."""
        for kind, at in self.positions.items():
            if not isinstance(kind, CfgType) or kind == CfgType.PCI_CFG or self.data[at + 4] != bar:
                continue
            start, size = self.get(at + 8, 4), self.get(at + 12, 4)
            if start <= offset and offset + length <= start + size:
                return kind
        return None
