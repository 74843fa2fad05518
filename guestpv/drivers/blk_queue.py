"""Requests of one queue of a block device: each ends exactly once, as done, failed or unknown (5.2.6)."""

from __future__ import annotations

import enum
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ..errors import DeviceViolation, GuestpvError, QueueFull
from ..memory import DmaBuffer, DmaPool
from ..spec import blk as spec
from ..virtqueue.queue import Virtqueue
from .blk_errors import OutcomeUnknown, describe, error_of

HEADER: Final = struct.Struct("<IIQ")
SLOT: Final = 64
"""Bytes of a request's own memory: header at 0, status at 16, small data from 24 on."""
STATUS: Final = 16
SMALL: Final = 24
UNTOUCHED: Final = 0xFF
STAGES: Final = 8


class Outcome(enum.Enum):
    """How a request ended."""

    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(slots=True, eq=False)
class Request:
    """One request that was given to the device.

    Attributes:
        kind: request type, ``T_*``.
        sector: first 512-byte sector.
        nbytes: bytes of data, or of the range.
        outcome: None while it is in flight; set once and for all.
        error: what to raise unless it is done.
        on_end: called once, when ``outcome`` is set.
        on_return: called once, when the device gave the memory back: now or, after a timeout, later.
    """

    kind: int
    sector: int
    nbytes: int
    outcome: Outcome | None = None
    error: GuestpvError | None = None
    on_end: Callable[[Request], None] | None = None
    on_return: Callable[[], None] | None = None
    slot: int = -1
    readable: Sequence[DmaBuffer] = ()
    writable: Sequence[DmaBuffer] = ()
    written: int = 1
    small: bytes = field(default=b"", repr=False)

    def end(self, outcome: Outcome, error: GuestpvError | None = None) -> None:
        """Set the outcome, unless it is set already."""
        if self.outcome is None:
            self.outcome, self.error = outcome, error
            if self.on_end is not None:
                self.on_end(self)

    def check(self) -> None:
        """Raise the error of a request that is not done."""
        if self.error is not None:
            raise self.error


class Lease:
    """A stage in use: free again when each of its requests came back and its user dropped it, too."""

    __slots__ = ("_holders", "_stages", "stage")

    def __init__(self, stages: list[DmaBuffer]) -> None:
        self.stage = stages.pop()
        self._stages = stages
        self._holders = 1

    def hold(self) -> Callable[[], None]:
        """One more holder; what is returned ends its hold."""
        self._holders += 1
        return self.drop

    def drop(self) -> None:
        """One holder less."""
        self._holders -= 1
        if not self._holders:
            self._stages.append(self.stage)


class RequestQueue:
    """One queue with the memory of its requests, used by one thread at a time (see ``own``).

    Args:
        queue: its virtqueue.
        pool: where memory comes from; only the constructor and ``forget`` use it.
        stage_bytes: bytes of each of the eight buffers that data is copied through.

    Attributes:
        stages: buffers that are free; ``Lease`` takes one.
        stage_bytes: bytes of each.
        late: requests that came back after their time limit.
        broken: why the queue takes nothing any more, None while it does.
    """

    def __init__(self, queue: Virtqueue, pool: DmaPool, stage_bytes: int) -> None:
        self.queue = queue
        self.late = 0
        self.stage_bytes = stage_bytes
        self.broken: GuestpvError | None = None
        self._pool = pool
        slots = queue.size
        self.memory = pool.allocate(slots * SLOT, align=4096)
        self._bytes = memoryview(self.memory.array.data)
        self._parts = [self.memory[SLOT * slot : SLOT * (slot + 1)] for slot in range(slots)]
        self._headers = [part[: HEADER.size] for part in self._parts]
        self._statuses = [part[STATUS : STATUS + 1] for part in self._parts]
        self.free = list(range(slots - 1, -1, -1))
        self._all_stages = [pool.allocate(stage_bytes, align=4096) for _ in range(STAGES)]
        self.stages = list(self._all_stages)
        self._in_flight: dict[int, Request] = {}

    @property
    def in_flight(self) -> int:
        """Requests that the device has, those that are late included."""
        return len(self._in_flight)

    def own(self) -> None:
        """Make the calling thread the owner."""
        self.queue.own()

    def burst_memory(self, depth: int) -> tuple[DmaBuffer, DmaBuffer]:
        """The same memory for ``depth`` requests of a burst on an idle queue: headers, and status bytes.

        Status bytes lie apart from what the driver writes: each has one writer, and so has its cache line.
        """
        count = self.queue.size
        start = HEADER.size * count
        return self.memory[: HEADER.size * depth], self.memory[start : start + depth]

    def small(self, slot: int, size: int) -> DmaBuffer:
        """Room for up to 40 bytes of data beside a request's header."""
        return self._parts[slot][SMALL : SMALL + size]

    def submit(
        self,
        kind: int,
        sector: int = 0,
        readable: Sequence[DmaBuffer] = (),
        writable: Sequence[DmaBuffer] = (),
        *,
        nbytes: int = 0,
        small: int = 0,
        on_end: Callable[[Request], None] | None = None,
        lease: Lease | None = None,
    ) -> Request:
        """Add a request; the device sees it after ``publish``.

        Args:
            nbytes: bytes of the range, for messages; the data's by default.
            lease: what the request holds until the device returned its memory.
            small: bytes of device-writable data kept beside the header, behind ``writable``; afterwards in
                the request's ``small``.

        Raises:
            QueueFull: no room; ``reap`` first.
            GuestpvError: the queue is broken.
        """
        if self.broken is not None:
            raise self.broken
        if not self.free:
            raise QueueFull("every request slot is in use", where=self.queue.name, hint="reap() first")
        slot = self.free[-1]
        base = slot * SLOT
        HEADER.pack_into(self._bytes, base, kind, 0, sector)
        self._bytes[base + STATUS] = UNTOUCHED
        data = sum(part.nbytes for part in readable) + sum(part.nbytes for part in writable)
        if small:
            writable = [*writable, self.small(slot, small)]
        readable, writable = [self._headers[slot], *readable], [*writable, self._statuses[slot]]
        token = self.queue.add(readable, writable)
        self.free.pop()
        request = Request(kind, sector, nbytes or data, on_end=on_end, slot=slot)
        if lease is not None:
            request.on_return = lease.hold()
        request.readable, request.writable = readable, writable
        request.written = sum(part.nbytes for part in writable)
        request.small = bytes(small)
        self._in_flight[token] = request
        return request

    def again(self, tokens: Sequence[int]) -> list[Request]:
        """Give requests that a dead back end had to its successor; returns those that are wanted still.

        Args:
            tokens: what the rings, started anew, no longer hold.
        """
        sent = []
        for token in tokens:
            request = self._in_flight.pop(token)
            if request.outcome is not None:
                self._returned(request)
                continue
            self._bytes[request.slot * SLOT + STATUS] = UNTOUCHED
            self._in_flight[self.queue.add(request.readable, request.writable)] = request
            sent.append(request)
        self.queue.publish()
        return sent

    def publish(self) -> bool:
        """Give the device what was added; returns whether that took a notification."""
        return self.queue.publish()

    def reap(self) -> int:
        """Take back what the device is done with. Returns how many requests that were.

        Raises:
            DeviceViolation: the device broke the queue; everything in flight ended as unknown.
        """
        count = 0
        try:
            for token, used in self.queue.completions():
                self._finish(self._in_flight.pop(token), used)
                count += 1
        except DeviceViolation as violation:
            self.abandon(violation)
            raise
        return count

    def _finish(self, request: Request, used: int) -> None:
        base = request.slot * SLOT
        status = self._bytes[base + STATUS]
        if request.small:
            start = base + SMALL
            request.small = bytes(self._bytes[start : start + len(request.small)])
        self._returned(request)
        if request.outcome is not None:
            self.late += 1
            return
        if status != spec.S_OK:
            error = error_of(status, request.kind, request.sector, request.nbytes, self.queue.name)
            request.end(Outcome.FAILED, error)
        elif used < request.written:
            request.end(Outcome.FAILED, self._short(request, used))
        else:
            request.end(Outcome.DONE)

    def _returned(self, request: Request) -> None:
        self.free.append(request.slot)
        if request.on_return is not None:
            request.on_return()

    def _short(self, request: Request, used: int) -> DeviceViolation:
        return DeviceViolation(
            f"{describe(request.kind, request.sector, request.nbytes)} has status OK, but its used length is "
            f"{used}, not {request.written}: data or status were not written",
            section="2.7.8",
            where=self.queue.name,
        )

    def wait(self, requests: Iterable[Request], timeout: float | None) -> None:
        """Publish, and wait until all of ``requests`` ended. Their outcomes tell how.

        Those that are not back after ``timeout`` seconds end as unknown; the device keeps their memory
        until it returns them or is reset.

        Raises:
            DeviceViolation: the device broke the queue.
        """
        self.queue.publish()
        deadline = None if timeout is None else time.monotonic() + timeout
        left = list(requests)
        while left := [request for request in left if request.outcome is None]:
            if self.reap():
                continue
            remaining = None if deadline is None else deadline - time.monotonic()
            if (remaining is None or remaining > 0) and self.queue.wait(remaining):
                continue
            for request in left:
                request.end(Outcome.UNKNOWN, self.unknown(request, f"not back within {timeout:g} s"))

    def unknown(self, request: Request, why: str) -> OutcomeUnknown:
        """The error of a request that the device kept."""
        return OutcomeUnknown(
            f"{describe(request.kind, request.sector, request.nbytes)}: {why}; it may be done or not",
            kind=request.kind,
            sector=request.sector,
            nbytes=request.nbytes,
            where=self.queue.name,
        )

    def abandon(self, reason: GuestpvError) -> None:
        """End everything in flight as unknown; nothing goes to the device any more until it is reset."""
        self.broken = reason
        for request in self._in_flight.values():
            request.end(Outcome.UNKNOWN, self.unknown(request, reason.message))

    def settle(self, reason: GuestpvError) -> None:
        """Before a reset: take what is back, end the rest as unknown."""
        if self.broken is None:
            try:
                self.reap()
            except GuestpvError:
                return
            self.abandon(reason)

    def forget(self) -> None:
        """After a reset: the device has no memory of ours any more; give it all back to the pool."""
        self._in_flight.clear()
        self._bytes.release()
        for buffer in (self.memory, *self._all_stages):
            self._pool.free(buffer)
