"""What both ring formats share on the device's side: chains, staging, in-order use (2.7.9, 2.8.8)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..spec import features as ft
from .dma import BusMemory, Unmapped
from .evidence import DriverFault


class _Barrier(threading.local):
    """A lock of each thread's own, always held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()


_barrier = _Barrier()


def fence() -> None:
    """A full memory barrier: a release, then an acquire, which no access passes in either direction."""
    lock = _barrier.lock
    lock.release()
    lock.acquire()


class Element(NamedTuple):
    """One descriptor's memory: bus address, length in bytes, whether the device writes it."""

    address: int
    length: int
    writable: bool


@dataclass(eq=False, slots=True)
class Chain:
    """A buffer that the driver made available.

    Attributes:
        id: head index (split) or buffer id (packed); what goes back with the used element.
        position: how many chains were made available before it, since the queue was enabled.
        count: ring descriptors it takes.
        elements: the descriptors as the driver wrote them, indirect ones resolved.
        readable: memory of the device-readable elements, read-only.
        writable: memory of the device-writable elements.
    """

    id: int
    position: int
    count: int
    elements: list[Element]
    readable: list[memoryview]
    writable: list[memoryview]
    slots: list[int] = field(default_factory=list)

    @property
    def readable_bytes(self) -> int:
        """Length of the device-readable part."""
        return sum(map(len, self.readable))

    @property
    def writable_bytes(self) -> int:
        """Length of the device-writable part."""
        return sum(map(len, self.writable))

    def read(self, size: int | None = None, offset: int = 0) -> bytes:
        """Up to ``size`` bytes of the device-readable part, from ``offset`` on."""
        wanted = self.readable_bytes - offset if size is None else size
        return b"".join(cut(self.readable, offset, wanted))

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Write to the device-writable part at ``offset``; returns the bytes that fitted."""
        source = memoryview(data)
        done = 0
        for piece in cut(self.writable, offset, len(source)):
            piece[:] = source[done : done + len(piece)]
            done += len(piece)
        return done


def cut(pieces: list[memoryview], offset: int, size: int) -> Iterator[memoryview]:
    """The parts of ``pieces``, seen as one string of bytes, that lie in ``[offset, offset + size)``."""
    for piece in pieces:
        if size <= 0:
            return
        if offset >= len(piece):
            offset -= len(piece)
            continue
        part = piece[offset : offset + size]
        offset = 0
        size -= len(part)
        if len(part):
            yield part


Areas = tuple[memoryview, memoryview, memoryview]
"""Descriptor, driver and device area."""


class Used(NamedTuple):
    """A used element to be written: it returns ``chains``, named by the last of them."""

    chains: list[Chain]
    length: int


class Ring:
    """Device side of one enabled virtqueue; a format adds ``pop``, ``_write`` and the event fields.

    Args:
        size: queue size.
        features: negotiated features, a bit mask.
        memory: where bus addresses lead.
        areas: memory of the descriptor, driver and device area.

    Attributes:
        batch: with IN_ORDER, whether one used element may stand for several chains that were used
            completely.
        max_chain: longest chain accepted, in descriptors.
        areas: memory of the descriptor, driver and device area.
        strict: keep in ``shown`` what the device last left in its own area.
        shown: the bytes of ``own``, while ``strict``.
        told: what ``exposed`` was when the driver last notified, or the device last looked by itself.
    """

    requirement_order = ""

    def __init__(self, size: int, features: int, memory: BusMemory, areas: Areas) -> None:
        self.size = size
        self.memory = memory
        self.areas = areas
        self.strict = False
        self.shown = b""
        self.told = 0
        self.event_idx = bool(features >> ft.F_EVENT_IDX & 1)
        self.indirect = bool(features >> ft.F_INDIRECT_DESC & 1)
        self.in_order = bool(features >> ft.F_IN_ORDER & 1)
        self._address_rule = "DRV-FEAT-18" if features >> ft.F_ACCESS_PLATFORM & 1 else "DRV-FEAT-19"
        self.batch = True
        self.max_chain = size
        self.popped = 0
        self.outstanding: dict[int, Chain] = {}
        self._order: deque[Chain] = deque()
        self._done: dict[int, int] = {}
        self._staged: list[Used] = []
        self.remarks: list[tuple[str, str]] = []

    def pop(self) -> Chain | None:
        """The next available chain, or None.

        Raises:
            DriverFault: what the driver wrote cannot be a chain.
        """
        raise NotImplementedError

    def push(self, chain: Chain, length: int) -> None:
        """Stage a chain as used with ``length`` bytes written; ``publish`` shows it to the driver.

        With IN_ORDER a chain waits here until all before it are done.
        """
        if self.outstanding.get(chain.id) is not chain:
            raise ValueError(f"chain {chain.id} is not out of this ring")
        if not self.in_order:
            self._staged.append(Used([chain], length))
            return
        self._done[chain.position] = length

    def publish(self) -> bool:
        """Show all staged chains to the driver at once; True when it asked for a notification."""
        if self.in_order:
            self._stage_in_order()
        if not self._staged:
            return False
        staged, self._staged = self._staged, []
        for used in staged:
            for chain in used.chains:
                del self.outstanding[chain.id]
        return self._write(staged)

    def _stage_in_order(self) -> None:
        """Take the done chains at the head of the order.

        The driver assumes that skipped buffers were used completely (2.7.9); one that was not ends a batch.
        """
        batch: list[Chain] = []
        while self._order and self._order[0].position in self._done:
            chain = self._order.popleft()
            length = self._done.pop(chain.position)
            batch.append(chain)
            more = bool(self._order) and self._order[0].position in self._done
            if not (self.batch and more and length == chain.writable_bytes):
                self._staged.append(Used(batch, length))
                batch = []

    def _write(self, staged: list[Used]) -> bool:
        raise NotImplementedError

    def suppress_kicks(self) -> None:
        """Tell the driver that no available buffer notifications are needed for now."""
        raise NotImplementedError

    def enable_kicks(self) -> bool:
        """Ask for available buffer notifications; True when buffers came meanwhile and none may follow."""
        raise NotImplementedError

    def check_notification(self, next_off: int, next_wrap: int, exact: bool) -> None:
        """Compare the data of a notification with the ring (2.9); ``exact`` when the driver waits for us.

        Raises:
            DriverFault: they do not agree.
        """
        raise NotImplementedError

    def exposed(self) -> int:
        """How far the driver made buffers available: chains of a split, descriptors of a packed ring."""
        raise NotImplementedError

    @property
    def own(self) -> bytes:
        """What lies in the device area, that only the device may write while the queue is enabled."""
        return bytes(self.areas[2])

    def _wrote(self) -> None:
        if self.strict:
            self.shown = self.own

    def descriptors(self, chain: Chain) -> bytes:
        """The ring descriptors of an outstanding chain as they stand now."""
        table = self.areas[0]
        return b"".join(table[16 * slot : 16 * slot + 16] for slot in chain.slots)

    def _took(self, chain: Chain) -> Chain:
        self.outstanding[chain.id] = chain
        self.popped += 1
        if self.in_order:
            self._order.append(chain)
        return chain

    def _chain(self, id: int, count: int, elements: list[Element], slots: list[int]) -> Chain:
        """Resolve the elements' memory and check that the writable ones come last."""
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        seen_writable = False
        try:
            for address, length, write in elements:
                if write:
                    seen_writable = True
                    writable += self.memory.spans(address, length, write=True)
                elif seen_writable:
                    raise DriverFault(
                        self.requirement_order,
                        f"chain {id}: a device-readable element follows a device-writable one",
                    )
                else:
                    readable += self.memory.spans(address, length)
        except Unmapped as error:
            raise DriverFault(self._address_rule, f"chain {id}: {error}") from None
        return Chain(id, self.popped, count, elements, readable, writable, slots)

    def _table(self, address: int, length: int, requirement: str) -> memoryview:
        """The memory of an indirect table."""
        if not length or length % 16:
            raise DriverFault(requirement, f"indirect table of {length} bytes is no non-zero multiple of 16")
        try:
            return self.memory.view(address, length)
        except Unmapped as error:
            raise DriverFault(self._address_rule, f"indirect table: {error}") from None
