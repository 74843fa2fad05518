"""``guestpv balloon down``: take all memory back and give the function back."""

from __future__ import annotations

import click

from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv balloon down
  guestpv balloon down 0000:05:00.0
"""


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, metavar="[ADDRESS]")
@click.option("--all", "everything", is_flag=True, help="All balloons that are up.")
@reporting
def down(report: Report, name: str | None, everything: bool) -> None:
    """End the balloon with this PCI ADDRESS, or the only one, and wait for it.

    All memory comes back from the host, the device is reset, and the function is given back to the
    kernel's driver if `balloon up` took it from there.
    """
    from .kinds import BALLOON, end

    end(report, BALLOON, BALLOON.find(name), everything, lambda farewell: "the balloon")
