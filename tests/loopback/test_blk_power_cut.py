"""Power cuts on a disk that really forgets: what was acknowledged before a completed flush is still there.

``GUESTPV_CUTS`` says how many (100 here, at least 1,000 in the long run); ``-s`` shows the report.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.blk import Blk as Model
from guestpv.devices.models.blk_volatile import VolatileStore
from guestpv.devices.ring import Chain
from guestpv.drivers.blk import Blk
from guestpv.spec import blk as spec
from guestpv.transport.pci import PciTransport

CUTS = int(os.environ.get("GUESTPV_CUTS", "100"))
SECTORS = 256
STAMP = np.dtype([("sector", "<u8"), ("version", "<u8"), ("filler", "<u8", (62,))])
"""A sector tells where it belongs and which write it is from, all over, so that a torn one is seen."""


class Rig:
    """A driver on a forgetful disk, and what the disk may show after a cut."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.store = VolatileStore(SECTORS * 512)
        self.model = Model(self.store)
        self.function = SoftwareFunction(self.model, name="loopback:blk")
        self.disk = Blk(PciTransport(self.function), timeout=60.0)
        self.safe = np.zeros(SECTORS, np.uint64)
        self.later: list[set[int]] = [set() for _ in range(SECTORS)]
        self.last = np.zeros(SECTORS, np.uint64)
        self.version = 0
        self.checked = self.in_flight = 0
        self.buffer = self.disk.allocate(SECTORS * 512)

    def stamped(self, sector: int, count: int) -> Any:
        self.version += 1
        data = np.zeros(count, STAMP)
        data["sector"] = np.arange(sector, sector + count)
        data["version"] = self.version
        data["filler"] = self.version * 1000 + data["sector"][:, None]
        for touched in range(sector, sector + count):
            self.later[touched].add(self.version)
        return data.view(np.uint8)

    def place(self) -> tuple[int, int]:
        count = int(self.random.integers(1, 33))
        return int(self.random.integers(0, SECTORS - count)), count

    def write(self) -> None:
        sector, count = self.place()
        self.disk.write(512 * sector, self.stamped(sector, count))
        self.last[sector : sector + count] = self.version

    def fua(self) -> None:
        self.write()
        self.flush()

    def many(self) -> None:
        """A burst with up to 32 in flight, to different sectors."""
        sectors = self.random.permutation(SECTORS)[: int(self.random.integers(1, 64))]
        for row, sector in enumerate(sectors):
            self.buffer.array[512 * row : 512 * row + 512] = self.stamped(int(sector), 1)
            self.last[sector] = self.version
        self.disk.write_many(sectors * 512, self.buffer, 512, depth=32).check()

    def flush(self) -> None:
        self.disk.flush()
        self.safe[:] = self.last
        for versions in self.later:
            versions.clear()

    def write_through(self) -> None:
        """The cache is switched off, which flushes it, and every write lasts."""
        self.disk.set_writeback(False)
        self.flush_is_implied()
        self.write()
        self.flush_is_implied()
        self.disk.set_writeback(True)

    def flush_is_implied(self) -> None:
        self.safe[:] = self.last
        for versions in self.later:
            versions.clear()

    def leave_in_flight(self) -> list[Any]:
        """Writes, and perhaps a flush, that the cut overtakes: done or not, nobody is told."""
        honest = self.model.handle

        def half(queue: Any, chain: Chain) -> None:
            if self.random.random() < 0.5:
                complete, queue.complete = queue.complete, lambda *_: None
                honest(queue, chain)
                queue.complete = complete

        self.model.handle = half  # type: ignore[method-assign]
        requests = []
        for number in range(int(self.random.integers(0, 6))):
            sector = 40 * number
            part = self.buffer[512 * sector : 512 * (sector + 16)]
            part.array[:] = self.stamped(sector, 16)
            requests += self.disk.submit(spec.T_OUT, 512 * sector, [part])
        if self.random.random() < 0.5:
            requests.append(self.disk.queues[0].submit(spec.T_FLUSH))
        self.disk.queues[0].publish()
        self.model.handle = honest  # type: ignore[method-assign]
        self.in_flight += len(requests)
        return requests

    def cut(self) -> Any:
        flying = self.leave_in_flight()
        done = self.store.cut(self.random)
        self.disk.restart()
        assert all(request.outcome is not None and request.outcome.value == "unknown" for request in flying)
        found = self.disk.read(0, SECTORS * 512).view(STAMP)
        for sector in range(SECTORS):
            version = int(found["version"][sector])
            allowed = self.later[sector] | {int(self.safe[sector])}
            assert version in allowed, f"sector {sector} has version {version}, may have {sorted(allowed)}"
            if version:
                assert found["sector"][sector] == sector
                assert (found["filler"][sector] == version * 1000 + sector).all(), f"sector {sector} is torn"
            self.checked += 1
            self.later[sector].clear()
        self.safe[:] = found["version"]
        self.last[:] = found["version"]
        return done


def test_what_was_flushed_is_there_after_every_cut() -> None:
    rig = Rig(seed=7)
    steps = [rig.write] * 5 + [rig.many, rig.flush, rig.fua, rig.write_through]
    kept = torn = dropped = 0
    for _ in range(CUTS):
        for _ in range(int(rig.random.integers(1, 12))):
            steps[int(rig.random.integers(0, len(steps)))]()
        cut = rig.cut()
        kept, torn, dropped = kept + cut.kept, torn + cut.torn, dropped + cut.dropped
    print(
        f"\n{CUTS} cuts: {rig.store.writes} writes and {rig.store.flushes} flushes; of the writes no flush "
        f"covered {kept} came through, {torn} in part, {dropped} not; {rig.in_flight} requests were in "
        f"flight; {rig.checked} sectors checked"
    )
    assert min(kept, torn, dropped, rig.in_flight) > CUTS // 10
    rig.disk.close()


def test_a_driver_that_does_not_flush_is_found_out() -> None:
    rig = Rig(seed=8)
    rig.disk.flush = lambda **_: None  # type: ignore[method-assign,assignment]

    def live() -> None:
        for _ in range(20):
            rig.write()
            rig.flush()
            rig.cut()

    with pytest.raises(AssertionError, match="has version"):
        live()
    rig.disk.close()
