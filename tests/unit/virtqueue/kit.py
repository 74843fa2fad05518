"""What the tests of both ring formats share."""

from __future__ import annotations

import pytest

from guestpv.memory import DmaBuffer
from ringpeer import Bench, mask

SPLIT, PACKED = mask(), mask("RING_PACKED")
FORMATS = pytest.mark.parametrize("base", [SPLIT, PACKED], ids=["split", "packed"])


def buffers(b: Bench, *sizes: int) -> list[DmaBuffer]:
    return [b.pool.allocate(size) for size in sizes]


def where(parts: list[DmaBuffer]) -> tuple[tuple[int, int], ...]:
    return tuple((part.address, part.nbytes) for part in parts)


def use_all(b: Bench) -> None:
    while chain := b.peer.pop():
        b.peer.push(chain, 0)
    b.queue.reap_burst()
