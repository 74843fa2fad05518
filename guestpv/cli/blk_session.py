"""One disk shown as a block device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..errors import GuestpvError, Refused
from ..services.blk import BlkService
from ..services.control import ControlServer
from ..services.nbd import clear_stale, remember
from ..system import SYSTEM
from .driven import Driven
from .kinds import BLK
from .signals import Stop


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for.

    Attributes:
        spec: the device; None takes the only drivable one.
        features: such as ``+mq,-ring_packed``.
        index: of ``/dev/nbdN``; None takes a free one.
        queues: connections; None for the default.
        poll: spin instead of waiting for interrupts.
        force: also when the machine uses the function.
        restart: reset the device and go on when it breaks.
        vfio_backend: the way into VFIO, or ``auto``.
    """

    spec: str | None = None
    features: str = ""
    index: int | None = None
    queues: int | None = None
    poll: bool = False
    force: bool = False
    restart: bool = False
    vfio_backend: str = "auto"


class BlkSession(Driven):
    """A driven disk, from ``run`` to its end. While it is mounted a wish to end it waits until it is not."""

    kind = BLK

    def __init__(self, wishes: Wishes, tell: Callable[[str], None]) -> None:
        super().__init__(wishes, tell)
        self._wishes = wishes
        self._service: BlkService | None = None
        self._busy = False

    def _bring_up(self, undo: ExitStack, stop: Stop, control: ControlServer) -> None:
        wishes, directory = self._wishes, self.kind.directory()
        for name in clear_stale(directory):
            self._say(f"/dev/{name}, which a killed process left behind, is taken down")
        service = BlkService(
            self._open(undo, stop),
            index=wishes.index,
            queues=wishes.queues,
            poll=wishes.poll,
            restarts=wishes.restart,
        )
        undo.callback(self._close, service)
        if service.index is not None:
            undo.callback(SYSTEM.unlink, remember(directory, service.index))
        with self._lock:
            self._service = service
        control.listen(service.name)
        self._say(f"{service.path} is up: {service.disk.capacity} bytes")
        stop.check()

    @property
    def _running(self) -> BlkService:
        assert self._service is not None
        return self._service

    @property
    def _name(self) -> str:
        return self._running.name

    def _close(self, service: BlkService) -> None:
        with self._lock:
            service.close()

    def _may_end(self) -> bool:
        try:
            return self._running.settle()
        except Refused as refused:
            if not self._busy:
                self._say(f"{refused.message}; going down once it is not: {refused.hint}")
            self._busy = True
            return False

    def _restart(self) -> None:
        self._running.restart()

    def _watch(self, seconds: float, wake_fd: int) -> list[str]:
        return self._running.watch(seconds, wake_fd)

    def _judge(self, events: list[str]) -> None:
        super()._judge(events)
        if "disconnected" in events:
            raise GuestpvError("somebody else disconnected it (nbd-client -d?)", where=self._running.path)

    def status(self) -> dict[str, Any]:
        """What it is and how it stands, from any thread."""
        with self._lock:
            service = self._service
            if service is None:
                return {"spec": self._spec, "function": self._function, "events": list(self._events)}
            disk = service.disk
            return {
                "name": service.name,
                "path": service.path,
                **self._identity(service.features),
                "block_size": disk.block_size,
                "read_only": disk.read_only,
                "cache": "write-back" if disk.volatile_cache else "write-through",
                "connections": len(disk.queues),
                **service.stats(),
                "restarts": self._restarts.report(),
                "events": list(self._events),
            }
