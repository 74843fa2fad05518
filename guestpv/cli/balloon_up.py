"""``guestpv balloon up``: follow the host's wishes for memory."""

from __future__ import annotations

import re
from typing import Any

import click

from ..errors import UsageError
from .completion import complete_address
from .report import Report, reporting
from .restarts import option as restart_option
from .vfio_option import VFIO_BACKEND
from .views import bring_up

EXAMPLE = """\b
Examples:
  guestpv balloon up                      the only balloon
  guestpv balloon up --detach --keep-free 256M
  guestpv balloon up 0000:05:00.0 --rate 64M
The host sets the target: QMP `balloon`, `virsh setmem`.
"""

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """An amount of memory: bytes, or with K, M, G or T (powers of 1024)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The amount in bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no amount of memory, such as 256M or 2G", param, ctx)
        return int(match[1]) << UNITS[match[2].upper()]


@click.command(epilog=EXAMPLE)
@click.argument("spec", required=False, shell_complete=complete_address)
@click.option(
    "--features",
    default="",
    metavar="LIST",
    help="Insist on features (+a) or leave them out (-b): -stats_vq.",
)
@click.option(
    "--keep-free",
    type=Size(),
    help="Memory that stays available to this guest, whatever the host wants.  [default: 5 %, at least 64M]",
)
@click.option(
    "--rate",
    type=Size(),
    default="256M",
    show_default=True,
    help="The balloon grows by at most this a second.",
)
@restart_option
@click.option("--detach", is_flag=True, help="Return once it is up; `guestpv balloon down` ends it.")
@click.option("--force", is_flag=True, help="Also when something uses the function.")
@VFIO_BACKEND
@reporting
def up(
    report: Report,
    spec: str | None,
    features: str,
    keep_free: int | None,
    rate: int,
    restart: bool,
    detach: bool,
    force: bool,
    vfio_backend: str,
) -> None:
    """Drive the balloon SPEC: give memory to the host as it asks for it, and take it back.

    Takes the function from the kernel's driver if it has to, follows the host's target, answers its
    requests for statistics, and shrinks when this guest runs short of memory, until Ctrl-C, SIGTERM or
    `guestpv balloon down`. Then all memory comes back and the kernel gets the function back.

    Without SPEC it takes the balloon, if there is exactly one that can be driven.
    """
    from .balloon_session import BalloonSession, Wishes
    from .balloon_view import BalloonLine, describe
    from .kinds import BALLOON

    if rate < 4096:
        raise UsageError(f"--rate {rate} is less than a page a second", hint="guestpv balloon up --help")
    wishes = Wishes(
        spec=spec,
        features=features,
        keep_free=keep_free,
        rate=rate,
        force=force,
        restart=restart,
        vfio_backend=vfio_backend,
    )
    bring_up(
        BALLOON,
        BalloonSession,
        wishes,
        report,
        detach=detach,
        describe=describe,
        ending="Ctrl-C takes all memory back.",
        line=lambda status: BalloonLine(),
    )
