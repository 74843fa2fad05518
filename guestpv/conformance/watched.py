"""A PCI function that tells a log of every access, and outlives the transports that are put on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..memory import DmaSpace
from ..pci.capabilities import virtio_capabilities
from ..pci.function import Bar, PciFunction
from ..spec import pci
from ..spec.pci import CfgType

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a structure lies."""

    kind: str
    bar: int
    offset: int
    length: int


class WatchedBar:
    """A BAR whose accesses are told one by one; see ``Bar``."""

    pointer = 0

    def __init__(self, owner: WatchedFunction, index: int, bar: Bar) -> None:
        self._owner = owner
        self._index = index
        self._bar = bar
        self.size = bar.size

    def read(self, offset: int, width: int) -> int:
        """One access."""
        value = self._bar.read(offset, width)
        self._owner.tell(f"read  {self._owner.register(self._index, offset)}/{width} = {value:#x}")
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        """One access."""
        self._owner.tell(f"write {self._owner.register(self._index, offset)}/{width} = {value:#x}")
        self._bar.write(offset, width, value)


class WatchedFunction:
    """See ``PciFunction``. ``close`` leaves the function behind it open for the next transport.

    Attributes:
        inner: the function itself.
        tell: where lines go; exchange it for each case.
        vectors: eventfds of the MSI-X vectors that are enabled, by number.
    """

    def __init__(self, inner: PciFunction) -> None:
        self.inner = inner
        self.name = inner.name
        self.dma: DmaSpace = inner.dma
        self.translated = inner.translated
        self.tell: Tell = lambda line: None
        self.vectors: list[int] = []
        self._places = [
            Place(CfgType(found.cfg_type).name.lower(), found.bar, found.offset, found.length)
            for found in virtio_capabilities(inner.config_read)
            if found.cfg_type in (CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR, CfgType.DEVICE)
        ]

    def register(self, bar: int, offset: int) -> str:
        """How the evidence calls a place in a BAR."""
        for place in self._places:
            at = offset - place.offset
            if bar != place.bar or not 0 <= at < place.length:
                continue
            if place.kind != "common":
                return place.kind if place.kind == "isr" else f"{place.kind}+{at:#x}"
            field = pci.COMMON_CFG.at(at)
            if field is not None:
                return field.name + (f"+{at - field.offset}" if at != field.offset else "")
        return f"BAR{bar}+{offset:#x}"

    def config_read(self, offset: int, width: int) -> int:
        """Told."""
        value = self.inner.config_read(offset, width)
        self.tell(f"read  config+{offset:#x}/{width} = {value:#x}")
        return value

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Told."""
        self.tell(f"write config+{offset:#x}/{width} = {value:#x}")
        self.inner.config_write(offset, width, value)

    def bar(self, index: int) -> WatchedBar:
        """The window of a BAR, watched; doorbells go through it as well."""
        return WatchedBar(self, index, self.inner.bar(index))

    @property
    def msix_vectors(self) -> int:
        """As the function has it."""
        return self.inner.msix_vectors

    def enable_msix(self, count: int) -> list[int]:
        """Told, and remembered in ``vectors``."""
        self.tell(f"MSI-X on with {count} vectors")
        self.vectors = self.inner.enable_msix(count)
        return list(self.vectors)

    def enable_intx(self) -> int:
        """Told."""
        self.tell("INTx on")
        return self.inner.enable_intx()

    def unmask_intx(self) -> None:
        """As the function does it."""
        self.inner.unmask_intx()

    def disable_interrupts(self) -> None:
        """Take all eventfds away."""
        self.vectors = []
        self.inner.disable_interrupts()

    def reset(self) -> bool:
        """Told."""
        self.tell("function level reset")
        return self.inner.reset()

    def request_fd(self) -> int | None:
        """As the function has it."""
        return self.inner.request_fd()

    def error_fd(self) -> int | None:
        """As the function has it."""
        return self.inner.error_fd()

    def close(self) -> None:
        """Only the interrupts end; the function stays open."""
        self.disable_interrupts()
