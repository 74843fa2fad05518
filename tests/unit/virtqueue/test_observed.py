"""The observing build: the order of the core's accesses, and every interleaving with a small device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from ringpeer import AVAIL, USED, WRITE, Bench, Chain, PackedPeer, bench, mask

SPLIT, PACKED = mask(), mask("RING_PACKED")
LONGEST = 12
"""No driver's turn below has more accesses."""
FORMATS = pytest.mark.parametrize("base", [SPLIT, PACKED], ids=["split", "packed"])
EVENTS = pytest.mark.parametrize("extra", [(), ("EVENT_IDX",)], ids=["flags", "event_idx"])


@pytest.fixture(scope="module")
def observed() -> Any:
    """The queue type on the observing build."""
    from guestpv.virtqueue.observed import ObservedVirtqueue

    return ObservedVirtqueue


def kinds(b: Bench) -> list[tuple[str, str, int]]:
    return [(access.kind, access.area, access.offset) for access in b.queue.accesses]  # type: ignore[attr-defined]


@pytest.mark.requirement("DRV-SPLIT-32", "DRV-SPLIT-33")
def test_split_order_of_accesses(observed: Any) -> None:
    b = bench(mask("EVENT_IDX"), 4, queue_type=observed)
    part = b.pool.allocate(8)
    b.queue.add([part], [part])
    b.queue.publish()
    assert kinds(b) == [
        ("store", "desc", 0),
        ("store", "desc", 8),
        ("store", "desc", 16),
        ("store", "desc", 24),
        ("store", "driver", 4),
        ("store release", "driver", 2),
        ("fence", "", 0),
        ("load", "device", 36),
    ]
    assert b.queue.accesses[5].value == 1
    chain = b.peer.pop()
    assert chain is not None
    b.peer.push(chain, 3)
    b.queue.accesses.clear()
    b.queue.reap_burst()
    assert kinds(b) == [
        ("load acquire", "device", 2),
        ("load", "device", 4),
        ("load", "device", 8),
        ("store", "driver", 12),
        ("fence", "", 0),
    ]


@pytest.mark.requirement("DRV-PACKED-13", "DRV-PACKED-19", "DRV-PACKED-20", "DRV-PACKED-37")
def test_packed_order_of_accesses(observed: Any) -> None:
    b = bench(PACKED, 4, queue_type=observed)
    part = b.pool.allocate(8)
    b.queue.add([part], [part])
    b.queue.publish()
    assert kinds(b) == [
        ("store", "desc", 16),
        ("store", "desc", 24),
        ("store", "desc", 0),
        ("store", "desc", 8),
        ("store release", "desc", 14),
        ("fence", "", 0),
        ("load", "device", 2),
    ]
    assert b.queue.accesses[4].value & (AVAIL | USED) == AVAIL
    assert b.queue.accesses[3].value >> 48 & (AVAIL | USED) != AVAIL, "the head waits for the release"
    chain = b.peer.pop()
    assert chain is not None
    b.queue.desc[0]["id"], b.queue.desc[0]["len"] = chain.id, 0
    b.queue.desc[0]["flags"] = AVAIL | USED
    b.queue.accesses.clear()
    assert b.queue.reap_burst()[1].tolist() == [0]
    assert kinds(b) == [
        ("load acquire", "desc", 14),
        ("load", "desc", 12),
        ("load", "desc", 8),
        ("load acquire", "desc", 46),
    ]


def test_accesses_to_tables_are_named(observed: Any) -> None:
    b = bench(mask("INDIRECT_DESC"), 4, queue_type=observed)
    part = b.pool.allocate(8)
    b.queue.add([part], [part])
    assert [access for access in kinds(b) if access[1] == "table"] == [
        ("store", "table", at) for at in (0, 8, 16, 24)
    ]


def test_what_the_hook_raises_comes_out_of_the_operation(observed: Any) -> None:
    b = bench(SPLIT, 4, queue_type=observed)
    b.queue.add([b.pool.allocate(8)])

    def refuse(_access: object) -> None:
        raise ZeroDivisionError

    b.queue.before_access = refuse
    with pytest.raises(ZeroDivisionError):
        b.queue.publish()


class Scene:
    """One meeting of driver and device; a step of the device is one access, or what may be one."""

    def __init__(self, b: Bench) -> None:
        self.b = b
        self.event_idx = b.peer.event_idx
        part = b.pool.allocate(8)
        # One buffer there and back first, so that no index stands where it started.
        b.queue.add([], [part])
        b.queue.publish()
        b.peer.push(self.take(), 1)
        b.queue.reap_burst()
        b.peer.suppress(False)
        b.queue.disable_interrupts()
        b.queue.add([], [part])

    def take(self) -> Chain:
        chain = self.b.peer.pop()
        assert chain is not None
        return chain


class Publishing(Scene):
    """The driver publishes while the device is about to sleep."""

    kicked = seen = False

    def driver(self) -> None:
        self.kicked = self.b.queue.publish()

    def device(self) -> Iterator[None]:
        self.seen = self.b.peer.pop() is not None
        yield
        if not self.seen:
            self.b.peer.suppress(True)
            yield
            self.seen = self.b.peer.pop() is not None
            yield

    def verdict(self) -> None:
        assert self.seen or self.kicked, "the device sleeps on a buffer"


class Using(Scene):
    """The device uses a buffer while the driver is about to sleep."""

    def __init__(self, b: Bench) -> None:
        super().__init__(b)
        b.queue.publish()
        self.chain = self.take()
        self.reaped = 0
        self.interrupts = b.peer.interrupts

    def driver(self) -> None:
        self.reaped = len(self.b.queue.reap_burst()[0])
        if not self.reaped and self.b.queue.enable_interrupts():
            self.reaped = len(self.b.queue.reap_burst()[0])
            assert self.reaped == 1

    def device(self) -> Iterator[None]:
        peer, queue = self.b.peer, self.b.queue
        if isinstance(peer, PackedPeer):
            at = peer.used_at
            queue.desc[at]["id"] = self.chain.id
            yield
            queue.desc[at]["len"] = 3
            yield
            queue.desc[at]["flags"] = (AVAIL | USED if peer.used_wrap else 0) | WRITE
            yield
            mode, event = int(queue.driver["flags"]), int(queue.driver["desc"])
            self.interrupted = mode == 0 or (mode == 2 and event == (at | peer.used_wrap << 15))
        else:
            queue.device["ring"][peer.next_used % 2]["id"] = self.chain.id
            yield
            queue.device["ring"][peer.next_used % 2]["len"] = 3
            yield
            queue.device["idx"] = peer.next_used + 1
            yield
            event = int(queue.driver["used_event"])
            self.interrupted = event == peer.next_used if self.event_idx else not int(queue.driver["flags"])
        yield

    def verdict(self) -> None:
        assert self.reaped or self.interrupted, "the driver sleeps on a used buffer"


def run(observed: Any, features: int, kind: type[Any], placed: tuple[int, ...]) -> tuple[int, int]:
    """One interleaving: step n of the device comes before access placed[n], those left over at the end."""
    b = bench(features, 2, queue_type=observed)
    scene = kind(b)
    device = scene.device()
    left = list(placed)
    accesses = steps = 0

    def before(_access: object) -> None:
        nonlocal accesses, steps
        while left and left[0] == accesses:
            left.pop(0)
            steps += next(device, True) is None
        accesses += 1

    b.queue.before_access = before
    scene.driver()
    b.queue.before_access = None
    steps += sum(1 for _ in device)
    scene.verdict()
    return accesses, steps


@FORMATS
@EVENTS
@pytest.mark.parametrize("kind", [Publishing, Using])
@pytest.mark.requirement("DRV-SPLIT-33", "DRV-SPLIT-34", "DRV-PACKED-20", "DRV-PACKED-21")
def test_no_interleaving_loses_a_notification(
    observed: Any, base: int, extra: tuple[str, ...], kind: type[Any]
) -> None:
    """Each way to place the device's steps between the driver's accesses."""
    features = base | mask(*extra)
    results = [
        run(observed, features, kind, at)
        for at in itertools.combinations_with_replacement(range(LONGEST + 1), 4)
    ]
    assert max(accesses for accesses, _ in results) <= LONGEST
    assert {steps for _, steps in results} >= ({1, 3} if kind is Publishing else {4})
