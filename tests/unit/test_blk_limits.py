"""Splitting, by properties: nothing is lost, doubled or moved, and every limit holds."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from guestpv.drivers.blk_limits import MOST_BYTES, Limits, RangeLimits
from guestpv.errors import UsageError
from guestpv.memory import DmaBuffer, Segment


def buffer(lengths: list[int], start: int) -> DmaBuffer:
    """A buffer whose segments are far apart on the bus."""
    segments = tuple(Segment(start + (n << 32), length) for n, length in enumerate(lengths))
    return DmaBuffer(np.zeros(sum(lengths), np.uint8), segments, start, None)


@given(
    sector=st.integers(0, 1 << 40),
    count=st.integers(0, 5000),
    most=st.integers(1, 300),
    ranges=st.integers(1, 8),
    alignment=st.integers(1, 64),
)
def test_ranges(sector: int, count: int, most: int, ranges: int, alignment: int) -> None:
    requests = list(RangeLimits(most, ranges, alignment).split(sector, count))
    assert all(1 <= len(request) <= ranges for request in requests)
    position = sector
    for start, length in (part for request in requests for part in request):
        assert start == position
        assert 1 <= length <= most
        position += length
        cut_inside = position < sector + count
        assert not cut_inside or position % alignment == 0 or most < alignment
    assert position == sector + count


@settings(deadline=None)
@given(
    lists=st.lists(st.lists(st.integers(1, 50_000), min_size=1, max_size=4), min_size=1, max_size=6),
    size_max=st.integers(1, 64).map(lambda n: n * 512),
    seg_max=st.integers(1, 20),
    block=st.sampled_from([512, 4096]),
)
def test_transfers(lists: list[list[int]], size_max: int, seg_max: int, block: int) -> None:
    total = sum(map(sum, lists))
    lists[-1][-1] += -total % block
    buffers = [buffer(lengths, 1 << (48 + n)) for n, lengths in enumerate(lists)]
    limits = Limits(block_size=block, size_max=size_max, seg_max=seg_max)
    asked = [(s.address, s.length) for b in buffers for s in b.segments]
    given_: list[tuple[int, int]] = []
    position = 8
    try:
        for sector, parts in limits.split(8 * 512, buffers):
            assert sector == position
            lengths = [segment.length for part in parts for segment in part.segments]
            assert len(lengths) <= seg_max
            assert max(lengths) <= size_max
            assert sum(lengths) % block == 0
            assert 0 < sum(lengths) <= MOST_BYTES
            position += sum(lengths) // 512
            given_ += [(segment.address, segment.length) for part in parts for segment in part.segments]
    except UsageError:
        # Only elements that are no whole blocks, or cut to less than one, can be impossible.
        assert size_max * seg_max < block or any(length % block for _, length in asked)
        return
    assert joined(given_) == joined(asked)


def joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours that touch as one."""
    result: list[tuple[int, int]] = []
    for address, length in parts:
        if result and sum(result[-1]) == address:
            result[-1] = (result[-1][0], result[-1][1] + length)
        else:
            result.append((address, length))
    return result
