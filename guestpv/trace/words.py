"""Register accesses in words: which structure and field, what its bits say, which section it is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ..pci.capabilities import VirtioCapability
from ..spec import balloon, blk, console, net, pci
from ..spec import features as feat
from ..spec.layout import Layout
from ..spec.status import Status
from ..spec.steps import STATUS_STEPS, register_step

CONFIGURATIONS: Final[dict[int, Layout]] = {
    feat.NET: net.CONFIG,
    feat.BLK: blk.CONFIG,
    feat.CONSOLE: console.CONFIG,
    feat.BALLOON: balloon.CONFIG,
}
"""Virtio device id -> layout of its configuration."""

STRUCTURES: Final = {
    pci.CfgType.COMMON: "common",
    pci.CfgType.NOTIFY: "notify",
    pci.CfgType.ISR: "isr",
    pci.CfgType.DEVICE: "device",
}

SPACE: Final = {
    pci.PCI_CONFIG_VENDOR: "vendor id",
    pci.PCI_CONFIG_DEVICE: "device id",
    pci.PCI_CONFIG_COMMAND: "command",
    pci.PCI_CONFIG_STATUS: "status",
    pci.PCI_CONFIG_REVISION: "revision id",
    pci.PCI_CONFIG_SUBSYSTEM: "subsystem id",
    pci.PCI_CONFIG_CAPABILITIES: "capabilities pointer",
    pci.PCI_CONFIG_INTERRUPT_PIN: "interrupt pin",
}
"""Offset in PCI configuration space -> what is there."""


def status_words(value: int) -> str:
    """``ACKNOWLEDGE DRIVER``, or ``reset`` for 0."""
    if value == 0:
        return "reset"
    known = [bit.name or "" for bit in Status if bit and value & bit]
    rest = value & ~sum(bit for bit in Status)
    return " ".join(known + ([f"{rest:#x}"] if rest else []))


@dataclass(frozen=True, slots=True)
class Register:
    """One access to a register, in words.

    Attributes:
        structure: ``common``, ``notify``, ``isr``, ``device`` or ``BARn``.
        name: the standard's name of the field.
        offset: bytes from the start of the structure.
        meaning: what the value says; empty where the number says it all.
        section: of the standard.
    """

    structure: str
    name: str
    offset: int
    meaning: str
    section: str


class Registers:
    """Follows the accesses to one PCI function, because what one means depends on those before.

    Args:
        device_type: virtio device id.
        capabilities: the function's virtio structures.

    Attributes:
        queue: what ``queue_select`` was set to.
        features: what was written to ``driver_feature`` so far.
        notify_offsets: queue -> ``queue_notify_off``.
        vectors: queue, or -1 for the configuration -> MSI-X vector.
    """

    def __init__(self, device_type: int | None, capabilities: list[VirtioCapability]) -> None:
        self.device_type = device_type
        self.queue = 0
        self.features = 0
        self.notify_offsets: dict[int, int] = {}
        self.vectors: dict[int, int] = {}
        self._places = [
            (STRUCTURES[pci.CfgType(found.cfg_type)], found)
            for found in capabilities
            if found.cfg_type in STRUCTURES
        ]
        self._status = 0
        self._selected = {"device_feature": 0, "driver_feature": 0}

    def place(self, bar: int, offset: int) -> tuple[str, int]:
        """Structure, and bytes from its start, of a place in a BAR."""
        for name, found in self._places:
            if bar == found.bar and 0 <= offset - found.offset < found.length:
                return name, offset - found.offset
        return f"BAR{bar}", offset

    def access(self, bar: int, offset: int, width: int, value: int, *, write: bool) -> Register:
        """One access, with what was read or written."""
        structure, at = self.place(bar, offset)
        if structure == "common":
            return self._common(at, value, write=write)
        if structure == "isr":
            return Register(structure, "isr", at, _isr(value), "4.1.4.5, 4.1.5.3")
        if structure == "notify":
            return Register(structure, "queue_notify", at, self._doorbell(width, value), "4.1.5.2")
        if structure == "device":
            return self._device(at)
        return Register(structure, f"{structure}+{at:#x}", at, "", "")

    def _common(self, at: int, value: int, *, write: bool) -> Register:
        field = pci.COMMON_CFG.at(at)
        if field is None:
            return Register("common", f"common+{at:#x}", at, "", pci.COMMON_CFG.section)
        _, section = register_step(field.name)
        name, meaning = field.name, ""
        if name == "device_status":
            meaning, section = self._status_word(value, write=write)
        elif name.endswith("_select") and name != "queue_select":
            self._selected[name.removesuffix("_select")] = value
            meaning = f"bits {32 * value} to {32 * value + 31}"
        elif name in self._selected:
            word = self._selected[name]
            if write:
                self.features = self.features & ~(0xFFFFFFFF << 32 * word) | value << 32 * word
            meaning = " ".join(feat.feature_names(self.device_type, value << 32 * word)) or "none"
        elif name == "queue_select":
            self.queue = value
            meaning = f"queue {value}"
        elif name.endswith("_msix_vector"):
            queue = self.queue if name.startswith("queue") else -1
            self.vectors[queue] = value
            whose = "configuration changes" if queue < 0 else f"queue {queue}"
            meaning = f"{whose}: " + ("no vector" if value == pci.NO_VECTOR else f"vector {value}")
        elif name.startswith("queue_"):
            if name == "queue_notify_off":
                self.notify_offsets[self.queue] = value
            if field.width == 8:
                name += " (low half)" if at == field.offset else " (high half)"
            meaning = f"queue {self.queue}"
            if field.name == "queue_size" and not write and value == 0:
                meaning += ": not there"
        return Register("common", name, at, meaning, section)

    def _status_word(self, value: int, *, write: bool) -> tuple[str, str]:
        words = status_words(value)
        if not write:
            return words, "2.1"
        added = value & ~self._status
        self._status = value
        try:
            section = STATUS_STEPS[Status(added)][1]
        except (ValueError, KeyError):
            section = "2.1"
        plus = f", sets {status_words(added)}" if value and added and added != value else ""
        return words + plus, section

    def _doorbell(self, width: int, value: int) -> str:
        if width < 4:
            return f"queue {value}" if value in self.notify_offsets else f"value {value:#x}"
        return f"queue {value & 0xFFFF}, next offset {value >> 16 & 0x7FFF}, wrap {value >> 31}"

    def _device(self, at: int) -> Register:
        layout = CONFIGURATIONS.get(self.device_type or 0)
        field = layout.at(at) if layout else None
        if layout is None or field is None:
            return Register("device", f"config+{at:#x}", at, "", "2.5, 4.1.4.6")
        name = field.name
        if field.count > 1:
            name += f"[{at - field.offset}]"
        elif field.width == 8:
            name += " (low half)" if at == field.offset else " (high half)"
        return Register("device", name, at, "", f"{layout.section}, 4.1.4.6")


def _isr(value: int) -> str:
    words = [text for bit, text in ((1, "a queue"), (2, "configuration change")) if value & bit]
    return " and ".join(words) or "nothing"


def space_word(offset: int) -> str:
    """What lies at an offset of PCI configuration space."""
    return SPACE.get(offset, f"configuration space {offset:#04x}")


def facts(register: Register, width: int, value: int) -> dict[str, Any]:
    """A register access as an event keeps it."""
    return {
        "structure": register.structure,
        "register": register.name,
        "offset": register.offset,
        "width": width,
        "value": value,
        "meaning": register.meaning,
    }
