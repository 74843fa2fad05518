"""Rules of packed virtqueues (2.8)."""

from __future__ import annotations

from typing import Any

from ...devices.evidence import Event
from ...devices.packed import AVAIL, USED, PackedRing
from ...devices.ring import Chain
from ...spec import features as ft
from .rules import Answer, Answers, Watch, exercised, rule
from .rules_ring import is_indirect


def ring_of(watch: Watch, event: Event) -> PackedRing | None:
    """The ring of the event's queue, where it is a packed one."""
    ring = watch.queue(event).ring
    return ring if isinstance(ring, PackedRing) else None


def any_packed(watch: Watch, event: Event, subject: Any) -> bool:
    """Whether the queue is packed."""
    return ring_of(watch, event) is not None


def linked(watch: Watch, event: Event, chain: Chain) -> bool:
    """Whether a buffer takes several descriptors of a packed ring."""
    return any_packed(watch, event, chain) and chain.count > 1


def crosses(watch: Watch, event: Event, chain: Chain) -> bool:
    """Whether a list goes over the end of a packed ring."""
    return linked(watch, event, chain) and chain.slots[-1] < chain.slots[0]


exercised("DRV-PACKED-08", "DRV-PACKED-11", "DRV-PACKED-13", on="pop", when=linked, needs="ring")
exercised(
    "DRV-PACKED-16",
    on="pop",
    when=lambda w, e, chain: any_packed(w, e, chain) and is_indirect(w, e, chain),
    needs="ring",
)
exercised("DRV-PACKED-33", on="pop", when=crosses, needs="ring")
exercised("DRV-PACKED-34", on="pop", when=any_packed, needs="ring")
exercised("DRV-PACKED-40", "DRV-PACKED-41", on="publish", when=any_packed, needs="ring")


@rule("DRV-PACKED-25", on="enable")
def the_ring_begins_as_zeroes(watch: Watch, event: Event, subject: Any) -> Answer:
    """The descriptor ring is zero when the queue is enabled."""
    ring = ring_of(watch, event)
    if ring is None:
        return None
    return "the descriptor ring is not zero when the queue is enabled" if any(ring.areas[0]) else True


@rule("DRV-PACKED-26", "DRV-PACKED-27", "DRV-PACKED-28", on=("pop", "kick", "publish"), needs="ring")
def wrap_counters(watch: Watch, event: Event, subject: Any) -> Answers:
    """AVAIL and USED of what was made available follow the driver's wrap counter."""
    ring = ring_of(watch, event)
    if ring is None:
        return None
    key = f"next descriptor {event.queue}"
    slot = ring.available % ring.size
    first_lap = ring.available < ring.size
    if event.kind == "pop":
        lap = (ring.available - 1) // ring.size
        return {"DRV-PACKED-26" if lap == 0 else "DRV-PACKED-27": True, "DRV-PACKED-28": True}
    now = bytes(ring.areas[0][16 * slot : 16 * slot + 16])
    known = watch.life.memo.get(key, (slot, bytes(16) if first_lap else now))
    watch.life.memo[key] = (slot, now)
    if event.kind == "publish" or known[0] != slot or known[1] == now or ring._is_available(ring.available):
        return None
    flags = int.from_bytes(now[14:], "little")
    text = f"descriptor {slot} was written with flags {flags:#06x} on lap {ring.available // ring.size}"
    if bool(flags & AVAIL) == bool(flags & USED):
        return {"DRV-PACKED-28": text}
    return {"DRV-PACKED-26" if first_lap else "DRV-PACKED-27": text}


exercised(
    *("DRV-PACKED-04", "DRV-PACKED-05"), on="push", when=lambda w, *_: w.has(ft.F_RING_PACKED), needs="ring"
)
