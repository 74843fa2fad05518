"""SIGINT, SIGTERM and SIGHUP as a wish to stop, looked at where stopping is safe."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from ..errors import GuestpvError


class Stopped(GuestpvError):
    """Somebody stopped it before it was up."""

    code = "stopped"


class Stop:
    """While entered, signals set a flag instead of interrupting a half-done step.

    Attributes:
        fd: readable once stopping is wanted, or after ``wake``; for ``poll`` and ``select``.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    @property
    def wanted(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    @property
    def reason(self) -> str:
        """The signal's name, or an empty string."""
        return self._signal.name if self._signal else ""

    def check(self) -> None:
        """Go no further if a signal came.

        Raises:
            Stopped: one came.
        """
        if self._signal is not None:
            raise Stopped(f"stopped by {self._signal.name} before it was up; everything was given back")

    def wake(self) -> None:
        """End a wait on ``fd``, from any thread."""
        os.eventfd_write(self.fd, 1)

    def calm(self) -> None:
        """Let the next wait on ``fd`` wait again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
        self.wake()

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup it stays up when the terminal goes.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.fd)
