"""``guestpv blk down``: end a disk and give its function back."""

from __future__ import annotations

import errno
import os

import click

from ..errors import Refused
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
    from .kinds import BLK, end

    found = BLK.find(name and name.removeprefix("/dev/"))
    if everything or len(found) == 1:
        for endpoint in found:
            require_unused(str(endpoint.status.get("path", "")))
    end(report, BLK, found, everything)


def require_unused(path: str) -> None:
    """Raise Refused while a block device is mounted or claimed otherwise."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Refused(
                f"{path} is in use: mounted, or claimed by RAID or LVM", hint=f"umount {path}"
            ) from None
