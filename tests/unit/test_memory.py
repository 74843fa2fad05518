"""DMA memory: what a buffer's addresses mean, and who may still touch memory when."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestpv.errors import UsageError
from guestpv.memory import CHUNK, DmaPool, DmaRegion, Segment

PAGE = 4096


class PagedSpace:
    """A device that sees every page somewhere else; ``run`` pages in a row are neighbours for it too."""

    def __init__(self, run: int) -> None:
        self.run = run * PAGE
        self.mapped: list[DmaRegion] = []
        self.next = 0x1_0000_0000

    def map(self, size: int) -> DmaRegion:
        array = np.zeros(size, dtype=np.uint8)
        segments = []
        for start in range(0, size, self.run):
            segments.append(Segment(self.next, min(self.run, size - start)))
            self.next += self.run + PAGE
        region = DmaRegion(array, tuple(segments), array.ctypes.data)
        self.mapped.append(region)
        return region

    def unmap(self, region: DmaRegion) -> None:
        self.mapped.remove(region)

    def byte_at(self, address: int) -> int:
        for region in self.mapped:
            position = 0
            for segment in region.segments:
                if segment.address <= address < segment.address + segment.length:
                    return int(region.array[position + address - segment.address])
                position += segment.length
        raise AssertionError(f"the device has nothing at {address:#x}")


def device_view(space: PagedSpace, segments: tuple[Segment, ...]) -> bytes:
    return bytes(space.byte_at(s.address + i) for s in segments for i in range(s.length))


def test_the_device_finds_what_we_wrote_whatever_the_segments() -> None:
    space = PagedSpace(run=1)
    buffer = DmaPool(space).allocate(3 * PAGE, align=PAGE)
    data = bytes(range(256)) * 48
    buffer.write(data)
    assert len(buffer.segments) == 3
    assert device_view(space, buffer.segments) == data


def test_a_slice_is_the_same_memory_at_the_right_addresses() -> None:
    space = PagedSpace(run=1)
    buffer = DmaPool(space).allocate(2 * PAGE, align=PAGE)
    part = buffer[PAGE - 2 : PAGE + 3]
    part.write(b"ABCDE")
    assert [s.length for s in part.segments] == [2, 3]
    assert device_view(space, part.segments) == b"ABCDE"
    assert bytes(buffer.array[PAGE - 2 : PAGE + 3]) == b"ABCDE"
    assert part.pointer == buffer.pointer + PAGE - 2


def test_a_buffer_with_several_segments_has_no_single_address() -> None:
    buffer = DmaPool(PagedSpace(run=1)).allocate(2 * PAGE, align=PAGE)
    with pytest.raises(UsageError, match="2 segments"):
        _ = buffer.address


def test_small_buffers_stay_in_one_segment_while_the_space_allows_it() -> None:
    pool = DmaPool(PagedSpace(run=1))
    buffers = [pool.allocate(3000) for _ in range(100)]
    assert all(len(b.segments) == 1 for b in buffers)


def test_a_reused_buffer_shows_nothing_of_its_past() -> None:
    pool = DmaPool(PagedSpace(run=512))
    first = pool.allocate(100)
    first.write(b"secret" * 10)
    pool.free(first)
    assert not pool.allocate(100).array.any()


def test_a_buffer_is_given_back_once_and_whole() -> None:
    pool = DmaPool(PagedSpace(run=512))
    buffer = pool.allocate(100)
    with pytest.raises(UsageError, match="slice"):
        pool.free(buffer[:50])
    pool.free(buffer)
    with pytest.raises(UsageError, match="freed twice"):
        pool.free(buffer)


def test_closing_takes_memory_from_the_device_but_not_from_a_reader() -> None:
    space = PagedSpace(run=512)
    pool = DmaPool(space)
    view = pool.allocate(16).array
    view[:] = 7
    pool.close()
    assert space.mapped == []
    assert view.tolist() == [7] * 16
    with pytest.raises(UsageError, match="closed"):
        pool.allocate(1)


@pytest.mark.parametrize(("size", "align"), [(0, 64), (-1, 64), (10, 3), (10, 8192)])
def test_senseless_requests_are_refused(size: int, align: int) -> None:
    with pytest.raises(UsageError):
        DmaPool(PagedSpace(run=512)).allocate(size, align=align)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3 * PAGE), st.sampled_from([1, 16, 64, PAGE]), st.booleans()),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([1, 3, 512]),
)
def test_live_buffers_never_overlap(steps: list[tuple[int, int, bool]], run: int) -> None:
    space = PagedSpace(run)
    pool = DmaPool(space)
    live = []
    for number, (size, align, keep) in enumerate(steps):
        buffer = pool.allocate(size, align=align)
        assert buffer.pointer % min(align, 16) == 0
        assert sum(s.length for s in buffer.segments) == size
        buffer.array[:] = number % 251
        if keep:
            live.append((number % 251, buffer))
        else:
            pool.free(buffer)
    for mark, buffer in live:
        assert (buffer.array == mark).all()
    assert pool.in_use == sum(b.nbytes for _, b in live)
    for _, buffer in live:
        pool.free(buffer)
    assert pool.in_use == 0
    assert pool.allocate(CHUNK, align=PAGE).nbytes == CHUNK
