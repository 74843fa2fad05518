"""``guestpv net down``: end a link and give its function back."""

from __future__ import annotations

import click

from ..errors import GuestpvError, TimeLimit, UsageError
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
    from ..services.control import DOWN_TIME_LIMIT, ask, find
    from ..vfio.lock import runtime_directory

    found = find(runtime_directory(), name)
    if not found and not everything:
        raise UsageError("nothing is up", hint="guestpv net status")
    if len(found) > 1 and not everything:
        names = " ".join(endpoint.name for endpoint in found)
        raise UsageError(
            f"which one? up are: {names}", hint="guestpv net down NAME, or guestpv net down --all"
        )
    ended = []
    for endpoint in found:
        try:
            farewell = ask(endpoint.path, "down", DOWN_TIME_LIMIT)
        except TimeLimit as error:
            raise TimeLimit(
                error.message, where=endpoint.name, hint=f"kill {endpoint.status.get('pid', 'PID')}"
            ) from error
        if "error" in farewell:
            raise GuestpvError(f"it ended with an error: {farewell['error']}", where=endpoint.name)
        ended.append(farewell)

    def show() -> None:
        for one in ended:
            click.echo(f"{one['name']} is down{where_it_is(one)}")

    report.done(ended, show)


def where_it_is(farewell: dict[str, str | None]) -> str:
    """Who has the function now, where it is one of the kernel's."""
    function, driver = farewell["function"], farewell["driver"]
    if driver is None:
        return "."
    if driver == "vfio-pci":
        return f"; {function} stays bound to vfio-pci (guestpv unbind {function})."
    return f"; {driver} has {function} again."
