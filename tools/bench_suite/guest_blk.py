"""4 KiB random reads in one guest: library and ``blk up`` against the kernel's virtio-blk, AHCI and IDE.

One image, five drivers that take turns. Beside rates and latencies: register accesses and interrupts for each
request, counted in a second boot in which QEMU traces.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import guestpv
from guestvm import Machine
from guestvm import kernel as kernels
from guestvm.progress import Progress

from .blk import version
from .contest import Contender, Run, duel, race
from .guest_disks import BLK_UP, DRIVERS, KERNEL, LIBRARY, PERCENTILES, Disks, costs, machine_with_disks
from .report import Row

SERIES = "6.1"
DEPTHS = (1, 32)
SIZE = 256 << 20
LEAST = {(LIBRARY, 1): 1.0, (LIBRARY, 32): 1.0, (BLK_UP, 32): 0.7}
FOREIGN = 0.1
"""Share of one processor that others than the guest may use in a run that counts."""
COUNTS = {1: 200, 32: 9600}


@dataclass(frozen=True)
class DiskRun(Run):
    """``latency``: microseconds by percentile (as text). ``cpu`` is the whole virtual machine's."""

    latency: dict[str, float]


class Processors:
    """The processor time of the virtual machine, and of everybody else on this machine but us."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._guest, self._all, self._clock = self._used(), self._busy(), time.monotonic()

    def _used(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _busy(self) -> float:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        # Without idle and waiting for a disk; guests are in the user's time.
        return sum(int(fields[index]) for index in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")

    def since(self) -> tuple[float, float]:
        """Seconds that the guest used, and the share of one processor that others took."""
        guest = self._used() - self._guest
        return guest, (self._busy() - self._all - guest) / (time.monotonic() - self._clock)


def one_run(vm: Machine, disks: Disks, driver: str, depth: int, seconds: float) -> DiskRun:
    """One run of one driver."""
    watch = Processors(vm.pid)
    outcome = disks.run(driver, depth, seconds=seconds)
    cpu, foreign = watch.since()
    return DiskRun(
        outcome.iops, cpu / (outcome.iops * seconds) * 1e6, None, foreign < FOREIGN, outcome.latency
    )


def rows_of(depth: int, runs: dict[str, list[Run]]) -> list[Row]:
    """Rates and processor time against the kernel's driver, and every driver's latencies."""
    rows = []
    for driver in DRIVERS:
        case = f"depth {depth}/{driver}"
        if driver != KERNEL:
            pairs = duel(runs, driver, KERNEL)
            rows += [
                pairs.row(case, "iops", KERNEL, lambda run: run.rate, least=LEAST.get((driver, depth))),
                pairs.row(case, "cpu_s_per_million", KERNEL, lambda run: run.cpu),
            ]
        good = [run for run in runs[driver] if run.quiet] or runs[driver]
        middle = sorted(good, key=lambda run: run.rate)[len(good) // 2]
        latency = cast(DiskRun, middle).latency
        rows += [Row(case, f"us_p{p}", latency[str(p)], runs=len(good)) for p in PERCENTILES]
    return rows


def run(quick: bool) -> tuple[dict[str, str], list[Row]]:
    """Measure; versions and rows for the report."""
    rounds, seconds = (1, 1) if quick else (5, 2)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "disk.img"
        image.write_bytes(bytes(SIZE))
        with machine_with_disks(SERIES, image, limit=1500) as vm:
            disks = Disks(vm)
            for depth in DEPTHS:
                contenders: dict[str, Contender] = {
                    name: partial(one_run, vm, disks, name, depth, seconds) for name in DRIVERS
                }
                rows += rows_of(depth, race(contenders, rounds))
            disks.close()
        for (driver, depth), cost in costs(SERIES, image, Path(directory) / "trace", COUNTS).items():
            case = f"depth {depth}/{driver}"
            rows.append(Row(case, "accesses_per_op", cost.accesses))
            rows.append(Row(case, "interrupts_per_op", cost.interrupts))
    return {
        "python": platform.python_version(),
        "guestpv": guestpv.__version__,
        "QEMU": version(["qemu-system-x86_64"]),
        "accelerator": vm.accel,
        "guest": kernels.get(SERIES, Progress(quiet=True)).release,
    }, rows
