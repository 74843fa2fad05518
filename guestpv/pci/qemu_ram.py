"""The RAM of a QEMU as memory that a driver can use."""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from ..errors import GuestpvError, UsageError
from ..memory import DmaRegion, Segment

PAGE = 4096
RAM_FIRST = 1 << 20
"""Below it lie the holes and the BIOS shadow of a PC."""
RAM_LIMIT = 2 << 30
"""The q35 machine puts RAM beyond 2 GiB above 4 GiB, where an offset is no longer an address."""


class GuestRam:
    """The RAM of a QEMU as a DMA space: bus address, guest-physical address and offset are one.

    Args:
        size: bytes, a multiple of 1 MiB, at most 2 GiB.
        fd: the file that is that RAM already, which this object owns then; None: a new memfd.

    Attributes:
        fd: the memfd, for QEMU to inherit, or the file that was given.
        array: all of it, 1-D uint8.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        if size % (1 << 20) or not 2 << 20 <= size <= RAM_LIMIT:
            raise UsageError(f"guest RAM of {size} bytes: give whole MiB from 2 to {RAM_LIMIT >> 20}")
        self.size = size
        self._used_before = fd is not None
        if fd is None:
            fd = os.memfd_create("guestpv-ram", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
        self.fd = fd
        self._memory = mmap.mmap(fd, size)
        self.array: NDArray[np.uint8] = np.frombuffer(self._memory, dtype=np.uint8)
        self._free = [(RAM_FIRST, size)]
        self._returned: deque[tuple[int, int]] = deque()

    def map(self, size: int) -> DmaRegion:
        """``size`` bytes, rounded up to pages, zeroed and contiguous on the bus.

        Raises:
            GuestpvError: the guest's RAM is full.
        """
        size = -(-size // PAGE) * PAGE
        while self._returned:
            start, stop = self._returned.popleft()
            if not self._used_before:
                self._memory.madvise(mmap.MADV_REMOVE, start, stop - start)
            self._free.append((start, stop))
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self._free):
            if merged and merged[-1][1] == start:
                start = merged.pop()[0]
            merged.append((start, stop))
        self._free = merged
        for position, (start, stop) in enumerate(merged):
            if stop - start >= size:
                merged[position : position + 1] = [(start + size, stop)] if stop - start > size else []
                array = np.frombuffer(self._memory, dtype=np.uint8, count=size, offset=start)
                if self._used_before:
                    array[:] = 0
                return DmaRegion(array, (Segment(start, size),), array.ctypes.data)
        raise GuestpvError(
            f"the guest's RAM of {self.size >> 20} MiB has no {size} bytes in one piece left",
            where="qtest",
            hint="start QEMU with more (-m)" if self._used_before else "give it more: ?memory=MIB",
        )

    def unmap(self, region: DmaRegion) -> None:
        """Let the addresses be used again, once the last view of the region's array is gone."""
        (segment,) = region.segments
        place = (segment.address, segment.address + segment.length)
        weakref.finalize(region.array, self._returned.append, place).atexit = False

    def close(self) -> None:
        """Close the file; the mapping lives on while somebody holds a view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
