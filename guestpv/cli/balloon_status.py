"""``guestpv balloon status``: the balloons that are up."""

from __future__ import annotations

from typing import Any

import click

from .report import Report, reporting
from .views import show_all

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
    report.done(found, lambda: show_all(BALLOON, found, rows, report.verbose))


def rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The balloon and its counters, as names and values."""
    from .balloon_view import describe, size

    counters = data["counters"]
    return [
        *describe(data),
        (
            "moved",
            f"{size(counters['inflated'])} in, {size(counters['deflated'])} out, "
            f"of that {size(counters['given_back'])} because memory was short",
        ),
        ("statistics", f"answered {counters['statistics']} times"),
    ]
