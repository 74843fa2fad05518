"""``guestpv blk status``: the disks that are up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from .report import Report, reporting
from .views import show_all

EXAMPLE = """\b
Examples:
  guestpv blk status
  guestpv blk status nbd0 --json | jq .data[0].writes
"""


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, metavar="[NAME|ADDRESS]")
@reporting
def status(report: Report, name: str | None) -> None:
    """Show the disks that are up, or the one with this NAME or PCI ADDRESS, with counters.

    Requests are those of the device: a long read or write is several; kicks are doorbells rung.
    """
    from .kinds import BLK

    found = [endpoint.status for endpoint in BLK.find(name and name.removeprefix("/dev/"))]
    report.done(found, lambda: show_all(BLK, found, rows, report.verbose, queues))


def rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The disk and its counters, as names and values."""
    from .blk_up import describe
    from .counters import amount

    return [
        *describe(data),
        ("read", f"{data['reads']} times, {amount(data['bytes_read'], 'B', 1024)}"),
        ("written", f"{data['writes']} times, {amount(data['bytes_written'], 'B', 1024)}"),
        (
            "other",
            f"{data['flushes']} flushes, {data['discards']} discards, {data['zeroes']} zeroed, "
            f"{data['errors']} errors",
        ),
        ("requests", f"{data['requests']} with {data['kicks']} kicks and {data['interrupts']} interrupts"),
    ]


def queues(data: dict[str, Any], verbose: int) -> Iterator[Any]:
    """A table with a line for each queue, for whoever asks for more."""
    from .tables import table

    if verbose:
        columns = ("reads", "writes", "flushes", "requests", "kicks", "interrupts", "wakeups")
        headings = [column.upper() for column in columns]
        lines = [
            (str(index), *(str(queue[column]) for column in columns))
            for index, queue in enumerate(data["queues"])
        ]
        yield table(("QUEUE", *headings), lines, right=" ".join(headings))
