"""The driver half of a virtqueue (2.6 to 2.9): memory, safety and words in Python, every ring access in C."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from guestpv.core._core import ffi, lib
from guestpv.errors import GuestpvError, QueueFull, UsageError
from guestpv.memory import DmaBuffer, DmaPool
from guestpv.spec import features as f

from .kick import Kick
from .layout import PackedRings, Record, RingLayout, SplitRings, check_size, ring_layout, ring_views
from .violation import device_violation

OPTIONS = {
    f.F_RING_PACKED: lib.GPV_PACKED,
    f.F_EVENT_IDX: lib.GPV_EVENT_IDX,
    f.F_INDIRECT_DESC: lib.GPV_INDIRECT,
    f.F_IN_ORDER: lib.GPV_IN_ORDER,
    f.F_NOTIFICATION_DATA: lib.GPV_NOTIFICATION_DATA,
    f.F_ORDER_PLATFORM: lib.GPV_ORDER_PLATFORM,
}
"""Negotiated feature bit -> what it changes in the core."""

MAX_TABLES = 1024
SLOT_BITS = 16
DESC_BYTES = 16


@dataclass(frozen=True, slots=True)
class RingAddresses:
    """Bus addresses of the descriptor, driver and device area, for the transport's queue registers."""

    desc: int
    driver: int
    device: int


class Virtqueue:
    """One virtqueue, split or packed.

    A buffer is a list of device-readable and then device-writable ``DmaBuffer``. ``add`` places it and
    returns a token; ``publish`` makes everything added available and notifies the device if it asks for
    that; ``completions`` gives back each token once with its used length. A queue belongs to the thread
    that made it (see ``own``). A device that breaks the rules raises ``DeviceViolation``, and breaks this
    queue only.

    Args:
        index: number of the virtqueue.
        size: entries, 1 to 32768; a power of two unless RING_PACKED is among the features.
        features: negotiated feature mask.
        pool: where ring memory and indirect tables come from.
        kick: how the device is notified.
        interrupt_fd: eventfd of the queue's interrupt, or None to poll.
        acknowledge: called after the eventfd fired, for interrupts that need it (INTx).
        indirect_entries: longest buffer, in elements, that gets an indirect table when INDIRECT_DESC was
            negotiated; longer ones become chains.
        name: for messages.

    Attributes:
        addresses: bus addresses of the three areas.
        rings: live numpy views, ``layout.SplitRings`` or ``layout.PackedRings``.
        handle: the core's ``struct gpv_queue *``.
        core_ffi, core_lib: the build of the core that it belongs to, ordinary or observing; whoever hands
            ``handle`` to the core calls it through these.

    Raises:
        ValueError: the format does not allow this size.
    """

    core_ffi: ClassVar[Any] = ffi
    core_lib: ClassVar[Any] = lib

    def __init__(
        self,
        index: int,
        size: int,
        features: int,
        pool: DmaPool,
        kick: Kick,
        *,
        interrupt_fd: int | None = None,
        acknowledge: Callable[[], None] | None = None,
        indirect_entries: int = 16,
        name: str = "",
    ) -> None:
        self.index = index
        self.features = features
        self.packed = bool(features >> f.F_RING_PACKED & 1)
        self.name = name or f"queue {index}"
        self.interrupt_fd = interrupt_fd
        self.acknowledge = acknowledge
        self.handle: Any = self.core_ffi.NULL
        self._pool = pool
        self._kick = kick
        self._indirect_entries = indirect_entries
        self._buffers: list[DmaBuffer] = []
        self._single = self.core_ffi.new("struct gpv_single *")
        self._elements = self._border = 0
        self._cookies: dict[int, object] = {}
        self._bursts: list[Any] = []
        self._build(size)

    def _build(self, size: int) -> None:
        check_size(size, self.packed)
        self.size = size
        self.layout: RingLayout = ring_layout(size, self.packed)
        memory = self._pool.allocate(self.layout.total)
        self._buffers = [memory]
        areas = (self.layout.desc, self.layout.driver, self.layout.device)
        if any(len(memory[area.offset : area.end].segments) > 1 for area in areas):
            self._pool.free(self._buffers.pop())
            raise UsageError(
                f"a ring of {size} entries does not fit into one piece of this bus's memory",
                where=self.name,
                hint="take a smaller queue size: each of the ring's areas has to be contiguous (2.7, 2.8)",
            )
        self.addresses = RingAddresses(*(memory[area.offset : area.end].address for area in areas))
        self.rings: SplitRings | PackedRings = ring_views(memory.array, self.layout)
        config = self.core_ffi.new("struct gpv_queue_config *")
        config.size = size
        for bit, option in OPTIONS.items():
            config.options |= option if self.features >> bit & 1 else 0
        config.desc, config.driver, config.device = (
            self.core_ffi.cast("void *", memory.pointer + area.offset) for area in areas
        )
        self._keep = self._kick.fill(config.kick, self.index, self.core_ffi, self.core_lib)
        if self.features >> f.F_INDIRECT_DESC & 1:
            config.table_entries = min(size, self._indirect_entries)
            config.table_count, tables = self._tables(min(size, MAX_TABLES), config.table_entries)
            self._buffers.append(tables)
            config.tables = self.core_ffi.cast("void *", tables.pointer)
            config.tables_bus = tables.address
        self.handle = self.core_lib.gpv_queue_new(config)
        if self.handle == self.core_ffi.NULL:
            raise MemoryError(f"{self.name}: no memory for the shadow of {size} entries")
        addresses, lengths = np.zeros(size, np.uint64), np.zeros(size, np.uint32)
        self._addresses, self._element_lengths = addresses.data, lengths.data
        self._single.queue = self.handle
        self._single.addresses = self.core_ffi.from_buffer("uint64_t *", addresses)
        self._single.lengths = self.core_ffi.from_buffer("uint32_t *", lengths)
        self._ids: NDArray[np.uint32] = np.zeros(size, np.uint32)
        self._lengths: NDArray[np.uint32] = np.zeros(size, np.uint32)
        self._id_pointer = self.core_ffi.from_buffer("uint32_t *", self._ids)
        self._length_pointer = self.core_ffi.from_buffer("uint32_t *", self._lengths)
        self._one = self.core_ffi.new("uint32_t[2]")
        self._one_length = self._one + 1
        self._one_cookie = self.core_ffi.new("uint64_t *")

    def _tables(self, count: int, entries: int) -> tuple[int, DmaBuffer]:
        """Memory for ``count`` indirect tables, or for as many as are contiguous on the bus."""
        tables = self._pool.allocate(count * entries * DESC_BYTES)
        if len(tables.segments) > 1:
            count = max(1, tables.segments[1].length // (entries * DESC_BYTES))
            self._pool.free(tables)
            tables = self._pool.allocate(count * entries * DESC_BYTES)
        return count, tables

    def __repr__(self) -> str:
        kind = "packed" if self.packed else "split"
        return f"<Virtqueue {self.name}: {kind}, {self.size} entries, {self.outstanding} outstanding>"

    @property
    def desc(self) -> Record:
        """The descriptor table or ring, live."""
        return self.rings.desc

    @property
    def driver(self) -> Record:
        """The driver area, live: available ring (split) or driver event suppression (packed)."""
        return self.rings.avail if isinstance(self.rings, SplitRings) else self.rings.driver

    @property
    def device(self) -> Record:
        """The device area, live: used ring (split) or device event suppression (packed)."""
        return self.rings.used if isinstance(self.rings, SplitRings) else self.rings.device

    @property
    def free_slots(self) -> int:
        """Free descriptors."""
        return int(self.core_lib.gpv_free_slots(self.handle))

    @property
    def outstanding(self) -> int:
        """Buffers added and not come back."""
        return int(self.core_lib.gpv_outstanding(self.handle))

    @property
    def used_position(self) -> int:
        """Packed: where the next used descriptor is awaited, its wrap counter in bit 15."""
        return int(self.core_lib.gpv_used_position(self.handle))

    @property
    def kicks(self) -> int:
        """Notifications sent so far."""
        return int(self.core_lib.gpv_kicks(self.handle))

    def _fail(self, code: int) -> NoReturn:
        if code == lib.GPV_ECLOSED:
            raise UsageError("the virtqueue is closed", where=self.name)
        if code == lib.GPV_EBROKEN:
            violation = self.core_ffi.new("struct gpv_violation *")
            self.core_lib.gpv_violation_get(self.handle, violation)
            raise device_violation(violation, self.packed, self.name)
        if code == lib.GPV_EFULL:
            raise QueueFull(
                f"no room: {self.free_slots} of {self.size} descriptors are free",
                where=self.name,
                hint="publish(), then take completions() before adding more",
            )
        if code == lib.GPV_ECHAIN:
            raise UsageError(
                f"a buffer has 1 to {self.size} elements (VIRTIO 1.4 section 2.7.5.3.1, 2.8.17)",
                where=self.name,
            )
        if code == lib.GPV_ELENGTH:
            raise UsageError(
                "an element has at least 1 byte and a buffer at most 2^32 (VIRTIO 1.4 section 2.7.5)",
                where=self.name,
            )
        if code == lib.GPV_ETHREAD:
            raise UsageError(
                "the virtqueue belongs to another thread", where=self.name, hint="hand it over with own()"
            )
        error, self._kick.error = self._kick.error, None
        if error is not None:
            raise error
        raise GuestpvError("the notification eventfd refused the kick", where=self.name)

    def own(self) -> None:
        """Make the calling thread the owner. The former owner must not use the queue any more."""
        if not self.handle:
            self._fail(lib.GPV_ECLOSED)
        self.core_lib.gpv_queue_own(self.handle)

    def add(
        self, readable: Sequence[DmaBuffer] = (), writable: Sequence[DmaBuffer] = (), cookie: object = None
    ) -> int:
        """Place one buffer; the device sees it after ``publish``.

        Returns:
            Token: slot number in the low 16 bits, generation above; never given out twice.

        Raises:
            QueueFull: not enough free descriptors.
            UsageError: no element, more elements than the queue size, an empty element.
        """
        addresses, lengths = self._addresses, self._element_lengths
        count = border = 0
        try:
            for buffer in readable:
                for part in buffer.segments:
                    addresses[count] = part.address
                    lengths[count] = part.length
                    count += 1
            border = count
            for buffer in writable:
                for part in buffer.segments:
                    addresses[count] = part.address
                    lengths[count] = part.length
                    count += 1
        except IndexError:
            self._fail(lib.GPV_ECHAIN)
        if count != self._elements or border != self._border:
            self._single.elements, self._single.writable_from = count, border
            self._elements, self._border = count, border
        token: int = self.core_lib.gpv_single_add(self._single)
        if token < 0:
            self._fail(token)
        if cookie is not None:
            self._cookies[token] = cookie
        return token

    def cookie(self, token: int) -> object:
        """The object given to ``add`` with this token; gone when the next completion is taken."""
        return self._cookies.get(token)

    def add_burst(
        self, addresses: NDArray[np.uint64], lengths: NDArray[np.uint32], writable_from: int
    ) -> NDArray[np.uint32]:
        """Place ``n`` buffers of ``k`` elements each.

        Args:
            addresses: bus addresses, shape (n, k).
            lengths: bytes, shape (n, k).
            writable_from: number of the first device-writable element, 0 to k.

        Returns:
            Slots, shape (m,), of the buffers that found room: the first m of the n.

        Raises:
            UsageError: as for ``add``; buffers before the bad one stay added.
        """
        addresses = np.ascontiguousarray(addresses, np.uint64)
        lengths = np.ascontiguousarray(lengths, np.uint32)
        if (
            addresses.ndim != 2
            or addresses.shape != lengths.shape
            or not 0 <= writable_from <= addresses.shape[1]
        ):
            raise UsageError(
                f"add_burst takes two arrays of one shape (n, k) and writable_from up to k, not"
                f" {addresses.shape}, {lengths.shape} and {writable_from}",
                where=self.name,
            )
        count, elements = addresses.shape
        ids = np.empty(count, np.uint32)
        done: int = self.core_lib.gpv_add_burst(
            self.handle,
            self.core_ffi.from_buffer("uint64_t *", addresses),
            self.core_ffi.from_buffer("uint32_t *", lengths),
            count,
            elements,
            writable_from,
            self.core_ffi.NULL,
            self.core_ffi.from_buffer("uint32_t *", ids),
        )
        if done < 0:
            self._fail(done)
        return ids[:done]

    def publish(self) -> bool:
        """Make every added buffer available (2.7.13.3, 2.8.21.1) and notify the device if it asks for that.

        Returns:
            Whether the device was notified.
        """
        result: int = self.core_lib.gpv_publish(self.handle)
        if result < 0:
            self._fail(result)
        return result > 0

    def notify(self) -> None:
        """Notify the device whether it asks for it or not; it has to cope (DEV-SPLIT-22)."""
        result: int = self.core_lib.gpv_notify(self.handle)
        if result < 0:
            self._fail(result)

    def completions(self) -> Iterator[tuple[int, int]]:
        """Take used buffers one by one until none is left: (token, used length in bytes).

        A buffer added by ``add_burst`` has its slot as token.

        Raises:
            DeviceViolation: the device broke the standard; the queue takes no more buffers.
        """
        while True:
            got: int = self.core_lib.gpv_reap(self.handle, self._one, self._one_length, self._one_cookie, 1)
            if got <= 0:
                if got < 0:
                    self._fail(got)
                return
            token = self._one_cookie[0] << SLOT_BITS | self._one[0]
            try:
                yield token, self._one[1]
            finally:
                self._cookies.pop(token, None)

    def reap_burst(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Take every used buffer at once: slots and used lengths in bytes, both of shape (n,).

        Raises:
            DeviceViolation: as for ``completions``.
        """
        got: int = self.core_lib.gpv_reap(
            self.handle, self._id_pointer, self._length_pointer, self.core_ffi.NULL, self.size
        )
        if got < 0:
            self._fail(got)
        return self._ids[:got].copy(), self._lengths[:got].copy()

    def pending(self) -> bool:
        """Whether used buffers wait to be taken."""
        result: int = self.core_lib.gpv_pending(self.handle)
        if result < 0:
            self._fail(result)
        return result > 0

    def disable_interrupts(self) -> None:
        """Advise the device to send no used buffer notifications (2.7.7, 2.8.10)."""
        result: int = self.core_lib.gpv_disarm(self.handle)
        if result < 0:
            self._fail(result)

    def enable_interrupts(self) -> bool:
        """Ask for used buffer notifications again, and look once more.

        Returns:
            True: completions are pending already and may not be notified.
        """
        result: int = self.core_lib.gpv_arm(self.handle)
        if result < 0:
            self._fail(result)
        return result > 0

    def wait(self, timeout: float | None, spin_us: int = 50) -> bool:
        """Wait until used buffers are pending: spin up to ``spin_us`` microseconds, then sleep.

        Args:
            timeout: seconds, or None for no limit.

        Returns:
            Whether completions are pending; False when time is up.
        """
        fd = -1 if self.interrupt_fd is None else self.interrupt_fd
        spin = spin_us * 1000
        deadline = None if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
        while True:
            left = -1 if deadline is None else max(0, deadline - time.monotonic_ns())
            result: int = self.core_lib.gpv_wait(self.handle, fd, left, spin)
            if result == lib.GPV_WOKEN:
                if self.acknowledge is not None:
                    self.acknowledge()
            elif result != lib.GPV_EINTR:
                if result < 0:
                    self._fail(result)
                return result > 0
            spin = 0

    def fileno(self) -> int:
        """The interrupt's eventfd, for select and asyncio: readable once the device notified.

        Sleep on it only after ``enable_interrupts()`` returned False; after it fired call
        ``clear_interrupt()`` and take ``completions()`` until there are none.

        Raises:
            UsageError: the queue has no interrupt.
        """
        if self.interrupt_fd is None:
            raise UsageError(
                "the virtqueue has no interrupt to wait for", where=self.name, hint="poll it with wait()"
            )
        return self.interrupt_fd

    def clear_interrupt(self) -> bool:
        """Read the eventfd without blocking (and acknowledge INTx). Returns whether it had fired."""
        fired = bool(self.core_lib.gpv_interrupt_clear(self.fileno()))
        if fired and self.acknowledge is not None:
            self.acknowledge()
        return fired

    def drain(self) -> list[int]:
        """Take back every buffer that never came back, and start over from index 0.

        Only after the device or the queue was reset (2.6.1): before that the device may still write to
        them.

        Returns:
            Token of each, oldest first; ``cookie`` still knows their objects.
        """
        if not self.handle:
            self._fail(lib.GPV_ECLOSED)
        ids = self.core_ffi.new("uint32_t[]", self.size)
        serials = self.core_ffi.new("uint64_t[]", self.size)
        count = self.core_lib.gpv_drain(self.handle, ids, serials)
        tokens = [serials[i] << SLOT_BITS | ids[i] for i in range(count)]
        self._cookies = {token: self._cookies[token] for token in tokens if token in self._cookies}
        return tokens

    def restart(self, size: int | None = None) -> None:
        """Fresh rings, with another size if given, after a queue reset and ``drain`` (2.6.1.2).

        ``addresses`` and ``rings`` change with the size; the transport programs and re-enables the queue.

        Raises:
            UsageError: buffers are outstanding.
            ValueError: the format does not allow this size.
        """
        check_size(self.size if size is None else size, self.packed)
        if self.outstanding:
            raise UsageError(
                f"{self.outstanding} buffers are outstanding",
                where=self.name,
                hint="reset the queue and drain() it",
            )
        if size is None or size == self.size:
            self.drain()
            return
        self.close()
        self._build(size)

    def close(self) -> None:
        """Give the ring memory back. Only after the device or the queue was reset."""
        if self.handle:
            for burst in self._bursts:
                burst.queue = self.core_ffi.NULL
            self._bursts.clear()
            self._single.queue = self.core_ffi.NULL
            self.core_lib.gpv_queue_free(self.handle)
            self.handle = self.core_ffi.NULL
        while self._buffers:
            self._pool.free(self._buffers.pop())
