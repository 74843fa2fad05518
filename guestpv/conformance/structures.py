"""The capability list as it is: nothing is passed over and nothing corrected."""

from __future__ import annotations

from dataclasses import dataclass

from ..pci.capabilities import walk
from ..pci.function import PciFunction
from ..spec import pci


@dataclass(frozen=True, slots=True)
class Structure:
    """A vendor-specific capability of a virtio function, read field by field (4.1.4).

    Attributes:
        at: its offset in configuration space.
        cap_len, cfg_type, bar, id, offset, length: its fields.
    """

    at: int
    cap_len: int
    cfg_type: int
    bar: int
    id: int
    offset: int
    length: int

    def __str__(self) -> str:
        return f"capability at {self.at:#x} (cfg_type {self.cfg_type})"


def structures(function: PciFunction, kind: int | None = None) -> list[Structure]:
    """All of them, or those of one ``cfg_type``, in the device's order."""
    found = []
    for at, id in walk(function.config_read):
        if id != pci.PCI_CAP_VENDOR:
            continue
        fields = pci.CAPABILITY
        values = {
            name: function.config_read(at + fields[name].offset, fields[name].width)
            for name in ("cap_len", "cfg_type", "bar", "id", "offset", "length")
        }
        found.append(Structure(at, **values))
    return [one for one in found if kind is None or one.cfg_type == kind]
