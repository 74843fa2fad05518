"""Memory as the device sees it: bus addresses, translated window by window."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from ..memory import DmaRegion, Segment

PAGE = 4096
FIRST_ADDRESS = 0x1_0000_0000
GAP = 16 * PAGE


class Unmapped(Exception):
    """The device has no memory at this bus address. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Window:
    """``len(memory)`` bytes that the device finds at the bus address ``start``."""

    start: int
    memory: memoryview
    writable: bool = True

    @property
    def end(self) -> int:
        """First bus address after the window."""
        return self.start + len(self.memory)


class BusMemory:
    """The windows through which a device reaches memory; they never overlap.

    Attributes:
        enabled: whether the device may reach memory at all (PCI: bus master).
        removed: called with address and length before windows are closed.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.removed: Callable[[int, int], None] = lambda address, length: None
        self._starts: list[int] = []
        self._windows: list[Window] = []

    def add(self, start: int, memory: memoryview, writable: bool = True) -> None:
        """Open a window on ``memory`` (bytes, contiguous) at bus address ``start``.

        Raises:
            UsageError: it is empty or overlaps another window.
        """
        window = Window(start, memory, writable)
        place = bisect.bisect(self._starts, start)
        before = self._windows[place - 1].end if place else 0
        after = self._starts[place] if place < len(self._starts) else 1 << 64
        if not len(memory) or start < before or window.end > after:
            raise UsageError(f"DMA window {start:#x}/{len(memory)} is empty or overlaps another one")
        self._starts.insert(place, start)
        self._windows.insert(place, window)

    def remove(self, start: int, length: int) -> list[Window]:
        """Close all windows that lie within the range and return them.

        Raises:
            UsageError: a window lies partly inside, or none does.
        """
        hit = [w for w in self._windows if w.start < start + length and start < w.end]
        if not hit or any(w.start < start or w.end > start + length for w in hit):
            raise UsageError(f"no whole DMA windows at {start:#x}/{length}")
        self.removed(start, length)
        for window in hit:
            self._windows.remove(window)
            self._starts.remove(window.start)
        return hit

    def windows(self) -> tuple[Window, ...]:
        """All windows by rising bus address."""
        return tuple(self._windows)

    def view(self, address: int, length: int, write: bool = False) -> memoryview:
        """``length`` bytes at ``address`` that lie in one window.

        Raises:
            Unmapped: they do not, or the window is read-only and ``write`` was asked for.
        """
        place = bisect.bisect(self._starts, address) - 1
        if place >= 0:
            window = self._windows[place]
            start = address - window.start
            if start + length <= len(window.memory) and (window.writable or not write):
                return window.memory[start : start + length]
        raise Unmapped(f"{length} bytes at bus address {address:#x}: {self._reason(address, length, write)}")

    def spans(self, address: int, length: int, write: bool = False) -> list[memoryview]:
        """``length`` bytes at ``address`` as one or more pieces, for a buffer across adjacent windows.

        Raises:
            Unmapped: some byte is in no window.
        """
        found = []
        while length:
            place = bisect.bisect(self._starts, address) - 1
            window = self._windows[place] if place >= 0 else None
            if window is None or address >= window.end or (write and not window.writable):
                raise Unmapped(
                    f"{length} bytes at bus address {address:#x}: {self._reason(address, length, write)}"
                )
            piece = window.memory[address - window.start : address - window.start + length]
            found.append(piece if write else piece.toreadonly())
            address += len(piece)
            length -= len(piece)
        return found

    def _reason(self, address: int, length: int, write: bool) -> str:
        for window in self._windows:
            if window.start <= address < window.end:
                if write and not window.writable:
                    return "the driver mapped it read-only"
                return f"the mapping ends at {window.end:#x}"
        return "not mapped for this device"


class SoftwareDma(BusMemory):
    """A ``DmaSpace`` of the function's own.

    Bus addresses start at 4 GiB, are no CPU addresses, and leave gaps between regions, so that a driver
    that hands out the wrong kind of address, or runs past a region, is found out.

    Args:
        segment: bytes after which a region continues elsewhere on the bus; 0 gives one segment each.
    """

    def __init__(self, segment: int = 0) -> None:
        super().__init__()
        if segment % PAGE:
            raise UsageError(f"segment size {segment} is not a multiple of {PAGE}")
        self._segment = segment
        self._next = FIRST_ADDRESS

    def map(self, size: int) -> DmaRegion:
        """``size`` bytes, rounded up to pages, zeroed, visible to the device."""
        if size <= 0:
            raise UsageError(f"cannot map {size} bytes")
        size = -(-size // PAGE) * PAGE
        backing = mmap.mmap(-1, size)
        array = np.frombuffer(backing, dtype=np.uint8)
        memory = memoryview(backing)
        step = self._segment or size
        segments = []
        for start in range(0, size, step):
            piece = memory[start : start + step]
            self.add(self._next, piece)
            segments.append(Segment(self._next, len(piece)))
            self._next += len(piece) + GAP
        return DmaRegion(array, tuple(segments), int(array.ctypes.data), backing)

    def unmap(self, region: DmaRegion) -> None:
        """Close the region's windows; its memory lives on while somebody holds a view."""
        for segment in region.segments:
            self.remove(segment.address, segment.length)
