"""``guestpv balloon down``: take all memory back and give the function back."""

from __future__ import annotations

import click

from ..errors import GuestpvError, TimeLimit, UsageError
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
    from ..services.control import DOWN_TIME_LIMIT, ask
    from .balloon_session import find
    from .net_down import where_it_is

    found = find(name)
    if not found and not everything:
        raise UsageError("nothing is up", hint="guestpv balloon status")
    if len(found) > 1 and not everything:
        names = " ".join(endpoint.name for endpoint in found)
        raise UsageError(
            f"which one? up are: {names}", hint="guestpv balloon down ADDRESS, or guestpv balloon down --all"
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
            click.echo(f"the balloon is down{where_it_is(one)}")

    report.done(ended, show)
