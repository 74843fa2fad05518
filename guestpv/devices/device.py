"""A virtio device without its transport: status, features, queues, the model behind (2.1-2.6, 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..spec import features as ft
from ..spec.status import Status
from .dma import BusMemory
from .evidence import DriverFault, Event, Finding, Journal
from .executor import Executor
from .model import Model
from .queue import DeviceQueue

SETUP_BITS = Status.ACKNOWLEDGE | Status.DRIVER | Status.FAILED
DRIVER_BITS = SETUP_BITS | Status.FEATURES_OK | Status.DRIVER_OK | Status.SUSPEND
STEPS = (
    (Status.DRIVER, Status.ACKNOWLEDGE, "DRV-INIT-02"),
    (Status.FEATURES_OK, Status.DRIVER, "DRV-INIT-03"),
    (Status.DRIVER_OK, Status.FEATURES_OK, "DRV-INIT-08"),
)
DEFAULT_FEATURES = ft.mask(
    (ft.F_INDIRECT_DESC, ft.F_EVENT_IDX, ft.F_VERSION_1, ft.F_ORDER_PLATFORM, ft.F_RING_RESET)
)


class Device:
    """The part of a device that every transport shares.

    Args:
        model: the device type.
        journal: where events and findings go.
        memory: bus addresses to memory.
        executor: runs the model.
        interrupt: called with a queue for a used buffer notification, with None for a configuration change.

    Attributes:
        offered: feature bits the driver is shown; any mask may be set before the driver looks.
        required: bits without which FEATURES_OK is refused.
        accepted: what the driver wrote so far.
        features: negotiated features, 0 before FEATURES_OK.
        running: whether buffers may be used: DRIVER_OK without DEVICE_NEEDS_RESET (2.1.2).
        refuse_features_ok: leave FEATURES_OK clear whatever the driver accepted.
        hold: keep all completions back until ``release``.
    """

    def __init__(
        self,
        model: Model,
        journal: Journal,
        memory: BusMemory,
        executor: Executor,
        interrupt: Callable[[DeviceQueue | None], None],
    ) -> None:
        self.model = model
        self.journal = journal
        self.memory = memory
        self.executor = executor
        self._interrupt = interrupt
        self.offered = model.offered | DEFAULT_FEATURES
        self.required = 1 << ft.F_VERSION_1
        self.refuse_features_ok = False
        self.hold = False
        self.status = Status.RESET
        self.accepted = 0
        self.features = 0
        self.generation = 0
        self._stale = False
        self._reset_asked = False
        model.device = self
        self.queues = [DeviceQueue(self, index) for index in range(model.num_queues)]

    @property
    def threaded(self) -> bool:
        """Whether the driver does not wait while the device works."""
        return self.executor.threaded

    @property
    def visible_features(self) -> int:
        """Negotiated features, or the offered ones while nothing is negotiated."""
        return self.features if self.status & Status.FEATURES_OK else self.offered

    @property
    def status(self) -> Status:
        """The device status field (2.1)."""
        return self._status

    @status.setter
    def status(self, status: Status) -> None:
        self._status = status
        self.running = status & (Status.DRIVER_OK | Status.NEEDS_RESET) == Status.DRIVER_OK

    def find(self, requirement: str, message: str, where: str = "") -> Finding:
        """Hold something against the driver that the device can live with."""
        return self.journal.find(requirement, message, where)

    def fault(self, fault: DriverFault, where: str = "") -> Finding:
        """Hold something against the driver that breaks the device."""
        finding = self.journal.find(fault.requirement, fault.message, where, fatal=True)
        self.need_reset()
        return finding

    def need_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET and tell the driver (2.1.2)."""
        with self.executor:
            live = bool(self.status & Status.DRIVER_OK)
            self.status |= Status.NEEDS_RESET
            if live:
                self._interrupt(None)

    def reset(self) -> None:
        """Everything back to the state after power-on."""
        self.journal.record(Event("reset", "device_status"))
        self.status = Status.RESET
        self.accepted = self.features = 0
        self.model.reset()
        for queue in self.queues:
            queue.reset()

    def write_status(self, value: int) -> None:
        """The driver wrote ``device_status``; 0 resets (2.1, 3.1.1)."""
        if value == 0:
            self._reset_asked = True
            self.reset()
            return
        self._check_status(value)
        new = Status(value & DRIVER_BITS) & ~self.status
        self.status |= new & SETUP_BITS
        if new & Status.FEATURES_OK:
            self._negotiate()
        if new & Status.DRIVER_OK:
            self._start()

    def _check_status(self, value: int) -> None:
        where = "device_status"
        old = self.status
        lost = old & ~value & DRIVER_BITS
        known = DRIVER_BITS if self.features >> ft.F_SUSPEND & 1 else DRIVER_BITS & ~Status.SUSPEND
        if value & ~(known | (old & Status.NEEDS_RESET)):
            self.find("DRV-STATUS-05", f"{value:#x} has bits that are not the driver's to set", where)
        if lost:
            self.find("DRV-STATUS-02", f"{value:#x} drops {lost!r}", where)
        if old & Status.FAILED:
            self.find("DRV-STATUS-03", f"{value:#x} written after FAILED without a reset", where)
        if value & Status.ACKNOWLEDGE and not old & Status.ACKNOWLEDGE:
            if not self._reset_asked:
                self.find("DRV-INIT-01", "initialization without a reset before it", where)
            self._reset_asked = False
        for bit, before, requirement in STEPS:
            if value & bit and not old & bit and not old & before:
                self.find(requirement, f"{bit!r} set while {before!r} was not", where)

    def _negotiate(self) -> None:
        """Keep FEATURES_OK only for a set this device can work with (2.2.2)."""
        accepted, kind = self.accepted, self.model.device_type
        where = "FEATURES_OK"
        names = partial(ft.feature_names, kind)
        objections = []
        if extra := accepted & ~self.offered:
            self.find("DRV-FEAT-01", f"accepted without being offered: {names(extra)}", where)
            objections.append("not offered")
        if broken := ft.unmet(kind, accepted):
            self.find("DRV-FEAT-02", f"accepted without what they require: {names(broken)}", where)
            objections.append("dependency")
        for bit in ft.bits(accepted & ~known_features(kind)):
            self.find(undefined_rule(bit), f"{ft.feature_name(kind, bit)} accepted: not defined", where)
            objections.append("undefined")
        if self.offered >> ft.F_VERSION_1 & ~accepted >> ft.F_VERSION_1 & 1:
            self.find("DRV-FEAT-15", "VIRTIO_F_VERSION_1 offered and not accepted", where)
        if missing := self.required & self.offered & ~accepted:
            objections.append(f"needs {names(missing)}")
        if reason := self.model.objection(accepted):
            objections.append(reason)
        if objections or self.refuse_features_ok:
            return
        self.features = accepted
        self.status |= Status.FEATURES_OK
        for queue in self.queues:
            queue.reset()
        self.model.negotiated()

    def _start(self) -> None:
        if not self.status & Status.FEATURES_OK:
            self.need_reset()
            return
        self.status |= Status.DRIVER_OK
        self.model.start()

    def accept(self, word: int, value: int) -> None:
        """The driver wrote 32 bits of its features."""
        if self.status & Status.FEATURES_OK:
            self.find("DRV-INIT-07", "driver_feature written after FEATURES_OK", "driver_feature")
            return
        shift = 32 * word
        self.accepted = self.accepted & ~(0xFFFFFFFF << shift) | value << shift

    def enable_queue(self, queue: DeviceQueue) -> None:
        """The driver wrote 1 to ``queue_enable``."""
        if not self.status & Status.FEATURES_OK:
            self.find("DRV-INIT-09", "queue enabled before FEATURES_OK", queue.where)
        try:
            queue.enable()
        except DriverFault as fault:
            self.fault(fault, queue.where)

    def kick(self, index: int, data: int | None = None) -> None:
        """An available buffer notification for a queue."""
        if index >= len(self.queues):
            rule = "DRV-PCI-49" if data is None else "DRV-PCI-50"
            self.find(rule, f"notification for queue {index} of {len(self.queues)}", "queue_notify")
            return
        queue = self.queues[index]
        if not self.status & Status.DRIVER_OK:
            self.find("DRV-INIT-13", "notification before DRIVER_OK", queue.where)
        elif not self.memory.enabled:
            self.find("", "notification while the device may not reach memory (bus master)", queue.where)
        queue.notification(data)
        if queue.enabled and self.running:
            self.executor.post(partial(self._serve, queue))

    def _serve(self, queue: DeviceQueue) -> None:
        if queue.enabled and self.running:
            self.model.serve(queue)

    def poll(self) -> None:
        """Look into all queues without a kick."""
        for queue in self.queues:
            if queue.enabled:
                self.executor.post(partial(self._serve, queue))

    def release(self, count: int | None = None, order: Callable[[int], int] | None = None) -> int:
        """Show held completions of all queues to the driver; see ``DeviceQueue.release``."""
        with self.executor:
            return sum(queue.release(count, order) for queue in self.queues)

    def interrupt(self, queue: DeviceQueue) -> None:
        """A used buffer notification, never before DRIVER_OK (2.1.2)."""
        self._interrupt(queue)

    def config_changed(self) -> None:
        """The device configuration has changed: a new generation, and a notification once the driver runs."""
        self._stale = True
        if self.status & Status.DRIVER_OK:
            self._interrupt(None)

    def bump_generation(self) -> None:
        """Make the next read of device configuration show a new generation, without a notification."""
        self._stale = True

    def config_seen(self) -> None:
        """The driver reads device configuration: the generation moves on if a change was not seen yet."""
        if self._stale:
            self._stale = False
            self.generation = (self.generation + 1) & 0xFF


def undefined_rule(bit: int) -> str:
    """What accepting a bit breaks that is not defined for a device type (2.2, 2.2.1)."""
    if 44 <= bit < 50 or bit >= 128:
        return "DRV-FEAT-09"
    return "DRV-FEAT-08" if 24 <= bit < 44 else "DRV-FEAT-11"


def known_features(device_type: int) -> int:
    """All bits that the standard defines for a device type on PCI; legacy-only ones are not among them."""
    common = set(ft.COMMON_FEATURES) - {24, 27}
    return ft.mask(common | set(ft.DEVICE_FEATURES.get(device_type, {})))
