"""``guestpv blk down``: end a disk and give its function back."""

from __future__ import annotations

import errno
import os

import click

from ..errors import GuestpvError, Refused, TimeLimit, UsageError
from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv blk down
  guestpv blk down nbd0
  guestpv blk down --all
"""


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, metavar="[NAME|ADDRESS]")
@click.option("--all", "everything", is_flag=True, help="All disks that are up.")
@reporting
def down(report: Report, name: str | None, everything: bool) -> None:
    """End the disk with this NAME or PCI ADDRESS, or the only one, and wait for it.

    Refused while it is mounted. What the kernel has in memory for it is written and flushed first; then
    the device is reset, its memory unmapped, and the function is given back to the kernel's driver if
    `blk up` took it from there.
    """
    from ..services.control import DOWN_TIME_LIMIT, ask
    from .blk_session import find
    from .net_down import where_it_is

    found = find(name)
    if not found and not everything:
        raise UsageError("nothing is up", hint="guestpv blk status")
    if len(found) > 1 and not everything:
        names = " ".join(endpoint.name for endpoint in found)
        raise UsageError(
            f"which one? up are: {names}", hint="guestpv blk down NAME, or guestpv blk down --all"
        )
    for endpoint in found:
        require_unused(str(endpoint.status.get("path", "")))
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


def require_unused(path: str) -> None:
    """Raise Refused while a block device is mounted or claimed otherwise."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Refused(
                f"{path} is in use: mounted, or claimed by RAID or LVM", hint=f"umount {path}"
            ) from None
