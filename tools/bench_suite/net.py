"""Frames to and from DPDK's vhost device over vhost-user: guestpv's rings and DPDK's virtio-user driver.

The device counts the frames of both in the same way. It copies each payload; neither driver does. Sending,
both write a virtio header and the front of each frame (42 bytes); receiving, both read the virtio header.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import guestpv
from guestpv.spec import features as feat
from guestpv.spec import net as spec
from peers import tree
from peers.errors import PeerError
from peers.tree import Tree

from .contest import (
    DISTURBED,
    Contender,
    Duel,
    Run,
    cores,
    distance,
    duel,
    handle_for,
    loops,
    package_version,
    race,
    threads,
    undisturbed,
    waited,
)
from .report import Row
from .testpmd import Testpmd

PEER = "DPDK virtio-user"
ENTRIES = 256
BUFFER = 2048
FRONT = 42
"""Bytes that testpmd's txonly writes into each frame: Ethernet, IPv4 and UDP."""
ADDRESSES = b"\2\0\0\0\0\1\2\0\0\0\0\2\x88\xb5"
LEAST = 1.0
WARM_UP = 0.2


@dataclass(frozen=True)
class Way:
    """One way through both drivers: what is negotiated."""

    name: str
    packed: bool
    in_order: bool
    mergeable: bool

    @property
    def vdev(self) -> str:
        """Arguments of DPDK's virtio-user; in-order without mergeable buffers is its vectorized path."""
        vectorized = int(self.in_order and not self.mergeable)
        return (
            f"packed_vq={self.packed:d},in_order={self.in_order:d},mrg_rxbuf={self.mergeable:d},"
            f"vectorized={vectorized}"
        )

    @property
    def wishes(self) -> str:
        """The same for our opener."""
        wanted = {"ring_packed": self.packed, "in_order": self.in_order, "mrg_rxbuf": self.mergeable}
        return ",".join(f"{'%2B' if on else '-'}{name}" for name, on in wanted.items())


WAYS = (
    Way("split", False, False, True),
    Way("packed", True, False, True),
    Way("split in-order vectorized", False, True, False),
    Way("packed in-order vectorized", True, True, False),
)
DIRECTIONS = {"send": ("rxonly", "txonly", "received"), "receive": ("txonly", "rxonly", "sent")}
"""Direction -> forwarding mode of the device, of DPDK's driver, and what the device counts."""
LENGTHS = (64, 1518)


def measured(device: Testpmd, what: str, pid: int, seconds: float) -> Run:
    """Rate by the device's own counter while the driver in process ``pid`` runs."""
    time.sleep(WARM_UP)
    before, mine = threads(device.pid), threads(pid)
    start, first = time.perf_counter(), device.count(what)
    time.sleep(seconds)
    last, spent = device.count(what), time.perf_counter() - start
    delay = max(waited(before, threads(device.pid)), waited(mine, threads(pid)))
    done = last - first
    if not done:
        raise PeerError(f"nothing was {what} in {seconds:g} s")
    return Run(done / spent, 1e6 * spent / done, None, delay < DISTURBED * spent * 1e9)


@dataclass(frozen=True)
class Arena:
    """Where the race is run.

    Attributes:
        module: the compiled loops.
        cpus: of the driver and of the device.
        seconds: of each run.
    """

    peers: Tree
    module: Any
    device: Testpmd
    socket: Path
    cpus: tuple[int, int]
    seconds: float

    def theirs(self, way: Way, direction: str, length: int) -> Run:
        """One run of testpmd on virtio-user."""
        _, mode, what = DIRECTIONS[direction]
        vdev = f"net_virtio_user0,path={self.socket},queues=1,queue_size={ENTRIES},{way.vdev}"
        with Testpmd(self.peers, vdev, self.cpus[::-1], memory=400) as driver:
            driver.tell(f"set fwd {mode}", f"set txpkts {length}", "start")
            return measured(self.device, what, driver.pid, self.seconds)

    def ours(self, way: Way, direction: str, length: int) -> Run:
        """One run of race.c's loops on a fresh connection."""
        with guestpv.open(f"vhost-user:net:{self.socket}?features={way.wishes}") as transport:
            transport.negotiate(supported=feat.mask([spec.F_MRG_RXBUF]))
            queues = [transport.make_queue(index, ENTRIES) for index in (0, 1)]
            transport.driver_ok()
            memory = transport.pool.allocate(BUFFER * ENTRIES, align=4096)
            front = np.frombuffer(ADDRESSES.ljust(FRONT, b"\0"), np.uint8)
            queue = queues[0 if direction == "receive" else 1]
            ffi, lib = self.module.ffi, self.module.lib
            state = ffi.new("struct race_net *")
            state.queue = handle_for(self.module, queue)
            state.buffers, state.length, state.stride = ENTRIES, length, BUFFER
            state.memory, state.bus = ffi.cast("uint8_t *", memory.pointer), memory.address
            state.head, state.head_length = ffi.cast("uint8_t *", front.ctypes.data), FRONT
            state.run_ns = int((self.seconds + 2 * WARM_UP) * 1e9)
            loop = lib.race_net_receive if direction == "receive" else lib.race_net_send
            code: list[int] = []

            def drive() -> None:
                queue.own()
                code.append(loop(state))

            thread = threading.Thread(target=drive)
            thread.start()
            try:
                run = measured(self.device, DIRECTIONS[direction][2], os.getpid(), self.seconds)
            finally:
                thread.join()
            if code != [0] or state.failed:
                raise PeerError(f"the race ended with {code}, {state.failed} of {state.done} frames wrong")
            return Run(run.rate, run.cpu, queue.kicks / state.done, run.quiet)

    def case(self, direction: str, length: int, rounds: int) -> list[Row]:
        """All ways of both drivers, and the best of each."""
        mode = DIRECTIONS[direction][0]
        self.device.tell("stop", f"set fwd {mode}", f"set txpkts {length}", "start")
        contenders: dict[str, Contender] = {}
        for way in WAYS:
            contenders[f"ours {way.name}"] = partial(self.ours, way, direction, length)
            contenders[f"theirs {way.name}"] = partial(self.theirs, way, direction, length)
        outcome = race(contenders, rounds)
        rows = [
            row(f"{direction} {length}/{way.name}", duel(outcome, f"ours {way.name}", f"theirs {way.name}"))
            for way in WAYS
        ]
        ours, theirs = (
            max(
                (name for name in outcome if name.startswith(who)),
                key=lambda name: statistics.median(run.rate for run in outcome[name]),
            )
            for who in ("ours", "theirs")
        )
        return [*rows, row(f"{direction} {length}/best of each", duel(outcome, ours, theirs), LEAST)]


def row(case: str, pairs: Duel, least: float | None = None) -> Row:
    """One line of the report."""
    return pairs.row(case, "pps", PEER, lambda run: run.rate, least=least)


def run(quick: bool) -> tuple[dict[str, str], list[Row]]:
    """Measure; versions and rows for the report."""
    peers, module, cpus = tree.get("peers"), loops(), cores()
    rounds, seconds = (1, 0.3) if quick else (7, 0.4)
    with tempfile.TemporaryDirectory() as directory, undisturbed(cpus[0]) as first:
        socket = Path(directory) / "net.sock"
        with Testpmd(peers, f"net_vhost0,iface={socket},queues=1", cpus) as device:
            rows = [distance(module, cpus[1])]
            arena = Arena(peers, module, device, socket, cpus, seconds)
            for direction in DIRECTIONS:
                for length in LENGTHS:
                    rows += arena.case(direction, length, rounds)
    versions = {
        "python": platform.python_version(),
        "guestpv": guestpv.__version__,
        "dpdk": package_version(peers, "libdpdk"),
        "priority": "first" if first else "as everybody",
        "payload": "copied by the device, by neither driver",
    }
    return versions, rows
