"""One network device from bind to give-back: each step with its undo, in one place."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from ..errors import DeviceGone, GuestpvError, Refused, UsageError
from ..opener import Spec
from ..opener import open as open_transport
from ..pci.capabilities import type_name
from ..services.addressing import Addressing, KernelLink
from ..services.control import ControlServer
from ..services.dhcp import Settings
from ..services.net import NetService
from ..services.resolver import Resolver
from ..spec import features as feat
from ..system import SYSTEM
from ..transport.base import FeatureFilter
from ..vfio.binding import bind, unbind
from ..vfio.lock import runtime_directory
from ..vfio.survey import DEVICES, Function, look_up, survey
from .signals import Stop

TICK: Final = 1.0
"""Seconds between looks at lease and counters while the link is up."""
SETTLING_TICK: Final = 0.05
"""The same while an address is awaited."""
UNPLUG_TIME_LIMIT: Final = 3.0
EVENTS_KEPT: Final = 50


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
        force: also when the machine uses the function.
    """

    spec: str | None = None
    features: str = ""
    settings: Settings | None = None
    addressed: bool = True
    ifname: str | None = None
    poll: bool = False
    queue_pairs: int = 1
    force: bool = False


class Session:
    """A network device driven as a link, from ``run`` to its end.

    Args:
        wishes: what the user asked for.
        tell: called with every event in words.
    """

    def __init__(self, wishes: Wishes, tell: Callable[[str], None]) -> None:
        self._wishes = wishes
        self._tell = tell
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._service: NetService | None = None
        self._addressing: Addressing | None = None
        self._lock = threading.Lock()
        self._started = time.time()
        self._spec = ""
        self._function = ""
        self._driver_before: str | None = None
        self._bound = False
        self._identity: dict[str, Any] = {}

    def run(self, ready: Callable[[dict[str, Any]], None], refresh: Callable[[dict[str, Any]], None]) -> None:
        """Bring the device up, call ``ready`` once, look after it until somebody ends it, undo everything.

        Args:
            ready: called with the description once the link is up and has its address.
            refresh: called with the status every second.

        Raises:
            Stopped: a signal came before it was up.
            GuestpvError: it could not be brought up, or came to an end by itself; everything is undone.
        """
        with Stop() as stop, ControlServer(runtime_directory(), self.status, stop.wake) as control:
            try:
                with ExitStack() as undo:
                    self._bring_up(undo, stop, control)
                    ready(self.status())
                    while not (stop.wanted or control.down_requested):
                        self._look_after(stop, TICK)
                        refresh(self.status())
                    self._say(f"going down: {stop.reason or 'guestpv net down'}")
            except GuestpvError as error:
                control.farewell = {
                    "error": f"{error.where}: {error.message}" if error.where else error.message
                }
                raise
            control.farewell = {
                "name": self._identity["name"],
                "function": self._function,
                "driver": self._driver_after(),
            }

    def _bring_up(self, undo: ExitStack, stop: Stop, control: ControlServer) -> None:
        wishes = self._wishes
        wanted = FeatureFilter.parse(wishes.features, feat.NET)
        spec = Spec.parse(wishes.spec) if wishes.spec else Spec("vfio", choose(wishes.force).address)
        self._spec = wishes.spec or f"vfio:{spec.body}"
        if spec.scheme == "vfio":
            self._take(spec.body, undo)
        stop.check()
        transport = open_transport(self._spec)
        undo.callback(transport.close)
        self._function = transport.name
        require_net(transport.device_type, transport.name)
        if wishes.features:
            transport.feature_filter = wanted
        stop.check()
        service = NetService(
            transport, ifname=wishes.ifname, poll=wishes.poll, queue_pairs=wishes.queue_pairs
        )
        undo.callback(self._close_service, service)
        self._identify(service)
        self._service = service
        control.listen(service.ifname)
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

    def _take(self, address: str, undo: ExitStack) -> None:
        """Bind the function if nobody did; what was bound here is given back here."""
        function = look_up(address)
        self._function = function.address
        require_net(function.type, function.address)
        bound = bind(function.address, force=self._wishes.force)
        self._driver_before, self._bound = bound.driver, bound.changed
        if bound.changed:
            undo.callback(self._give_back)
            self._say(f"{function.address} taken from {bound.driver or 'no driver'}")

    def _give_back(self) -> None:
        try:
            unbind(self._function)
        except (GuestpvError, OSError):
            if not self._unplugged():
                raise
            self._say(f"{self._function} is unplugged: there is nothing to give back")
            return
        self._say(f"{self._function} given back to {self._driver_after() or 'no driver'}")

    def _unplugged(self) -> bool:
        """Whether it goes away: while the kernel removes it, its files fail in all kinds of ways."""
        deadline = time.monotonic() + UNPLUG_TIME_LIMIT
        while time.monotonic() < deadline:
            if not SYSTEM.exists(f"{DEVICES}/{self._function}"):
                return True
            time.sleep(0.02)
        return False

    def _driver_after(self) -> str | None:
        """The kernel driver that has the function now; None where it is none of the kernel's."""
        try:
            return look_up(self._function).driver
        except UsageError:
            return None

    def _look_after(self, stop: Stop, seconds: float) -> None:
        assert self._service is not None
        events = self._service.watch(seconds, stop.fd)
        # What woke us is looked at next, by the caller.
        stop.calm()
        if self._addressing is not None:
            events += self._addressing.poll()
        for event in events:
            self._say(event)
        if "release requested" in events:
            raise DeviceGone(
                "the kernel asked for the function back: it is being unplugged, or somebody unbinds it",
                where=self._function,
            )
        if "bus error" in events:
            raise DeviceGone(
                "the function reported an unrecoverable bus error", where=self._function, hint="dmesg | tail"
            )

    def _close_service(self, service: NetService) -> None:
        # The control thread must not look at counters of a pump that is being freed.
        with self._lock:
            service.close()

    def _say(self, event: str) -> None:
        self._events.append({"time": time.time(), "event": event})
        self._tell(event)

    def _identify(self, service: NetService) -> None:
        self._identity = {
            "name": service.ifname,
            "spec": self._spec,
            "function": self._function,
            "pid": os.getpid(),
            "started": self._started,
            "driver_before": self._driver_before,
            "stays_bound": Spec.parse(self._spec).scheme == "vfio" and not self._bound,
            "mac": service.mac,
            "mtu": service.mtu,
            "queue_pairs": self._wishes.queue_pairs,
            "features": feat.feature_names(feat.NET, service.features),
            "feature_mask": hex(service.features),
        }

    def status(self) -> dict[str, Any]:
        """What it is and how it is, from any thread: identity, address, counters, last events."""
        addressing = self._addressing
        settings = addressing.settings if addressing else None
        counters: dict[str, Any] = {}
        if self._service is not None:
            with self._lock:
                counters = self._service.stats()
        return {
            **(self._identity or {"spec": self._spec, "function": self._function, "pid": os.getpid()}),
            "address": settings.as_dict() if settings else None,
            **counters,
            "events": list(self._events),
        }


def require_net(device_type: int, name: str) -> None:
    """Raise UsageError unless it is a network device."""
    if device_type != feat.NET:
        raise UsageError(
            f"it is a virtio {type_name(device_type)} device, no network device",
            where=name,
            hint="guestpv list",
        )


def choose(force: bool) -> Function:
    """The only network function that can be driven.

    Args:
        force: one that is in use counts, too.

    Raises:
        Refused: there is none.
        UsageError: there are several.
    """
    known = [function for function in survey() if function.type == feat.NET]
    if not known:
        raise Refused(
            "this machine has no virtio network function",
            hint="QEMU: -device virtio-net-pci,netdev=...,disable-legacy=on,iommu_platform=on",
        )
    found = [function for function in known if function.drivable or (force and function.uses)]
    if not found:
        reasons = "; ".join(f"{function.address}: {function.problem}" for function in known)
        raise Refused(f"no network function can be driven: {reasons}", hint=known[0].hint)
    if len(found) > 1:
        names = ", ".join(f"{function.address} (driver {function.driver or 'none'})" for function in found)
        raise UsageError(f"which one? {names}", hint=f"guestpv net up {found[0].address}")
    return found[0]
