"""One network device driven as a link, with its address."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from ..drivers.net_control import Rss
from ..errors import GuestpvError
from ..services.addressing import Addressing, KernelLink
from ..services.capture import SUFFIX, CaptureServer
from ..services.control import ControlServer
from ..services.dhcp import Settings
from ..services.net import NetService
from ..services.resolver import Resolver
from .driven import Driven
from .kinds import NET
from .signals import Stop

SETTLING_TICK: Final = 0.05
"""Seconds between looks at the link while an address is awaited."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for.

    Attributes:
        spec: the device; None takes the only drivable one.
        features: such as ``+mq,-ring_packed``.
        settings: a given address; None asks a DHCP server.
        addressed: False leaves the link without an address.
        ifname: name of the link; None lets the kernel number it.
        poll: spin instead of waiting for interrupts.
        queue_pairs: how many.
        rss: how received packets are steered, with RSS.
        force: also when the machine uses the function.
        restart: reset the device and go on when it breaks.
        vfio_backend: the way into VFIO, or ``auto``.
    """

    spec: str | None = None
    features: str = ""
    settings: Settings | None = None
    addressed: bool = True
    ifname: str | None = None
    poll: bool = False
    queue_pairs: int = 1
    rss: Rss | None = None
    force: bool = False
    restart: bool = False
    vfio_backend: str = "auto"


class Session(Driven):
    """A network device driven as a link, from ``run`` to its end."""

    kind = NET

    def __init__(self, wishes: Wishes, tell: Callable[[str], None]) -> None:
        super().__init__(wishes, tell)
        self._wishes = wishes
        self._service: NetService | None = None
        self._addressing: Addressing | None = None
        self._described: dict[str, Any] = {}

    def _bring_up(self, undo: ExitStack, stop: Stop, control: ControlServer) -> None:
        wishes = self._wishes
        service = NetService(
            self._open(undo, stop),
            ifname=wishes.ifname,
            poll=wishes.poll,
            queue_pairs=wishes.queue_pairs,
            rss=wishes.rss,
        )
        undo.callback(self._close_service, service)
        self._described = {
            "name": service.ifname,
            **self._identity(service.features),
            "mac": service.mac,
            "mtu": service.mtu,
            "queue_pairs": wishes.queue_pairs,
        }
        self._service = service
        path = control.listen(service.ifname)
        undo.callback(CaptureServer(path.with_suffix(SUFFIX), self._capture).close)
        self._say(f"{service.ifname} is up: MAC {service.mac}, MTU {service.mtu}")
        if not service.link_up:
            self._say("link down")
        stop.check()
        if wishes.addressed:
            if wishes.settings is None:
                self._say("asking for an address (DHCP)")
            self._addressing = Addressing(
                KernelLink(service.ifname), wishes.settings, Resolver(service.ifname)
            )
            undo.callback(self._addressing.close)
            while not self._addressing.ready:
                self._look_after(stop, SETTLING_TICK)
                stop.check()
                if control.down_requested:
                    raise GuestpvError(
                        "ended by guestpv net down before it was up; everything was given back"
                    )

    @property
    def _name(self) -> str:
        return str(self._described["name"])

    def _restart(self) -> None:
        assert self._service is not None
        self._service.restart()

    def _watch(self, seconds: float, wake_fd: int) -> list[str]:
        assert self._service is not None
        events = self._service.watch(seconds, wake_fd)
        return events + (self._addressing.poll() if self._addressing is not None else [])

    def _capture(self, fd: int) -> None:
        assert self._service is not None
        with self._lock:
            self._service.capture(fd)

    def _close_service(self, service: NetService) -> None:
        with self._lock:
            service.close()

    def status(self) -> dict[str, Any]:
        """What it is and how it is, from any thread: identity, address, counters, last events."""
        addressing = self._addressing
        settings = addressing.settings if addressing else None
        counters: dict[str, Any] = {}
        if self._service is not None:
            with self._lock:
                counters = self._service.stats()
        return {
            **(self._described or {"spec": self._spec, "function": self._function}),
            "address": settings.as_dict() if settings else None,
            **counters,
            "restarts": self._restarts.report(),
            "events": list(self._events),
        }
