"""The device under test in the hands of one case: registers, features, queues, buffers, and waiting."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..errors import UsageError
from ..memory import DmaBuffer
from ..spec import features as ft
from ..spec.pci import CfgType
from ..transport.base import DEFAULT_QUEUE_SIZE, FeatureFilter, Transport
from ..transport.pci import PciTransport
from ..virtqueue.queue import Virtqueue
from .case import Case
from .queue import Queue
from .requests import WORK, Work
from .watched import WatchedFunction

LIMIT: Final = 30.0
"""Seconds that a device may take for what it has to do."""
SETTLE: Final = 0.05
"""Seconds without anything happening after which nothing is taken to happen any more."""

PLATFORM: Final = ft.mask((ft.F_VERSION_1, ft.F_ACCESS_PLATFORM, ft.F_ORDER_PLATFORM))
"""Features that every negotiation here accepts where they are offered."""

EVERY_FEATURE: Final = (1 << 128) - 1


@dataclass(frozen=True, slots=True)
class Combination:
    """Ring features to negotiate.

    Attributes:
        name: as in the names of checks: ``split``, ``packed-indirect``.
        features: mask.
    """

    name: str
    features: int

    @property
    def indirect(self) -> bool:
        """Whether buffers are to go through indirect tables."""
        return bool(self.features >> ft.F_INDIRECT_DESC & 1)


RING_OPTIONS: Final = {
    "": 0,
    "indirect": 1 << ft.F_INDIRECT_DESC,
    "event_idx": 1 << ft.F_EVENT_IDX,
    "in_order": 1 << ft.F_IN_ORDER,
    "all": ft.mask((ft.F_INDIRECT_DESC, ft.F_EVENT_IDX, ft.F_IN_ORDER, ft.F_NOTIFICATION_DATA)),
}


def combinations(offered: int) -> list[Combination]:
    """Feature combinations of rings that a device offers: each format with each option, and with all."""
    found: dict[int, Combination] = {}
    for name, form in (("split", 0), ("packed", 1 << ft.F_RING_PACKED)):
        for option, wanted in RING_OPTIONS.items():
            mask = form | (wanted & offered if option == "all" else wanted)
            if mask & ~offered == 0:
                found.setdefault(mask, Combination(f"{name}-{option}" if option else name, mask))
    return list(found.values())


class Rig:
    """One device, opened and reset, for one case.

    Attributes:
        spec: the specification it was opened by.
        transport: the device; every public method of it may be used.
        case: the log and the verdict's details.
        synchronous: whether the device has done everything when a register access or a kick returns.
        limit: seconds that it may take for what it has to do.
        work: requests of its device type.
        wire: network interface at the other end of the device's cable, empty for none.
        undo: what ``finish`` undoes, the last first.
    """

    def __init__(
        self, spec: str, transport: Transport, case: Case, *, synchronous: bool, wire: str = ""
    ) -> None:
        self.spec = spec
        self.wire = wire
        self.transport = transport
        self.case = case
        self.synchronous = synchronous
        self.limit = 1.0 if synchronous else LIMIT
        self._rings: list[Virtqueue] = []
        self.undo = contextlib.ExitStack()
        self.work: Work = WORK[transport.device_type](self)

    # What only a PCI function has.

    @property
    def pci(self) -> PciTransport:
        """The transport, where it is virtio-pci; else the case ends NOT_OBSERVABLE."""
        if not isinstance(self.transport, PciTransport):
            self.case.not_observable("the device is no PCI function")
        return self.transport

    @property
    def function(self) -> WatchedFunction:
        """The PCI function; else the case ends NOT_OBSERVABLE."""
        function = self.pci.function
        assert isinstance(function, WatchedFunction)
        return function

    @property
    def interrupts_are_late(self) -> bool:
        """Whether a thread passes interrupts on, so that what is under way needs a moment to arrive."""
        return isinstance(self.transport, PciTransport) and self.transport.interrupts_are_shared

    # From reset to running.

    def features_for(self, ring: int = 0) -> int:
        """What to accept: the platform's features, the work's, and these of the ring, as far as offered."""
        return self.transport.offered & (PLATFORM | self.work.features | ring)

    def negotiate(self, features: int) -> None:
        """Steps 1 to 6 of 3.1.1 with exactly these features.

        Raises:
            FeaturesRefused: FEATURES_OK did not stay.
        """
        self.transport.feature_filter = FeatureFilter(0, EVERY_FEATURE & ~features)
        self.case.note(f"negotiate {' '.join(ft.feature_names(self.transport.device_type, features))}")
        got = self.transport.negotiate(features)
        assert got == features, (
            f"{features & ~got:#x} cannot be negotiated: it is not offered or lacks another"
        )

    def queue(self, index: int, size: int | None = None) -> Queue:
        """Make and enable a queue, after ``negotiate``."""
        return Queue(self, self.transport.make_queue(index, size), self.transport.features)

    def queue_with_vector(
        self, index: int, vector: int, size: int | None = None, *, enable: bool = True
    ) -> Queue:
        """Make a queue by registers alone, with this MSI-X vector; the eventfd is the vector's.

        Args:
            index: queue number.
            vector: MSI-X vector, one of ``function.vectors``, or NO_VECTOR.
            size: entries; the device's maximum, at most 256, when not given.
            enable: whether to write queue_enable, too.
        """
        common, vectors = self.pci.common, self.function.vectors
        common.write("queue_select", index)
        size = size or min(common.read("queue_size"), DEFAULT_QUEUE_SIZE)
        features = self.transport.features
        fd = vectors[vector] if vector < len(vectors) else None
        kick = self.pci.doorbell(index, features)
        ring = Virtqueue(index, size, features, self.transport.pool, kick, interrupt_fd=fd)
        self._rings.append(ring)
        common.write("queue_size", size)
        common.write("queue_msix_vector", vector)
        common.write("queue_desc", ring.addresses.desc)
        common.write("queue_driver", ring.addresses.driver)
        common.write("queue_device", ring.addresses.device)
        if enable:
            common.write("queue_enable", 1)
        return Queue(self, ring, features)

    def start(self, ring: int = 0, size: int | None = None) -> Queue:
        """Negotiate, make every queue that the device type needs, set DRIVER_OK. Returns the main queue."""
        self.negotiate(self.features_for(ring))
        queues = {index: self.queue(index, size) for index in self.work.queues}
        self.transport.driver_ok()
        return queues[self.work.main]

    def works(self) -> None:
        """Reset the device and run one good request through it.

        Raises:
            AssertionError, GuestpvError: it does not work.
        """
        self.transport.reset(self.limit)
        queue = self.start()
        request = self.work.request()
        queue.run(request.readable, request.writable)
        request.check()
        self.transport.reset(self.limit)

    def finish(self) -> None:
        """Reset the device, undo what was done to it from outside, and give back the rings made here."""
        self.transport.reset(self.limit)
        self.undo.close()
        while self._rings:
            self._rings.pop().close()

    # Memory.

    def buffer(self, size: int, fill: bytes = b"", *, align: int = 64) -> DmaBuffer:
        """Memory that the device can reach, zeroed; it is taken back with the case."""
        buffer = self.transport.pool.allocate(size, align=align)
        if fill:
            buffer.write(fill)
        return buffer

    # Waiting.

    @staticmethod
    def clock() -> float:
        """Seconds."""
        return time.monotonic()

    def pause(self) -> None:
        """Let the device work for a moment."""
        if not self.synchronous:
            time.sleep(0.0005)

    def wait(self, ready: Callable[[], bool], what: str, limit: float | None = None) -> None:
        """Wait until ``ready``.

        Raises:
            AssertionError: it was not within ``limit`` (default 30) seconds.
        """
        limit = self.limit if limit is None else limit
        end = self.clock() + (0 if self.synchronous else limit)
        while not ready():
            if self.clock() >= end:
                raise AssertionError(f"no {what}" + ("" if self.synchronous else f" within {limit:g} s"))
            self.pause()

    def config_changes(self) -> int:
        """Configuration change notifications since the last call; the case ends without their interrupt."""
        fd = self.transport.config_fd
        if fd is None:
            self.case.not_observable("configuration changes have no interrupt here")
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def wait_config_change(self) -> None:
        """Wait for a configuration change notification.

        Raises:
            AssertionError: none came.
        """
        self.wait(lambda: self.config_changes() > 0, "configuration change notification")

    def vector_events(self, vector: int) -> int:
        """Messages of an MSI-X vector since the last call, as far as the eventfd counts them."""
        try:
            return os.eventfd_read(self.function.vectors[vector])
        except BlockingIOError:
            return 0

    def isr(self) -> int:
        """Read the ISR status, which clears it (4.1.4.5)."""
        place = next(found for found in self.pci.capabilities if found.cfg_type == CfgType.ISR)
        return self.function.bar(place.bar).read(place.offset, 1)

    def settle(self) -> None:
        """Give the device time for what it must not do; too short a time makes no fault."""
        if not self.synchronous:
            time.sleep(SETTLE)
        self.transport.read_status()


def require_type(transport: Transport) -> None:
    """Whether there is anything to ask of this device.

    Raises:
        UsageError: the device type has no checks.
    """
    if transport.device_type not in WORK:
        name = ft.DEVICE_NAMES.get(transport.device_type, str(transport.device_type))
        known = ", ".join(ft.DEVICE_NAMES[kind] for kind in WORK)
        raise UsageError(
            f"no checks for device type {name}; there are some for {known}", where=transport.name
        )
