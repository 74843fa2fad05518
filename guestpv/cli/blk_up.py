"""``guestpv blk up``: drive a disk as a block device of this machine."""

from __future__ import annotations

from typing import Any

import click

from .completion import complete_address
from .report import Report, reporting
from .restarts import option as restart_option
from .vfio_option import VFIO_BACKEND
from .views import bring_up, function_rows

EXAMPLE = """\b
Examples:
  guestpv blk up                          the only disk that can be driven
  guestpv blk up 0000:03:00.0 --detach    in the background
  guestpv blk up --index 3 --queues 2
"""


@click.command(epilog=EXAMPLE)
@click.argument("spec", required=False, shell_complete=complete_address)
@click.option(
    "--features",
    default="",
    metavar="LIST",
    help="Insist on features (+a) or leave them out (-b): +mq,-ring_packed.",
)
@click.option("--index", type=click.IntRange(0, 255), help="N of /dev/nbdN.  [default: a free one]")
@click.option(
    "--queues",
    type=click.IntRange(1, 64),
    help="Queues, each with a connection and a thread.  [default: one for each processor, at most 4]",
)
@click.option("--poll", is_flag=True, help="Spin instead of waiting for interrupts: faster, costs a CPU.")
@restart_option
@click.option("--detach", is_flag=True, help="Return once it is up; `guestpv blk down` ends it.")
@click.option("--force", is_flag=True, help="Also when the machine uses it, as a mounted disk for example.")
@VFIO_BACKEND
@reporting
def up(
    report: Report,
    spec: str | None,
    features: str,
    index: int | None,
    queues: int | None,
    poll: bool,
    restart: bool,
    detach: bool,
    force: bool,
    vfio_backend: str,
) -> None:
    """Drive the disk SPEC as a block device of this machine, /dev/nbdN.

    Takes the function from the kernel's driver if it has to, and serves the kernel's network block device
    until Ctrl-C, SIGTERM or `guestpv blk down`. While it is mounted the first two wait, and the third
    refuses. Then what the kernel has in memory is written, flushed, and the kernel gets the function back.

    A flush, and a write with FUA, is answered when the device has answered a flush of its own: what a file
    system or a database relies on holds here as it does with the kernel's driver.
    """
    from .blk_session import BlkSession, Wishes
    from .kinds import BLK

    wishes = Wishes(
        spec=spec,
        features=features,
        index=index,
        queues=queues,
        poll=poll,
        force=force,
        restart=restart,
        vfio_backend=vfio_backend,
    )
    bring_up(
        BLK,
        BlkSession,
        wishes,
        report,
        detach=detach,
        describe=describe,
        ending="Ctrl-C gives the function back.",
    )


def describe(status: dict[str, Any]) -> list[tuple[str, str]]:
    """What is up, as names and values."""
    from .counters import amount

    cache = "read-only" if status["read_only"] else f"{status['cache']} cache"
    size = amount(status["capacity"], "B", 1024)
    return [
        *function_rows(status),
        ("disk", f"{status['path']}, {size}, blocks of {status['block_size']} bytes, {cache}"),
        ("connections", str(status["connections"])),
    ]
