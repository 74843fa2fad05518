"""A register block in a BAR, accessed field by field as its layout declares."""

from __future__ import annotations

from ..errors import UsageError
from ..pci.function import Bar
from ..spec.layout import Field, Layout


class RegisterBlock:
    """Registers of one ``Layout`` at ``offset`` in a BAR.

    Every access is one access of the field's own width; an 8-byte field is two 4-byte halves, low half
    first (4.1.3.1, DRV-PCI: a driver uses the width of the field, and may split 64-bit fields).
    """

    def __init__(self, bar: Bar, offset: int, length: int, layout: Layout) -> None:
        self._bar = bar
        self._offset = offset
        self.length = length
        self.layout = layout

    def has(self, name: str) -> bool:
        """Whether the device's structure is long enough to hold the field."""
        return self.layout[name].end <= self.length

    def read(self, name: str, element: int = 0) -> int:
        """Read one element of a field."""
        field = self.layout[name]
        return self.read_at(field.offset + element * field.width, field.width)

    def write(self, name: str, value: int) -> None:
        """Write a field.

        Raises:
            UsageError: the value does not fit, or the field is the device's to write.
        """
        field = self.layout[name]
        if not field.writable:
            raise UsageError(f"{self.layout.name}.{name} is read-only for the driver")
        self.write_at(field.offset, field.width, value)

    def read_at(self, offset: int, width: int) -> int:
        """Read ``width`` bytes at ``offset`` into the block."""
        at = self._locate(offset, width)
        if width == 8:
            return self._bar.read(at, 4) | self._bar.read(at + 4, 4) << 32
        return self._bar.read(at, width)

    def write_at(self, offset: int, width: int, value: int) -> None:
        """Write ``width`` bytes at ``offset`` into the block."""
        if value < 0 or value >> (8 * width):
            raise UsageError(f"{value:#x} does not fit into {width} bytes of {self.layout.name}")
        at = self._locate(offset, width)
        if width == 8:
            self._bar.write(at, 4, value & 0xFFFFFFFF)
            self._bar.write(at + 4, 4, value >> 32)
        else:
            self._bar.write(at, width, value)

    def read_field(self, field: Field) -> int | bytes:
        """A whole field: an integer, or bytes for an array of single bytes."""
        if field.count == 1:
            return self.read_at(field.offset, field.width)
        return bytes(self.read_at(field.offset + i, 1) for i in range(field.count * field.width))

    def _locate(self, offset: int, width: int) -> int:
        if offset < 0 or offset + width > self.length:
            raise UsageError(
                f"{self.layout.name} has {self.length} bytes; there is no register at {offset}+{width}",
                where=self.layout.section,
            )
        return self._offset + offset
