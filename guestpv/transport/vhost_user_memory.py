"""Memory for vhost-user: memfds that a back end maps, under guest addresses of our choosing.

The protocol knows a region by two addresses: descriptors hold the guest address, SET_VRING_ADDR the user
address. Here they never coincide, so that one taken for the other points nowhere.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..errors import GuestpvError, UsageError
from ..memory import Bytes, DmaRegion, Segment
from ..system import PAGE_SIZE, SYSTEM
from ..wire.vhost_user import MemorySlot

FIRST_GUEST_ADDRESS: Final = 1 << 36
ARENA: Final = 256 << 20
"""Least bytes of one memfd. Untouched pages cost nothing, and a back end has room for few regions only."""


@dataclass(slots=True)
class Arena:
    """One memfd and how much of it has been handed out."""

    fd: int
    memory: Bytes
    guest_address: int
    handed_out: int = 0

    @property
    def pointer(self) -> int:
        """CPU address of the first byte, which is the region's user address."""
        return int(self.memory.ctypes.data)

    @property
    def slot(self) -> MemorySlot:
        """The arena as the protocol knows it."""
        return MemorySlot(self.guest_address, self.memory.nbytes, self.pointer, 0)


def _mapped(fd: int, size: int) -> Bytes:
    """A view of the whole file; the mapping goes with the last view."""
    pointer = SYSTEM.mmap(size, fd=fd)
    window = SYSTEM.window(pointer, size)
    weakref.finalize(window, SYSTEM.munmap, pointer, size).atexit = False
    return np.frombuffer(memoryview(window), dtype=np.uint8)


class MemfdSpace:
    """A ``DmaSpace`` of memfds.

    Memory is taken from the back end by closing the connection; it has no other way that every back end
    understands.

    Args:
        announce: called with each new arena, to tell a connected back end.
    """

    def __init__(self, announce: Callable[[Arena], None]) -> None:
        self._announce = announce
        self._next_guest_address = FIRST_GUEST_ADDRESS
        self.arenas: list[Arena] = []

    def map(self, size: int) -> DmaRegion:
        """Hand out ``size`` bytes, rounded up to pages.

        Raises:
            GuestpvError: the kernel gives no memory, or the back end takes no further region.
        """
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        arena = next((a for a in self.arenas if a.handed_out + size <= a.memory.nbytes), None)
        if arena is None:
            arena = self._grow(max(size, ARENA))
        start = arena.handed_out
        arena.handed_out += size
        return DmaRegion(
            arena.memory[start : start + size],
            (Segment(arena.guest_address + start, size),),
            arena.pointer + start,
        )

    def _grow(self, size: int) -> Arena:
        try:
            fd = os.memfd_create("guestpv", os.MFD_CLOEXEC)
        except OSError as error:
            raise GuestpvError(f"memfd_create: {error.strerror}", where="vhost-user memory") from None
        try:
            os.ftruncate(fd, size)
            arena = Arena(fd, _mapped(fd, size), self._next_guest_address)
            self._announce(arena)
        except OSError as error:
            os.close(fd)
            raise GuestpvError(
                f"no shared memory of {size} bytes: {error.strerror}",
                where="vhost-user memory",
                hint="raise the memory limit of this process: ulimit -v; cat /sys/fs/cgroup/memory.max",
            ) from None
        except BaseException:
            os.close(fd)
            raise
        self._next_guest_address += 2 * size
        self.arenas.append(arena)
        return arena

    def unmap(self, region: DmaRegion) -> None:
        """Nothing to tell the back end: it loses all regions at once with its connection."""

    def user_address(self, guest_address: int) -> int:
        """The user address of a byte that has this guest address.

        Raises:
            UsageError: it lies in no region.
        """
        arena, offset = self._find(guest_address)
        return arena.pointer + offset

    def look(self, guest_address: int, size: int) -> Bytes:
        """``size`` bytes that have this guest address.

        Raises:
            UsageError: they lie in no region.
        """
        arena, offset = self._find(guest_address)
        return arena.memory[offset : offset + size]

    def _find(self, guest_address: int) -> tuple[Arena, int]:
        for arena in self.arenas:
            offset = guest_address - arena.guest_address
            if 0 <= offset < arena.memory.nbytes:
                return arena, offset
        raise UsageError(f"guest address {guest_address:#x} lies in no region of the memory table")

    def close(self) -> None:
        """Close the memfds. Memory lives on for as long as a view of it does."""
        for arena in self.arenas:
            os.close(arena.fd)
        self.arenas.clear()
