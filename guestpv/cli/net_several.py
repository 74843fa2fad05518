"""``guestpv net up`` with several functions: one process each, brought up and taken down together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import GuestpvError
from ..services.control import DOWN_TIME_LIMIT, ask
from ..system import SYSTEM
from .driven import detach as detach_one
from .kinds import NET
from .report import Report
from .session import Session, Wishes
from .signals import Stop

LOOK: Final = 1.0
"""Seconds between looks at the processes."""


def up_together(wishes: Sequence[Wishes], report: Report, detach: bool) -> None:
    """Bring all of them up, or none; without ``detach`` stay until Ctrl-C or until the last has ended.

    Raises:
        GuestpvError: one of them did not come up, and all are down again; or one ended by itself.
    """
    from .net_up import describe
    from .views import show

    up: list[dict[str, Any]] = []
    try:
        for wish in wishes:
            detach_one(NET, Session, wish, report, up.append)
    except BaseException:
        take_down(up)
        raise

    def human() -> None:
        for status in up:
            show(describe(status), f"Up in process {status['pid']}.")
        if not detach:
            report.say("Ctrl-C gives all of them back.")

    report.done(up, human)
    if detach:
        return
    ended: dict[int, int] = {}
    with Stop() as stop:
        while not stop.wanted and len(ended) < len(up):
            SYSTEM.poll([stop.fd], LOOK)
            for status in up:
                gone, code = 0, 0
                if status["pid"] not in ended:
                    gone, code = os.waitpid(status["pid"], os.WNOHANG)
                if gone:
                    ended[gone] = os.waitstatus_to_exitcode(code)
                    report.say(f"{status['name']} has ended")
        take_down([status for status in up if status["pid"] not in ended])
    if bad := [status for status in up if ended.get(status["pid"], 0)]:
        raise GuestpvError(
            f"{', '.join(status['name'] for status in bad)} ended with an error",
            where=", ".join(status["function"] for status in bad),
            hint="\n".join(f"cat {status['log']}" for status in bad),
        )


def take_down(up: list[dict[str, Any]]) -> None:
    """End those that are up, the last one first; whoever is gone already is well."""
    for status in reversed(up):
        with contextlib.suppress(OSError, GuestpvError):
            ask(Path(status["log"]).with_suffix(".sock"), "down", DOWN_TIME_LIMIT)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(status["pid"], 0)
