"""Transfers of any length on one queue: cut into requests, kept in flight together, waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GuestpvError, QueueFull
from ..memory import DmaBuffer
from ..spec import blk as spec
from .blk_limits import Limits, RangeLimits
from .blk_queue import Lease, Request, RequestQueue


def patiently(
    requests: RequestQueue,
    timeout: float | None,
    kind: int,
    sector: int,
    *ways: Sequence[DmaBuffer],
    **options: Any,
) -> Request:
    """Submit one request, waiting for room if there is none.

    Raises:
        QueueFull: nothing came back within ``timeout`` seconds.
    """
    while True:
        try:
            return requests.submit(kind, sector, *ways, **options)
        except QueueFull:
            requests.publish()
            if not requests.reap() and not requests.queue.wait(timeout):
                raise


def ways(kind: int, parts: list[DmaBuffer]) -> tuple[Sequence[DmaBuffer], Sequence[DmaBuffer]]:
    """Data as what the device reads and what it writes."""
    return ((), parts) if kind == spec.T_IN else (parts, ())


def scattered(
    requests: RequestQueue,
    limits: Limits,
    timeout: float | None,
    kind: int,
    offset: int,
    buffers: Sequence[DmaBuffer],
) -> None:
    """Read into or write from DMA memory; everything that was sent is waited for, then an error raised."""
    sent = []
    try:
        for sector, parts in limits.split(offset, buffers):
            sent.append(patiently(requests, timeout, kind, sector, *ways(kind, parts)))
    finally:
        requests.wait(sent, timeout)
    for request in sent:
        request.check()


def staged(
    requests: RequestQueue,
    limits: Limits,
    timeout: float | None,
    kind: int,
    offset: int,
    memory: NDArray[np.uint8],
) -> None:
    """Copy through the queue's stages, all of them at a time; everything that was sent is waited for."""
    flying: deque[tuple[NDArray[np.uint8], Lease, list[Request]]] = deque()
    error: GuestpvError | None = None
    done = 0
    while flying or (done < memory.nbytes and error is None):
        if done < memory.nbytes and error is None and (requests.stages or not flying):
            lease = _lease(requests, timeout)
            part = memory[done : done + lease.stage.nbytes]
            if kind == spec.T_OUT:
                lease.stage.array[: part.nbytes] = part
            sent = [
                patiently(requests, timeout, kind, sector, *ways(kind, parts), lease=lease)
                for sector, parts in limits.split(offset + done, [lease.stage[: part.nbytes]])
            ]
            requests.publish()
            flying.append((part, lease, sent))
            done += part.nbytes
            continue
        part, lease, sent = flying.popleft()
        requests.wait(sent, timeout)
        error = error or next((request.error for request in sent if request.error), None)
        if kind == spec.T_IN:
            part[:] = lease.stage.array[: part.nbytes]
        lease.drop()
    if error is not None:
        raise error


def ranged(
    requests: RequestQueue,
    limits: RangeLimits,
    timeout: float | None,
    kind: int,
    offset: int,
    length: int,
    flags: int,
) -> None:
    """Discard, zero or erase a range, one request after the other."""
    for ranges in limits.split(offset // spec.SECTOR, length // spec.SECTOR):
        lease = _lease(requests, timeout)
        segments = np.array([(*part, flags) for part in ranges], spec.DISCARD_SEGMENT)
        lease.stage.array[: segments.nbytes] = segments.view(np.uint8)
        request = patiently(
            requests,
            timeout,
            kind,
            0,
            [lease.stage[: segments.nbytes]],
            (),
            nbytes=int(segments["num_sectors"].sum()) * spec.SECTOR,
            lease=lease,
        )
        lease.drop()
        # The header's sector is 0 for these; messages name the first range.
        request.sector = ranges[0][0]
        requests.wait([request], timeout)
        request.check()


def _lease(requests: RequestQueue, timeout: float | None) -> Lease:
    """A stage, waited for where others have them all."""
    while not requests.stages:
        requests.publish()
        if not requests.reap() and not requests.queue.wait(timeout):
            raise QueueFull("every stage is in use", where=requests.queue.name)
    return Lease(requests.stages)
