"""One disk shown as a block device, from bind to give-back: each step with its undo, in one place."""

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
from ..services.blk import BlkService
from ..services.control import ControlServer, Endpoint, endpoints
from ..spec import features as feat
from ..transport.base import FeatureFilter
from ..vfio.binding import bind, unbind
from ..vfio.lock import runtime_directory
from ..vfio.survey import Function, look_up, survey
from .signals import Stop

TICK: Final = 1.0
"""Seconds between looks at what is shown, and at whether a busy device has become free."""
EVENTS_KEPT: Final = 50


def directory() -> str:
    """Where the control sockets of disks are, apart from those of network links."""
    path = os.path.join(runtime_directory(), "blk")
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    return path


def find(wanted: str | None) -> list[Endpoint]:
    """The disks that are up, or the one with this name, node, PCI address or SPEC.

    Raises:
        UsageError: one was named that is not up.
    """
    everything = endpoints(directory())
    if wanted is None:
        return everything
    found = [
        one
        for one in everything
        if wanted.removeprefix("/dev/") in (one.name, one.status.get("function"), one.status.get("spec"))
    ]
    if not found:
        names = " ".join(one.name for one in everything)
        raise UsageError(
            f"{wanted} is not up", hint=f"up are: {names}" if names else "nothing is up: guestpv blk up"
        )
    return found


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
    """

    spec: str | None = None
    features: str = ""
    index: int | None = None
    queues: int | None = None
    poll: bool = False
    force: bool = False


class BlkSession:
    """A driven disk, from ``run`` to its end.

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
        self._service: BlkService | None = None
        self._spec = ""
        self._function = ""
        self._driver_before: str | None = None
        self._bound = False

    def run(self, ready: Callable[[dict[str, Any]], None], refresh: Callable[[dict[str, Any]], None]) -> None:
        """Bring the disk up, call ``ready`` once, look after it until somebody ends it, undo everything.

        While the block device is mounted a wish to end it waits until it is not.

        Args:
            ready: called with the status once the block device is there.
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
                    busy = False
                    while True:
                        if stop.wanted or control.down_requested:
                            try:
                                service.settle()
                                break
                            except Refused as refused:
                                if not busy:
                                    self._say(f"{refused.message}; going down once it is not: {refused.hint}")
                                busy = True
                        self._look_after(service, stop)
                        refresh(self.status())
                    self._say(f"going down: {stop.reason or 'guestpv blk down'}")
            except GuestpvError as error:
                control.farewell = {
                    "error": f"{error.where}: {error.message}" if error.where else error.message
                }
                raise
            control.farewell = {
                "name": service.name,
                "function": self._function,
                "driver": self._driver_after(),
            }

    def _bring_up(self, undo: ExitStack, stop: Stop, control: ControlServer) -> BlkService:
        wishes = self._wishes
        wanted = FeatureFilter.parse(wishes.features, feat.BLK)
        spec = Spec.parse(wishes.spec) if wishes.spec else Spec("vfio", choose(wishes.force).address)
        self._spec = wishes.spec or f"vfio:{spec.body}"
        if spec.scheme == "vfio":
            self._take(spec.body, undo)
        stop.check()
        transport = open_transport(self._spec)
        undo.callback(transport.close)
        self._function = transport.name
        require_blk(transport.device_type, transport.name)
        if wishes.features:
            transport.feature_filter = wanted
        stop.check()
        service = BlkService(transport, index=wishes.index, queues=wishes.queues, poll=wishes.poll)
        undo.callback(self._close, service)
        with self._lock:
            self._service = service
        control.listen(service.name)
        self._say(f"{service.path} is up: {service.disk.capacity} bytes")
        stop.check()
        return service

    def _close(self, service: BlkService) -> None:
        # The control thread must not look at counters of an export that is being freed.
        with self._lock:
            service.close()

    def _take(self, address: str, undo: ExitStack) -> None:
        """Bind the function if nobody did; what was bound here is given back here."""
        function = look_up(address)
        self._function = function.address
        require_blk(function.type, function.address)
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

    def _look_after(self, service: BlkService, stop: Stop) -> None:
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
        if "disconnected" in events:
            raise GuestpvError("somebody else disconnected it (nbd-client -d?)", where=service.path)

    def _say(self, event: str) -> None:
        self._events.append({"time": time.time(), "event": event})
        self._tell(event)

    def status(self) -> dict[str, Any]:
        """What it is and how it stands, from any thread."""
        identity: dict[str, Any] = {
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
                disk = service.disk
                identity |= {
                    "name": service.name,
                    "path": service.path,
                    "block_size": disk.block_size,
                    "read_only": disk.read_only,
                    "cache": "write-back" if disk.volatile_cache else "write-through",
                    "connections": len(disk.queues),
                    "features": feat.feature_names(feat.BLK, service.features),
                    "feature_mask": hex(service.features),
                    **service.stats(),
                }
        return identity | {"events": list(self._events)}


def require_blk(device_type: int, name: str) -> None:
    """Raise UsageError unless it is a disk."""
    if device_type != feat.BLK:
        raise UsageError(
            f"it is a virtio {type_name(device_type)} device, no block device",
            where=name,
            hint="guestpv list",
        )


def choose(force: bool) -> Function:
    """The only disk that can be driven.

    Args:
        force: one that is in use counts, too.

    Raises:
        Refused: there is none.
        UsageError: there are several.
    """
    known = [function for function in survey() if function.type == feat.BLK]
    if not known:
        raise Refused(
            "this machine has no virtio disk",
            hint="QEMU: -device virtio-blk-pci,drive=...,disable-legacy=on,iommu_platform=on",
        )
    found = [function for function in known if function.drivable or (force and function.uses)]
    if not found:
        reasons = "; ".join(f"{function.address}: {function.problem}" for function in known)
        raise Refused(f"no disk can be driven: {reasons}", hint=known[0].hint)
    if len(found) > 1:
        names = ", ".join(f"{function.address} (driver {function.driver or 'none'})" for function in found)
        raise UsageError(f"which one? {names}", hint=f"guestpv blk up {found[0].address}")
    return found[0]
