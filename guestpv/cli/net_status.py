"""``guestpv net status``: the links that are up."""

from __future__ import annotations

import time
from typing import Any

import click

from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv net status
  guestpv net status pv0 --json | jq .data[0].rx.packets
"""


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, metavar="[NAME|ADDRESS]")
@reporting
def status(report: Report, name: str | None) -> None:
    """Show the links that are up, or the one with this NAME or PCI ADDRESS, with counters.

    rx counts from the device to the link, tx the other way; kicks are doorbells rung.
    """
    from .kinds import NET

    found = [endpoint.status for endpoint in NET.find(name)]
    report.done(found, lambda: show(found, report.verbose))


def show(found: list[dict[str, Any]], verbose: int) -> None:
    """For a person."""
    from .net_up import describe
    from .restarts import row
    from .tables import console, indented, pairs

    out = console()
    if not found:
        out.print("Nothing is up. (guestpv net up)")
    for number, data in enumerate(found):
        if number:
            out.print()
        if "error" in data:
            out.print(f"error: {data['error']}")
            continue
        minutes, seconds = divmod(int(time.time() - data["started"]), 60)
        rows = describe(data)
        rows += [*row(data), ("process", f"{data['pid']}, for {minutes} min {seconds} s")]
        out.print(pairs(rows))
        out.print(counters("", data["rx"], data["tx"]))
        if verbose:
            for index, queue in enumerate(data["queues"]):
                ways = [
                    {key[3:]: value for key, value in queue.items() if key.startswith(w)}
                    for w in ("rx", "tx")
                ]
                out.print(counters(f"pair {index} ", *ways))
            out.print("events")
            for event in data["events"]:
                when = time.strftime("%F %T", time.localtime(event["time"]))
                out.print(indented(f"{when} {event['event']}"))


def counters(prefix: str, rx: dict[str, int], tx: dict[str, int]) -> Any:
    """A table with a line for either way."""
    from .counters import amount
    from .tables import table

    columns = ("packets", "bytes", "dropped", "kicks", "interrupts")
    rows = [
        (f"{prefix}{name}", *(amount(way[c], "B", 1024) if c == "bytes" else str(way[c]) for c in columns))
        for name, way in (("rx", rx), ("tx", tx))
    ]
    headings = [column.upper() for column in columns]
    return table(("", *headings), rows, right=" ".join(headings))
