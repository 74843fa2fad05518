"""``guestpv bind``: take a function from the kernel's driver."""

from __future__ import annotations

from dataclasses import asdict

import click

from .completion import complete_address
from .report import Report, reporting
from .vfio_option import NOIOMMU, VFIO_BACKEND

EXAMPLE = """\b
Examples:
  guestpv bind 0000:01:00.0
  guestpv bind 0000:01:00.0 --user alice
"""


@click.command(epilog=EXAMPLE)
@click.argument("address", shell_complete=complete_address)
@click.option("--user", metavar="NAME", help="Let this user drive the function, without being root.")
@click.option("--force", is_flag=True, help="Also when the machine uses it (root disk, default route...).")
@VFIO_BACKEND
@reporting
def bind(report: Report, address: str, user: str | None, force: bool, vfio_backend: str) -> None:
    """Take the function at ADDRESS from the kernel's driver and bind it to vfio-pci.

    `guestpv net up` does this by itself where it has to; a function bound by hand stays bound until
    `guestpv unbind`. The kernel's driver is remembered.
    """
    from ..vfio.binding import bind as take
    from ..vfio.ways import RISK

    noiommu = vfio_backend == NOIOMMU
    bound = take(address.removeprefix("vfio:"), force=force, user=user, noiommu=noiommu)
    if noiommu:
        report.warn(RISK)

    def show() -> None:
        if bound.changed:
            click.echo(f"{bound.address} is bound to vfio-pci (before: {bound.driver or 'no driver'}).")
        else:
            click.echo(f"{bound.address} was bound to vfio-pci already.")
        if user:
            click.echo(f"{bound.node} belongs to {user} now.")
        for member in bound.blockers:
            click.echo(f"Its group also holds {member.address} ({member.what}): {member.command}")

    report.done(asdict(bound) | {"user": user}, show)
