"""Races: contenders on one back end, in turn, round after round, with an eye on who else wanted the cores."""

from __future__ import annotations

import importlib.util
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi

from guestpv.virtqueue.queue import Virtqueue
from peers.errors import PeerError
from peers.tree import LIBRARIES, Tree

from .report import Row

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "bench"
CORE = ROOT / "guestpv" / "core"
PARTS = ("kick", "queue", "split", "packed", "wait", "again")
"""Sources of the core that the loops of race.c call; compiled with them, as a C program's linker would."""
LOOK = 0.05
"""Seconds between two looks at a running peer."""
PRIORITY = -20
DISTURBED = 0.05
"""Share of a run's time that driver or device waited for a core above which the run is discarded."""


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes:
        rate: operations per second.
        cpu: seconds of CPU per million operations, of the driver's thread.
        kicks: notifications per operation, None where nobody counts them.
        quiet: nobody else wanted the cores of driver and back end.
    """

    rate: float
    cpu: float
    kicks: float | None
    quiet: bool


Contender = Callable[[], Run]


Figure = Callable[[Run], float]


@dataclass(frozen=True)
class Duel:
    """The runs of two contenders, pair by pair: what a pair has in common, such as the moment, cancels out.

    Attributes:
        pairs: ours and theirs, of the same round.
    """

    pairs: Sequence[tuple[Run, Run]]

    @property
    def good(self) -> Sequence[tuple[Run, Run]]:
        """Pairs of two quiet runs, or all, where there is none."""
        return [pair for pair in self.pairs if pair[0].quiet and pair[1].quiet] or self.pairs

    def row(
        self,
        case: str,
        metric: str,
        peer: str,
        figure: Figure,
        limit: float | None = None,
        least: float | None = None,
    ) -> Row:
        """Medians of both, and of the pairs' ratios."""
        ours = [figure(mine) for mine, _ in self.good]
        theirs = [figure(other) for _, other in self.good]
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True) if other]
        runs = [run for pair in self.pairs for run in pair]
        return Row(
            case,
            metric,
            statistics.median(ours),
            peer,
            statistics.median(theirs),
            statistics.median(ratios) if ratios else None,
            len(runs),
            sum(not run.quiet for run in runs),
            limit,
            least,
        )


def race(contenders: dict[str, Contender], rounds: int) -> dict[str, list[Run]]:
    """Run the contenders in turn until each has ``rounds`` quiet runs, or twice as many runs in all."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}

    def lacking() -> bool:
        return any(sum(run.quiet for run in done) < rounds for done in runs.values())

    for number in range(2 * rounds):
        if number >= rounds and not lacking():
            break
        for name, contender in contenders.items():
            runs[name].append(contender())
    return runs


def duel(runs: dict[str, list[Run]], ours: str, theirs: str) -> Duel:
    """Two of the contenders of a race."""
    return Duel(list(zip(runs[ours], runs[theirs], strict=True)))


def package_version(peers: Tree, name: str) -> str:
    """What pkg-config would say of a library of the tree."""
    text = (peers.root / LIBRARIES[0] / "pkgconfig" / f"{name}.pc").read_text()
    return next(line.split()[1] for line in text.splitlines() if line.startswith("Version:"))


def loops() -> Any:
    """The compiled race.c: ``ffi`` and ``lib``."""
    builder = cffi.FFI()
    declared = [(CORE / f"{name}.cdef.h").read_text() for name in ("kick", "queue")]
    builder.cdef("".join(declared) + (HERE / "race.cdef.h").read_text())
    builder.set_source(
        "_race",
        (HERE / "race.c").read_text(),
        sources=[str(CORE / f"{name}.c") for name in PARTS],
        include_dirs=[str(CORE), str(HERE)],
        extra_compile_args=["-O2", "-std=gnu11", "-pthread"],
    )
    path = builder.compile(tmpdir=str(BUILD))
    spec = importlib.util.spec_from_file_location("_race", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def distance(module: Any, there: int) -> Row:
    """How long a cache line takes from this core to the device's and back, best of several tries."""
    tries = [module.lib.race_distance(there, 20000) for _ in range(5)]
    return Row("between the two cores", "ns_there_and_back", min(tries), runs=len(tries))


def handle_for(module: Any, queue: Virtqueue) -> Any:
    """The queue's handle as the race's own module knows the type."""
    return module.ffi.cast("struct gpv_queue *", int(Virtqueue.core_ffi.cast("uintptr_t", queue.handle)))


def cores() -> tuple[int, int]:
    """CPU of the driver and CPU of the back end.

    Raises:
        PeerError: there is only one.
    """
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise PeerError("a race needs two cores: one for the driver, one for the back end")
    return usable[0], usable[1]


@contextmanager
def undisturbed(cpu: int) -> Iterator[bool]:
    """This process and its children on ``cpu``, before everybody else where root may say so.

    Yields whether priority was given. With the kernel's autogroups only the session's own nice value counts
    against other sessions.
    """
    before, group = os.sched_getaffinity(0), Path("/proc/self/autogroup")
    os.sched_setaffinity(0, {cpu})
    first = False
    try:
        try:
            group.write_text(str(PRIORITY))
            first = True
        except OSError:
            pass
        yield first
    finally:
        if first:
            group.write_text("0")
        os.sched_setaffinity(0, before)


@dataclass(frozen=True)
class Spent:
    """Nanoseconds that a thread ran, and that it was runnable and waited for a core."""

    ran: int
    waited: int


def threads(pid: int) -> dict[int, Spent]:
    """Every thread of a process."""
    found = {}
    for entry in Path(f"/proc/{pid}/task").glob("*"):
        try:
            ran, waited, _ = (entry / "schedstat").read_text().split()
        except OSError:
            continue
        found[int(entry.name)] = Spent(int(ran), int(waited))
    return found


def waited(before: dict[int, Spent], after: dict[int, Spent]) -> int:
    """Nanoseconds that the busiest of the threads waited for a core."""
    return max((now.waited - before.get(tid, Spent(0, 0)).waited for tid, now in after.items()), default=0)


def own_run(
    action: Callable[[], tuple[int, float]], backend: int, kicks: Callable[[], int] | None = None
) -> Run:
    """Run ``action`` in this thread, against the process ``backend``; it returns operations and seconds."""
    tid = threading.get_native_id()
    ours, theirs, kicked = threads(os.getpid())[tid], threads(backend), kicks() if kicks else 0
    cpu = time.thread_time()
    done, seconds = action()
    cpu = time.thread_time() - cpu
    delay = max(
        threads(os.getpid())[tid].waited - ours.waited,
        waited(theirs, threads(backend)),
    )
    return Run(
        done / seconds,
        cpu / done * 1e6,
        (kicks() - kicked) / done if kicks else None,
        delay < DISTURBED * seconds * 1e9,
    )


@dataclass(frozen=True)
class Ended:
    """What a child process printed and used.

    Attributes:
        cpu: seconds of CPU, without those of its first thread, which only sets up.
        writes: ``write`` system calls, which is how a notification is sent.
        delay: nanoseconds that one of its threads, or of the back end's, waited for a core.
    """

    output: str
    cpu: float
    writes: int
    delay: int


def watch(command: Sequence[str], backend: int, limit: float) -> Ended:
    """Run a peer to its end and look at it all the while.

    Raises:
        PeerError: it failed, or did not end within ``limit`` seconds.
    """
    theirs = threads(backend)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        seen: dict[int, Spent] = {}
        deadline = time.monotonic() + limit
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            seen |= threads(child.pid)
            if time.monotonic() > deadline:
                child.send_signal(signal.SIGKILL)
                raise PeerError(f"{command[-1]} did not end within {limit:g} s")
            time.sleep(LOOK)
        # The process is dead and not yet forgotten: its counters can still be read.
        counters = dict(line.split(": ") for line in Path(f"/proc/{child.pid}/io").read_text().splitlines())
        first = seen.pop(child.pid, Spent(0, 0)).ran / 1e9
        before = os.times()
        assert child.stdout is not None
        output = child.stdout.read()
        code = child.wait()
        after = os.times()
    if code:
        raise PeerError(f"{' '.join(command[-3:])} ended with {code}: {output.strip()[-1000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system - first
    return Ended(
        output,
        cpu,
        int(counters["syscw"]),
        max([waited(theirs, threads(backend)), *(s.waited for s in seen.values())]),
    )
