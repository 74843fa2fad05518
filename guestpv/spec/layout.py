"""One declaration for a register block: offset, width and the feature that makes a field exist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Field:
    """One little-endian field of a register block.

    Attributes:
        name: the standard's name of the field.
        offset: bytes from the start of the block.
        width: bytes of one element: 1, 2, 4 or 8. An 8-byte field is accessed as two 4-byte halves
            (4.1.3.1, DRV-PCI).
        count: number of elements (a MAC address is 6 elements of width 1).
        writable: whether the driver may write it.
        feature: bit number of the feature without which the field does not exist, or None.
    """

    name: str
    offset: int
    width: int
    count: int = 1
    writable: bool = False
    feature: int | tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """First byte after the field."""
        return self.offset + self.width * self.count

    def exists(self, features: int) -> bool:
        """Whether one of the features that bring the field is in the mask ``features``."""
        if self.feature is None:
            return True
        bits = (self.feature,) if isinstance(self.feature, int) else self.feature
        return any(features >> bit & 1 for bit in bits)


class Layout:
    """A register block: its fields by name, in the standard's order, and padding behind the last one."""

    def __init__(self, name: str, section: str, fields: tuple[Field, ...], padding: int = 0) -> None:
        self.name = name
        self.section = section
        self.fields = fields
        self.padding = padding
        self._by_name = {field.name: field for field in fields}

    def __getitem__(self, name: str) -> Field:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    @property
    def size(self) -> int:
        """Bytes of the block."""
        return max(field.end for field in self.fields) + self.padding

    def at(self, offset: int) -> Field | None:
        """The field that covers the byte at ``offset``, if any."""
        for field in self.fields:
            if field.offset <= offset < field.end:
                return field
        return None
