"""``guestpv blk status``: the disks that are up."""

from __future__ import annotations

import time
from typing import Any

import click

from .report import Report, reporting

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
    report.done(found, lambda: show(found, report.verbose))


def show(found: list[dict[str, Any]], verbose: int) -> None:
    """For a person."""
    from .blk_up import describe
    from .counters import amount
    from .restarts import row
    from .tables import console, indented, pairs, table

    out = console()
    if not found:
        out.print("Nothing is up. (guestpv blk up)")
    for number, data in enumerate(found):
        if number:
            out.print()
        if "error" in data:
            out.print(f"error: {data['error']}")
            continue
        minutes, seconds = divmod(int(time.time() - data["started"]), 60)
        rows = describe(data)
        rows += [
            ("read", f"{data['reads']} times, {amount(data['bytes_read'], 'B', 1024)}"),
            ("written", f"{data['writes']} times, {amount(data['bytes_written'], 'B', 1024)}"),
            (
                "other",
                f"{data['flushes']} flushes, {data['discards']} discards, {data['zeroes']} zeroed, "
                f"{data['errors']} errors",
            ),
            (
                "requests",
                f"{data['requests']} with {data['kicks']} kicks and {data['interrupts']} interrupts",
            ),
            *row(data),
            ("process", f"{data['pid']}, for {minutes} min {seconds} s"),
        ]
        out.print(pairs(rows))
        if verbose:
            columns = ("reads", "writes", "flushes", "requests", "kicks", "interrupts", "wakeups")
            headings = [column.upper() for column in columns]
            lines = [
                (str(index), *(str(queue[column]) for column in columns))
                for index, queue in enumerate(data["queues"])
            ]
            out.print(table(("QUEUE", *headings), lines, right=" ".join(headings)))
            out.print("events")
            for event in data["events"]:
                when = time.strftime("%F %T", time.localtime(event["time"]))
                out.print(indented(f"{when} {event['event']}"))
