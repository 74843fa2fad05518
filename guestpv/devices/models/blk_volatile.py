"""A disk with a volatile write cache that really forgets: a power cut drops or tears what was not flushed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from ...spec.blk import SECTOR
from .blk_store import Store


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

    Args:
        size: bytes.

    Attributes:
        writes, flushes: how many there were.
    """

    def __init__(self, size: int) -> None:
        super().__init__("", size)
        self._safe = np.zeros(size, np.uint8)
        self._unsafe: list[tuple[int, bytes]] = []
        self.writes = self.flushes = 0

    def write(self, offset: int, pieces: list[memoryview]) -> None:
        """Store ``pieces`` from ``offset`` on, in the cache."""
        super().write(offset, pieces)
        self._unsafe.append((offset, b"".join(pieces)))
        self.writes += 1

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, in the cache."""
        super().zero(offset, length)
        self._unsafe.append((offset, bytes(length)))
        self.writes += 1

    def flush(self) -> None:
        """Make everything last."""
        for offset, data in self._unsafe:
            self._safe[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        self._unsafe.clear()
        self.flushes += 1

    def resize(self, size: int) -> None:
        """Grow or shrink to ``size`` bytes; a resize lasts."""
        super().resize(size)
        self._safe = np.concatenate([self._safe[:size], np.zeros(max(0, size - self._safe.size), np.uint8)])
        self._unsafe = [(offset, data) for offset, data in self._unsafe if offset + len(data) <= size]

    def cut(self, random: np.random.Generator) -> Cut:
        """Lose power: the cache is gone, and the disk shows what came through."""
        fates = random.integers(0, 3, len(self._unsafe))
        for number in random.permutation(len(self._unsafe)):
            offset, data = self._unsafe[number]
            sectors = np.frombuffer(data, np.uint8).reshape(-1, SECTOR)
            through = {0: 0.0, 1: 1.0, 2: 0.5}[int(fates[number])]
            place = self._safe[offset : offset + len(data)].reshape(-1, SECTOR)
            chosen = random.random(len(sectors)) < through
            place[chosen] = sectors[chosen]
        for offset, data in self._unsafe:
            os.pwrite(self._fd, self._safe[offset : offset + len(data)].data, offset)
        self._unsafe.clear()
        dropped, kept, torn = (int(np.count_nonzero(fates == fate)) for fate in range(3))
        return Cut(kept, torn, dropped)
