"""``guestpv unbind``: give a function back to the kernel's driver."""

from __future__ import annotations

from dataclasses import asdict

import click

from .completion import complete_address
from .report import Report, reporting

EXAMPLE = """\b
Example:
  guestpv unbind 0000:01:00.0
"""


@click.command(epilog=EXAMPLE)
@click.argument("address", shell_complete=complete_address)
@click.option(
    "--force", is_flag=True, help="Also while a process drives it: that process is asked to let go."
)
@reporting
def unbind(report: Report, address: str, force: bool) -> None:
    """Give the function at ADDRESS back to the kernel driver that it had.

    This also mends what a process that was killed left behind.
    """
    from ..vfio.binding import unbind as give_back

    done = give_back(address.removeprefix("vfio:"), force=force)

    def show() -> None:
        driver = f"the driver {done.driver}" if done.driver else "no driver"
        click.echo(f"{done.address} has {driver}{' again' if done.changed else '; nothing had to be done'}.")

    report.done(asdict(done), show)
