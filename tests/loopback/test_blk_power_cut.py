"""Power cuts on a disk that really forgets: what was acknowledged before a completed flush is still there.

``GUESTPV_CUTS`` says how many (100 here, at least 1,000 in the long run); ``-s`` shows the report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guestpv
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.blk import Blk as Model
from guestpv.devices.models.blk_volatile import VolatileStore
from guestpv.devices.ring import Chain
from guestpv.drivers.blk import Blk
from guestpv.drivers.blk_queue import Outcome
from guestpv.errors import DeviceGone
from guestpv.spec import blk as spec
from guestpv.transport.pci import PciTransport
from worlds.ledger import Ledger, Writer

CUTS = int(os.environ.get("GUESTPV_CUTS", "100"))
KILLS = max(2, CUTS // 50)
"""Cuts by killing the process that has the disk; each starts one."""
SECTORS = 256


class Rig(Writer):
    """A driver on a forgetful disk in this process, whose power is cut."""

    def __init__(self, seed: int) -> None:
        self.store = VolatileStore(SECTORS * 512)
        self.model = Model(self.store)
        self.function = SoftwareFunction(self.model, name="loopback:blk")
        self.in_flight = 0
        disk = Blk(PciTransport(self.function), timeout=60.0)
        super().__init__(disk, Ledger(SECTORS, np.random.default_rng(seed)))

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
            part.array[:] = self.ledger.stamped(sector, 16)
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
        assert all(request.outcome is Outcome.UNKNOWN for request in flying)
        self.ledger.check(self.disk.read(0, SECTORS * 512))
        return done


def test_what_was_flushed_is_there_after_every_cut() -> None:
    rig = Rig(seed=7)
    kept = torn = dropped = 0
    for _ in range(CUTS):
        rig.live()
        cut = rig.cut()
        kept, torn, dropped = kept + cut.kept, torn + cut.torn, dropped + cut.dropped
    print(
        f"\n{CUTS} cuts: {rig.store.writes} writes and {rig.store.flushes} flushes; of the writes no flush "
        f"covered {kept} came through, {torn} in part, {dropped} not; {rig.in_flight} requests were in "
        f"flight; {rig.ledger.checked} sectors checked"
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


@contextmanager
def served(directory: Path, seed: int) -> Iterator[subprocess.Popen[str]]:
    """``guestpv serve`` with the forgetful disk; what lasts is in ``disk.img``."""
    device = f"blk?file=disk.img&cache=volatile&seed={seed}"
    words = [sys.executable, "-m", "guestpv", "serve", "vfio-user:s", "--device", device, "--json"]
    (directory / "s").unlink(missing_ok=True)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=directory) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["ok"]
            yield process
        finally:
            process.kill()


def test_what_was_flushed_is_there_after_the_served_disk_was_killed(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTORS * 512))
    ledger = Ledger(SECTORS, np.random.default_rng(9))
    flushes = in_flight = 0
    for number in range(KILLS):
        with served(tmp_path, number) as process, guestpv.open(f"vfio-user:{tmp_path}/s") as transport:
            writer = Writer(Blk(transport, timeout=60.0), ledger)
            killer = threading.Timer(float(ledger.random.random()) / 20, process.kill)
            killer.start()
            with pytest.raises(DeviceGone):
                writer.live_on()
            killer.join()
            writer.disk.close()
            assert {request.outcome for request in writer.sent} <= {Outcome.DONE, Outcome.UNKNOWN}
            in_flight += sum(request.outcome is Outcome.UNKNOWN for request in writer.sent)
            flushes += writer.flushes
        ledger.check(np.fromfile(image, np.uint8))
    print(
        f"\n{KILLS} processes killed: {ledger.version} writes and {flushes} flushes; {in_flight} requests "
        f"were in flight; {ledger.checked} sectors checked"
    )


def test_what_was_not_flushed_is_lost_in_part_when_the_process_ends(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with guestpv.open(f"loopback:blk?file={image}&cache=volatile") as transport, Blk(transport) as disk:
        disk.write(0, b"f" * 4096)
        disk.flush()
        for place in range(4096, 1 << 20, 4096):
            disk.write(place, b"w" * 4096)
        assert disk.read(4096, (1 << 20) - 4096).tobytes() == b"w" * ((1 << 20) - 4096)
    content = image.read_bytes()
    assert content[:4096] == b"f" * 4096
    sectors = {content[place : place + 512] for place in range(4096, 1 << 20, 512)}
    assert sectors == {b"w" * 512, bytes(512)}
