"""One virtqueue of a device: its registers' values, its ring once enabled, and what a model calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..spec import features as ft
from ..spec.pci import NO_VECTOR
from ..spec.ring import MAX_QUEUE_SIZE
from ..virtqueue.layout import ring_layout
from .dma import Unmapped
from .evidence import DriverFault, Event
from .packed import PackedRing
from .ring import Chain, Ring
from .split import SplitRing

if TYPE_CHECKING:
    from .device import Device


class DeviceQueue:
    """A virtqueue as the device has it.

    Attributes:
        index: virtqueue index.
        size: queue size now; ``max_size`` after a reset.
        desc, driver, device: bus addresses of the three areas.
        vector: MSI-X vector or NO_VECTOR.
        enabled: whether the driver enabled it.
        ring: the ring while enabled, else None.
        hold: keep completions back until ``release`` (also ``Device.hold``, for all queues).
        held: completions kept back, oldest first; each entry is what is shown together.
        ask_for_kicks: False suppresses available buffer notifications; ``Device.poll`` then moves the queue.
        kicks, interrupts: notifications seen and sent since the device was made.
    """

    def __init__(self, owner: Device, index: int) -> None:
        self.owner = owner
        self.index = index
        self.hold = False
        self.ask_for_kicks = True
        self.kicks = 0
        self.interrupts = 0
        self.held: list[tuple[tuple[Chain, int], ...]] = []
        self.ring: Ring | None = None
        self.reset()

    def reset(self) -> None:
        """Back to the state after a reset: disabled, all positions forgotten (2.6.1.1.1)."""
        self.size = self.max_size
        self.desc = self.driver = self.device = 0
        self.vector = NO_VECTOR
        self.enabled = False
        self.ring = None
        self.held.clear()

    @property
    def max_size(self) -> int:
        """Largest queue size, 0 where the queue does not exist with the features as they are."""
        size = self.owner.model.queue_size(self.index, self.owner.visible_features)
        return min(size, MAX_QUEUE_SIZE)

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"queue {self.index}"

    def enable(self) -> None:
        """Start using the areas that the driver named.

        Raises:
            DriverFault: size, alignment or addresses cannot be used.
        """
        features = self.owner.features
        packed = bool(features >> ft.F_RING_PACKED & 1)
        try:
            layout = ring_layout(self.size, packed)
        except ValueError as error:
            raise DriverFault("DRV-PACKED-22" if packed else "DRV-SPLIT-38", str(error)) from None
        rules = ("PACKED-01", "PACKED-02", "PACKED-03") if packed else ("SPLIT-01", "SPLIT-02", "SPLIT-03")
        parts = (("desc", self.desc, layout.desc), ("driver", self.driver, layout.driver))
        views = []
        for rule, (name, address, area) in zip(
            rules, (*parts, ("device", self.device, layout.device)), strict=True
        ):
            if address % area.align:
                raise DriverFault(f"DRV-{rule}", f"queue_{name} {address:#x} is not aligned to {area.align}")
            try:
                views.append(self.owner.memory.view(address, area.size, write=name == "device" or packed))
            except Unmapped as error:
                rule = "DRV-FEAT-18" if features >> ft.F_ACCESS_PLATFORM & 1 else "DRV-FEAT-19"
                raise DriverFault(rule, f"queue_{name}: {error}") from None
        areas = (views[0], views[1], views[2])
        kind: Callable[..., Ring] = PackedRing if packed else SplitRing
        self.ring = kind(self.size, features, self.owner.memory, areas)
        self.enabled = True
        self.owner.journal.record(Event("enable", "queue", value=self.size, queue=self.index))

    @property
    def _live(self) -> bool:
        """Whether the device may touch the ring now."""
        return self.owner.running and self.owner.memory.enabled

    def pop(self) -> Chain | None:
        """The next chain the driver made available; None when there is none or the device is not running."""
        ring = self.ring
        if ring is None or not self._live:
            return None
        try:
            chain = ring.pop()
        except DriverFault as fault:
            self._remarks(ring)
            self.owner.fault(fault, self.where)
            return None
        self._remarks(ring)
        if chain is not None:
            self.owner.journal.record(
                Event("pop", "chain", value=chain.id, queue=self.index, extra=chain.position), chain
            )
        return chain

    def chains(self) -> Iterator[Chain]:
        """All available chains, notifications off meanwhile and looked for again at the end."""
        while self.ring is not None and self._live:
            self.ring.suppress_kicks()
            while (chain := self.pop()) is not None:
                yield chain
            if not self.rearm():
                return

    def rearm(self) -> bool:
        """Ask for the next available buffer notification; True when buffers are there already."""
        if self.ring is None or not self._live or not self.ask_for_kicks:
            return False
        try:
            return self.ring.enable_kicks()
        except DriverFault as fault:
            self.owner.fault(fault, self.where)
            return False

    def complete(self, chain: Chain, length: int = 0) -> None:
        """The model is done with a chain and wrote ``length`` bytes: show it to the driver, or hold it."""
        self.complete_together([(chain, length)])

    def complete_together(self, done: Sequence[tuple[Chain, int]]) -> None:
        """Complete chains so that the driver sees all of them as used or none."""
        if self.hold or self.owner.hold:
            self.held.append(tuple(done))
            return
        for chain, length in done:
            self.push(chain, length)
        self.publish()

    def release(self, count: int | None = None, order: Callable[[int], int] | None = None) -> int:
        """Show held completions to the driver; returns how many.

        Args:
            count: at most so many (chains completed together count once), None for all.
            order: sort key over their place in ``held`` (``lambda n: -n`` reverses). With IN_ORDER the ring
                still waits for earlier chains.
        """
        places = sorted(range(len(self.held)), key=order) if order else list(range(len(self.held)))
        chosen = places[:count]
        done = [self.held[place] for place in chosen]
        self.held = [entry for place, entry in enumerate(self.held) if place not in set(chosen)]
        for group in done:
            for chain, length in group:
                self.push(chain, length)
        self.publish()
        return len(done)

    def push(self, chain: Chain, length: int) -> None:
        """Stage a used element. A chain from before a reset is dropped silently."""
        ring = self.ring
        if ring is None or ring.outstanding.get(chain.id) is not chain or not self._live:
            return
        ring.push(chain, length)
        self.owner.journal.record(
            Event("push", "chain", value=chain.id, queue=self.index, extra=length), chain
        )

    def publish(self) -> None:
        """Make staged used elements visible together and interrupt the driver if it asked for that."""
        ring = self.ring
        if ring is None or not self._live:
            return
        wanted = ring.publish()
        self._remarks(ring)
        self.owner.journal.record(
            Event("publish", "used", value=int(wanted), queue=self.index, extra=getattr(ring, "used", 0))
        )
        if wanted:
            self.interrupts += 1
            self.owner.interrupt(self)

    def notification(self, data: int | None) -> None:
        """A kick came; ``data`` is next_off and next_wrap with NOTIFICATION_DATA, else None."""
        self.kicks += 1
        self.owner.journal.record(Event("kick", "queue_notify", value=data or 0, queue=self.index))
        if self.ring is not None and self.ring.strict:
            self.ring.told = self.ring.exposed()
        if data is None or self.ring is None or not self.owner.running:
            return
        try:
            self.ring.check_notification(data & 0x7FFF, data >> 15, exact=not self.owner.threaded)
        except DriverFault as fault:
            self.owner.find(fault.requirement, fault.message, self.where)

    def _remarks(self, ring: Ring) -> None:
        if ring.remarks:
            remarks, ring.remarks = ring.remarks, []
            for requirement, message in remarks:
                self.owner.find(requirement, message, self.where)
