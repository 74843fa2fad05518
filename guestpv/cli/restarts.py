"""``--restart``: how often a device that went wrong is reset and driven on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import click

from ..errors import BackEndGone, DeviceViolation, FeaturesRefused, GuestpvError, TimeLimit

MOST: Final = 5
PERIOD: Final = 600.0
"""So many restarts within so many seconds are the end: what breaks again at once is not mended by a reset."""
PAUSE: Final = 0.1
"""Seconds before a restart that did not work is tried again; twice as long each time."""
MENDABLE: Final = (DeviceViolation, TimeLimit, FeaturesRefused, BackEndGone)
"""What a reset may mend: a device that asks for one, that broke its rings, that answers no more, or that is
still coming up again, as a new back end may be."""

option: Final = click.option(
    "--restart",
    is_flag=True,
    help="Reset the device and go on when it breaks, asks for a reset or gets another back end, at most "
    f"{MOST} times in {PERIOD / 60:g} minutes.",
)


class Restarts:
    """Restarts of one device.

    Args:
        wanted: whether the user wants any.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._times: deque[float] = deque()
        self._count = 0
        self._reason = ""

    def mend(
        self,
        trouble: GuestpvError,
        restart: Callable[[], None],
        tell: Callable[[str], None],
        wait: Callable[[float], bool],
    ) -> None:
        """Restart until it works.

        Args:
            trouble: what went wrong; raised again where it may not be, or cannot be, mended.
            restart: resets the device and goes on.
            tell: called with what happens, in words.
            wait: waits so many seconds; whether somebody wants an end instead.

        Raises:
            GuestpvError: ``trouble``, or what a restart failed with.
        """
        pause = PAUSE
        while True:
            if not self._wanted or not isinstance(trouble, MENDABLE):
                raise trouble
            now = time.monotonic()
            while self._times and self._times[0] < now - PERIOD:
                self._times.popleft()
            if len(self._times) >= MOST:
                tell(f"{MOST} restarts in {PERIOD / 60:g} minutes: no more of them")
                raise trouble
            self._times.append(now)
            self._count += 1
            self._reason = str(trouble).splitlines()[0]
            tell(f"restart {self._count}: {self._reason}")
            try:
                restart()
                tell("the device was reset and goes on")
                return
            except MENDABLE as error:
                trouble = error
            if wait(pause):
                raise trouble
            pause *= 2

    def report(self) -> dict[str, Any]:
        """``{"wanted", "count", "reason"}``: may there be any, how many were there, why the last."""
        return {"wanted": self._wanted, "count": self._count, "reason": self._reason or None}


def row(status: dict[str, Any]) -> list[tuple[str, str]]:
    """The line about restarts in a status for a person, where there were any."""
    restarts = status.get("restarts") or {"count": 0}
    return [("restarts", f"{restarts['count']}, the last: {restarts['reason']}")] if restarts["count"] else []
