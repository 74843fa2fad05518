"""The memory that a balloon is made of: where it comes from, and what the host calls its pages.

A page number is guest-physical whatever stands between device and memory (5.5.6). Memory is mapped through
the function's own DMA space, because that pins it: the kernel neither moves nor swaps a pinned page, so its
number stays true. It is private to this process, never inherited by a fork, and nobody else can touch it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import Refused
from ..memory import DmaBuffer, DmaRegion, DmaSpace
from ..spec.balloon import PAGE_BYTES, PAGE_NUMBER, PAGE_SHIFT
from ..system import PAGE_SIZE, SYSTEM, System

HUGE_BYTES = 2 << 20
HUGE_PAGES = HUGE_BYTES >> PAGE_SHIFT
IN_ORDER = np.arange(HUGE_PAGES, dtype=np.uint32)

Numbers = NDArray[np.uint32]


class Chunk:
    """A piece of pinned memory: its first ``inside`` pages are in the balloon, the others are free.

    Attributes:
        buffer: the memory.
        numbers: what the host calls its pages, uint32, shape (pages,), in 4096-byte units.
        huge: bytes of it that are huge pages: 2 MiB in one piece and aligned.
        inside: pages in the balloon, or on their way.
        reported: free pages from this one on were reported to the host.
        hinted: free pages from this one on were hinted in the current round.
        lent: hints that the device has not used yet; the memory stays until it did.
    """

    __slots__ = ("buffer", "hinted", "huge", "inside", "lent", "numbers", "region", "reported")

    def __init__(self, region: DmaRegion, numbers: Numbers) -> None:
        self.region = region
        self.buffer = DmaBuffer(region.array, region.segments, region.pointer, None)
        self.numbers = numbers
        pieces = numbers[: len(numbers) // HUGE_PAGES * HUGE_PAGES].reshape(-1, HUGE_PAGES)
        first = pieces[:, :1]
        whole = (first[:, 0] % HUGE_PAGES == 0) & (pieces - first == IN_ORDER).all(axis=1)
        self.huge = int(whole.sum()) * HUGE_BYTES
        self.inside = 0
        self.reported = self.hinted = len(numbers)
        self.lent = 0

    @property
    def free(self) -> int:
        """Pages that are not in the balloon."""
        return len(self.numbers) - self.inside

    def enter(self, count: int) -> Numbers:
        """Take the next ``count`` free pages into the balloon; their numbers."""
        first = self.inside
        self.inside += count
        self.reported = max(self.reported, self.inside)
        self.hinted = max(self.hinted, self.inside)
        return self.numbers[first : self.inside]

    def last(self, count: int) -> Numbers:
        """Numbers of the ``count`` pages that went in last."""
        return self.numbers[self.inside - count : self.inside]

    def pages(self, first: int, end: int) -> DmaBuffer:
        """The memory of some of its pages."""
        return self.buffer[first * PAGE_BYTES : end * PAGE_BYTES]

    def pieces(self, first: int, end: int) -> Iterator[DmaBuffer]:
        """The memory of some of its pages in the largest aligned pieces, at most a huge page each, each
        contiguous on the bus."""
        while first < end:
            stop = min(end, (first // HUGE_PAGES + 1) * HUGE_PAGES)
            position = first
            for segment in self.pages(first, stop).segments:
                count = segment.length >> PAGE_SHIFT
                yield self.pages(position, position + count)
                position += count
            first = stop


class PageSource:
    """Gives chunks, and takes them back.

    Args:
        space: where memory is mapped, and thereby pinned.
        translated: whether bus addresses differ from guest-physical ones; then the kernel is asked for page
            numbers.
        chunk_bytes: size of a chunk, a multiple of 4096.
    """

    def __init__(
        self, space: DmaSpace, translated: bool, chunk_bytes: int, where: str, system: System = SYSTEM
    ) -> None:
        self._space = space
        self._translated = translated
        self._chunk_bytes = chunk_bytes
        self._where = where
        self._system = system

    def take(self) -> Chunk:
        """A new chunk.

        Raises:
            Refused: the kernel does not tell its page numbers, or they do not fit into 32 bits.
            GuestpvError: there is no memory, or a limit does not let it be pinned.
        """
        region = self._space.map(self._chunk_bytes)
        try:
            return Chunk(region, self._numbers(region))
        except BaseException:
            self._space.unmap(region)
            raise

    def give_back(self, chunk: Chunk) -> None:
        """Unpin a chunk and return its memory to the kernel, once the last reference to it is gone."""
        self._space.unmap(chunk.region)

    def _numbers(self, region: DmaRegion) -> Numbers:
        numbers = self._frames(region) if self._translated else self._bus_pages(region)
        if not numbers.all():
            raise Refused(
                "the kernel does not tell this process which physical pages it has (/proc/self/pagemap shows "
                "page number 0): handing over such a page would take page 0 from the guest",
                where=self._where,
                hint="page numbers need CAP_SYS_ADMIN: run it as root, with sudo, or as a systemd service of "
                "root",
            )
        if numbers.max() >> (8 * PAGE_NUMBER.itemsize):
            raise Refused(
                f"page number {int(numbers.max()):#x} does not fit into the 32 bits of a request (5.5.6): "
                "memory above 16 TiB cannot be in a balloon",
                where=self._where,
            )
        return numbers.astype(np.uint32)

    def _frames(self, region: DmaRegion) -> NDArray[np.uint64]:
        """Page numbers by the kernel; one of its pages may be several of 4096 bytes."""
        frames = self._system.page_frames(region.pointer, region.array.nbytes // PAGE_SIZE)
        ratio = PAGE_SIZE // PAGE_BYTES
        if ratio == 1:
            return frames
        numbers: NDArray[np.uint64] = (
            frames[:, None] * np.uint64(ratio) + np.arange(ratio, dtype=np.uint64) * (frames[:, None] > 0)
        ).ravel()
        return numbers

    @staticmethod
    def _bus_pages(region: DmaRegion) -> NDArray[np.uint64]:
        return np.concatenate(
            [
                np.arange(
                    segment.address >> PAGE_SHIFT,
                    (segment.address + segment.length) >> PAGE_SHIFT,
                    dtype=np.uint64,
                )
                for segment in region.segments
            ]
        )
