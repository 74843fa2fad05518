"""Whether a driven device is still well, known within a second: also where no interrupt tells."""

from __future__ import annotations

import time
from typing import Final

from ..transport.base import Transport

LOOK: Final = 0.25
"""Seconds between looks at ``device_status``. A function that vanishes, or that somebody else resets, sends
no interrupt; four register reads a second cost nothing."""


class Health:
    """Looks at ``device_status`` of a live device, no more often than it has to."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._next = 0.0

    def check(self, now: bool = False) -> None:
        """Look if it is time, or at once.

        Raises:
            DeviceViolation: the device needs a reset, or was reset by somebody else.
            DeviceGone: the function is gone.
        """
        at = time.monotonic()
        if now or at >= self._next:
            self._next = at + LOOK
            self._transport.check_live()
