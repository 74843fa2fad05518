"""Interrupts on their way from the device's eventfds to the driver's, each of them told."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..system import SYSTEM
from ..transport.interrupts import Fanout


class Relay:
    """Reads eventfds in a thread of its own and passes every event on."""

    def __init__(self) -> None:
        self._fanout = Fanout()
        self._fds: list[int] = []

    def add(self, source: int, tell: Callable[[], None]) -> int:
        """The eventfd that stands for ``source`` from now on; ``tell`` is called before it fires."""
        sink = SYSTEM.eventfd()
        self._fds.append(sink)

        def pass_on() -> None:
            tell()
            os.eventfd_write(sink, 1)

        self._fanout.add(source, pass_on)
        return sink

    def close(self) -> None:
        """Stop the thread and close the eventfds. Idempotent."""
        self._fanout.close()
        while self._fds:
            SYSTEM.close(self._fds.pop())
