"""One balloon from bind to give-back: each step with its undo, in one place."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final

from ..errors import DeviceGone, GuestpvError, Refused, UsageError
from ..opener import Spec
from ..opener import open as open_transport
from ..pci.capabilities import type_name
from ..services.balloon import DEFAULT_RATE, BalloonService, mib
from ..services.control import ControlServer, Endpoint, endpoints
from ..spec import balloon as spec_balloon
from ..spec import features as feat
from ..system import SYSTEM
from ..transport.base import FeatureFilter
from ..vfio.binding import bind, unbind
from ..vfio.lock import runtime_directory
from ..vfio.survey import Function, look_up, survey
from .signals import Stop

TICK: Final = 1.0
"""Seconds between looks at what is shown."""
EVENTS_KEPT: Final = 50
FIRST_VICTIM: Final = "1000"
"""Worst ``oom_score_adj``: should all else fail, killing the balloon gives the guest its memory back."""


def directory() -> str:
    """Where the control sockets of balloons are, apart from those of network links."""
    path = os.path.join(runtime_directory(), "balloon")
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    return path


def find(wanted: str | None) -> list[Endpoint]:
    """The balloons that are up, or the one with this PCI address or SPEC.

    Raises:
        UsageError: an address was given, and no such balloon is up.
    """
    everything = endpoints(directory())
    if wanted is None:
        return everything
    found = [
        one for one in everything if wanted in (one.name, one.status.get("function"), one.status.get("spec"))
    ]
    if not found:
        names = " ".join(one.name for one in everything)
        raise UsageError(
            f"{wanted} is not up", hint=f"up are: {names}" if names else "nothing is up: guestpv balloon up"
        )
    return found


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for.

    Attributes:
        spec: the device; None takes the only drivable one.
        features: such as ``-stats_vq``.
        keep_free: bytes that stay available to the guest; None for the default.
        rate: bytes a second that the balloon grows by at most.
        force: also when something uses the function.
    """

    spec: str | None = None
    features: str = ""
    keep_free: int | None = None
    rate: int = DEFAULT_RATE
    force: bool = False


class BalloonSession:
    """A driven balloon, from ``run`` to its end.

    Args:
        wishes: what the user asked for.
        tell: called with every event in words.
    """

    def __init__(self, wishes: Wishes, tell: Callable[[str], None]) -> None:
        self._wishes = wishes
        self._tell = tell
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._lock = threading.Lock()
        self._started = time.time()
        self._service: BalloonService | None = None
        self._spec = ""
        self._function = ""
        self._driver_before: str | None = None
        self._bound = False

    def run(self, ready: Callable[[dict[str, Any]], None], refresh: Callable[[dict[str, Any]], None]) -> None:
        """Bring the balloon up, call ``ready`` once, follow the host until somebody ends it, undo everything.

        Args:
            ready: called with the status once the device is live.
            refresh: called with the status every second.

        Raises:
            Stopped: a signal came before it was up.
            GuestpvError: it could not be brought up, or came to an end by itself; everything is undone.
        """
        with Stop() as stop, ControlServer(directory(), self.status, stop.wake) as control:
            try:
                with ExitStack() as undo:
                    service = self._bring_up(undo, stop, control)
                    ready(self.status())
                    while not (stop.wanted or control.down_requested):
                        self._look_after(service, stop)
                        refresh(self.status())
                    self._say(f"going down: {stop.reason or 'guestpv balloon down'}")
            except GuestpvError as error:
                control.farewell = {
                    "error": f"{error.where}: {error.message}" if error.where else error.message
                }
                raise
            control.farewell = {
                "name": self._function,
                "function": self._function,
                "driver": self._driver_after(),
            }

    def _bring_up(self, undo: ExitStack, stop: Stop, control: ControlServer) -> BalloonService:
        wishes = self._wishes
        wanted = FeatureFilter.parse(wishes.features, feat.BALLOON)
        spec = Spec.parse(wishes.spec) if wishes.spec else Spec("vfio", choose(wishes.force).address)
        self._spec = wishes.spec or f"vfio:{spec.body}"
        if spec.scheme == "vfio":
            self._take(spec.body, undo)
        stop.check()
        transport = open_transport(self._spec)
        undo.callback(transport.close)
        self._function = transport.name
        require_balloon(transport.device_type, transport.name)
        if wishes.features:
            transport.feature_filter = wanted
        stop.check()
        service = BalloonService(transport, keep_free=wishes.keep_free, rate=wishes.rate)
        undo.callback(service.close)
        if transport.has(spec_balloon.F_DEFLATE_ON_OOM):
            SYSTEM.write_text("/proc/self/oom_score_adj", FIRST_VICTIM)
        with self._lock:
            self._service = service
        control.listen(self._function)
        self._say(f"the host wants {mib(service.target)} in the balloon")
        stop.check()
        return service

    def _take(self, address: str, undo: ExitStack) -> None:
        """Bind the function if nobody did; what was bound here is given back here."""
        function = look_up(address)
        self._function = function.address
        require_balloon(function.type, function.address)
        bound = bind(function.address, force=self._wishes.force)
        self._driver_before, self._bound = bound.driver, bound.changed
        if bound.changed:
            undo.callback(self._give_back)
            self._say(f"{function.address} taken from {bound.driver or 'no driver'}")

    def _give_back(self) -> None:
        try:
            unbind(self._function)
        except UsageError as error:
            # Nothing is left to give back once the function was unplugged.
            self._say(f"{self._function} is gone: {error.message}")
            return
        self._say(f"{self._function} given back to {self._driver_after() or 'no driver'}")

    def _driver_after(self) -> str | None:
        """The kernel driver that has the function now; None where it is none of the kernel's."""
        try:
            return look_up(self._function).driver
        except UsageError:
            return None

    def _look_after(self, service: BalloonService, stop: Stop) -> None:
        events = service.watch(TICK, stop.fd)
        # What woke us is looked at next, by the caller.
        stop.calm()
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

    def _say(self, event: str) -> None:
        self._events.append({"time": time.time(), "event": event})
        self._tell(event)

    def status(self) -> dict[str, Any]:
        """What it is and how it stands, from any thread."""
        identity: dict[str, Any] = {
            "name": self._function,
            "spec": self._spec,
            "function": self._function,
            "pid": os.getpid(),
            "started": self._started,
            "driver_before": self._driver_before,
            "stays_bound": Spec.parse(self._spec).scheme == "vfio" and not self._bound,
        }
        with self._lock:
            service = self._service
        if service is not None:
            identity["features"] = feat.feature_names(feat.BALLOON, service.features)
            identity["feature_mask"] = hex(service.features)
            identity |= service.stats()
        return identity | {"events": list(self._events)}


def require_balloon(device_type: int, name: str) -> None:
    """Raise UsageError unless it is a balloon."""
    if device_type != feat.BALLOON:
        raise UsageError(
            f"it is a virtio {type_name(device_type)} device, no memory balloon",
            where=name,
            hint="guestpv list",
        )


def choose(force: bool) -> Function:
    """The only balloon that can be driven.

    Args:
        force: one that is in use counts, too.

    Raises:
        Refused: there is none.
        UsageError: there are several.
    """
    known = [function for function in survey() if function.type == feat.BALLOON]
    if not known:
        raise Refused(
            "this machine has no virtio balloon",
            hint="QEMU: -device virtio-balloon-pci,disable-legacy=on,iommu_platform=on,deflate-on-oom=on",
        )
    found = [function for function in known if function.drivable or (force and function.uses)]
    if not found:
        reasons = "; ".join(f"{function.address}: {function.problem}" for function in known)
        raise Refused(f"no balloon can be driven: {reasons}", hint=known[0].hint)
    if len(found) > 1:
        names = ", ".join(f"{function.address} (driver {function.driver or 'none'})" for function in found)
        raise UsageError(f"which one? {names}", hint=f"guestpv balloon up {found[0].address}")
    return found[0]
