"""Memory for DMA, and where to put it in a function's I/O address space. Knows no VFIO interface."""

from __future__ import annotations

import bisect
import mmap
import weakref
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import GuestpvError
from ..system import HUGE_PAGE_SIZE, MAP_HUGE_2MB, MAP_HUGETLB, System

MSI_WINDOW: Final = (0xFEE00000, 0xFEEFFFFF)
"""x86: writes there are interrupts, whatever the IOMMU's tables say."""
LOWEST: Final = 1 << 20
HIGHEST: Final = (1 << 46) - 1


class Memory:
    """Zeroed anonymous memory that lives for as long as a view of it does.

    Args:
        size: bytes, a multiple of the page size.
        align: alignment in bytes, a power of two; huge pages are tried where it is a multiple of 2 MiB.

    Attributes:
        pointer: CPU address of the first byte.
        array: uint8 view, shape ``(size,)``.
        huge: whether it consists of reserved huge pages.

    Raises:
        OSError: there is no memory.
    """

    def __init__(self, size: int, align: int, system: System) -> None:
        self.size = size
        self.huge = False
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base, length = 0, size
        if not (size | align) % HUGE_PAGE_SIZE:
            with suppress(OSError):  # none are reserved; ordinary pages do as well
                base = system.mmap(size, flags=private | MAP_HUGETLB | MAP_HUGE_2MB)
                self.huge = True
        if not base:
            length = size + align
            base = system.mmap(length, flags=private)
        self.pointer = -(-base // align) * align
        try:
            # A fork must not turn pages under the device into copy-on-write ones.
            system.madvise(base, length, mmap.MADV_DONTFORK)
            if not self.huge and not align % HUGE_PAGE_SIZE:
                with suppress(OSError):  # a kernel without transparent huge pages
                    system.madvise(self.pointer, size, mmap.MADV_HUGEPAGE)
            window = system.window(self.pointer, size)
        except BaseException:
            system.munmap(base, length)
            raise
        # At exit the process goes with its memory; unmapping it under a running thread would be a crash.
        weakref.finalize(window, system.munmap, base, length).atexit = False
        self.array: NDArray[np.uint8] = np.frombuffer(memoryview(window), dtype=np.uint8)


class HugeMemory(Memory):
    """Zeroed memory of reserved huge pages in a file, so that another process can keep them, too.

    Args:
        size: bytes, a multiple of 2 MiB.

    Attributes:
        fd: descriptor of the file, open until ``release``.

    Raises:
        OSError: so many huge pages are not reserved.
    """

    def __init__(self, size: int, system: System) -> None:
        self.size = size
        self.huge = True
        self._system = system
        self.fd = system.huge_file(size)
        with ExitStack() as undo:
            undo.callback(self.release)
            self.pointer = system.mmap(size, fd=self.fd, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            undo.callback(system.munmap, self.pointer, size)
            window = system.window(self.pointer, size)
            undo.pop_all()
        weakref.finalize(window, system.munmap, self.pointer, size).atexit = False
        self.array = np.frombuffer(memoryview(window), dtype=np.uint8)

    def release(self) -> None:
        """Close the file: the pages live on in what maps them, and with whoever else has it. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._system.close(fd)


class IovaAllocator:
    """Hands out I/O virtual addresses, highest first.

    High addresses lie above the guest's RAM where the IOMMU's width allows it, so that a device which took
    one for a physical address would hit nothing instead of somebody's memory. Page 0 and the first MiB,
    the MSI window and what lies above 2^46 are left out.

    Args:
        ranges: allowed addresses as (first, last), both included.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._free: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            first, last = max(first, LOWEST), min(last, HIGHEST)
            for low, high in ((first, min(last, MSI_WINDOW[0] - 1)), (max(first, MSI_WINDOW[1] + 1), last)):
                if low <= high:
                    self._free.append((low, high + 1))

    def allocate(self, size: int, align: int) -> int:
        """An address aligned to ``align`` (a power of two) with ``size`` bytes of room.

        Raises:
            GuestpvError: there is no room.
        """
        for position in reversed(range(len(self._free))):
            low, high = self._free[position]
            start = (high - size) & -align
            if start >= low:
                self._free[position : position + 1] = [
                    piece for piece in ((low, start), (start + size, high)) if piece[0] < piece[1]
                ]
                return start
        raise GuestpvError(
            f"no room for {size} bytes in the I/O address space",
            where=", ".join(f"{low:#x}-{high - 1:#x}" for low, high in self._free) or "nothing free",
        )

    def free(self, start: int, size: int) -> None:
        """Give an address back."""
        position = bisect.bisect(self._free, (start, start))
        self._free.insert(position, (start, start + size))
        for left in (position, position - 1):
            if 0 <= left < len(self._free) - 1 and self._free[left][1] == self._free[left + 1][0]:
                self._free[left : left + 2] = [(self._free[left][0], self._free[left + 1][1])]
