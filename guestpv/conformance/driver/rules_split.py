"""Rules of split virtqueues (2.7)."""

from __future__ import annotations

from typing import Any

from ...devices.evidence import Event
from ...devices.ring import Chain
from ...devices.split import SplitRing
from ...spec import features as ft
from .rules import Answer, Watch, exercised, rule
from .rules_ring import is_indirect


def split(watch: Watch, event: Event) -> SplitRing | None:
    """The ring of the event's queue, where it is a split one."""
    ring = watch.queue(event).ring
    return ring if isinstance(ring, SplitRing) else None


def idx_of(ring: SplitRing) -> int:
    """The available idx now."""
    return int.from_bytes(ring.areas[1][2:4], "little")


def linked(watch: Watch, event: Event, chain: Chain) -> bool:
    """Whether a chain takes several descriptors of a split ring."""
    return split(watch, event) is not None and len(chain.slots) > 1


def in_table(watch: Watch, event: Event, chain: Chain) -> bool:
    """Whether a chain lies in an indirect table of several entries."""
    return split(watch, event) is not None and len(chain.elements) > 1 and is_indirect(watch, event, chain)


def has(bit: int) -> Any:
    """Whether a split ring has a feature."""
    return lambda watch, event, _: split(watch, event) is not None and watch.has(bit)


def lacks(bit: int) -> Any:
    """Whether a split ring lacks a feature."""
    return lambda watch, event, _: split(watch, event) is not None and not watch.has(bit)


def any_split(watch: Watch, event: Event, subject: Any) -> bool:
    """Whether the queue is split."""
    return split(watch, event) is not None


exercised("DRV-SPLIT-06", "DRV-SPLIT-07", "DRV-SPLIT-41", on="pop", when=linked, needs="ring")
exercised("DRV-SPLIT-44", on="pop", when=in_table, needs="ring")
exercised("DRV-SPLIT-14", "DRV-SPLIT-48", on="pop", when=any_split, needs="ring")
exercised("DRV-SPLIT-42", on="pop", when=has(ft.F_IN_ORDER), needs="ring")
exercised(
    "DRV-SPLIT-08",
    on="pop",
    when=lambda w, e, chain: linked(w, e, chain) and w.has(ft.F_IN_ORDER),
    needs="ring",
)
exercised(
    "DRV-SPLIT-13",
    on="pop",
    when=lambda w, e, chain: w.has(ft.F_IN_ORDER) and in_table(w, e, chain),
    needs="ring",
)
exercised("DRV-SPLIT-15", on="publish", when=lacks(ft.F_EVENT_IDX), needs="ring")
exercised("DRV-SPLIT-17", on="publish", when=has(ft.F_EVENT_IDX), needs="ring")


@rule("DRV-SPLIT-22", on="enable")
def used_flags_begin_as_zero(watch: Watch, event: Event, subject: Any) -> Answer:
    """Used flags are 0 when the ring is new."""
    ring = split(watch, event)
    if ring is None:
        return None
    return "used flags are not 0 when the queue is enabled" if any(ring.own[:2]) else True


@rule("DRV-SPLIT-46", on="enable")
def available_idx_begins_at_zero(watch: Watch, event: Event, subject: Any) -> Answer:
    """The available idx of a new queue is 0."""
    ring = split(watch, event)
    if ring is None:
        return None
    return f"available idx is {idx_of(ring)} when the queue is enabled" if idx_of(ring) else True


@rule("DRV-SPLIT-47", on="kick", needs="ring")
def the_index_runs_freely(watch: Watch, event: Event, subject: Any) -> Answer:
    """The available idx counts on beyond the queue size."""
    ring = split(watch, event)
    if ring is None or ring.popped < ring.size:
        return None
    idx = idx_of(ring)
    if idx <= ring.size and (idx - ring.popped) & 0xFFFF >= 0x8000:
        return f"available idx {idx} after {ring.popped & 0xFFFF}: it was reduced by the queue size"
    return True


@rule("DRV-SPLIT-45", on=("store", "store release"), needs="order")
def stores_to_fields(watch: Watch, event: Event, subject: Any) -> Answer:
    """Stores to the available ring are 16 bits wide and hit a field."""
    ring = split(watch, event)
    if ring is None or event.name != "driver":
        return None
    fits = event.width == 2 and event.offset % 2 == 0 and event.offset <= 4 + 2 * ring.size
    return True if fits else f"a store of {event.width} bytes at {event.offset} of the available ring"


@rule("DRV-SPLIT-49", on=("store", "store release"), needs="order")
def the_index_counts_the_heads(watch: Watch, event: Event, subject: Any) -> Answer:
    """idx grows by the number of heads that were put into the ring."""
    ring = split(watch, event)
    if ring is None or event.name != "driver":
        return None
    key = f"heads {event.queue}"
    if 4 <= event.offset < 4 + 2 * ring.size:
        watch.life.memo[key] = watch.remember(key) + 1
        return None
    if event.offset != 2:
        return None
    grown, heads = (event.value - idx_of(ring)) & 0xFFFF, watch.life.memo.pop(key, 0)
    return True if grown == heads else f"idx grows by {grown}, {heads} heads were added"
