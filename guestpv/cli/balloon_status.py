"""``guestpv balloon status``: the balloons that are up."""

from __future__ import annotations

import time
from typing import Any

import click

from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv balloon status
  guestpv balloon status --json | jq .data[0].pages
"""


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, metavar="[ADDRESS]")
@reporting
def status(report: Report, name: str | None) -> None:
    """Show the balloons that are up, or the one with this PCI ADDRESS.

    With --json amounts are in pages of 4096 bytes, unless a name says bytes.
    """
    from .kinds import BALLOON

    found = [endpoint.status for endpoint in BALLOON.find(name)]
    report.done(found, lambda: show(found, report.verbose))


def show(found: list[dict[str, Any]], verbose: int) -> None:
    """For a person."""
    from .balloon_view import describe, size
    from .restarts import row
    from .tables import console, indented, pairs

    out = console()
    if not found:
        out.print("Nothing is up. (guestpv balloon up)")
    for number, data in enumerate(found):
        if number:
            out.print()
        if "error" in data:
            out.print(f"error: {data['error']}")
            continue
        counters = data["counters"]
        minutes, seconds = divmod(int(time.time() - data["started"]), 60)
        rows = describe(data)
        rows += [
            (
                "moved",
                f"{size(counters['inflated'])} in, {size(counters['deflated'])} out, "
                f"of that {size(counters['given_back'])} because memory was short",
            ),
            ("statistics", f"answered {counters['statistics']} times"),
            *row(data),
            ("process", f"{data['pid']}, for {minutes} min {seconds} s"),
        ]
        out.print(pairs(rows))
        if verbose:
            out.print("events")
            for event in data["events"]:
                when = time.strftime("%F %T", time.localtime(event["time"]))
                out.print(indented(f"{when} {event['event']}"))
