"""Buffers that are made available once more without writing their descriptors (``gpv_again``)."""

from __future__ import annotations

import numpy as np
import pytest
from guestpv.core._core import lib

from guestpv.memory import DmaBuffer
from ringpeer import Bench, bench, mask

SIZE = 16


def parts(b: Bench) -> tuple[list[DmaBuffer], list[DmaBuffer]]:
    return [b.pool.allocate(16)], [b.pool.allocate(64), b.pool.allocate(1)]


def use_all(b: Bench) -> list[int]:
    """The device uses what is available; slots in the order in which they come back."""
    b.queue.publish()
    while chain := b.peer.pop():
        b.peer.push(chain, 1)
    return [int(slot) for slot in b.queue.reap_burst()[0]]


def again(b: Bench, slot: int) -> int:
    return int(lib.gpv_again(b.queue.handle, slot, 0))


@pytest.mark.parametrize("features", [mask(), mask("INDIRECT_DESC"), mask("EVENT_IDX")])
def test_the_device_finds_the_same_buffers_and_no_descriptor_was_written(features: int) -> None:
    b = bench(features, SIZE)
    made = {b.queue.add(*parts(b)) & 0xFFFF for _ in range(4)}
    b.queue.publish()
    first = [b.peer.pop() for _ in made]
    for chain in first:
        assert chain is not None
        b.peer.push(chain, 1)
    slots = [int(slot) for slot in b.queue.reap_burst()[0]]
    before = b.queue.desc.copy()
    for _ in range(3 * SIZE):
        for slot in reversed(slots):
            assert again(b, slot) == slot
        assert b.queue.free_slots == SIZE - 4 * (1 if features & mask("INDIRECT_DESC") & ~mask() else 3)
        b.queue.publish()
        chains = [b.peer.pop() for _ in slots]
        assert chains == first[::-1]
        first = chains
        for chain in chains:
            assert chain is not None
            b.peer.push(chain, 1)
        slots = [int(slot) for slot in b.queue.reap_burst()[0]]
    assert np.array_equal(b.queue.desc, before)
    assert b.queue.free_slots == SIZE


@pytest.mark.parametrize("features", [mask(), mask("INDIRECT_DESC")])
def test_one_element_moves_and_the_others_stay(features: int) -> None:
    b = bench(features, SIZE)
    readable, writable = parts(b)
    b.queue.add(readable, writable)
    (slot,) = use_all(b)
    for _ in range(3):
        elsewhere = b.pool.allocate(64)
        assert lib.gpv_again_moved(b.queue.handle, slot, 0, 1, elsewhere.address) == slot
        b.queue.publish()
        chain = b.peer.pop()
        assert chain is not None
        assert chain.readable == ((readable[0].address, 16),)
        assert chain.writable == ((elsewhere.address, 64), (writable[1].address, 1))
        b.peer.push(chain, 1)
        assert [int(slot) for slot in b.queue.reap_burst()[0]] == [slot]
    assert lib.gpv_again_moved(b.queue.handle, slot, 0, SIZE, elsewhere.address) == lib.GPV_ECHAIN
    assert b.queue.free_slots == SIZE


def test_only_the_last_one_back_and_nothing_in_between() -> None:
    b = bench(mask(), SIZE)
    for _ in range(3):
        b.queue.add(*parts(b))
    slots = use_all(b)
    assert again(b, slots[0]) == lib.GPV_ECHAIN
    assert again(b, slots[2]) == slots[2]
    assert again(b, slots[2]) == lib.GPV_ECHAIN
    # Any other buffer may have taken descriptors of those that are free.
    b.queue.add(writable=[b.pool.allocate(8)])
    assert again(b, slots[1]) == lib.GPV_ECHAIN
    assert again(b, slots[0]) == lib.GPV_ECHAIN
    assert len(use_all(b)) == 2
    assert b.queue.free_slots == SIZE


@pytest.mark.parametrize("features", [mask("RING_PACKED"), mask("IN_ORDER")])
def test_rings_that_cannot_do_it_say_so(features: int) -> None:
    b = bench(features, SIZE)
    b.queue.add(writable=[b.pool.allocate(8)])
    (slot,) = use_all(b)
    assert again(b, slot) == lib.GPV_ECHAIN


def test_a_fresh_queue_has_nothing_to_give_again() -> None:
    b = bench(mask(), SIZE)
    assert again(b, 0) == lib.GPV_ECHAIN
    b.queue.close()
    assert lib.gpv_again(b.queue.handle, 0, 0) == lib.GPV_ECLOSED
