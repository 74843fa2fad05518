"""What the `up` verbs have in common: a function from bind to give-back, each step with its undo."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar, Final, Protocol

from ..errors import DeviceGone, GuestpvError, UsageError
from ..opener import Spec
from ..opener import open as open_transport
from ..services.control import ControlServer
from ..services.control import detach as run_detached
from ..spec import features as feat
from ..system import SYSTEM
from ..transport.base import FeatureFilter, Transport
from ..vfio.binding import bind, forget, unbind
from ..vfio.survey import DEVICES, look_up
from ..vfio.ways import RISK
from .kinds import Kind
from .report import Report
from .restarts import Restarts
from .signals import Stop
from .vfio_option import NOIOMMU, is_noiommu, with_backend

TICK: Final = 1.0
"""Seconds between looks at what is up."""
UNPLUG_TIME_LIMIT: Final = 20.0
EVENTS_KEPT: Final = 50


class Asked(Protocol):
    """What the user of every kind can ask for: a SPEC, features, to take what is in use, restarts, how."""

    @property
    def spec(self) -> str | None: ...
    @property
    def features(self) -> str: ...
    @property
    def force(self) -> bool: ...
    @property
    def restart(self) -> bool: ...
    @property
    def vfio_backend(self) -> str: ...


class Driven(ABC):
    """A driven device, from ``run`` to its end.

    Args:
        asked: what the user asked for.
        tell: called with every event in words.
    """

    kind: ClassVar[Kind]

    def __init__(self, asked: Asked, tell: Callable[[str], None]) -> None:
        self._asked = asked
        self._tell = tell
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        # The control thread must not look at counters of something that is being freed.
        self._lock = threading.Lock()
        self._started = time.time()
        self._restarts = Restarts(asked.restart)
        self._spec = ""
        self._function = ""
        self._driver_before: str | None = None
        self._bound = False

    def run(self, ready: Callable[[dict[str, Any]], None], refresh: Callable[[dict[str, Any]], None]) -> None:
        """Bring it up, call ``ready`` once, look after it until somebody ends it, undo everything.

        Args:
            ready: called with the status once it is up.
            refresh: called with the status every second.

        Raises:
            Stopped: a signal came before it was up.
            GuestpvError: it could not be brought up, or came to an end by itself; everything is undone.
        """
        kind = self.kind
        with Stop() as stop, ControlServer(kind.directory(), self.status, stop.wake, kind.verb) as control:
            try:
                with ExitStack() as undo:
                    self._bring_up(undo, stop, control)
                    name = self._name
                    ready(self.status())
                    while not ((stop.wanted or control.down_requested) and self._may_end()):
                        self._look_after(stop, TICK)
                        refresh(self.status())
                    self._say(f"going down: {stop.reason or f'guestpv {kind.verb} down'}")
            except GuestpvError as error:
                control.farewell = {
                    "error": f"{error.where}: {error.message}" if error.where else error.message
                }
                raise
            control.farewell = {"name": name, "function": self._function, "driver": self._driver_after()}

    @abstractmethod
    def _bring_up(self, undo: ExitStack, stop: Stop, control: ControlServer) -> None:
        """Open it, start what serves it, and listen."""

    @abstractmethod
    def _watch(self, seconds: float, wake_fd: int) -> list[str]:
        """What happened within so many seconds, or until the descriptor is readable."""

    @abstractmethod
    def _restart(self) -> None:
        """Reset the device and go on."""

    @property
    def _name(self) -> str:
        return self._function

    def _may_end(self) -> bool:
        """Whether nobody uses it, when somebody wants it to end."""
        return True

    def _open(self, undo: ExitStack, stop: Stop) -> Transport:
        """The device, bound if nobody had it, with the features that were asked for."""
        asked = self._asked
        wanted = FeatureFilter.parse(asked.features, self.kind.device_type)
        backend = asked.vfio_backend
        self._spec = with_backend(
            asked.spec or f"vfio:{self.kind.choose(asked.force, backend == NOIOMMU).address}", backend
        )
        spec = Spec.parse(self._spec)
        if spec.scheme == "vfio":
            self._take(spec, undo)
        stop.check()
        transport = open_transport(self._spec)
        undo.callback(transport.close)
        self._function = transport.name
        self.kind.require(transport.device_type, transport.name)
        if asked.features:
            transport.feature_filter = wanted
        stop.check()
        return transport

    def _take(self, spec: Spec, undo: ExitStack) -> None:
        """Bind the function if nobody did; what was bound here is given back here."""
        function = look_up(spec.body)
        self._function = function.address
        self.kind.require(function.type, function.address)
        bound = bind(function.address, force=self._asked.force, noiommu=is_noiommu(spec))
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
            forget(self._function)
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
        try:
            events = self._watch(seconds, stop.fd)
        except GuestpvError as trouble:
            self._restarts.mend(
                trouble, self._restart_alone, self._say, lambda pause: self._rest(stop, pause)
            )
            events = []
        # What woke us is looked at next, by the caller.
        stop.calm()
        for event in events:
            self._say(event)
        self._judge(events)

    def _restart_alone(self) -> None:
        with self._lock:
            self._restart()

    @staticmethod
    def _rest(stop: Stop, pause: float) -> bool:
        SYSTEM.poll([stop.fd], pause)
        return stop.wanted

    def _judge(self, events: list[str]) -> None:
        """Raise what it cannot go on after."""
        if "release requested" in events:
            raise DeviceGone(
                "the kernel asked for the function back: it is being unplugged, or somebody unbinds it",
                where=self._function,
            )
        if "bus error" in events:
            raise DeviceGone(
                "the function reported an unrecoverable bus error, or what emulates it has ended",
                where=self._function,
                hint="dmesg | tail",
            )

    def _say(self, event: str) -> None:
        self._events.append({"time": time.time(), "event": event})
        self._tell(event)

    def _identity(self, features: int) -> dict[str, Any]:
        """What it is, without its name; ``features`` is the negotiated mask."""
        return {
            "spec": self._spec,
            "function": self._function,
            "pid": os.getpid(),
            "started": self._started,
            "driver_before": self._driver_before,
            "stays_bound": Spec.parse(self._spec).scheme == "vfio" and not self._bound,
            "features": feat.feature_names(self.kind.device_type, features),
            "feature_mask": hex(features),
        }

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What it is and how it stands, from any thread."""


def detach(
    kind: Kind,
    session: Callable[[Any, Callable[[str], None]], Driven],
    wishes: Asked,
    report: Report,
    up: Callable[[dict[str, Any]], None],
) -> None:
    """Bring it up in a process of its own; ``up`` gets its status.

    What it risks is told here and in its log: nobody sees what is said there before there is one.

    Raises:
        Detached: it failed; nothing runs in the background.
    """
    risky = wishes.vfio_backend == NOIOMMU or bool(wishes.spec and is_noiommu(Spec.parse(wishes.spec)))
    if risky:
        report.warn(RISK)

    def make(tell: Callable[[str], None]) -> Driven:
        if risky:
            tell(f"WARNING: {RISK}")
        return session(wishes, tell)

    run_detached(lambda ready: in_background(kind, make, ready), up)


def in_background(
    kind: Kind,
    make: Callable[[Callable[[str], None]], Driven],
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """Run what ``make`` gives, with its events in a log file beside its control socket."""
    early: list[bytes] | None = []

    def tell(event: str) -> None:
        line = f"{time.strftime('%F %T')} {event}\n".encode()
        if early is None:
            os.write(1, line)
        else:
            early.append(line)

    def start_log(status: dict[str, Any]) -> None:
        nonlocal early
        path = os.path.join(kind.directory(), f"{status['name']}.log")
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        # Its name is known only now; what was said before belongs into it, too.
        os.write(1, b"".join(early or ()))
        early = None
        tell("up")
        ready(status | {"log": path})

    make(tell).run(start_log, lambda status: None)
