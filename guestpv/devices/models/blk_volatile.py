"""A disk with a volatile write cache that really forgets: a power cut drops or tears what was not flushed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError
from ...spec.blk import SECTOR
from .blk_store import Store

EVICTED = 0.25
"""Share of the writes after which something leaves the cache early."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What became of the writes that no flush covered: how many came through, in part, or not at all."""

    kept: int
    torn: int
    dropped: int


class VolatileStore(Store):
    """Sectors in memory behind a write-back cache.

    Reads see every write at once. A flush makes them last. A power cut lets each later write come through,
    disappear, or tear into some of its sectors, and lets them take effect in any order: what a disk may do
    (5.2.6.2) and most never do in a test. A single sector is never torn.

    With a file only what lasts is in it, so the end of the process, however sudden, is a power cut.

    Args:
        size: bytes; 0 takes the file's.
        path: a file that holds what lasts; empty gives memory.
        evict: let some sectors of some writes last before their flush, as a full cache does, at random.

    Attributes:
        writes, flushes: how many there were.

    Raises:
        UsageError: the size is no positive multiple of 512.
    """

    def __init__(self, size: int, path: str = "", evict: np.random.Generator | None = None) -> None:
        if path:
            with open(path, "r+b") as file:
                size = size or os.fstat(file.fileno()).st_size
                file.truncate(size)
        if not size:
            raise UsageError(f"0 bytes are no positive multiple of {SECTOR}", where=path)
        super().__init__("", size)
        self._path, self._evict = path, evict
        self._safe = self._lasting()
        os.pwrite(self._fd, self._safe.data, 0)
        self._unsafe: list[tuple[int, bytes]] = []
        self.writes = self.flushes = 0

    def _lasting(self) -> NDArray[Any]:
        if not self._path:
            return np.zeros(self.size, np.uint8)
        return np.memmap(self._path, np.uint8, "r+", shape=(self.size,))

    def write(self, offset: int, pieces: list[memoryview]) -> None:
        """Store ``pieces`` from ``offset`` on, in the cache."""
        super().write(offset, pieces)
        self._remember(offset, b"".join(pieces))

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, in the cache."""
        super().zero(offset, length)
        self._remember(offset, bytes(length))

    def _remember(self, offset: int, data: bytes) -> None:
        self._unsafe.append((offset, data))
        self.writes += 1
        if self._evict is not None and self._evict.random() < EVICTED:
            offset, data = self._unsafe[int(self._evict.integers(len(self._unsafe)))]
            self._come_through(offset, data, 0.5, self._evict)

    def _come_through(self, offset: int, data: bytes, share: float, random: np.random.Generator) -> None:
        """Let about this share of the sectors of a write last."""
        sectors = np.frombuffer(data, np.uint8).reshape(-1, SECTOR)
        place = self._safe[offset : offset + len(data)].reshape(-1, SECTOR)
        chosen = random.random(len(sectors)) < share
        place[chosen] = sectors[chosen]

    def flush(self) -> None:
        """Make everything last."""
        for offset, data in self._unsafe:
            self._safe[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        self._unsafe.clear()
        self.flushes += 1

    def resize(self, size: int) -> None:
        """Grow or shrink to ``size`` bytes; a resize lasts."""
        before = self._safe
        super().resize(size)
        if self._path:
            os.truncate(self._path, size)
            self._safe = self._lasting()
        else:
            self._safe = np.concatenate([before[:size], np.zeros(max(0, size - before.size), np.uint8)])
        self._unsafe = [(offset, data) for offset, data in self._unsafe if offset + len(data) <= size]

    def cut(self, random: np.random.Generator) -> Cut:
        """Lose power: the cache is gone, and the disk shows what came through."""
        fates = random.integers(0, 3, len(self._unsafe))
        for number in random.permutation(len(self._unsafe)):
            offset, data = self._unsafe[number]
            self._come_through(offset, data, {0: 0.0, 1: 1.0, 2: 0.5}[int(fates[number])], random)
        for offset, data in self._unsafe:
            os.pwrite(self._fd, self._safe[offset : offset + len(data)].data, offset)
        self._unsafe.clear()
        dropped, kept, torn = (int(np.count_nonzero(fates == fate)) for fate in range(3))
        return Cut(kept, torn, dropped)
