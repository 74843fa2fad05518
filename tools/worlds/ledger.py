"""What a disk may show after a power cut: every sector says where it belongs and which write it is from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from guestpv.drivers.blk import Blk
from guestpv.drivers.blk_queue import Request
from guestpv.spec import blk as spec

SECTOR = 512
STAMP = np.dtype([("sector", "<u8"), ("version", "<u8"), ("filler", "<u8", (62,))])
"""A sector tells its place and its write all over, so that a torn one is seen."""


class Ledger:
    """What was written to a small disk, what of it must last, and what may.

    Args:
        sectors: of the disk, zeroes at first.
        random: for places and sizes.

    Attributes:
        checked: sectors compared so far.
    """

    def __init__(self, sectors: int, random: np.random.Generator) -> None:
        self.sectors, self.random = sectors, random
        self.version = self.checked = 0
        self._safe = np.zeros(sectors, np.uint64)
        self._last = np.zeros(sectors, np.uint64)
        self._later: list[set[int]] = [set() for _ in range(sectors)]

    def place(self, most: int = 32) -> tuple[int, int]:
        """A random first sector and number of sectors."""
        count = int(self.random.integers(1, most + 1))
        return int(self.random.integers(0, self.sectors - count)), count

    def stamped(self, sector: int, count: int) -> NDArray[np.uint8]:
        """The bytes of a new write, which may be seen from now on."""
        self.version += 1
        data = np.zeros(count, STAMP)
        data["sector"] = np.arange(sector, sector + count)
        data["version"] = self.version
        data["filler"] = self.version * 1000 + data["sector"][:, None]
        for touched in range(sector, sector + count):
            self._later[touched].add(self.version)
        return data.view(np.uint8)

    def acknowledged(self, sector: int, count: int) -> None:
        """The latest write was answered: the next completed flush covers it."""
        self._last[sector : sector + count] = self.version

    def flushed(self) -> None:
        """A flush was answered: what was acknowledged before it was sent is what the disk must show."""
        self._safe[:] = self._last
        for versions in self._later:
            versions.clear()

    def check(self, content: NDArray[np.uint8]) -> None:
        """Compare the disk after a cut, and go on from what it shows.

        Raises:
            AssertionError: something that had to last is not there, or what is there never was written so.
        """
        found: Any = content.view(STAMP)
        for sector in range(self.sectors):
            version = int(found["version"][sector])
            allowed = self._later[sector] | {int(self._safe[sector])}
            assert version in allowed, f"sector {sector} has version {version}, may have {sorted(allowed)}"
            if version:
                assert found["sector"][sector] == sector
                assert (found["filler"][sector] == version * 1000 + sector).all(), f"sector {sector} is torn"
            self._later[sector].clear()
        self.checked += self.sectors
        self._safe[:] = found["version"]
        self._last[:] = found["version"]


class Writer:
    """A driver that writes here and there on one queue, and keeps the ledger.

    Attributes:
        flushes: how many were answered.
        sent: the requests that ``live_on`` had in flight last.
    """

    def __init__(self, disk: Blk, ledger: Ledger) -> None:
        self.disk, self.ledger, self.random = disk, ledger, ledger.random
        self.buffer = disk.allocate(self.ledger.sectors * SECTOR)
        self.flushes, self.sent = 0, list[Request]()
        self.steps = [self.write] * 5 + [self.many, self.flush, self.fua, self.write_through]

    def write(self) -> None:
        """Some sectors."""
        sector, count = self.ledger.place()
        self.disk.write(SECTOR * sector, self.ledger.stamped(sector, count))
        self.ledger.acknowledged(sector, count)

    def fua(self) -> None:
        """Some sectors that last when they are answered."""
        sector, count = self.ledger.place()
        self.disk.write(SECTOR * sector, self.ledger.stamped(sector, count), fua=True)
        self.ledger.acknowledged(sector, count)
        # The flush of a FUA write covers what was done before it, too.
        self.ledger.flushed()

    def many(self) -> None:
        """A burst with up to 32 in flight, to different sectors."""
        sectors = self.random.permutation(self.ledger.sectors)[: int(self.random.integers(1, 64))]
        for row, sector in enumerate(map(int, sectors)):
            self.buffer.array[SECTOR * row : SECTOR * row + SECTOR] = self.ledger.stamped(sector, 1)
            self.ledger.acknowledged(sector, 1)
        self.disk.write_many(sectors * SECTOR, self.buffer, SECTOR, depth=32).check()

    def flush(self) -> None:
        """All that was answered lasts."""
        self.disk.flush()
        self.ledger.flushed()
        self.flushes += 1

    def write_through(self) -> None:
        """The cache is switched off, which flushes it, and every write lasts."""
        self.disk.set_writeback(False)
        self.ledger.flushed()
        self.write()
        self.ledger.flushed()
        self.disk.set_writeback(True)

    def live(self) -> None:
        """A few steps at random."""
        for _ in range(int(self.random.integers(1, 12))):
            self.steps[int(self.random.integers(0, len(self.steps)))]()

    def live_on(self) -> None:
        """Until the disk is gone: anything, and then all sectors at once, with all requests in flight."""
        while True:
            self.steps[int(self.random.integers(0, len(self.steps)))]()
            self.buffer.array[:] = self.ledger.stamped(0, self.ledger.sectors)
            self.sent = []
            for place in range(0, self.ledger.sectors * SECTOR, 4096):
                self.sent += self.disk.submit(spec.T_OUT, place, [self.buffer[place : place + 4096]])
            self.disk.queues[0].publish()
            self.disk.queues[0].wait(self.sent, self.disk.timeout)
            self.ledger.acknowledged(0, self.ledger.sectors)
