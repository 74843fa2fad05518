"""Random drivers against random devices: every buffer comes back exactly once, no notification is lost."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guestpv.errors import QueueFull
from guestpv.virtqueue.check import CheckedVirtqueue
from ringpeer import Bench, Chain, bench, mask

OPTIONS = ("RING_PACKED", "EVENT_IDX", "INDIRECT_DESC", "IN_ORDER", "NOTIFICATION_DATA", "ORDER_PLATFORM")
LENGTHS = st.integers(1, 64)


class QueueMachine(RuleBasedStateMachine):
    """Driver and device take steps in any order; the model is a dict of what is out."""

    b: Bench

    @initialize(
        options=st.sets(st.sampled_from(OPTIONS)),
        power=st.integers(0, 5),
        odd=st.integers(1, 33),
        entries=st.integers(1, 4),
        checked=st.booleans(),
    )
    def start(self, options: set[str], power: int, odd: int, entries: int, checked: bool) -> None:
        size = odd if "RING_PACKED" in options else 1 << power
        kind = {"queue_type": CheckedVirtqueue} if checked else {}
        self.b = bench(mask(*options), size, indirect_entries=entries, **kind)
        self.memory = self.b.pool.allocate(64 * 64)
        self.out: dict[int, tuple[list[int], int, Any]] = {}
        """Token, or slot of a burst -> lengths, number of readable ones, cookie."""
        self.added: list[int] = []
        self.at_device: list[Chain] = []
        self.used: dict[int, int] = {}
        """Slot -> length, used and not reaped."""
        self.device_sleeps = False
        self.driver_sleeps = False
        self.came_back = 0

    def parts(self, lengths: list[int]) -> list[Any]:
        return [self.memory[64 * i : 64 * i + length] for i, length in enumerate(lengths)]

    @rule(lengths=st.lists(LENGTHS, min_size=1, max_size=9), data=st.data())
    def add(self, lengths: list[int], data: st.DataObject) -> None:
        lengths = lengths[: self.b.queue.size]
        readable = data.draw(st.integers(0, len(lengths)))
        parts = self.parts(lengths)
        free = self.b.queue.free_slots
        cookie = object()
        try:
            token = self.b.queue.add(parts[:readable], parts[readable:], cookie)
        except QueueFull:
            assert len(lengths) > free
            return
        slot = token & 0xFFFF
        assert slot not in {t & 0xFFFF for t in self.out}, "a slot was given to two buffers"
        self.out[token] = (lengths, readable, cookie)
        self.added.append(token)

    @rule(count=st.integers(1, 8), lengths=st.lists(LENGTHS, min_size=1, max_size=3), data=st.data())
    def add_burst(self, count: int, lengths: list[int], data: st.DataObject) -> None:
        lengths = lengths[: self.b.queue.size]
        readable = data.draw(st.integers(0, len(lengths)))
        row = [part.address for part in self.parts(lengths)]
        free = self.b.queue.free_slots
        slots = self.b.queue.add_burst(
            np.array([row] * count, np.uint64), np.array([lengths] * count, np.uint32), readable
        ).tolist()
        assert min(count, free // len(lengths)) <= len(slots) <= count
        for slot in slots:
            assert slot not in {t & 0xFFFF for t in self.out}
            self.out[slot] = (lengths, readable, None)
            self.added.append(slot)

    @rule()
    def publish(self) -> None:
        kicks = len(self.b.kicks)
        kicked = self.b.queue.publish()
        assert len(self.b.kicks) - kicks == kicked
        if not self.added:
            assert not kicked
        elif self.device_sleeps:
            assert kicked, "the kick was lost"
            self.device_sleeps = False
        self.added.clear()

    @rule(count=st.integers(1, 8))
    def device_takes(self, count: int) -> None:
        for _ in range(count):
            chain = self.b.peer.pop()
            if chain is None:
                break
            self.device_sleeps = False
            token = next(t for t in self.out if t & 0xFFFF == chain.id)
            assert token not in self.added, "the device saw a buffer before it was published"
            lengths, readable, _ = self.out[token]
            expected = [(part.address, part.nbytes) for part in self.parts(lengths)]
            assert chain.readable == tuple(expected[:readable])
            assert chain.writable == tuple(expected[readable:])
            self.at_device.append(chain)

    @rule(wanted=st.booleans())
    def device_suppresses(self, wanted: bool) -> None:
        self.b.peer.suppress(wanted)
        self.device_sleeps = False

    @rule()
    def device_falls_asleep(self) -> None:
        self.b.peer.suppress(True)
        chain = self.b.peer.pop()
        self.device_sleeps = chain is None
        if chain is not None:
            self.at_device.append(chain)

    @precondition(lambda self: self.at_device)
    @rule(data=st.data())
    def device_uses(self, data: st.DataObject) -> None:
        before: tuple[Chain, ...] = ()
        if self.b.peer.in_order:
            count = data.draw(st.integers(1, len(self.at_device)))
            *skipped, chain = self.at_device[:count]
            before = tuple(skipped)
            del self.at_device[:count]
        else:
            chain = self.at_device.pop(data.draw(st.integers(0, len(self.at_device) - 1)))
        length = data.draw(st.integers(0, chain.room))
        interrupts = self.b.peer.interrupts
        self.b.peer.push(chain, length, before)
        for other in before:
            self.used[other.id] = other.room
        self.used[chain.id] = length
        if self.driver_sleeps:
            assert self.b.peer.interrupts > interrupts, "the interrupt was lost"
            self.driver_sleeps = False

    def take(self, key: int, length: int) -> None:
        slot = key & 0xFFFF
        assert self.used.pop(slot) == length
        token = next(t for t in self.out if t & 0xFFFF == slot)
        assert key in (token, slot)
        del self.out[token]
        self.came_back += 1
        self.driver_sleeps = False

    @rule(limit=st.integers(1, 9))
    def reap_some(self, limit: int) -> None:
        # In this order: once there were enough, no further one is taken.
        for _, (token, length) in zip(range(limit), self.b.queue.completions(), strict=False):
            expected = self.out[token][2]
            assert self.b.queue.cookie(token) is expected
            self.take(token, length)

    @rule()
    def reap_all(self) -> None:
        ids, lengths = self.b.queue.reap_burst()
        for slot, length in zip(ids.tolist(), lengths.tolist(), strict=True):
            self.take(slot, length)
        assert not self.used

    @rule()
    def driver_disarms(self) -> None:
        self.b.queue.disable_interrupts()
        self.driver_sleeps = False

    @rule()
    def driver_falls_asleep(self) -> None:
        pending = self.b.queue.enable_interrupts()
        assert pending == bool(self.used)
        self.driver_sleeps = not pending

    @rule()
    def reset(self) -> None:
        left = self.b.queue.drain()
        assert sorted(left) == sorted(self.out)
        self.b.peer = type(self.b.peer)(self.b.queue, self.b.space)
        for state in (self.out, self.added, self.at_device, self.used):
            state.clear()
        self.device_sleeps = self.driver_sleeps = False

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "b"):
            return
        assert self.b.queue.outstanding == len(self.out)
        assert self.b.queue.pending() == bool(self.used)
        assert 0 <= self.b.queue.free_slots <= self.b.queue.size - len(self.out)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_places_of_a_packed_ring_are_free_again_where_used_elements_were_taken() -> None:
    """Also the place of a buffer that is still with the device, which used others first (2.8.6)."""
    b = bench(mask("RING_PACKED"), 3, queue_type=CheckedVirtqueue)
    part = b.pool.allocate(64)
    first, second, third = (b.queue.add([part]) for _ in range(3))
    b.queue.publish()
    chains = [b.peer.pop() for _ in range(3)]
    for chain in (chains[0], chains[2]):
        assert chain is not None
        b.peer.push(chain, 0)
    assert list(b.queue.completions()) == [(first, 0), (third, 0)]
    fourth = b.queue.add([part, part])
    b.queue.publish()
    assert chains[1] is not None
    b.peer.push(chains[1], 0)
    again = b.peer.pop()
    assert again is not None
    b.peer.push(again, 0)
    assert list(b.queue.completions()) == [(second, 0), (fourth, 0)]


@pytest.mark.parametrize("form", [(), ("RING_PACKED",)], ids=["split", "packed"])
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=2)), ids=str)
def test_random_bursts_over_three_wraps_of_the_index(
    form: tuple[str, ...], options: tuple[bool, bool]
) -> None:
    names = [name for name, on in zip(("EVENT_IDX", "IN_ORDER"), options, strict=True) if on]
    b = bench(mask(*form, *names), 256)
    random = np.random.default_rng(7)
    row = np.full((256, 1), b.pool.allocate(64).address, np.uint64)
    lengths = np.full((256, 1), 64, np.uint32)
    sent = back = total = returned = 0
    chains: list[Chain] = []
    while sent < 3 * 0x10000 + 100:
        count = int(random.integers(1, 257))
        sent += len(b.queue.add_burst(row[:count], lengths[:count], 0))
        b.queue.publish()
        while chain := b.peer.pop():
            chains.append(chain)
        keep = int(random.integers(0, len(chains) + 1))
        if not options[1]:
            random.shuffle(chains)  # type: ignore[arg-type]
        while len(chains) > keep:
            length = len(chains) % 65
            b.peer.push(chains.pop(0), length)
            total += length
        ids, got = b.queue.reap_burst()
        back += len(ids)
        returned += int(got.sum())
    assert back == sent - len(chains)
    assert returned == total
