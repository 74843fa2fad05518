"""4 KiB random reads from qemu-storage-daemon's null device over vhost-user: guestpv's rings and libblkio's.

Neither side looks at the data. Both keep the latency of every request, both sleep on the queue's eventfd or
spin, whichever the case says.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import guestpv
from guestpv.drivers.blk import Blk
from guestpv.transport.vhost_user import VhostUserTransport
from peers import tree
from peers.backend import Backend, storage_daemon
from peers.errors import PeerError
from peers.tree import LIBRARIES, LOADER, Tree

from .contest import (
    BUILD,
    DISTURBED,
    Duel,
    Run,
    cores,
    distance,
    duel,
    handle_for,
    loops,
    own_run,
    package_version,
    race,
    undisturbed,
    watch,
)
from .report import Row

PEER = "libblkio"
BLOCK = 4096
CAPACITY = 1 << 30
NODE = f"driver=null-co,size={CAPACITY},read-zeroes=on"
QUEUE = 512
"""Entries; three descriptors a request."""
RING = "-indirect_desc"
"""With room in the queue, descriptors in the ring are a cache line less for the device."""
DEPTHS = (1, 8, 32, 128)
LEAST = {("poll", 1): 1.0, ("poll", 8): 1.0, ("poll", 32): 1.2, ("poll", 128): 1.2}
EVENT_LEAST = 1.0
COST_LIMIT = 1.0
HEADER = 16
FIRST = 5000
"""Requests that tell how many a run takes."""
SPIN_FOR_EVER = 10_000_000
"""Microseconds."""


def build_peer(peers: Tree) -> list[str]:
    """libblkio's own benchmark, an example of its package, as a command."""
    include, library = BUILD / "blkio", peers.root / LIBRARIES[0] / "libblkio.so.1"
    program = BUILD / "blkio-bench"
    include.mkdir(parents=True, exist_ok=True)
    # Only this header: the tree's C library is newer than the machine's.
    (include / "blkio.h").write_bytes((peers.root / "usr/include/blkio.h").read_bytes())
    source = peers.root / "usr/share/doc/libblkio-dev/examples/blkio-bench.c"
    done = subprocess.run(
        [
            "cc",
            "-O2",
            "-w",
            "-Wl,--allow-shlib-undefined",
            f"-I{include}",
            "-o",
            str(program),
            str(source),
            str(library),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PeerError(f"blkio-bench does not build: {done.stderr.strip()[-1000:]}")
    libraries = ":".join(str(peers.root / part) for part in LIBRARIES)
    return [str(peers.root / LOADER), "--library-path", libraries, str(program)]


def peer_run(command: list[str], backend: Backend, mode: str, depth: int, seconds: int) -> Run:
    """One run of blkio-bench."""
    ended = watch(
        [
            *command,
            f"--iodepth={depth}",
            "--readwrite=randread",
            f"--blocksize={BLOCK}",
            f"--runtime={seconds}",
            *(["--poll"] if mode == "poll" else []),
            "virtio-blk-vhost-user",
            f"path={backend.socket}",
        ],
        backend.pid,
        seconds + 10,
    )
    rate = json.loads(ended.output)["aggregate"]["kiops"] * 1e3
    done = rate * seconds
    return Run(rate, ended.cpu / done * 1e6, ended.writes / done, ended.delay < DISTURBED * seconds * 1e9)


def our_run(module: Any, backend: Backend, mode: str, depth: int, seconds: float) -> Run:
    """One run of race.c's loop on a fresh connection."""
    with guestpv.open(f"vhost-user:blk:{backend.socket}?features={RING}") as transport:
        assert isinstance(transport, VhostUserTransport)
        transport.negotiate(supported=0)
        queue = transport.make_queue(0, QUEUE)
        transport.driver_ok()
        headers = transport.pool.allocate(HEADER * depth, align=4096)
        statuses = transport.pool.allocate(depth, align=4096)
        data = transport.pool.allocate(BLOCK * depth, align=4096)
        state = module.ffi.new("struct race_blk *")
        state.queue = handle_for(module, queue)
        state.fd = -1 if mode == "poll" else queue.interrupt_fd
        state.depth, state.nbytes, state.blocks = depth, BLOCK, CAPACITY // BLOCK
        state.headers = module.ffi.cast("uint8_t *", headers.pointer)
        state.statuses = module.ffi.cast("uint8_t *", statuses.pointer)
        state.headers_bus, state.statuses_bus = headers.address, statuses.address
        state.data_bus = data.address
        state.run_ns = int(seconds * 1e9)

        def action() -> tuple[int, float]:
            code = module.lib.race_blk_run(state)
            if code or state.failed:
                raise PeerError(f"the race ended with {code}, {state.failed} of {state.done} requests failed")
            return state.done, state.spent_ns / 1e9

        return own_run(action, backend.pid, lambda: queue.kicks)


def driver_run(backend: Backend, mode: str, depth: int, seconds: float) -> Run:
    """One run of the block driver from Python, with the latency of each request as the others have it."""
    with (
        guestpv.open(f"vhost-user:blk:{backend.socket}?features={RING}") as transport,
        Blk(transport) as disk,
    ):
        rows = disk.allocate(BLOCK * depth)
        spin = SPIN_FOR_EVER if mode == "poll" else 0

        def read(count: int) -> float:
            places = np.random.default_rng(count).integers(0, CAPACITY // BLOCK, count, np.uint64)
            places *= np.uint64(BLOCK)
            start = time.perf_counter()
            disk.read_many(places, rows, BLOCK, depth=depth, spin_us=spin, latencies=True).check()
            return time.perf_counter() - start

        count = int(FIRST * seconds / read(FIRST)) + 1
        return own_run(lambda: (count, read(count)), backend.pid, lambda: disk.queues[0].queue.kicks)


def kicks_of(run: Run) -> float:
    """Both sides count them here."""
    assert run.kicks is not None
    return run.kicks


def rows_of(case: str, pairs: Duel, least: float | None = None, strict: bool = False) -> list[Row]:
    """The rows of one case; ``strict``: costs must not be above the peer's."""
    limit = COST_LIMIT if strict else None
    return [
        pairs.row(case, "iops", PEER, lambda run: run.rate, least=least),
        pairs.row(case, "cpu_s_per_million", PEER, lambda run: run.cpu, limit=limit),
        pairs.row(case, "kicks_per_op", PEER, kicks_of, limit=limit),
    ]


def version(command: list[str]) -> str:
    """The number in the first line that a program of QEMU says about itself."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return said.partition("version ")[2].split()[0]


def run(quick: bool) -> tuple[dict[str, str], list[Row]]:
    """Measure; versions and rows for the report."""
    peers = tree.get("peers")
    module, command = loops(), build_peer(peers)
    rounds, seconds = (1, 1) if quick else (7, 1)
    driver, device = cores()
    with (
        tempfile.TemporaryDirectory() as directory,
        undisturbed(driver) as first,
        storage_daemon(Path(directory) / "blk.sock", NODE, cpus={device}) as backend,
    ):
        rows = [distance(module, device)]
        for mode in ("poll", "eventfd"):
            for depth in DEPTHS:
                contenders: dict[str, Callable[[], Run]] = {
                    "guestpv": lambda m=mode, d=depth: our_run(module, backend, m, d, seconds),  # type: ignore[misc]
                    "driver": lambda m=mode, d=depth: driver_run(backend, m, d, seconds),  # type: ignore[misc]
                    PEER: lambda m=mode, d=depth: peer_run(command, backend, m, d, seconds),  # type: ignore[misc]
                }
                outcome = race(contenders, rounds)
                least = LEAST.get((mode, depth), EVENT_LEAST)
                case = f"{mode}/depth {depth}"
                rows += rows_of(case, duel(outcome, "guestpv", PEER), least, mode == "eventfd")
                rows += rows_of(f"{case}, Blk.read_many", duel(outcome, "driver", PEER))
    versions = {
        "python": platform.python_version(),
        "guestpv": guestpv.__version__,
        "qemu-storage-daemon": version(["qemu-storage-daemon"]),
        "libblkio": package_version(peers, "blkio"),
        "priority": "first" if first else "as everybody",
    }
    return versions, rows
