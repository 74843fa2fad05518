"""Virtqueues in the states that docs/how-a-virtqueue-works.md talks about.

Every one is a real queue of ours, with the ring half of our software device on the other side, driven step
by step and stopped where the picture is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ..trace import ring_picture
from ..vectors.stage import READ, Stage

WRAP: Final = 0xFFFF
"""Available idx from which one more buffer wraps to 0."""


@dataclass(slots=True)
class Picture:
    """A scenario at the moment of its picture."""

    title: str
    stage: Stage
    notes: list[str] = field(default_factory=list)

    def svg(self) -> str:
        """The picture."""
        names = self.stage.names
        return ring_picture(self.stage.queue, title=self.title, names=names, notes=self.notes)


def split_placed() -> Picture:
    """split: two requests are placed, idx not moved yet"""
    stage = Stage()
    stage.two_requests()
    notes = ["Nothing here is visible to the device yet: available idx still says that there is no entry."]
    return Picture("Placed: two requests, not published", stage, notes)


def split_available() -> Picture:
    """split: idx moved on by two, the device was notified"""
    stage = Stage()
    stage.two_requests()
    note = stage.publish()
    return Picture("Available: idx tells the device about both", stage, [note])


def split_used() -> Picture:
    """split: the device used the second request first"""
    stage = Stage()
    stage.two_requests()
    stage.publish()
    chains = stage.take()
    stage.use(chains[1])
    notes = [
        "The device took both and finished B first: one used element names B by the head of its chain, 3,"
        " and tells that 1 byte was written, the status.",
    ]
    return Picture("Used: B came back before A", stage, notes)


def split_taken() -> Picture:
    """split: the driver took the second request back"""
    stage = Stage()
    stage.two_requests()
    stage.publish()
    chains = stage.take()
    stage.use(chains[1])
    stage.reap()
    notes = [
        "Nobody wipes a ring: old entries stay until they are written over. The descriptors of B went to the"
        " head of the free list, so the next request uses memory that is still in the cache.",
    ]
    return Picture("Taken back: the descriptors of B are free again", stage, notes)


def packed_placed() -> Picture:
    """packed: two requests are placed, the first flags withheld"""
    stage = Stage("RING_PACKED")
    stage.two_requests()
    notes = [
        "The device looks at position 0 only. There AVAIL=0 and USED=1, which means nothing in this lap, so"
        " it does not go on to the others, although they are complete.",
    ]
    return Picture("Placed: everything but the flags of the first descriptor", stage, notes)


def packed_available() -> Picture:
    """packed: the first flags are stored"""
    stage = Stage("RING_PACKED")
    stage.two_requests()
    note = stage.publish()
    return Picture("Available: one store of flags shows both requests", stage, [note])


def packed_used() -> Picture:
    """packed: a used descriptor overwrote the first request's"""
    stage = Stage("RING_PACKED")
    stage.two_requests()
    stage.publish()
    chains = stage.take()
    stage.use(chains[1])
    notes = [
        "The device finished B first and wrote its used descriptor to the next place in the ring, over the"
        " first descriptor of A, and skips as many places as B had descriptors. A is still with the device,"
        " which knows its elements since it read them; positions 3 to 5 are kept for its used descriptor.",
    ]
    return Picture("Used: the answer to B stands where A was", stage, notes)


def packed_wrapped() -> Picture:
    """packed: a third request goes over the end of the ring"""
    stage = Stage("RING_PACKED")
    stage.two_requests()
    stage.publish()
    chains = stage.take()
    stage.use(chains[1])
    stage.reap()
    stage.request("C (read)", READ, 8)
    note = stage.publish()
    notes = [
        f"C took positions 6, 7 and 0. {note}",
        "From position 0 on the driver's wrap counter is 0: available now means AVAIL=0, USED=1. Positions 3"
        " to 5 still say what the driver wrote there for B; one of them will carry the used descriptor of A.",
    ]
    return Picture("Wrapped: C begins in one lap and ends in the next", stage, notes)


def split_indirect() -> Picture:
    """split: both requests as indirect tables"""
    stage = Stage("INDIRECT_DESC")
    stage.two_requests()
    stage.publish()
    return Picture("Indirect: one descriptor a request", stage)


def packed_indirect() -> Picture:
    """packed: both requests as indirect tables"""
    stage = Stage("RING_PACKED", "INDIRECT_DESC")
    stage.two_requests()
    stage.publish()
    return Picture("Indirect: one descriptor a request", stage)


def split_event_index() -> Picture:
    """split: the event index where idx wraps"""
    stage = Stage("EVENT_IDX", "NOTIFICATION_DATA")
    stage.run(WRAP)
    stage.device.enable_kicks()
    old = int(stage.queue.driver["idx"])
    stage.small("D", "E", "F")
    note = stage.publish()
    new, event = int(stage.queue.driver["idx"]), int(stage.queue.device["avail_event"])
    notes = [
        f"idx went from 0x{old:04x} to 0x{new:04x}, and avail_event is 0x{event:04x}: (new - event - 1) mod"
        f" 65536 = {(new - event - 1) & 0xFFFF}, (new - old) mod 65536 = {(new - old) & 0xFFFF}, and the"
        " first is smaller: the event was passed.",
        note,
    ]
    return Picture("Event index: three buffers over the wrap of idx", stage, notes)


def packed_event_index() -> Picture:
    """packed: the event position where the ring wraps"""
    stage = Stage("RING_PACKED", "EVENT_IDX", "NOTIFICATION_DATA")
    stage.run(6)
    stage.device.enable_kicks()
    stage.small("D", "E", "F")
    note = stage.publish()
    event = int(stage.queue.device["desc"])
    notes = [
        f"The device asked to be told when the descriptor at position {event & 0x7FFF} becomes available in"
        f" the lap whose wrap counter is {event >> 15}. It is the first of the three.",
        note,
    ]
    return Picture("Event position: three buffers over the end of the ring", stage, notes)


def _in_order(*features: str) -> Stage:
    stage = Stage("IN_ORDER", *features)
    stage.request("A (read)", READ, 0)
    stage.request("B (read)", READ, 8)
    stage.publish()
    stage.use(*stage.take())
    return stage


def split_in_order() -> Picture:
    """split: one used element returns two requests"""
    notes = [
        "One used element, at the place of the first buffer of the batch, names the last one. The driver"
        " works out that two came back, and that A was used completely.",
    ]
    return Picture("In order: one used element for a batch of two", _in_order(), notes)


def packed_in_order() -> Picture:
    """packed: one used descriptor returns two requests"""
    notes = [
        "One used descriptor, at the first place of the batch, has the id of the last buffer. The next one"
        " will be written at position 6.",
    ]
    return Picture("In order: one used descriptor for a batch of two", _in_order("RING_PACKED"), notes)


def queue_reset() -> Picture:
    """the queue was reset and enabled again with four entries"""
    stage = Stage("RING_RESET")
    stage.two_requests()
    stage.publish()
    stage.take()
    tokens = stage.queue.drain()
    stage.queue.restart(4)
    stage.device = stage.attach()
    stage.names.clear()
    stage.request("A (again)", READ, 0)
    stage.publish()
    notes = [
        f"Before the reset {len(tokens)} requests were in flight in a ring of 8. The driver took both back"
        " itself, made new rings of 4 entries and published A once more: every index began at 0 again.",
    ]
    return Picture("Reset: the same queue, smaller, from the start", stage, notes)


SCENARIOS: Final[dict[str, Callable[[], Picture]]] = {
    "split-placed": split_placed,
    "split-available": split_available,
    "split-used": split_used,
    "split-taken": split_taken,
    "split-indirect": split_indirect,
    "split-event-index": split_event_index,
    "split-in-order": split_in_order,
    "packed-placed": packed_placed,
    "packed-available": packed_available,
    "packed-used": packed_used,
    "packed-wrapped": packed_wrapped,
    "packed-indirect": packed_indirect,
    "packed-event-index": packed_event_index,
    "packed-in-order": packed_in_order,
    "queue-reset": queue_reset,
}
"""Scenario -> what brings a queue into that state. The first line of its description is shown by the verb."""
