"""The device half of one virtqueue, for tests of the driver half: plain numpy on ring memory, no hurry.

It is written from sections 2.7 to 2.9 and keeps to them; tests that need a liar write to the rings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guestpv.memory import DmaPool, DmaRegion, Segment
from guestpv.spec import features as f
from guestpv.spec.ring import PACKED_DESC, SPLIT_DESC
from guestpv.virtqueue.kick import Kick
from guestpv.virtqueue.layout import PackedRings, SplitRings
from guestpv.virtqueue.queue import Virtqueue

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15


class PeerSpace:
    """Memory at bus addresses that are not the CPU's, so that mixing the two up is found."""

    def __init__(self) -> None:
        self.regions: list[DmaRegion] = []
        self.next = 0x7_0000_0000

    def map(self, size: int) -> DmaRegion:
        array = np.zeros(size + 4096, np.uint8)
        start = -array.ctypes.data % 4096
        array = array[start : start + size]
        region = DmaRegion(array, (Segment(self.next, size),), array.ctypes.data)
        self.next += size + (1 << 20)
        self.regions.append(region)
        return region

    def unmap(self, region: DmaRegion) -> None:
        self.regions.remove(region)

    def at(self, address: int, length: int) -> np.ndarray:
        """The bytes that the device finds at a bus address."""
        for region in self.regions:
            start = address - region.segments[0].address
            if start >= 0 and start + length <= region.array.nbytes:
                return region.array[start : start + length]
        raise AssertionError(f"the device was sent to {address:#x}+{length}, which nobody gave it")


@dataclass(frozen=True)
class Chain:
    """A buffer as the device sees it: elements are (bus address, length)."""

    id: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]
    count: int
    """Descriptors it takes in the ring."""

    @property
    def room(self) -> int:
        return sum(length for _, length in self.writable)


def _elements(entries: list[tuple[int, int, int]]) -> tuple[tuple[tuple[int, int], ...], ...]:
    readable = tuple((addr, length) for addr, length, flags in entries if not flags & WRITE)
    writable = tuple((addr, length) for addr, length, flags in entries if flags & WRITE)
    assert [e[2] & WRITE for e in entries] == [0] * len(readable) + [WRITE] * len(writable), "writable first"
    return readable, writable


class Peer:
    """What both formats have in common: options and counters of notifications."""

    def __init__(self, queue: Virtqueue, space: PeerSpace) -> None:
        self.space = space
        self.size = queue.size
        self.event_idx = bool(queue.features >> f.F_EVENT_IDX & 1)
        self.in_order = bool(queue.features >> f.F_IN_ORDER & 1)
        self.interrupts = 0

    def pop(self) -> Chain | None:
        """The next available buffer, or None."""
        raise NotImplementedError

    def push(self, chain: Chain, length: int, batch: tuple[Chain, ...] = ()) -> None:
        """Use a buffer (IN_ORDER: and those of ``batch`` before it) and interrupt if asked to."""
        raise NotImplementedError

    def suppress(self, wanted: bool) -> None:
        """Say whether available buffer notifications are wanted, from the next buffer on."""
        raise NotImplementedError


class SplitPeer(Peer):
    def __init__(self, queue: Virtqueue, space: PeerSpace) -> None:
        super().__init__(queue, space)
        assert isinstance(queue.rings, SplitRings)
        self.rings = queue.rings
        self.next_avail = 0
        self.next_used = 0

    def pop(self) -> Chain | None:
        avail, size = self.rings.avail, self.size
        if int(avail["idx"]) == self.next_avail:
            return None
        assert (int(avail["idx"]) - self.next_avail) % 0x10000 <= size, "available idx jumped"
        head = int(avail["ring"][self.next_avail % size])
        self.next_avail = (self.next_avail + 1) % 0x10000
        entries: list[tuple[int, int, int]] = []
        index, count = head, 0
        while True:
            desc = self.rings.desc[index]
            flags = int(desc["flags"])
            count += 1
            if flags & INDIRECT:
                assert not flags & NEXT, "INDIRECT together with NEXT"
                table = self.space.at(int(desc["addr"]), int(desc["len"])).view(SPLIT_DESC)
                position = 0
                while True:
                    entry = table[position]
                    entries.append((int(entry["addr"]), int(entry["len"]), int(entry["flags"])))
                    assert not entry["flags"] & INDIRECT
                    if not entry["flags"] & NEXT:
                        break
                    assert int(entry["next"]) == position + 1 or not self.in_order
                    position = int(entry["next"])
                assert len(entries) == len(table)
            else:
                entries.append((int(desc["addr"]), int(desc["len"]), flags))
            assert count <= size, "endless chain"
            if not flags & NEXT:
                break
            assert not self.in_order or int(desc["next"]) == (index + 1) % size
            index = int(desc["next"])
        return Chain(head, *_elements(entries), count)

    def push(self, chain: Chain, length: int, batch: tuple[Chain, ...] = ()) -> None:
        used = self.rings.used
        used["ring"][self.next_used % self.size]["id"] = chain.id
        used["ring"][self.next_used % self.size]["len"] = length
        old = self.next_used
        self.next_used = (self.next_used + 1 + len(batch)) % 0x10000
        used["idx"] = self.next_used
        if self.event_idx:
            event = int(self.rings.avail["used_event"])
            wanted = any((old + i) % 0x10000 == event for i in range(1 + len(batch)))
        else:
            wanted = not int(self.rings.avail["flags"]) & 1
        self.interrupts += wanted

    def suppress(self, wanted: bool) -> None:
        if self.event_idx:
            self.rings.used["avail_event"] = (self.next_avail if wanted else self.next_avail - 1) % 0x10000
        else:
            self.rings.used["flags"] = not wanted


class PackedPeer(Peer):
    def __init__(self, queue: Virtqueue, space: PeerSpace) -> None:
        super().__init__(queue, space)
        assert isinstance(queue.rings, PackedRings)
        self.rings = queue.rings
        self.avail_at, self.avail_wrap = 0, 1
        self.used_at, self.used_wrap = 0, 1

    def pop(self) -> Chain | None:
        entries: list[tuple[int, int, int]] = []
        count = 0
        while True:
            desc = self.rings.desc[self.avail_at]
            flags = int(desc["flags"])
            if (bool(flags & AVAIL), bool(flags & USED)) != (self.avail_wrap == 1, self.avail_wrap == 0):
                assert not entries, "the rest of a list is not available"
                return None
            count += 1
            self.avail_at += 1
            if self.avail_at == self.size:
                self.avail_at, self.avail_wrap = 0, 1 - self.avail_wrap
            if flags & INDIRECT:
                assert not flags & NEXT, "INDIRECT together with NEXT"
                table = self.space.at(int(desc["addr"]), int(desc["len"])).view(PACKED_DESC)
                entries = [(int(e["addr"]), int(e["len"]), int(e["flags"])) for e in table]
                assert not any(flags & ~WRITE for _, _, flags in entries)
            else:
                entries.append((int(desc["addr"]), int(desc["len"]), flags))
            assert count <= self.size, "endless list"
            if not flags & NEXT:
                return Chain(int(desc["id"]), *_elements(entries), count)

    def push(self, chain: Chain, length: int, batch: tuple[Chain, ...] = ()) -> None:
        start, wrap = self.used_at, self.used_wrap
        total = chain.count + sum(other.count for other in batch)
        desc = self.rings.desc[start]
        desc["id"] = chain.id
        desc["len"] = length
        desc["flags"] = (AVAIL | USED if wrap else 0) | (WRITE if length else 0)
        self.used_at += total
        if self.used_at >= self.size:
            self.used_at, self.used_wrap = self.used_at - self.size, 1 - self.used_wrap
        mode = int(self.rings.driver["flags"])
        event = int(self.rings.driver["desc"])
        assert mode in ((0, 1, 2) if self.event_idx else (0, 1))
        covered = [
            ((start + i) % self.size, wrap if start + i < self.size else 1 - wrap) for i in range(total)
        ]
        self.interrupts += mode == 0 or (mode == 2 and (event & 0x7FFF, event >> 15) in covered)

    def suppress(self, wanted: bool) -> None:
        if wanted and self.event_idx:
            self.rings.device["desc"] = self.avail_at | self.avail_wrap << 15
            self.rings.device["flags"] = 2
        else:
            self.rings.device["flags"] = not wanted


def mask(*names: str) -> int:
    """A feature mask with VERSION_1 and the named common features."""
    return f.mask([f.F_VERSION_1, *(f.feature_bit(None, name) for name in names)])


@dataclass
class Bench:
    """A queue, its peer, and what the driver told the device."""

    queue: Virtqueue
    peer: SplitPeer | PackedPeer
    pool: DmaPool
    space: PeerSpace
    kicks: list[int]


def bench(
    features: int,
    size: int,
    *,
    index: int = 5,
    queue_type: type[Virtqueue] = Virtqueue,
    **options: object,
) -> Bench:
    """A virtqueue over fake memory with a peer on it; ``options`` go to the Virtqueue."""
    space = PeerSpace()
    pool = DmaPool(space)
    kicks: list[int] = []
    queue = queue_type(index, size, features, pool, Kick.call(kicks.append), **options)  # type: ignore[arg-type]
    peer = PackedPeer(queue, space) if queue.packed else SplitPeer(queue, space)
    return Bench(queue, peer, pool, space, kicks)
