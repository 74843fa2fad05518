"""Rules that both ring formats have: memory, descriptors, notifications, order (2.6, 2.7, 2.8, 2.9)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from ...devices.dma import Unmapped
from ...devices.evidence import Event
from ...devices.ring import Chain
from ...devices.split import SplitRing
from ...spec import features as ft
from ...spec.ring import DESC_F_INDIRECT, MAX_QUEUE_SIZE
from ...virtqueue.layout import ring_layout
from .rules import Answer, Answers, Watch, exercised, presented, rule


def packed(watch: Watch) -> bool:
    """Whether the rings are packed ones."""
    return watch.has(ft.F_RING_PACKED)


def by_format(watch: Watch, split: str, other: str) -> str:
    """One of two requirements, ``DRV-`` left out."""
    return f"DRV-{other if packed(watch) else split}"


def both(split: str, other: str, on: str | tuple[str, ...], when: Any = lambda *_: True) -> None:
    """Register a requirement of each format, exercised by the same events; the device finds the breach."""
    exercised(f"DRV-{split}", on=on, when=lambda w, e, s: not packed(w) and when(w, e, s), needs="ring")
    exercised(f"DRV-{other}", on=on, when=lambda w, e, s: packed(w) and when(w, e, s), needs="ring")


def raw(watch: Watch, event: Event, chain: Chain) -> Iterator[tuple[int, int]]:
    """(flags, id or next) of the ring descriptors of a chain."""
    ring = watch.queue(event).ring
    assert ring is not None
    data = ring.descriptors(chain)
    for at in range(0, len(data), 16):
        low, high = (int.from_bytes(data[at + place : at + place + 2], "little") for place in (12, 14))
        yield (high, low) if packed(watch) else (low, high)


def is_indirect(watch: Watch, event: Event, chain: Chain) -> bool:
    """Whether a chain lies in an indirect table."""
    return any(flags & DESC_F_INDIRECT for flags, _ in raw(watch, event, chain))


def mixed(watch: Watch, event: Event, chain: Chain) -> bool:
    """Whether a chain has elements of both kinds."""
    return len({element.writable for element in chain.elements}) > 1


# Areas

both("SPLIT-01", "PACKED-01", "enable")
both("SPLIT-02", "PACKED-02", "enable")
both("SPLIT-03", "PACKED-03", "enable")


@rule(*("DRV-SPLIT-35", "DRV-SPLIT-36", "DRV-SPLIT-37", "DRV-PACKED-23"), on=("write queue_enable", "enable"))
def areas_are_whole(watch: Watch, event: Event, subject: Any) -> Answers:
    """Each area lies in memory as a whole, and none over another."""
    if event.queue >= len(watch.device.queues):
        return None
    queue = watch.queue(event)
    try:
        layout = ring_layout(queue.size, packed(watch))
    except ValueError:
        return None
    rules = ["DRV-PACKED-23"] * 3 if packed(watch) else ["DRV-SPLIT-35", "DRV-SPLIT-36", "DRV-SPLIT-37"]
    parts = [
        (queue.desc, layout.desc.size),
        (queue.driver, layout.driver.size),
        (queue.device, layout.device.size),
    ]
    answers: dict[str, Answer] = {}
    for requirement, (address, size) in zip(rules, parts, strict=True):
        if event.kind == "enable":
            answers[requirement] = True
        elif _maps(watch, address, 1) and not _maps(watch, address, size):
            answers[requirement] = f"{size} bytes at {address:#x} are not all there"
    ordered = sorted(parts)
    if event.kind == "enable" and any(a + n > b for (a, n), (b, _) in pairwise(ordered)):
        answers[rules[2]] = f"areas overlap: {', '.join(f'{a:#x}+{n}' for a, n in ordered)}"
    return answers


def _maps(watch: Watch, address: int, size: int) -> bool:
    try:
        watch.device.memory.view(address, size)
    except Unmapped:
        return False
    return True


@rule("DRV-SPLIT-38", "DRV-PACKED-22", on=("write queue_size", "enable"))
def sizes_that_may_be(watch: Watch, event: Event, subject: Any) -> Answers:
    """1 to 32768 entries, and a power of two in split rings."""
    size = event.value
    requirement = by_format(watch, "SPLIT-38", "PACKED-22")
    if 1 <= size <= MAX_QUEUE_SIZE and (packed(watch) or not size & (size - 1)):
        return {requirement: True}
    return {requirement: f"queue size {size}"}


@rule("DRV-SPLIT-39", "DRV-PACKED-42", on=("enable", "kick", "pop"), needs="ring")
def the_device_area_is_the_devices(watch: Watch, event: Event, subject: Any) -> Answers:
    """Only the device writes to its area while the queue is enabled."""
    ring = watch.queue(event).ring
    if ring is None:
        return None
    if not ring.strict:
        ring.strict, ring.shown = True, ring.own
        return None
    requirement = by_format(watch, "SPLIT-39", "PACKED-42")
    if ring.own == ring.shown:
        return {requirement: True}
    at = next(n for n, (a, b) in enumerate(zip(ring.own, ring.shown, strict=True)) if a != b)
    ring.shown = ring.own
    return {requirement: f"the driver wrote to byte {at} of the device area"}


# Chains

both("SPLIT-04", "PACKED-10", "pop", mixed)
both("SPLIT-11", "PACKED-09", "pop", lambda w, e, chain: len(chain.elements) > 1)
both("SPLIT-50", "PACKED-12", "pop")
both("SPLIT-09", "PACKED-14", "pop", lambda w, *_: not w.has(ft.F_INDIRECT_DESC))
both("SPLIT-12", "PACKED-17", "pop", is_indirect)
both("SPLIT-10", "PACKED-15", "pop", is_indirect)
both("SPLIT-43", "PACKED-38", "pop", is_indirect)


@rule("DRV-SPLIT-40", "DRV-PACKED-24", on="pop", needs="ring")
def descriptors_have_known_flags(watch: Watch, event: Event, subject: Chain) -> Answers:
    """Descriptors are decoded as the standard lays them out; no unknown flag is set."""
    known = 0x8087 if packed(watch) else 7
    requirement = by_format(watch, "SPLIT-40", "PACKED-24")
    for flags, _ in raw(watch, event, subject):
        if flags & ~known:
            return {requirement: f"chain {subject.id}: flags {flags:#x} in a descriptor"}
    return {requirement: True}


# Notifications


def asks(watch: Watch, ring: Any) -> str:
    """How a ring asks for notifications now: ``always``, ``never``, or ``event``."""
    flags = int.from_bytes(ring.own[2:4] if packed(watch) else ring.own[:2], "little")
    if ring.event_idx and (flags == 2 or not packed(watch)):
        return "event"
    return "never" if flags else "always"


DUE = {
    ("always", False): ("DRV-SPLIT-25",),
    ("event", False): ("DRV-SPLIT-27", "DRV-SPLIT-56"),
    ("always", True): ("DRV-PACKED-43",),
    ("event", True): ("DRV-PACKED-45",),
}
"""How the ring asks, whether it is packed -> requirements of a notification that is due."""


@rule(*sorted({name for names in DUE.values() for name in names}), on=("kick", "settled"), needs="ring")
def notifications_that_are_due(watch: Watch, event: Event, subject: Any) -> Answers:
    """Buffers that the device asked to be told of are told of."""
    if event.kind == "kick":
        ring = watch.queue(event).ring
        return _due(watch, ring, True) if ring is not None else None
    for queue in watch.device.queues:
        if queue.ring is None or not watch.device.running:
            continue
        text = f"queue {queue.index}: buffers wait, a notification was due and did not come"
        if due := _due(watch, queue.ring, text):
            return due
    return None


def _due(watch: Watch, ring: Any, answer: Answer) -> Answers:
    """The requirements of a notification that is due now, with an answer for each."""
    how, now = asks(watch, ring), ring.exposed()
    if now <= ring.told or (how == "event" and not crossed(watch, ring, now)):
        return {}
    due: dict[str, Answer] = dict.fromkeys(DUE.get((how, packed(watch)), ()), answer)
    if due and isinstance(ring, SplitRing):
        if not ring.event_idx and any(ring.own[-2:]):
            due["DRV-SPLIT-23"] = answer
        elif ring.event_idx and ring.own[0] & 1:
            due["DRV-SPLIT-26"] = answer
    return due


def crossed(watch: Watch, ring: Any, now: int) -> bool:
    """Whether the position that the device named was made available since it was told last."""
    if packed(watch):
        word = int.from_bytes(ring.own[:2], "little")
        place = ring.told + ((word & 0x7FFF) - ring.told) % ring.size
        return bool(place < now and ring._wrap(place) == word >> 15)
    event = int.from_bytes(ring.own[-2:], "little")
    return bool((event - ring.told) & 0xFFFF < now - ring.told)


presented("DRV-SPLIT-23", "DRV-SPLIT-26", needs="ring")


@rule("DRV-PACKED-44", on="kick", needs="order")
def no_notification_when_none_is_wanted(watch: Watch, event: Event, subject: Any) -> Answer:
    """With device event flags 1 no notification is sent."""
    queue = watch.queue(event)
    if queue.ring is None or not packed(watch) or queue.owner.threaded:
        return None
    return "notification while device event flags are 1" if asks(watch, queue.ring) == "never" else True


exercised("DRV-SPLIT-58", on="kick", when=lambda w, *_: w.has(ft.F_NOTIFICATION_DATA) and not packed(w))
exercised(
    *("DRV-PACKED-06", "DRV-PACKED-46"),
    on="kick",
    when=lambda w, *_: w.has(ft.F_NOTIFICATION_DATA) and packed(w),
)

# The order of stores

STORES = ("store", "store release", "fence", "load", "load acquire")


@rule("DRV-SPLIT-32", "DRV-PACKED-19", on=STORES, needs="order")
def what_is_published_is_complete(watch: Watch, event: Event, subject: Any) -> Answers:
    """Descriptors, and a split ring's entries, are ordered before what makes them available."""
    key = f"loose stores {event.queue}"
    loose: int = watch.remember(key)
    if event.kind in ("fence", "store release"):
        watch.life.memo[key] = 0
        if event.kind == "store release" and publishes(watch, event):
            return {by_format(watch, "SPLIT-32", "PACKED-19"): True}
        return None
    if event.kind != "store":
        return None
    if publishes(watch, event):
        requirement = by_format(watch, "SPLIT-32", "PACKED-19")
        return {requirement: f"{loose} stores are not ordered before it" if loose else True}
    if event.name in ("desc", "table") or (
        event.name == "driver" and not packed(watch) and event.offset >= 4
    ):
        watch.life.memo[key] = loose + 1
    return None


def publishes(watch: Watch, event: Event) -> bool:
    """Whether a store makes buffers available: to avail idx, or to the flags alone of a packed descriptor."""
    if packed(watch):
        return event.name == "desc" and event.offset % 16 == 14
    return event.name == "driver" and event.offset == 2


@rule("DRV-SPLIT-33", "DRV-PACKED-20", on=STORES, needs="order")
def a_full_fence_before_the_question(watch: Watch, event: Event, subject: Any) -> Answers:
    """What was published is ordered by a full fence before the device's wish for notifications is read."""
    key = f"published {event.queue}"
    if event.kind == "fence":
        watch.life.memo[key] = 0
        watch.life.memo[f"fenced {event.queue}"] = 1
    elif event.kind.startswith("store"):
        if publishes(watch, event):
            watch.life.memo[key] = 1
            watch.life.memo[f"fenced {event.queue}"] = 0
    elif event.name == "device" and wish(watch, event):
        requirement = by_format(watch, "SPLIT-33", "PACKED-20")
        if watch.life.memo.pop(key, 0):
            return {requirement: "the device's wish for notifications was read without a full fence"}
        if watch.life.memo.pop(f"fenced {event.queue}", 0):
            return {requirement: True}
    return None


def wish(watch: Watch, event: Event) -> bool:
    """Whether a load is one of used flags, avail_event or device event suppression."""
    if packed(watch):
        return True
    return event.offset == 0 or event.offset == 4 + 8 * watch.queue(event).size
