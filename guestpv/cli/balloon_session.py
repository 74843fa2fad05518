"""One balloon."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from ..services.balloon import DEFAULT_RATE, BalloonService, mib
from ..services.control import ControlServer
from ..spec import balloon as spec_balloon
from ..system import SYSTEM
from .driven import Driven
from .kinds import BALLOON
from .signals import Stop

FIRST_VICTIM: Final = "1000"
"""Worst ``oom_score_adj``: should all else fail, killing the balloon gives the guest its memory back."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for.

    Attributes:
        spec: the device; None takes the only drivable one.
        features: such as ``-stats_vq``.
        keep_free: bytes that stay available to the guest; None for the default.
        rate: bytes a second that the balloon grows by at most.
        force: also when something uses the function.
        restart: reset the device and go on when it breaks.
        vfio_backend: the way into VFIO, or ``auto``.
    """

    spec: str | None = None
    features: str = ""
    keep_free: int | None = None
    rate: int = DEFAULT_RATE
    force: bool = False
    restart: bool = False
    vfio_backend: str = "auto"


class BalloonSession(Driven):
    """A driven balloon, from ``run`` to its end; it follows what the host wants."""

    kind = BALLOON

    def __init__(self, wishes: Wishes, tell: Callable[[str], None]) -> None:
        super().__init__(wishes, tell)
        self._wishes = wishes
        self._service: BalloonService | None = None

    def _bring_up(self, undo: ExitStack, stop: Stop, control: ControlServer) -> None:
        transport = self._open(undo, stop)
        service = BalloonService(transport, keep_free=self._wishes.keep_free, rate=self._wishes.rate)
        undo.callback(service.close)
        if transport.has(spec_balloon.F_DEFLATE_ON_OOM):
            SYSTEM.write_text("/proc/self/oom_score_adj", FIRST_VICTIM)
        with self._lock:
            self._service = service
        control.listen(self._function)
        self._say(f"the host wants {mib(service.target)} in the balloon")
        stop.check()

    def _restart(self) -> None:
        assert self._service is not None
        self._service.restart()

    def _watch(self, seconds: float, wake_fd: int) -> list[str]:
        assert self._service is not None
        return self._service.watch(seconds, wake_fd)

    def status(self) -> dict[str, Any]:
        """What it is and how it stands, from any thread."""
        with self._lock:
            service = self._service
        if service is None:
            return {"spec": self._spec, "function": self._function, "events": list(self._events)}
        return {
            "name": self._function,
            **self._identity(service.features),
            **service.stats(),
            "restarts": self._restarts.report(),
            "events": list(self._events),
        }
