"""The record of requests in flight that outlives a vhost-user back end (its "Inflight I/O tracking").

A back end writes down what it has taken from a ring, in memory that the front end keeps. One that is started
again after a crash reads there what was not used yet; the rings alone do not tell once requests complete out
of order. The order of the stores is the protocol's: whatever the moment of death, the record can be mended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ..devices.ring import Chain

VERSION: Final = 1
ALIGN: Final = 64

SPLIT_HEAD: Final = np.dtype(
    [("features", "u8"), ("version", "u2"), ("desc_num", "u2"), ("last_batch_head", "u2"), ("used_idx", "u2")]
)
SPLIT_STATE: Final = np.dtype([("inflight", "u1"), ("padding", "u1", 5), ("next", "u2"), ("counter", "u8")])
PACKED_HEAD: Final = np.dtype(
    {
        "names": [
            "features",
            "version",
            "desc_num",
            "free_head",
            "old_free_head",
            "used_idx",
            "old_used_idx",
            "used_wrap_counter",
            "old_used_wrap_counter",
        ],
        "formats": ["u8", "u2", "u2", "u2", "u2", "u2", "u2", "u1", "u1"],
        "itemsize": 32,
    }
)
PACKED_STATE: Final = np.dtype(
    [
        ("inflight", "u1"),
        ("padding", "u1"),
        ("next", "u2"),
        ("last", "u2"),
        ("num", "u2"),
        ("counter", "u8"),
        ("id", "u2"),
        ("flags", "u2"),
        ("len", "u4"),
        ("addr", "u8"),
    ]
)

Memory = NDArray[np.uint8]
RawDescriptor = tuple[int, int, int, int]
"""A packed descriptor as the driver wrote it: addr, len, id, flags."""


def region_size(queue_size: int, packed: bool) -> int:
    """Bytes of one queue's record."""
    head, state = (PACKED_HEAD, PACKED_STATE) if packed else (SPLIT_HEAD, SPLIT_STATE)
    return -(-(head.itemsize + queue_size * state.itemsize) // ALIGN) * ALIGN


class Record(Protocol):
    """The record of one queue."""

    def taken(self, chain: Chain, raw: Sequence[RawDescriptor]) -> None:
        """A chain was popped; ``raw`` are its descriptors in a packed ring."""
        ...

    def staged(self, chain: Chain) -> None:
        """A chain is about to be shown as used."""
        ...

    def shown(self) -> None:
        """Everything staged is visible to the driver."""
        ...


class SplitRecord:
    """The record of a split queue.

    Args:
        memory: the queue's part of the shared buffer; zeroes for a new one.
        size: queue size.
        used_idx: ``idx`` of the used ring.

    Attributes:
        again: heads that were in flight when the last back end died, in the order they were taken.
    """

    def __init__(self, memory: Memory, size: int, used_idx: int) -> None:
        self._head = memory[: SPLIT_HEAD.itemsize].view(SPLIT_HEAD).reshape(())
        end = SPLIT_HEAD.itemsize + size * SPLIT_STATE.itemsize
        self._state = memory[SPLIT_HEAD.itemsize : end].view(SPLIT_STATE)
        self._staged: list[int] = []
        head, state = self._head, self._state
        if head["version"] != VERSION:
            head["desc_num"] = size
            head["used_idx"] = used_idx
            head["version"] = VERSION
        for _ in range(min((used_idx - int(head["used_idx"])) & 0xFFFF, size)):
            last = int(head["last_batch_head"]) % size
            state["inflight"][last] = 0
            head["last_batch_head"] = state["next"][last]
        head["used_idx"] = used_idx
        left = np.flatnonzero(state["inflight"])
        self.again: list[int] = left[np.argsort(state["counter"][left], kind="stable")].tolist()
        self._counter = int(state["counter"].max()) + 1

    def taken(self, chain: Chain, raw: Sequence[RawDescriptor]) -> None:
        """A chain was popped."""
        self._state["counter"][chain.id] = self._counter
        self._counter += 1
        self._state["inflight"][chain.id] = 1

    def staged(self, chain: Chain) -> None:
        """A chain is about to be shown as used."""
        self._state["next"][chain.id] = self._head["last_batch_head"]
        self._head["last_batch_head"] = chain.id
        self._staged.append(chain.id)

    def shown(self) -> None:
        """Everything staged is visible to the driver."""
        for head in self._staged:
            self._state["inflight"][head] = 0
        self._head["used_idx"] = (int(self._head["used_idx"]) + len(self._staged)) & 0xFFFF
        self._staged.clear()


class PackedRecord:
    """The record of a packed queue.

    Args:
        memory, size: as for ``SplitRecord``.
        used: ring position and wrap counter of the next used descriptor, for a new record.
        flags: of all descriptors as they are in the ring now, shape (size,).

    Attributes:
        again: descriptors of the buffers that were in flight, in the order they were taken.
        used: position and wrap counter of the next used descriptor.
    """

    def __init__(self, memory: Memory, size: int, used: tuple[int, int], flags: NDArray[np.uint16]) -> None:
        self._head = memory[: PACKED_HEAD.itemsize].view(PACKED_HEAD).reshape(())
        end = PACKED_HEAD.itemsize + size * PACKED_STATE.itemsize
        self._state = memory[PACKED_HEAD.itemsize : end].view(PACKED_STATE)
        self._size = size
        self._staged: list[int] = []
        self._entries: dict[int, int] = {}
        head = self._head
        if head["version"] != VERSION:
            head["desc_num"] = size
            self._state["next"] = np.arange(1, size + 1)
            head["used_idx"] = head["old_used_idx"] = used[0]
            head["used_wrap_counter"] = head["old_used_wrap_counter"] = used[1]
            head["version"] = VERSION
        self._mend(flags)
        self.used = (int(head["used_idx"]), int(head["used_wrap_counter"]))
        state = self._state
        left = np.flatnonzero(state["inflight"])
        order = left[np.argsort(state["counter"][left], kind="stable")].tolist()
        self._known = order.copy()
        self.again = [self._descriptors(entry) for entry in order]
        self._counter = int(state["counter"].max()) + 1

    def _mend(self, flags: NDArray[np.uint16]) -> None:
        """Decide whether the last batch was seen by the driver, and make the record say so."""
        head, state, size = self._head, self._state, self._size
        old, wrap = int(head["old_used_idx"]) % size, int(head["old_used_wrap_counter"])
        if head["used_idx"] != head["old_used_idx"] or head["used_wrap_counter"] != wrap:
            available = 1 << 7 if wrap else 1 << 15
            if int(flags[old]) & (1 << 7 | 1 << 15) != available:
                self._commit()
        for name in ("free_head", "used_idx", "used_wrap_counter"):
            head[name] = head[f"old_{name}"]
        entry = int(head["free_head"])
        for _ in range(size):
            if entry >= size:
                break
            state["inflight"][entry] = 0
            entry = int(state["next"][entry])

    def _commit(self) -> None:
        head = self._head
        for name in ("free_head", "used_idx", "used_wrap_counter"):
            head[f"old_{name}"] = head[name]

    def _descriptors(self, entry: int) -> list[RawDescriptor]:
        found = []
        for _ in range(int(self._state["num"][entry])):
            row = self._state[entry]
            found.append((int(row["addr"]), int(row["len"]), int(row["id"]), int(row["flags"])))
            entry = int(row["next"])
        return found

    def taken(self, chain: Chain, raw: Sequence[RawDescriptor]) -> None:
        """A chain was popped; ``raw`` are its descriptors as they were in the ring."""
        if self._known:
            self._entries[chain.id] = self._known.pop(0)
            return
        head, state = self._head, self._state
        entry = first = int(head["old_free_head"])
        state["num"][first] = 0
        state["counter"][first] = self._counter
        self._counter += 1
        state["inflight"][first] = 1
        for number, (address, length, id, flags) in enumerate(raw):
            entry = int(head["free_head"])
            if number == len(raw) - 1:
                state["last"][first] = entry
            state["num"][first] += 1
            state["addr"][entry], state["len"][entry] = address, length
            state["id"][entry], state["flags"][entry] = id, flags
            head["free_head"] = state["next"][entry]
        head["old_free_head"] = head["free_head"]
        self._entries[chain.id] = first

    def staged(self, chain: Chain) -> None:
        """A chain is about to be shown as used."""
        head, state = self._head, self._state
        entry = self._entries.pop(chain.id)
        state["next"][int(state["last"][entry])] = head["free_head"]
        head["free_head"] = entry
        position = int(head["used_idx"]) + chain.count
        if position >= self._size:
            position -= self._size
            head["used_wrap_counter"] ^= 1
        head["used_idx"] = position
        self._staged.append(entry)

    def shown(self) -> None:
        """Everything staged is visible to the driver."""
        for entry in self._staged:
            self._state["inflight"][entry] = 0
        self._staged.clear()
        self._commit()
