"""A block device's queue under asyncio: many coroutines, one queue, no thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceViolation, QueueFull
from ..memory import DmaBuffer
from ..spec import blk as spec
from .blk import Blk, Data
from .blk_queue import Lease, Outcome, Request

POLL: Final = 0.001
"""Seconds between looks at a queue without an interrupt."""


class AioBlk:
    """Reads and writes for coroutines; made and used in one event loop, which owns the queue.

    A coroutine that is cancelled leaves its requests with the device; they are taken back later.

    >>> async def main(disk):   # doctest: +SKIP
    ...     with AioBlk(disk) as aio:
    ...         await asyncio.gather(*(aio.read(n * 4096, 4096) for n in range(64)))
    """

    def __init__(self, disk: Blk, queue: int = 0) -> None:
        self.disk = disk
        self._loop = asyncio.get_running_loop()
        self._number = queue
        self._requests = disk.queues[queue]
        self._requests.own()
        self._moved = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        if self._requests.queue.interrupt_fd is not None:
            self._loop.add_reader(self._requests.queue.fileno(), self._interrupted)

    async def read(self, offset: int, length: int) -> NDArray[np.uint8]:
        """As ``Blk.read``."""
        self.disk.check_range(offset, length)
        result: NDArray[np.uint8] = np.empty(length, np.uint8)
        await self._staged(spec.T_IN, offset, result)
        return result

    async def write(self, offset: int, data: Data, *, fua: bool = False) -> None:
        """As ``Blk.write``."""
        source = np.frombuffer(data, np.uint8)
        self.disk.check_range(offset, source.nbytes, write=True)
        await self._staged(spec.T_OUT, offset, source)
        if fua:
            await self.flush()

    async def flush(self) -> None:
        """As ``Blk.flush``: what has been awaited before is safe from a power cut afterwards."""
        if self.disk.volatile_cache:
            await self._end(await self._submit(spec.T_FLUSH, 0, (), ()))

    async def _staged(self, kind: int, offset: int, memory: NDArray[np.uint8]) -> None:
        stage_bytes = self._requests.stage_bytes
        parts = [
            self._part(kind, offset + start, memory[start : start + stage_bytes])
            for start in range(0, memory.nbytes, stage_bytes)
        ]
        results = await asyncio.gather(*parts, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _part(self, kind: int, offset: int, memory: NDArray[np.uint8]) -> None:
        while not self._requests.stages:
            await self._progress()
        lease = Lease(self._requests.stages)
        try:
            part = lease.stage[: memory.nbytes]
            if kind == spec.T_OUT:
                part.array[:] = memory
            sent = []
            for sector, parts in self.disk.limits.split(offset, [part]):
                ways = ((), parts) if kind == spec.T_IN else (parts, ())
                sent.append(await self._submit(kind, sector, *ways, lease=lease))
            for request in sent:
                await self._end(request)
            if kind == spec.T_IN:
                memory[:] = part.array
        finally:
            lease.drop()

    async def _submit(
        self, kind: int, sector: int, *ways: Sequence[DmaBuffer], lease: Lease | None = None
    ) -> Request:
        while True:
            try:
                request = self._requests.submit(kind, sector, *ways, lease=lease)
                break
            except QueueFull:
                await self._progress()
        self._requests.publish()
        self._arm()
        return request

    async def _end(self, request: Request) -> None:
        if request.outcome is None:
            ended: asyncio.Future[None] = self._loop.create_future()

            def end(_: Request) -> None:
                if not ended.done():
                    ended.set_result(None)

            def expire() -> None:
                why = f"not back within {self.disk.timeout:g} s"
                request.end(Outcome.UNKNOWN, self._requests.unknown(request, why))

            request.on_end = end
            limit = None if self.disk.timeout is None else self._loop.call_later(self.disk.timeout, expire)
            try:
                await ended
            finally:
                request.on_end = None
                if limit is not None:
                    limit.cancel()
        request.check()

    async def _progress(self) -> None:
        """Wait until something came back."""
        self._moved.clear()
        self._requests.publish()
        self._arm()
        await self._moved.wait()

    def _arm(self) -> None:
        if self._requests.queue.interrupt_fd is None:
            if self._timer is None:
                self._timer = self._loop.call_later(POLL, self._poll)
        elif self._requests.queue.enable_interrupts():
            self._loop.call_soon(self._look)

    def _poll(self) -> None:
        self._timer = None
        self._look()
        if self._requests.in_flight and self._requests.broken is None:
            self._arm()

    def _interrupted(self) -> None:
        self._requests.queue.clear_interrupt()
        self._look()

    def _look(self) -> None:
        # A violation has ended everything in flight as unknown: each waiter learns it from its request.
        with contextlib.suppress(DeviceViolation):
            while self._requests.broken is None:
                self._requests.reap()
                if self._requests.queue.interrupt_fd is None or not self._requests.queue.enable_interrupts():
                    break
        self._moved.set()

    def close(self) -> None:
        """Leave the event loop; the queue can be used without it again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._requests.queue.interrupt_fd is not None:
            self._loop.remove_reader(self._requests.queue.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
