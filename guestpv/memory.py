"""DMA memory: numpy for us, bus addresses for the device.

A ``DmaSpace`` makes memory visible to a device; a ``DmaPool`` cuts what it gives into ``DmaBuffer``
objects. A buffer owns a list of segments, because neighbouring bytes of ours need not be neighbours on
the bus. When a pool closes, the device loses access first; the memory itself lives for as long as
somebody still holds a numpy view of it, so a late reader sees old data, never freed memory.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import GuestpvError, UsageError

Bytes = NDArray[np.uint8]

CHUNK: int = 2 << 20
"""Bytes a pool asks of its space at a time: one x86-64 huge page."""


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` bytes that the device finds at the bus address ``address``."""

    address: int
    length: int


@dataclass(eq=False, slots=True)
class DmaRegion:
    """Memory that a space made visible to the device.

    Attributes:
        array: 1-D uint8 view of it.
        segments: bus addresses that cover ``array`` from its first byte to its last.
        pointer: CPU virtual address of ``array[0]``.
        keep: whatever has to stay alive with the memory.
    """

    array: Bytes
    segments: tuple[Segment, ...]
    pointer: int
    keep: object = None


class DmaSpace(Protocol):
    """Where a device sees memory: an IOMMU domain, a guest's RAM, a vhost-user memory table."""

    def map(self, size: int) -> DmaRegion:
        """Make ``size`` bytes (rounded up to pages) of zeroed memory visible to the device."""
        ...

    def unmap(self, region: DmaRegion) -> None:
        """Take the region away from the device. Only after the device was reset."""
        ...


class DmaBuffer:
    """Part of a pool's memory: ``array`` for us, ``segments`` for the device.

    Slicing with a step of one gives a ``DmaBuffer`` over the same memory.
    """

    __slots__ = ("array", "owner", "pointer", "segments")

    def __init__(
        self, array: Bytes, segments: tuple[Segment, ...], pointer: int, owner: DmaPool | None
    ) -> None:
        self.array = array
        self.segments = segments
        self.pointer = pointer
        self.owner = owner

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return int(self.array.nbytes)

    def __len__(self) -> int:
        return self.nbytes

    @property
    def address(self) -> int:
        """Bus address of the first byte.

        Raises:
            UsageError: the buffer is not contiguous on the bus; use ``segments``.
        """
        if len(self.segments) != 1:
            raise UsageError(f"a DMA buffer of {self.nbytes} bytes has {len(self.segments)} segments")
        return self.segments[0].address

    def __getitem__(self, part: slice) -> DmaBuffer:
        start, stop, step = part.indices(self.nbytes)
        if step != 1:
            raise UsageError(f"a DMA buffer is sliced with step 1, not {step}")
        stop = max(stop, start)
        cut: list[Segment] = []
        position = 0
        for segment in self.segments:
            low, high = max(start, position), min(stop, position + segment.length)
            if low < high:
                cut.append(Segment(segment.address + low - position, high - low))
            position += segment.length
        return DmaBuffer(self.array[start:stop], tuple(cut), self.pointer + start, None)

    def write(self, data: bytes | bytearray | memoryview | Bytes, offset: int = 0) -> None:
        """Copy ``data`` to ``offset`` bytes into the buffer.

        Raises:
            UsageError: it does not fit.
        """
        source = np.frombuffer(data, dtype=np.uint8)
        if offset < 0 or offset + source.nbytes > self.nbytes:
            raise UsageError(f"{source.nbytes} bytes at offset {offset} do not fit into {self.nbytes}")
        self.array[offset : offset + source.nbytes] = source

    def __repr__(self) -> str:
        where = " + ".join(f"{s.address:#x}/{s.length}" for s in self.segments)
        return f"<DmaBuffer {self.nbytes} bytes at bus {where}>"


class DmaPool:
    """Cuts DMA buffers out of the regions of one space (first fit over a sorted free list)."""

    def __init__(self, space: DmaSpace) -> None:
        self._space = space
        self._regions: list[DmaRegion] = []
        self._free: dict[int, list[tuple[int, int]]] = {}
        self._out: dict[int, tuple[int, int, int]] = {}
        self._closed = False

    def allocate(self, size: int, *, align: int = 64) -> DmaBuffer:
        """A zeroed buffer of ``size`` bytes.

        It is one segment whenever the space hands out contiguous bus addresses.

        Args:
            size: bytes, at least 1.
            align: alignment of pointer and bus address in bytes, a power of two, at most 4096.

        Raises:
            UsageError: size or alignment make no sense, or the pool is closed.
            GuestpvError: the space has no more memory for the device; the message says why.
        """
        if size <= 0 or align <= 0 or align & (align - 1) or align > 4096:
            raise UsageError(f"cannot allocate {size} bytes aligned to {align}")
        if self._closed:
            raise UsageError("this DMA pool is closed: the device no longer has its memory")
        for number in range(len(self._regions)):
            buffer = self._cut(number, size, align, seams=False)
            if buffer is not None:
                return buffer
        region = self._space.map(-(-size // CHUNK) * CHUNK)
        number = len(self._regions)
        self._regions.append(region)
        self._free[number] = [(0, int(region.array.nbytes))]
        buffer = self._cut(number, size, align, seams=False) or self._cut(number, size, align, seams=True)
        if buffer is None:
            raise GuestpvError(f"the DMA space gave {region.array.nbytes} bytes where {size} were asked for")
        return buffer

    def _cut(self, number: int, size: int, align: int, *, seams: bool) -> DmaBuffer | None:
        """A buffer from one region; with ``seams`` it may lie across two of the region's segments."""
        region = self._regions[number]
        if not seams and size > max(segment.length for segment in region.segments):
            return None
        free = self._free[number]
        for position, (start, length) in enumerate(free):
            for begin in self._places(region, start, start + length):
                aligned = -(-begin // align) * align
                if aligned + size > start + length:
                    continue
                part = DmaBuffer(region.array, region.segments, region.pointer, None)[
                    aligned : aligned + size
                ]
                if len(part.segments) > 1 and not seams:
                    continue
                rest = ((start, aligned - start), (aligned + size, start + length - aligned - size))
                free[position : position + 1] = [piece for piece in rest if piece[1]]
                part.array[:] = 0
                part.owner = self
                self._out[part.pointer] = (number, aligned, size)
                return part
        return None

    @staticmethod
    def _places(region: DmaRegion, start: int, stop: int) -> list[int]:
        """Where a buffer may begin in a free stretch: its start, and each segment that starts in it."""
        places, position = [start], 0
        for segment in region.segments:
            if start < position < stop:
                places.append(position)
            position += segment.length
        return places

    def free(self, buffer: DmaBuffer) -> None:
        """Give a buffer back. The device must be done with it.

        Raises:
            UsageError: it is not a whole buffer of this pool, or was given back before.
        """
        place = self._out.pop(buffer.pointer, None) if buffer.owner is self else None
        if place is None:
            raise UsageError(f"{buffer!r} is not out of this pool (freed twice, or a slice of a buffer)")
        number, start, size = place
        free = self._free[number]
        position = bisect.bisect(free, (start, 0))
        free.insert(position, (start, size))
        for left in (position, position - 1):
            if 0 <= left < len(free) - 1 and free[left][0] + free[left][1] == free[left + 1][0]:
                free[left : left + 2] = [(free[left][0], free[left][1] + free[left + 1][1])]

    def look(self, address: int, length: int) -> bytes:
        """Up to ``length`` bytes that the device finds at a bus address, none where no memory of ours is."""
        for region in self._regions:
            position = 0
            for segment in region.segments:
                at = address - segment.address
                if 0 <= at < segment.length:
                    return region.array[position + at : position + min(segment.length, at + length)].tobytes()
                position += segment.length
        return b""

    @property
    def in_use(self) -> int:
        """Bytes handed out and not given back."""
        return sum(size for _, _, size in self._out.values())

    def close(self) -> None:
        """Take all memory away from the device. Only after the device was reset."""
        self._closed = True
        while self._regions:
            self._space.unmap(self._regions[-1])
            self._regions.pop()
        self._free.clear()
        self._out.clear()
