"""Things that no driver may do, for checks that are marked ``hostile``."""

from __future__ import annotations

from ..spec import ring as rs
from .queue import Queue


def break_device(queue: Queue) -> str:
    """Make something available that no device can use. Returns what ``Queue.provoke`` saw.

    Split: a head beyond the descriptor table. Packed: an indirect table whose length is no multiple of
    16, which every device has to look at before it can follow it.
    """
    if queue.packed:
        memory = queue.buffer(64)
        return queue.provoke(lambda: queue.offer([(memory.address, 24, rs.DESC_F_INDIRECT)]))

    def bad_head() -> None:
        queue.raw.offer(queue.size)
        queue.kick()

    return queue.provoke(bad_head)
