"""``guestpv blk bench``: how fast a disk answers."""

from __future__ import annotations

import time
from typing import Any

import click

from ..errors import UsageError
from .blk_options import SIZE, YES, consent
from .completion import complete_address
from .report import Report, reporting

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
BATCH = 4096
"""Requests of one burst at most."""
BATCH_SECONDS = 0.25
"""About how long one burst is to take."""


@click.command(epilog="\b\nExamples:\n  guestpv blk bench 0000:03:00.0\n"
               "  guestpv blk bench loopback:blk --depth 1 --size 64K --json")  # fmt: skip
@click.argument("spec", shell_complete=complete_address)
@click.option("--size", type=SIZE, default=4096, show_default=True, help="Bytes of a request.")
@click.option(
    "--depth", type=click.IntRange(1, 256), default=32, show_default=True, help="In flight at once."
)
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=3.0, show_default=True, help="How long.")
@click.option("--write", "writing", is_flag=True, help="Write random content instead of reading.")
@click.option("--poll", is_flag=True, help="Spin instead of waiting for interrupts.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the random places.")
@YES
@reporting
def bench(
    report: Report,
    spec: str,
    size: int,
    depth: int,
    seconds: float,
    writing: bool,
    poll: bool,
    seed: int,
    yes: bool,
) -> None:
    """Measure random reads, or writes, of the disk SPEC: requests a second, latencies, kicks per request."""
    import numpy as np

    from .blk_disk import opened

    if writing:
        consent(report, yes, f"overwrite {spec} at random places")
    with opened(spec) as disk:
        if poll:
            disk.transport.mode = "poll"
            disk.restart()
        slots = disk.capacity // size
        if not slots or size % disk.block_size:
            raise UsageError(
                f"requests of {size} bytes: not whole blocks of {disk.block_size}, or larger than the disk"
            )
        random = np.random.default_rng(seed)
        memory = disk.allocate(depth * size)
        memory.array[:] = random.integers(0, 256, memory.nbytes, dtype=np.uint8)
        many = disk.write_many if writing else disk.read_many
        latencies = []
        queue = disk.queues[0].queue
        kicks, started, count = queue.kicks, time.monotonic(), depth
        spent = 0.0
        while spent < seconds:
            places = random.integers(0, slots, count, dtype=np.uint64) * np.uint64(size)
            before = time.monotonic()
            result = many(places, memory, size, depth=depth, latencies=True)
            result.check()
            latencies.append(result.latencies)
            spent = time.monotonic() - started
            # A burst is long enough to hide its own cost, and short enough to end in time.
            pace = BATCH_SECONDS / max(time.monotonic() - before, 1e-6)
            count = int(min(max(count * min(pace, 4), depth), BATCH))
        every = np.concatenate(latencies)
        data: dict[str, Any] = {
            "size": size,
            "depth": depth,
            "operation": "write" if writing else "read",
            "mode": disk.transport.mode,
            "requests": int(every.size),
            "seconds": spent,
            "iops": every.size / spent,
            "bytes_per_second": every.size * size / spent,
            "kicks_per_request": (queue.kicks - kicks) / every.size,
            "latency_us": {
                "mean": float(every.mean()) / 1000,
                **{f"p{p:g}": float(np.percentile(every, p)) / 1000 for p in PERCENTILES},
                "max": float(every.max()) / 1000,
            },
        }
    report.done(data, lambda: show(data))


def show(data: dict[str, Any]) -> None:
    """For a person."""
    from .counters import amount
    from .tables import console, pairs

    latency = "  ".join(f"{name} {value:.1f}" for name, value in data["latency_us"].items())
    console().print(
        pairs(
            [
                ("requests", f"{data['requests']} {data['operation']}s, {data['depth']} at once"),
                ("rate", f"{data['iops']:.0f} IOPS, {amount(data['bytes_per_second'], 'B/s', 1024)}"),
                ("latency", f"{latency} us"),
                ("kicks", f"{data['kicks_per_request']:.3f} per request"),
            ]
        )
    )
