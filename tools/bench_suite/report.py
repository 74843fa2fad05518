"""What every benchmark writes: rows of (case, metric, value, ratio to a peer), and the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

BUSY = 0.02
"""Share of a sample's time spent waiting for a core above which the sample is discarded."""


@dataclass(frozen=True)
class Row:
    """One measured figure. ``ratio`` is ours over the peer's."""

    case: str
    metric: str
    value: float
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    runs: int = 1
    discarded: int = 0
    limit: float | None = None
    """The ratio that must not be exceeded, where there is one."""
    least: float | None = None
    """The ratio that must be reached, where there is one."""

    @property
    def met(self) -> bool:
        if self.ratio is None:
            return True
        return (self.limit is None or self.ratio <= self.limit) and (
            self.least is None or self.ratio >= self.least
        )


def run_delay() -> int:
    """Nanoseconds this thread was runnable and waited for a core."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])


def sample(action: Callable[[], float]) -> tuple[float, bool]:
    """Run ``action`` (which returns its figure) and say whether nothing else wanted the core."""
    waited, begin = run_delay(), time.perf_counter_ns()
    value = action()
    spent = time.perf_counter_ns() - begin
    return value, run_delay() - waited < BUSY * spent


def median(samples: list[tuple[float, bool]]) -> tuple[float, int]:
    """Median of the undisturbed samples (of all, if none was undisturbed), and how many were discarded."""
    good = [value for value, quiet in samples if quiet] or [value for value, _ in samples]
    return statistics.median(good), len(samples) - len(good)


def machine() -> dict[str, object]:
    """What the figures depend on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {"cpu": model, "cpus": os.cpu_count(), "kernel": platform.release(), "machine": platform.machine()}


def write(path: Path, versions: dict[str, str], rows: list[Row]) -> None:
    """The report as JSON."""
    document = {"machine": machine(), "versions": versions, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n")


COSTS = ("ns_per", "cpu_s", "kicks", "accesses", "instructions")
"""How the metrics begin of which less is better."""
NOISE = 0.1
RARE = 0.01
"""Notifications per operation below which a ratio says nothing: they cost nothing any more."""


def worse(path: Path, rows: list[Row]) -> list[str]:
    """A line for each ratio that is more than a tenth worse than in the report at ``path``."""
    before = {(row["case"], row["metric"]): row["ratio"] for row in json.loads(path.read_text())["rows"]}
    found = []
    for row in rows:
        was = before.get((row.case, row.metric))
        rare = row.metric == "kicks_per_op" and row.value < RARE
        if not was or not row.ratio or rare:
            continue
        change = row.ratio / was if row.metric.startswith(COSTS) else was / row.ratio
        if change > 1 + NOISE:
            found.append(f"{row.case} {row.metric}: ratio {row.ratio:.3f}, was {was:.3f}")
    return found


CURVE = "us_p"
"""How the metrics begin that are points of a distribution: microseconds, and the percentile."""
SHOWN = ("us_p50", "us_p99")


def show(rows: list[Row]) -> str:
    """The report as text, one row a line; of a distribution two points."""
    lines = []
    for row in rows:
        if row.metric.startswith(CURVE) and row.metric not in SHOWN:
            continue
        line = f"{row.case:34} {row.value:12.5g} {row.metric}"
        if row.ratio is not None:
            line += f"  {row.ratio:8.3f} x {row.peer}"
        for word, bound in (("at most", row.limit), ("at least", row.least)):
            if bound is not None:
                line += f"  ({word} {bound:g}: {'met' if row.met else 'MISSED'})"
        lines.append(line + f"  [{row.runs} runs, {row.discarded} discarded]")
    return "\n".join(lines)
