"""Many equal block requests at ring speed: arrays in, arrays out, the whole loop in C."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..core._core import lib
from ..errors import DeviceViolation, GuestpvError, TimeLimit, UsageError
from ..memory import DmaBuffer
from ..spec import blk as spec
from ..virtqueue.queue import Virtqueue
from .blk_errors import OutcomeUnknown, describe, error_of
from .blk_queue import HEADER, RequestQueue

SPIN_US: Final = 50
LOOK: Final = 0.1
"""Seconds between two looks at the health of a device that may go away without a word."""


@dataclass(frozen=True, slots=True)
class BurstResult:
    """How the requests of a burst ended.

    Attributes:
        kind: request type, ``T_IN`` or ``T_OUT``.
        sectors: uint64, shape (n,).
        nbytes: bytes of each.
        statuses: uint8, shape (n,): the device's status, 0xFE where status OK came with a used length that
            is too short, 0xFF where the outcome is unknown.
        latencies: uint64, shape (n,), nanoseconds from adding to taking back; empty unless asked for.
        where: for messages.
    """

    kind: int
    sectors: NDArray[np.uint64]
    nbytes: int
    statuses: NDArray[np.uint8]
    latencies: NDArray[np.uint64]
    where: str

    @property
    def done(self) -> NDArray[np.bool_]:
        """Which requests succeeded, shape (n,)."""
        return np.equal(self.statuses, spec.S_OK)

    def error(self, index: int) -> GuestpvError | None:
        """The error of one request, None if it succeeded."""
        status, sector = int(self.statuses[index]), int(self.sectors[index])
        what = describe(self.kind, sector, self.nbytes)
        if status == spec.S_OK:
            return None
        if status == lib.GPV_BLK_SHORT:
            return DeviceViolation(
                f"{what} has status OK, but its used length is too short", section="2.7.8", where=self.where
            )
        if status == lib.GPV_BLK_UNKNOWN:
            return OutcomeUnknown(
                f"{what} did not come back; it may be done or not",
                kind=self.kind,
                sector=sector,
                nbytes=self.nbytes,
                where=self.where,
            )
        return error_of(status, self.kind, sector, self.nbytes, self.where)

    def check(self) -> None:
        """Raise the error of the first request that did not succeed."""
        failed = np.flatnonzero(self.statuses)
        if failed.size and (error := self.error(int(failed[0]))) is not None:
            raise error


def run_burst(
    requests: RequestQueue,
    kind: int,
    sectors: NDArray[np.uint64],
    data: DmaBuffer,
    nbytes: int,
    *,
    depth: int,
    timeout: float | None,
    spin_us: int = SPIN_US,
    latencies: bool = False,
) -> BurstResult:
    """Carry out one request per element of ``sectors`` on an idle queue.

    Args:
        sectors: uint64, shape (n,).
        data: its row ``i`` of ``nbytes`` is the data of request ``i``. With fewer rows than requests, writes
            begin again with the first one, and which request's data a row has after reads is left open.
        depth: requests in flight at most.
        timeout: seconds without any completion.

    Raises:
        UsageError: requests are in flight, or a row is not contiguous on the bus.
        TimeLimit: nothing came back in time. The queue takes nothing more until the device is reset.
        DeviceViolation: the device broke the queue.
    """
    if requests.broken is not None:
        raise requests.broken
    if requests.in_flight:
        raise UsageError(
            f"{requests.in_flight} requests are in flight; a burst has the queue to itself",
            where=requests.queue.name,
        )
    queue = requests.queue
    count, depth = int(sectors.size), max(1, min(depth, queue.size))
    rows = data.nbytes // nbytes
    if count and not rows:
        raise UsageError(f"a buffer of {data.nbytes} bytes has no row of {nbytes}", where=queue.name)
    row_bus = _addresses(data, nbytes, min(rows, count))
    per_slot = kind == spec.T_IN and depth <= rows < count
    data_bus = row_bus if rows >= count or per_slot else np.ascontiguousarray(np.resize(row_bus, count))
    headers, done = requests.burst_memory(depth)
    headers.array[:] = 0
    headers.array.view("<u4")[::4] = kind
    done.array[:] = lib.GPV_BLK_UNKNOWN
    result = BurstResult(
        kind,
        sectors,
        nbytes,
        np.full(count, lib.GPV_BLK_UNKNOWN, np.uint8),
        np.zeros(count if latencies else 0, np.uint64),
        queue.name,
    )
    free, ids = np.arange(depth, dtype=np.uint32), np.full(depth, lib.GPV_BLK_NO_ID, np.int32)
    ffi = queue.core_ffi
    burst: Any = ffi.new("struct gpv_blk_burst *")
    burst.queue, burst.fd = queue.handle, -1 if queue.interrupt_fd is None else queue.interrupt_fd
    burst.kind, burst.nbytes, burst.writable = kind, nbytes, kind == spec.T_IN
    burst.depth, burst.count, burst.data_per_slot = depth, count, per_slot
    burst.headers = ffi.cast("uint8_t *", headers.pointer)
    burst.done = ffi.cast("uint8_t *", done.pointer)
    header_bus, done_bus = _addresses(headers, HEADER.size, depth), _addresses(done, 1, depth)
    for name, array in (
        ("header_bus", header_bus),
        ("done_bus", done_bus),
        ("sectors", sectors),
        ("data_bus", data_bus),
    ):
        setattr(burst, name, ffi.from_buffer("uint64_t *", array))
    burst.slot_ids = ffi.from_buffer("int32_t *", ids)
    burst.statuses = ffi.from_buffer("uint8_t *", result.statuses)
    burst.latencies = ffi.from_buffer("uint64_t *", result.latencies) if latencies else ffi.NULL
    burst.timeout_ns = _slice(queue, timeout)
    burst.spin_ns = spin_us * 1000
    burst.free_slots = ffi.from_buffer("uint32_t *", free)
    try:
        code = _until_over(burst, queue, timeout)
    except GuestpvError as error:
        requests.abandon(error)
        raise
    except BaseException:
        requests.abandon(GuestpvError("a burst was interrupted while the device had requests of it"))
        raise
    if code == 1:
        requests.abandon(
            TimeLimit(
                f"{burst.flying} of {count} requests are not back after {timeout:g} s; their outcome is "
                "unknown",
                where=queue.name,
                hint="reset the device: restart()",
            )
        )
        assert requests.broken is not None
        raise requests.broken
    if code < 0:
        try:
            queue._fail(code)
        except GuestpvError as error:
            requests.abandon(error)
            raise
    return result


def _slice(queue: Virtqueue, timeout: float | None) -> int:
    """Nanoseconds to wait at a time: whoever can tell that the device is gone is asked in between."""
    if queue.acknowledge is not None:
        timeout = LOOK if timeout is None else min(timeout, LOOK)
    return -1 if timeout is None else int(timeout * 1e9)


def _until_over(burst: Any, queue: Virtqueue, timeout: float | None) -> int:
    """Run the burst; its code, 1 when nothing came back for ``timeout`` seconds."""
    back, since = -1, time.monotonic()
    while True:
        code: int = queue.core_lib.gpv_blk_burst_run(burst)
        if code == lib.GPV_EINTR:
            # Between two calls Python runs its signal handlers.
            continue
        if code != 1:
            return code
        if queue.acknowledge is not None:
            queue.acknowledge()
        if burst.next - burst.flying != back:
            back, since = burst.next - burst.flying, time.monotonic()
        if timeout is not None and time.monotonic() - since >= timeout - burst.timeout_ns / 1e9:
            return code


def _addresses(data: DmaBuffer, stride: int, count: int) -> NDArray[np.uint64]:
    """Bus address of each of ``count`` rows of ``stride`` bytes."""
    if len(data.segments) == 1:
        return np.arange(count, dtype=np.uint64) * np.uint64(stride) + np.uint64(data.segments[0].address)
    return np.array([data[i * stride : (i + 1) * stride].address for i in range(count)], dtype=np.uint64)
