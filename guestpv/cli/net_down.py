"""``guestpv net down``: end a link and give its function back."""

from __future__ import annotations

import click

from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv net down
  guestpv net down pv0
  guestpv net down --all
"""


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, metavar="[NAME|ADDRESS]")
@click.option("--all", "everything", is_flag=True, help="All links that are up.")
@reporting
def down(report: Report, name: str | None, everything: bool) -> None:
    """End the link with this NAME or PCI ADDRESS, or the only one, and wait for it.

    The device is reset, its memory unmapped, and the function is given back to the kernel's driver
    if `net up` took it from there.
    """
    from .kinds import NET, end

    end(report, NET, NET.find(name), everything)
