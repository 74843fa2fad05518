"""Memory that a vfio-user client shares: each file mapped once, joined to windows for the device."""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, ENOSPC

from ..devices.dma import Unmapped
from ..devices.function import SoftwareFunction
from ..devices.queue import DeviceQueue
from ..devices.ring import Chain, Ring
from ..spec import features as ft
from ..virtqueue.layout import ring_layout

MAX_MAPS = 65535
"""Regions at a time: the protocol's default."""
ADDRESSES = 1 << 64

FileKey = tuple[int, int, int, bool]
"""Device, inode, size, writable: a file that grew is another file."""


class Objection(Exception):
    """A command cannot be carried out; the client gets the errno. Never leaves this package."""

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno


@dataclass(eq=False)
class File:
    """A file of the client's, mapped from its beginning to its end for as long as regions are in it."""

    key: FileKey
    mapping: mmap.mmap
    memory: memoryview = field(init=False)
    regions: int = 0

    def __post_init__(self) -> None:
        self.memory = memoryview(self.mapping)

    def close(self) -> None:
        """Unmap it."""
        self.memory.release()
        # A model that still holds a view of a dropped chain keeps the mapping until it lets go.
        with contextlib.suppress(BufferError):
            self.mapping.close()


@dataclass(frozen=True, slots=True)
class Region:
    """What one DMA_MAP said; ``file`` is None where no descriptor came: such memory cannot be reached."""

    start: int
    end: int
    offset: int
    writable: bool
    file: File | None

    def continues(self, before: Region) -> bool:
        """Whether it goes on where ``before`` ends, on the bus and in the file."""
        return (
            self.file is not None
            and before.file is self.file
            and before.end == self.start
            and before.offset + before.end - before.start == self.offset
        )


@dataclass(frozen=True, eq=False)
class Parked:
    """A queue that was stopped because memory it uses was unmapped, and what was behind its three areas."""

    queue: DeviceQueue
    ring: Ring
    places: list[tuple[int, int, int] | None]


class Spans:
    """Disjoint stretches of bus addresses, each with an end, sorted by their start."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, end: int) -> None:
        """Add one; it overlaps no other."""
        bisect.insort(self._starts, start)
        self._ends[start] = end

    def remove(self, start: int) -> int:
        """Take one out; returns its end."""
        del self._starts[bisect.bisect_left(self._starts, start)]
        return self._ends.pop(start)

    def overlapping(self, start: int, end: int) -> list[tuple[int, int]]:
        """All that have an address in ``[start, end)``, as (start, end)."""
        place = bisect.bisect_right(self._starts, start) - 1
        if place < 0 or self._ends[self._starts[place]] <= start:
            place += 1
        found = []
        while place < len(self._starts) and self._starts[place] < end:
            found.append((self._starts[place], self._ends[self._starts[place]]))
            place += 1
        return found


class ClientMemory:
    """The regions of one client, and the windows they make for its device.

    Regions that go on in each other, on the bus and in the file, share a window, because a ring area has to
    lie in one. Once DMA_UNMAP was answered the device touches nothing of the region any more.

    Args:
        function: the device.

    Attributes:
        may_resume: whether memory was mapped since queues were stopped for want of it.
    """

    def __init__(self, function: SoftwareFunction) -> None:
        self._function = function
        self._parked: list[Parked] = []
        self.may_resume = False
        self._regions: dict[int, Region] = {}
        self._mapped = Spans()
        self._windows = Spans()
        self._files: dict[FileKey, File] = {}

    def map(self, start: int, size: int, offset: int, writable: bool, fd: int | None) -> None:
        """Carry out DMA_MAP; ``fd`` stays the caller's.

        Raises:
            Objection: the region is empty, overlaps another, does not lie in the file or cannot be mapped.
        """
        end = start + size
        if not start < end <= ADDRESSES:
            raise Objection(EINVAL, f"no memory can be {size:#x} bytes at bus address {start:#x}")
        if len(self._regions) >= MAX_MAPS:
            raise Objection(ENOSPC, f"there are {MAX_MAPS} regions already")
        with self._function.executor:
            if self._mapped.overlapping(start, end):
                raise Objection(EEXIST, f"{start:#x}/{size:#x} overlaps what is mapped already")
            file = None if fd is None else self._open(fd, offset + size, writable)
            region = Region(start, end, offset, writable, file)
            self._regions[start] = region
            self._mapped.add(start, end)
            if file is not None:
                file.regions += 1
                self._join(region)
            self.may_resume = bool(self._parked)

    def _join(self, region: Region) -> None:
        """Open the region's window, as one with those of its neighbours where they go on in each other."""
        low, high = region.start, region.end
        for start, _ in self._mapped.overlapping(low - 1, low):
            if region.continues(self._regions[start]):
                low = self._windows.overlapping(low - 1, low)[0][0]
                self._shut(low)
        after = self._regions.get(high)
        if after is not None and after.continues(region):
            high = self._shut(high)
        self._show(low, high)

    def _show(self, start: int, end: int) -> None:
        """Open a window; a region starts where it does."""
        region = self._regions[start]
        assert region.file is not None
        memory = region.file.memory[region.offset : region.offset + end - start]
        self._function.dma.add(start, memory, region.writable)
        self._windows.add(start, end)

    def _shut(self, start: int) -> int:
        """Close a window; returns its end."""
        end = self._windows.remove(start)
        self._function.dma.remove(start, end - start)
        return end

    def _open(self, fd: int, least: int, writable: bool) -> File:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size < least:
            raise Objection(EINVAL, f"the descriptor is no file of {least:#x} bytes")
        key = (status.st_dev, status.st_ino, status.st_size, writable)
        if key not in self._files:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            try:
                self._files[key] = File(key, mmap.mmap(fd, status.st_size, prot=protection))
            except OSError as error:
                raise Objection(error.errno or EINVAL, f"mmap: {error.strerror}") from None
        return self._files[key]

    def unmap(self, start: int, size: int) -> list[int]:
        """Carry out DMA_UNMAP for all regions within the stretch, as the kernel's type1 IOMMU does.

        Returns:
            Indexes of the queues that had to be stopped because they used the memory.

        Raises:
            Objection: a region lies in it only partly.
        """
        end = start + size
        with self._function.executor:
            hit = self._mapped.overlapping(start, end)
            if any(low < start or end < high for low, high in hit):
                raise Objection(EINVAL, f"{start:#x}/{size:#x} cuts a region")
            stopped = [queue.index for queue in self._park(start, end)]
            for low, high in self._windows.overlapping(start, end):
                self._shut(low)
                if low < start:
                    self._show(low, start)
                if end < high:
                    self._show(end, high)
            for low, _ in hit:
                self._mapped.remove(low)
                self._forget(self._regions.pop(low))
        return stopped

    def _park(self, start: int, end: int) -> Iterator[DeviceQueue]:
        """Stop the queues that have rings or buffers in flight there."""
        for queue in self._function.device.queues:
            ring = queue.ring
            if ring is not None and _uses(queue, ring, start, end):
                self._parked.append(Parked(queue, ring, [self._place(*area) for area in _areas(queue, ring)]))
                queue.ring = None
                for chain in ring.outstanding.values():
                    chain.readable.clear()
                    chain.writable.clear()
                yield queue

    def resume(self) -> list[int]:
        """Let stopped queues go on whose memory is back; returns their indexes."""
        self.may_resume = False
        with self._function.executor:
            back = [parked.queue.index for parked in list(self._parked) if self._unpark(parked)]
            if back:
                # Kicks came to nothing meanwhile.
                self._function.device.poll()
        return back

    def _unpark(self, parked: Parked) -> bool:
        queue, ring = parked.queue, parked.ring
        if not queue.enabled or queue.ring is not None:
            # Reset meanwhile.
            self._parked.remove(parked)
            return False
        if [self._place(*area) for area in _areas(queue, ring)] != parked.places:
            return False
        try:
            buffers = [(chain, *self._buffers(chain)) for chain in ring.outstanding.values()]
        except Unmapped:
            return False
        for chain, readable, writable in buffers:
            chain.readable[:], chain.writable[:] = readable, writable
        queue.ring = ring
        self._parked.remove(parked)
        return True

    def _place(self, start: int, length: int) -> tuple[int, int, int] | None:
        """Device, inode and offset of the file behind a stretch, None where no window holds all of it."""
        windows = self._windows.overlapping(start, start + length)
        if len(windows) != 1 or not windows[0][0] <= start <= start + length <= windows[0][1]:
            return None
        region = self._regions[windows[0][0]]
        assert region.file is not None
        return (*region.file.key[:2], region.offset + start - region.start)

    def _buffers(self, chain: Chain) -> tuple[list[memoryview], list[memoryview]]:
        """Memory of a chain's readable and writable elements as it is mapped now."""
        spans = self._function.dma.spans
        sides: tuple[list[memoryview], list[memoryview]] = ([], [])
        for address, length, write in chain.elements:
            sides[write] += spans(address, length, write=write)
        return sides

    def _forget(self, region: Region) -> None:
        file = region.file
        if file is not None:
            file.regions -= 1
            if not file.regions:
                del self._files[file.key]
                file.close()

    def close(self) -> None:
        """Take everything away from the device, which has been reset."""
        self.unmap(0, ADDRESSES)


def _areas(queue: DeviceQueue, ring: Ring) -> list[tuple[int, int]]:
    """Bus addresses and lengths of a queue's three areas."""
    layout = ring_layout(ring.size, bool(queue.owner.features >> ft.F_RING_PACKED & 1))
    return [
        (queue.desc, layout.desc.size),
        (queue.driver, layout.driver.size),
        (queue.device, layout.device.size),
    ]


def _uses(queue: DeviceQueue, ring: Ring, start: int, end: int) -> bool:
    stretches = _areas(queue, ring)
    for chain in ring.outstanding.values():
        stretches += [(element.address, element.length) for element in chain.elements]
    return any(address < end and start < address + length for address, length in stretches)
