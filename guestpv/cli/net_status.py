"""``guestpv net status``: the links that are up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from .report import Report, reporting
from .views import show_all

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
    from .net_up import describe

    found = [endpoint.status for endpoint in NET.find(name)]
    report.done(found, lambda: show_all(NET, found, describe, report.verbose, tables))


def tables(data: dict[str, Any], verbose: int) -> Iterator[Any]:
    """What crossed the link, and for whoever asks for more each queue pair."""
    yield counters("", data["rx"], data["tx"])
    if verbose:
        for index, queue in enumerate(data["queues"]):
            ways = [
                {key[3:]: value for key, value in queue.items() if key.startswith(way)}
                for way in ("rx", "tx")
            ]
            yield counters(f"pair {index} ", *ways)


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
