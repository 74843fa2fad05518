"""The traditional memory balloon (5.5): gives memory to the host and takes it back.

A page is the kernel's, or free in our pool, or in the balloon. Pages enter and leave the pool in chunks; the
last chunk only is partly in the balloon, so there is never more than one chunk that neither the host nor the
kernel can use. Every step is finished when a method returns: no page is ever in between.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from ..errors import GuestpvError, Refused, TimeLimit, UsageError
from ..memory import DmaBuffer
from ..spec import balloon as spec
from ..spec.features import mask
from ..system import SYSTEM, System
from ..transport.base import Transport
from ..transport.pci import PciTransport
from ..virtqueue.queue import Virtqueue
from .balloon_pages import HUGE_BYTES, Chunk, Numbers, PageSource
from .balloon_queues import find_numbering
from .balloon_statistics import Statistics

FEATURES = mask(
    (
        spec.F_MUST_TELL_HOST,
        spec.F_STATS_VQ,
        spec.F_DEFLATE_ON_OOM,
        spec.F_FREE_PAGE_HINT,
        spec.F_PAGE_REPORTING,
    )
)
REQUEST_PAGES = 1024
"""Page numbers in the longest request: one page full."""
REQUESTS = 8
"""Requests on their way at a time."""
ANSWER_LIMIT = 30.0
LOOK = 0.25
"""Seconds between looks at the device's status while an answer is awaited."""


class Requests:
    """Page numbers on their way to the device, several requests at a time."""

    def __init__(self, transport: Transport, count: int, answer_limit: float) -> None:
        self._transport, pool = transport, transport.pool
        self._slots = [pool.allocate(REQUEST_PAGES * spec.PAGE_NUMBER.itemsize) for _ in range(count)]
        self._idle = list(self._slots)
        self._filling: DmaBuffer | None = None
        self._filled = 0
        self._answer_limit = answer_limit
        self.sent = 0

    def forget(self) -> None:
        """After a reset: the device has none of them any more."""
        self._idle, self._filling = list(self._slots), None

    def send(self, queue: Virtqueue, numbers: Numbers) -> None:
        """Tell the device page numbers: when a request is full, the rest with ``finish``.

        Waits for an older request only when all slots are taken.
        """
        while len(numbers):
            if self._filling is None:
                while not self._idle:
                    self._reap(queue)
                self._filling, self._filled = self._idle.pop(), 0
            part = numbers[: REQUEST_PAGES - self._filled]
            end = self._filled + len(part)
            self._filling.array.view(spec.PAGE_NUMBER)[self._filled : end] = part
            self._filled = end
            numbers = numbers[len(part) :]
            if self._filled == REQUEST_PAGES:
                self._flush(queue)

    def _flush(self, queue: Virtqueue) -> None:
        slot, self._filling = self._filling, None
        if slot is not None:
            queue.add(readable=[slot[: self._filled * spec.PAGE_NUMBER.itemsize]], cookie=slot)
            queue.publish()
            self.sent += 1

    def finish(self, queue: Virtqueue) -> None:
        """Send what is left and wait until the device acknowledged everything.

        Raises:
            TimeLimit: it did not.
        """
        self._flush(queue)
        while len(self._idle) < len(self._slots):
            self._reap(queue)

    def _reap(self, queue: Virtqueue) -> None:
        if not patient_wait(self._transport, queue, self._answer_limit):
            raise TimeLimit(
                f"the device acknowledged nothing for {self._answer_limit:g} s; "
                f"{queue.outstanding} requests wait, whose pages stay untouched until it is reset",
                where=queue.name,
                hint="look at the hypervisor: it is stopped, or its balloon hangs",
            )
        for token, _length in queue.completions():
            slot = queue.cookie(token)
            assert isinstance(slot, DmaBuffer)
            self._idle.append(slot)


def patient_wait(transport: Transport, queue: Virtqueue, limit: float) -> bool:
    """Wait up to ``limit`` seconds for the device to use a buffer; whether it did.

    Raises:
        DeviceViolation, DeviceGone: it never will, as it needs a reset or is gone.
    """
    deadline = time.monotonic() + limit
    while not queue.wait(max(0.0, min(LOOK, deadline - time.monotonic()))):
        transport.check_live()
        if time.monotonic() >= deadline:
            return False
    return True


class Balloon:
    """A virtio memory balloon.

    >>> with guestpv.open("vfio:0000:05:00.0") as t, Balloon(t) as balloon:   # doctest: +SKIP
    ...     balloon.inflate(balloon.target)

    Args:
        transport: an opened balloon on PCI; negotiated here, closed with the driver.
        chunk_bytes: how much memory is taken from the kernel at a time, a multiple of 2 MiB, so that it can
            be huge pages.
        poison: PAGE_POISON is negotiated where offered, and pages are filled with this 32-bit value when they
            come back and before they are reported. Without it the feature is left alone (DRV-BALLOON-02).
        answer_limit: seconds that the device may take to acknowledge a request.

    Attributes:
        features: the negotiated mask.
        numbering: ``standard`` or ``dense``, which is a quirk; see ``balloon_queues``.
        inflated, deflated, reported, hinted: pages since the start.
        answered: statistics requests that were answered.

    Raises:
        Refused: negotiation failed, or the kernel does not tell physical page numbers (CAP_SYS_ADMIN).
    """

    def __init__(
        self,
        transport: Transport,
        *,
        chunk_bytes: int = HUGE_BYTES,
        poison: int | None = None,
        answer_limit: float = ANSWER_LIMIT,
        system: System = SYSTEM,
    ) -> None:
        if not isinstance(transport, PciTransport):
            raise UsageError("the balloon is driven over PCI only", where=transport.name)
        if chunk_bytes <= 0 or chunk_bytes % HUGE_BYTES:
            raise UsageError(f"a chunk is a multiple of 2 MiB, not {chunk_bytes} bytes", where=transport.name)
        self.transport: Transport = transport
        self._answer_limit = answer_limit
        self._poison = poison
        self._chunks: list[Chunk] = []
        self._pages = 0
        self._stuck: BaseException | None = None
        self._closed = False
        self.inflated = self.deflated = self.reported = self.hinted = self.answered = 0
        self._requests: Requests | None = None
        self._kicks = 0
        self._source = PageSource(
            transport.function.dma, transport.must_translate, chunk_bytes, transport.name, system
        )
        self._statistics = Statistics(system)
        self._start()

    def _start(self) -> None:
        transport, poison = self.transport, self._poison
        poisoning = 0 if poison is None else 1 << spec.F_PAGE_POISON
        self.features = transport.negotiate(supported=FEATURES | poisoning)
        with transport.failing():
            numbering = find_numbering(
                transport.offered, self.features, transport.queue_max_size, transport.name
            )
            self.numbering = numbering.name
            self.queues = {which: transport.make_queue(number) for which, number in numbering.numbers.items()}
            self._inflateq, self._deflateq = self.queues[spec.INFLATEQ], self.queues[spec.DEFLATEQ]
            if self._requests is None:
                # Without page numbers nothing works: better to know before the device is live.
                self._source.give_back(self._source.take())
                least = min(self._inflateq.size, self._deflateq.size)
                self._requests = Requests(transport, min(REQUESTS, least), self._answer_limit)
                self._statistics_buffer = transport.pool.allocate(self._statistics.size)
                self._command = transport.pool.allocate(4)
                self._stop = transport.pool.allocate(4)
            self._requests.forget()
            self._hint_id = spec.CMD_ID_STOP
            if transport.has(spec.F_PAGE_POISON) and poison is not None:
                transport.config_write(spec.CONFIG["poison_val"], poison)
            transport.driver_ok()
            self._refill()
            self._write_actual()
            if self.statsq is not None:
                self._supply_statistics(self.statsq)

    def _refill(self) -> None:
        """A device that was reset knows of no page: tell it again which are in the balloon."""
        assert self._requests is not None
        with self._settling():
            for chunk in self._chunks:
                if chunk.inside:
                    self._requests.send(self._inflateq, chunk.numbers[: chunk.inside])
            self._requests.finish(self._inflateq)

    def restart(self) -> None:
        """Reset the device and start over with the same features; what is in the balloon stays there.

        A page whose way in or out the device had not acknowledged is in the balloon afterwards.

        Raises:
            Refused, FeaturesRefused, DeviceViolation: it did not come back as it was.
            TimeLimit, DeviceGone: it never left reset, or is gone.
        """
        self._kicks = self.kicks
        features = self.features
        self.transport.revive()
        self.queues = {}
        self._stuck = None
        for chunk in self._chunks:
            chunk.lent = 0
            chunk.reported = chunk.hinted = len(chunk.numbers)
        self._pages = sum(chunk.inside for chunk in self._chunks)
        self._start()
        self.transport.check_same(features)
        self._trim()

    # How it stands.

    @property
    def pages(self) -> int:
        """Pages in the balloon, of 4096 bytes."""
        return self._pages

    @property
    def free_pages(self) -> int:
        """Pages of our pool that are not in the balloon: less than one chunk."""
        return sum(chunk.free for chunk in self._chunks)

    @property
    def huge_bytes(self) -> int:
        """Bytes of the pool that are huge pages; the rest is single pages."""
        return sum(chunk.huge for chunk in self._chunks)

    @property
    def lent(self) -> int:
        """Hints that the device has not used yet; ``follow_hints`` looks whether it has."""
        return sum(chunk.lent for chunk in self._chunks)

    @property
    def target(self) -> int:
        """``num_pages``: how many pages the device wants to be in the balloon."""
        return self._config("num_pages")

    @property
    def actual(self) -> int:
        """``actual`` as the device shows it."""
        return self._config("actual")

    @property
    def kicks(self) -> int:
        """Notifications sent to the device."""
        return self._kicks + sum(queue.kicks for queue in self.queues.values())

    @property
    def requests(self) -> int:
        """Inflate and deflate requests so far."""
        return self._requests.sent if self._requests else 0

    @property
    def statsq(self) -> Virtqueue | None:
        """The statistics queue; its interrupt is a request for statistics. None without STATS_VQ."""
        return self.queues.get(spec.STATSQ)

    def page_numbers(self) -> Numbers:
        """Guest-physical numbers of all pages in the balloon, uint32, shape (pages,), in 4096-byte units."""
        return np.concatenate(
            [np.empty(0, np.uint32), *(chunk.numbers[: chunk.inside] for chunk in self._chunks)]
        )

    def _config(self, name: str) -> int:
        return int(self.transport.config(spec.CONFIG, name)[name])

    # Inflate and deflate (5.5.6).

    def inflate(self, pages: int) -> None:
        """Put ``pages`` more pages into the balloon and wait until the device acknowledged them.

        Raises:
            GuestpvError: there is no more memory, or a limit was met; what was possible is in the balloon.
            TimeLimit: the device does not answer; the balloon can only be closed.
            DeviceViolation: the device broke a queue.
        """
        self._check()
        before = self.pages
        shortage: GuestpvError | None = None
        left = pages
        assert self._requests is not None
        with self._settling():
            while left > 0 and shortage is None:
                try:
                    chunk = self._room()
                except GuestpvError as error:
                    shortage = error
                    continue
                count = min(left, chunk.free)
                self._pages += count
                self._requests.send(self._inflateq, chunk.enter(count))
                left -= count
            self._requests.finish(self._inflateq)
        self.inflated += self.pages - before
        if self.pages != before:
            self._write_actual()
        if shortage is not None:
            raise shortage

    def deflate(self, pages: int) -> int:
        """Take ``pages`` pages out of the balloon, or all there are; memory goes back to the kernel.

        Nothing is used before the device acknowledged it, whether MUST_TELL_HOST was negotiated or not.

        Returns:
            Pages taken out.

        Raises:
            TimeLimit, DeviceViolation: as for ``inflate``.
        """
        self._check()
        left = pages = min(pages, self.pages)
        leaving: list[tuple[Chunk, int]] = []
        assert self._requests is not None
        with self._settling():
            for chunk in reversed(self._chunks):
                count = min(left, chunk.inside)
                if count:
                    self._requests.send(self._deflateq, chunk.last(count))
                    leaving.append((chunk, count))
                    left -= count
            self._requests.finish(self._deflateq)
        for chunk, count in leaving:
            chunk.inside -= count
            self._pages -= count
            if self.transport.has(spec.F_PAGE_POISON):
                self._fill(chunk.pages(chunk.inside, chunk.inside + count))
        leaving.clear()
        if pages:
            self.deflated += pages
            self._write_actual()
        self._trim()
        return pages

    def _room(self) -> Chunk:
        """The chunk that the next page comes from."""
        room: Chunk | None = None
        for chunk in reversed(self._chunks):
            if not chunk.free:
                break
            room = chunk
        if room is None:
            room = self._source.take()
            self._chunks.append(room)
        return room

    def _trim(self) -> None:
        """Give chunks back to the kernel of which nothing is in the balloon, nor with the device."""
        while self._chunks and not self._chunks[-1].inside and not self._chunks[-1].lent:
            chunk = self._chunks.pop()
            # Hinted pages may change until DONE unless they are written to (DRV-BALLOON-32).
            if chunk.hinted < len(chunk.numbers):
                chunk.pages(chunk.hinted, len(chunk.numbers)).array[:] = 0
            self._source.give_back(chunk)

    def _fill(self, pages: DmaBuffer) -> None:
        pages.array.view(spec.PAGE_NUMBER)[:] = self._poison or 0

    def _write_actual(self) -> None:
        self.transport.config_write(spec.CONFIG["actual"], self.pages)

    def _check(self) -> None:
        if self._closed:
            raise UsageError("the balloon is closed", where=self.transport.name)
        if self._stuck is not None:
            raise Refused(
                f"the balloon cannot go on: {self._stuck}",
                where=self.transport.name,
                hint="close it; the reset of the device makes all its pages the guest's again",
            )

    @contextlib.contextmanager
    def _settling(self) -> Iterator[None]:
        """Remember a failure in the middle of a request: the state of its pages is not known then."""
        try:
            yield
        except BaseException as error:
            self._stuck = error
            raise

    # Statistics (5.5.6.3).

    def answer_statistics(self) -> bool:
        """Give the device fresh statistics if it asked for them. Returns whether it had."""
        queue = self.statsq
        if queue is None:
            return False
        answered = False
        while True:
            if queue.interrupt_fd is not None:
                queue.clear_interrupt()
            for _token, _length in queue.completions():
                self._supply_statistics(queue)
                self.answered += 1
                answered = True
            if not queue.enable_interrupts():
                return answered

    def _supply_statistics(self, queue: Virtqueue) -> None:
        self._statistics_buffer.write(self._statistics.fill())
        queue.add(readable=[self._statistics_buffer])
        queue.publish()

    # Free pages of our own pool (5.5.6.5, 5.5.6.7): the only free memory that a process can vouch for.

    def report_free(self) -> int:
        """Report the pool's free pages that were not reported yet; the host may take their memory.

        They can be used again at any time, without a word to the device.

        Returns:
            Pages reported; 0 without PAGE_REPORTING.

        Raises:
            TimeLimit: the device does not acknowledge.
        """
        self._check()
        queue = self.queues.get(spec.REPORTING_VQ)
        if queue is None:
            return 0
        count = 0
        for chunk in self._chunks:
            for piece in list(chunk.pieces(chunk.inside, chunk.reported)):
                if self.transport.has(spec.F_PAGE_POISON):
                    self._fill(piece)
                with self._settling():
                    self._report(queue, piece)
                count += piece.nbytes >> spec.PAGE_SHIFT
            chunk.reported = chunk.inside
        self.reported += count
        return count

    def _report(self, queue: Virtqueue, piece: DmaBuffer) -> None:
        queue.add(writable=[piece])
        queue.publish()
        if not patient_wait(self.transport, queue, self._answer_limit):
            raise TimeLimit(f"a report was not acknowledged for {self._answer_limit:g} s", where=queue.name)
        for _ in queue.completions():
            pass

    def follow_hints(self) -> int:
        """Look at ``free_page_hint_cmd_id`` and do what it asks: a round of hints, or their end.

        Returns:
            Pages hinted.
        """
        self._check()
        queue = self.queues.get(spec.FREE_PAGE_VQ)
        if queue is None:
            return 0
        for token, _length in queue.completions():
            chunk = queue.cookie(token)
            if isinstance(chunk, Chunk):
                chunk.lent -= 1
        self._trim()
        command = self._config("free_page_hint_cmd_id")
        if command == self._hint_id:
            return 0
        if command == spec.CMD_ID_DONE:
            for chunk in self._chunks:
                chunk.hinted = len(chunk.numbers)
        if command < spec.CMD_ID_FIRST:
            self._hint_id = command
            return 0
        if queue.outstanding:
            return 0  # the last round's buffers are still with the device; its id is looked at again
        self._hint_id = command
        return self._hint(queue, command)

    def _hint(self, queue: Virtqueue, command: int) -> int:
        """One round: the command id, the free pages, STOP (DRV-BALLOON-25, -29)."""
        self._command.write(command.to_bytes(4, "little"))
        self._stop.write(spec.CMD_ID_STOP.to_bytes(4, "little"))
        queue.add(readable=[self._command])
        count = 0
        for chunk in self._chunks:
            chunk.hinted = chunk.inside
            for piece in chunk.pieces(chunk.inside, len(chunk.numbers)):
                if queue.free_slots < 2:
                    break
                queue.add(writable=[piece], cookie=chunk)
                chunk.lent += 1
                count += piece.nbytes >> spec.PAGE_SHIFT
        queue.add(readable=[self._stop])
        queue.publish()
        self.hinted += count
        return count

    # The end.

    def close(self) -> None:
        """Take every page out of the balloon, reset the device and give everything back. Idempotent.

        A device that no longer answers is reset all the same: a reset ends the balloon, too.
        """
        if self._closed:
            return
        try:
            if self._stuck is None:
                with contextlib.suppress(GuestpvError):
                    self.deflate(self.pages)
        finally:
            self._closed = True
            self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
