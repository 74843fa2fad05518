"""A network device's frames under asyncio: one at a time, no thread."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Final, Self, SupportsBytes

from ..virtqueue.queue import Virtqueue
from .net import Net
from .net_port import Frames

POLL: Final = 0.001
"""Seconds between looks at a queue without an interrupt."""
BURST: Final = 64


class AioNet:
    """Sends and receives for coroutines; made and used in one event loop, which owns the queue pair.

    >>> async def main(net):   # doctest: +SKIP
    ...     with AioNet(net) as aio:
    ...         await aio.send(request)
    ...         async for frame in aio: ...

    Args:
        net: the device, started.
        pair: number of the queue pair, from 0.
    """

    def __init__(self, net: Net, pair: int = 0) -> None:
        self._port = net.pairs[pair]
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[bytes] = deque()
        self._port.own()
        self._queues = [queue for queue in (self._port.rx, self._port.tx) if queue.interrupt_fd is not None]
        self._moved = {queue.index: asyncio.Event() for queue in self._queues}
        for queue in self._queues:
            self._loop.add_reader(queue.fileno(), self._interrupted, queue)

    def _interrupted(self, queue: Virtqueue) -> None:
        queue.clear_interrupt()
        self._moved[queue.index].set()

    async def _until_used(self, queue: Virtqueue) -> None:
        """Wait until the device may have used a buffer of the queue."""
        moved = self._moved.get(queue.index)
        if moved is None:
            await asyncio.sleep(POLL)
            return
        moved.clear()
        # Whatever was used before the queue was armed notifies nobody.
        if not queue.enable_interrupts():
            await moved.wait()

    async def send(self, frame: SupportsBytes) -> None:
        """Send one Ethernet frame without checksum, or anything that ``bytes`` makes one of; waits for room.

        Raises:
            UsageError: it is shorter than its header or longer than the device takes.
            DeviceViolation: the device broke the queue.
        """
        table = Frames.of([bytes(frame)])
        while not self._port.send(table):
            await self._until_used(self._port.tx)

    async def receive(self) -> bytes:
        """The next frame, without the virtio header.

        Raises:
            DeviceViolation: the device broke the queue.
        """
        while not self._arrived:
            burst = self._port.receive(BURST)
            self._arrived.extend(burst[row] for row in range(len(burst)))
            if not self._arrived:
                await self._until_used(self._port.rx)
        return self._arrived.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await self.receive()

    def close(self) -> None:
        """Leave the event loop; the queue pair can be used without it again."""
        for queue in self._queues:
            if queue.handle:
                self._loop.remove_reader(queue.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
