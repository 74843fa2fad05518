"""Bursts of buffers of one shape, from arrays that are prepared once: the shortest way to the ring."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from guestpv.core._core import lib
from guestpv.errors import UsageError

from .queue import Virtqueue

_submit, _reap = lib.gpv_burst_submit, lib.gpv_burst_reap


class Burst:
    """Submits and reaps bursts on one queue; no Python object is made per buffer.

    Fill rows of ``addresses`` and ``lengths``, ``submit`` the first so many of them; ``reap`` and look at
    ``used_slots`` and ``used_lengths``. The arrays are written again by the next call.

    Args:
        queue: the virtqueue. When it is closed or gets another size, the burst ends with it.
        capacity: rows.
        elements: elements of each buffer, 1 to the queue size.
        writable_from: number of the first device-writable element.

    Attributes:
        addresses: bus addresses, uint64, (capacity, elements).
        lengths: bytes, uint32, (capacity, elements).
        slots: slots of the last submit, uint32, (capacity,).
        used_slots, used_lengths: what the last reap returned, uint32, (queue size,).

    Raises:
        UsageError: the shape makes no sense for the queue.
    """

    __slots__ = (
        "_burst",
        "_count",
        "_queue",
        "addresses",
        "lengths",
        "slots",
        "used_lengths",
        "used_slots",
    )

    def __new__(cls, queue: Virtqueue, *rest: int) -> Self:
        """Calls go straight to the ordinary build of the core, whose way must be the shortest."""
        return object.__new__(cls if queue.core_lib is lib else _OtherCore)  # type: ignore[return-value]

    def __init__(self, queue: Virtqueue, capacity: int, elements: int, writable_from: int) -> None:
        if capacity < 1 or not 1 <= elements <= queue.size or not 0 <= writable_from <= elements:
            raise UsageError(
                f"a burst of {capacity} buffers of {elements} elements, writable from {writable_from}",
                where=queue.name,
            )
        self._queue = queue
        self._count = 0
        ffi = queue.core_ffi
        self.addresses: NDArray[np.uint64] = np.zeros((capacity, elements), np.uint64)
        self.lengths: NDArray[np.uint32] = np.zeros((capacity, elements), np.uint32)
        self.slots: NDArray[np.uint32] = np.zeros(capacity, np.uint32)
        self.used_slots: NDArray[np.uint32] = np.zeros(queue.size, np.uint32)
        self.used_lengths: NDArray[np.uint32] = np.zeros(queue.size, np.uint32)
        self._burst = ffi.new("struct gpv_burst *")
        self._burst.queue = queue.handle
        self._burst.addresses = ffi.from_buffer("uint64_t *", self.addresses)
        self._burst.lengths = ffi.from_buffer("uint32_t *", self.lengths)
        self._burst.elements = elements
        self._burst.writable_from = writable_from
        self._burst.ids = ffi.from_buffer("uint32_t *", self.slots)
        self._burst.used_ids = ffi.from_buffer("uint32_t *", self.used_slots)
        self._burst.used_lengths = ffi.from_buffer("uint32_t *", self.used_lengths)
        self._burst.capacity = capacity
        self._burst.used_max = queue.size
        queue._bursts.append(self._burst)

    def submit(self, count: int) -> int:
        """Add the first ``count`` rows, at most all of them, and publish.

        Returns:
            How many found room; their slots are in ``slots``.

        Raises:
            DeviceViolation, UsageError: as ``Virtqueue.add_burst`` and ``publish``.
        """
        if count != self._count:
            self._burst.count = count
            self._count = count
        added: int = _submit(self._burst)
        if added < 0:
            self._queue._fail(added)
        return added

    def reap(self) -> int:
        """Take every used buffer. Returns how many; they are in ``used_slots`` and ``used_lengths``.

        Raises:
            DeviceViolation: as ``Virtqueue.reap_burst``.
        """
        got: int = _reap(self._burst)
        if got < 0:
            self._queue._fail(got)
        return got


class _OtherCore(Burst):
    """The same for a queue on another build of the core."""

    __slots__ = ()

    def submit(self, count: int) -> int:
        self._burst.count = count
        added: int = self._queue.core_lib.gpv_burst_submit(self._burst)
        if added < 0:
            self._queue._fail(added)
        return added

    def reap(self) -> int:
        got: int = self._queue.core_lib.gpv_burst_reap(self._burst)
        if got < 0:
            self._queue._fail(got)
        return got
