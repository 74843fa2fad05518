"""The block device (5.2): reads, writes, flushes and ranges, split to what the device allows.

Durability: where ``volatile_cache`` is true (FLUSH negotiated, cache not switched to write-through) a write
is safe from a power cut once a ``flush`` that was called after the write had returned has returned itself;
``write(..., fua=True)`` is a write and such a flush. Otherwise a write is safe when it has returned. Requests
in flight at the same time have no order among each other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceViolation, GuestpvError, QueueFull, Refused, UsageError
from ..memory import DmaBuffer
from ..spec import blk as spec
from ..spec.features import mask
from ..system import SYSTEM
from ..transport.base import Transport
from .blk_burst import SPIN_US, BurstResult, run_burst
from .blk_limits import Limits, RangeLimits
from .blk_queue import STAGES, Request, RequestQueue
from .blk_transfer import patiently, ranged, scattered, staged

FEATURES: Final = mask(
    (
        spec.F_SIZE_MAX,
        spec.F_SEG_MAX,
        spec.F_GEOMETRY,
        spec.F_RO,
        spec.F_BLK_SIZE,
        spec.F_FLUSH,
        spec.F_TOPOLOGY,
        spec.F_CONFIG_WCE,
        spec.F_MQ,
        spec.F_DISCARD,
        spec.F_WRITE_ZEROES,
        spec.F_LIFETIME,
        spec.F_SECURE_ERASE,
        spec.F_ZONED,
    )
)
DEFAULT_TIMEOUT: Final = 30.0
STAGING: Final = 1 << 20
"""Bytes of each queue through which data that is not in DMA memory is copied."""

Data = bytes | bytearray | memoryview | NDArray[Any]


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Wear of the storage, as the device estimates it (5.2.6).

    Attributes:
        pre_eol_info: reserved blocks in use: 0 undefined, 1 normal, 2 warning (80 %), 3 urgent (90 %).
        type_a: wear of SLC cells in tenths of the lifetime, 0 undefined, 11 exceeded.
        type_b: the same for MLC cells.
    """

    pre_eol_info: int
    type_a: int
    type_b: int


class Blk:
    """A virtio block device. Offsets and lengths are bytes, multiples of ``block_size``.

    >>> with guestpv.open("vfio:0000:03:00.0") as t, Blk(t) as disk:   # doctest: +SKIP
    ...     disk.write(0, b"x" * 4096)
    ...     disk.flush()
    ...     bytes(disk.read(0, 4096))

    Every method takes ``queue``, the number of the queue that it uses. A queue belongs to one thread; with
    several queues give each worker its own, and let it call ``own(queue)`` first.

    Args:
        transport: an opened block device; negotiated here, closed with the driver.
        queues: how many queues to use; more than one needs MQ (5.2.2).
        timeout: seconds after which a request that is not back ends as unknown, None for never.
        staging: bytes of DMA memory for each queue through which other memory is copied.

    Attributes:
        features: negotiated mask.
        limits: what one request may look like.
        capacity: bytes.
        block_size: bytes, the device's logical block.
        read_only: RO was negotiated: writes are refused.
        model: ``Z_NONE``, ``Z_HM`` or ``Z_HA`` (5.2.4); for zones see ``blk_zoned.Zones``.

    Raises:
        Refused, FeaturesRefused: negotiation failed, or a limit of the device makes no sense.
        UsageError: the device has fewer queues.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        queues: int = 1,
        timeout: float | None = DEFAULT_TIMEOUT,
        staging: int = STAGING,
    ) -> None:
        self.transport = transport
        self.timeout = timeout
        self._wanted_queues = queues
        self._staging = staging
        self.queues: list[RequestQueue] = []
        self._start()

    def _start(self) -> None:
        transport, wanted = self.transport, FEATURES
        before = transport.config(spec.CONFIG, "model", "size_max")
        if before.get("model") == spec.Z_HM:
            # A host-managed disk and DISCARD exclude each other, which has to be known before (5.2.5.1).
            wanted &= ~mask((spec.F_DISCARD,))
        if before.get("size_max") == 0 and not transport.feature_filter.required >> spec.F_SIZE_MAX & 1:
            # As qemu-storage-daemon has it: a limit that cannot be meant is not accepted, and so is none.
            wanted &= ~mask((spec.F_SIZE_MAX,))
        if self._wanted_queues == 1:
            wanted &= ~mask((spec.F_MQ,))
        self.features = transport.negotiate(supported=wanted)
        with transport.failing():
            self.config: dict[str, int] = {
                name: int(value) for name, value in transport.config(spec.CONFIG).items()
            }
            self._check_queues(self._wanted_queues)
            rings = [transport.make_queue(index) for index in range(self._wanted_queues)]
            self.limits = Limits.read(
                self.config, queue_size=min(ring.size for ring in rings), where=transport.name
            )
            self.model = self.config.get("model", spec.Z_NONE)
            if self.model > spec.Z_HA:
                raise DeviceViolation(
                    f"zoned model is {self.model}, which is undefined", section="5.2.4", where=transport.name
                )
            self.block_size = self.limits.block_size
            self.read_only = transport.has(spec.F_RO)
            self._writeback = bool(self.config.get("writeback", 1)) and transport.has(spec.F_FLUSH)
            stage = max(min(self._staging // STAGES, self.limits.request_bytes), self.block_size)
            stage = stage // self.block_size * self.block_size
            self.queues = [RequestQueue(ring, transport.pool, stage) for ring in rings]
            transport.driver_ok()

    def _check_queues(self, wanted: int) -> None:
        most = self.config.get("num_queues", 1)
        if most == 0:
            raise Refused("num_queues is 0 (VIRTIO 1.4 section 5.2.4)", where=self.transport.name)
        if not 1 <= wanted <= most:
            raise UsageError(
                f"{wanted} queues asked for, the device has {most}",
                where=self.transport.name,
                hint="QEMU: -device virtio-blk-pci,num-queues=N" if wanted > most else "",
            )

    # State.

    @property
    def capacity(self) -> int:
        """Bytes of the disk, as last read; see ``refresh``."""
        return self.config["capacity"] * spec.SECTOR

    @property
    def most_queues(self) -> int:
        """Queues that the device has; those not in use can be had by asking for them."""
        if (
            self.transport.offered >> spec.F_MQ & 1
            and spec.CONFIG["num_queues"].end <= self.transport.config_length
        ):
            return self.transport.read_config(spec.CONFIG["num_queues"].offset, 2)
        return 1

    @property
    def volatile_cache(self) -> bool:
        """Whether a write needs a flush to be safe from a power cut (5.2.5.1)."""
        return self._writeback

    def set_writeback(self, on: bool) -> None:
        """Switch the cache: write-back or write-through (CONFIG_WCE, 5.2.6.1).

        On the way to write-through what was written before is flushed, too (DRV-BLK-24).

        Raises:
            UsageError: CONFIG_WCE was not negotiated.
            GuestpvError: the device did not take it, or the flush failed.
        """
        if not self.transport.has(spec.F_CONFIG_WCE):
            raise UsageError("the cache cannot be switched: no CONFIG_WCE", where=self.transport.name)
        self.transport.config_write(spec.CONFIG["writeback"], int(on))
        now = int(self.transport.config(spec.CONFIG, "writeback")["writeback"])
        if now != int(on):
            raise GuestpvError(
                f"writeback reads {now} after {int(on)} was written", where=self.transport.name
            )
        if not on and self._writeback:
            self._simple(spec.T_FLUSH, 0)
        self._writeback = on

    def refresh(self) -> bool:
        """Read the configuration again (DRV-BLK-12). Returns whether the capacity is another one."""
        before = self.capacity
        fd = self.transport.config_fd
        if fd is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
        self.config |= {
            name: int(value) for name, value in self.transport.config(spec.CONFIG, "capacity").items()
        }
        return self.capacity != before

    def changed(self, timeout: float = 0.0) -> bool:
        """Wait up to ``timeout`` seconds for a configuration change; whether the capacity changed."""
        fd = self.transport.config_fd
        if fd is None or SYSTEM.poll([fd], timeout):
            return self.refresh()
        return False

    def own(self, queue: int = 0) -> None:
        """Make the calling thread the owner of a queue."""
        self.queues[queue].own()

    def allocate(self, nbytes: int) -> DmaBuffer:
        """DMA memory for ``read_into``, ``write_from`` and bursts; ``transport.pool`` takes it back."""
        return self.transport.pool.allocate(nbytes, align=4096)

    # Requests with data.

    def read(self, offset: int, length: int, *, queue: int = 0) -> NDArray[np.uint8]:
        """``length`` bytes from ``offset`` on, uint8, shape (length,).

        Raises:
            UsageError: not a multiple of ``block_size``, or beyond the end.
            BlkIoError: the device failed; ``sector`` and ``nbytes`` say where.
            OutcomeUnknown: the device did not answer in time.
        """
        self.check_range(offset, length)
        result: NDArray[np.uint8] = np.empty(length, np.uint8)
        staged(self.queues[queue], self.limits, self.timeout, spec.T_IN, offset, result)
        return result

    def write(self, offset: int, data: Data, *, fua: bool = False, queue: int = 0) -> None:
        """Write ``data`` at ``offset``; with ``fua`` it is safe from a power cut on return.

        Raises:
            Refused: the disk is read-only.
            UsageError, BlkIoError, OutcomeUnknown: as ``read``. After an error any part may be written.
        """
        source = np.frombuffer(data, np.uint8)
        self.check_range(offset, source.nbytes, write=True)
        staged(self.queues[queue], self.limits, self.timeout, spec.T_OUT, offset, source)
        if fua:
            self.flush(queue=queue)

    def read_into(self, offset: int, buffers: Sequence[DmaBuffer], *, queue: int = 0) -> None:
        """Read into DMA memory, one buffer after the other, without a copy. Raises as ``read``."""
        self._scattered(spec.T_IN, offset, buffers, queue)

    def write_from(self, offset: int, buffers: Sequence[DmaBuffer], *, queue: int = 0) -> None:
        """Write from DMA memory, one buffer after the other, without a copy. Raises as ``write``."""
        self._scattered(spec.T_OUT, offset, buffers, queue)

    def submit(
        self, kind: int, offset: int, buffers: Sequence[DmaBuffer], *, queue: int = 0
    ) -> list[Request]:
        """Add the requests of a transfer without waiting; ``queues[queue].wait`` or ``reap`` ends them.

        Raises:
            QueueFull: there was room for none; with room for some, those are returned: their ``nbytes``
                tell how far it got.
        """
        length = sum(buffer.nbytes for buffer in buffers)
        self.check_range(offset, length, write=kind == spec.T_OUT)
        requests: list[Request] = []
        for sector, parts in self.limits.split(offset, buffers):
            ways = ((), parts) if kind == spec.T_IN else (parts, ())
            try:
                requests.append(self.queues[queue].submit(kind, sector, *ways))
            except QueueFull:
                if not requests:
                    raise
                break
        return requests

    def read_many(
        self, offsets: NDArray[Any], out: DmaBuffer, nbytes: int, *, queue: int = 0, **options: Any
    ) -> BurstResult:
        """Read ``nbytes`` at each of ``offsets`` (bytes, shape (n,)) into row after row of ``out``.

        One burst keeps up to ``depth`` (the whole queue) requests in flight; ``latencies=True`` measures
        each. Errors are in the result, one for each request; ``check()`` raises the first.

        Raises:
            UsageError: an offset is misaligned or beyond the end, or ``nbytes`` is no single segment.
            TimeLimit: nothing came back for ``timeout`` seconds: ``restart`` the device.
        """
        return self._burst(spec.T_IN, offsets, out, nbytes, queue, options)

    def write_many(
        self, offsets: NDArray[Any], data: DmaBuffer, nbytes: int, *, queue: int = 0, **options: Any
    ) -> BurstResult:
        """Write row after row of ``data`` at ``offsets``; otherwise as ``read_many``."""
        return self._burst(spec.T_OUT, offsets, data, nbytes, queue, options)

    # Requests without data.

    def flush(self, *, queue: int = 0) -> None:
        """Make every write that has returned, on any queue, safe from a power cut.

        Without a volatile cache there is nothing to do, and nothing is sent.
        """
        if self._writeback:
            self._simple(spec.T_FLUSH, queue)

    def discard(self, offset: int, length: int, *, queue: int = 0) -> None:
        """Tell the device that a range is not needed; what it reads as afterwards is not defined (5.2.6.1).

        Raises:
            Refused: DISCARD was not negotiated, a limit of it is zero, or the disk is read-only.
            BlkIoError: the device failed; any part of the range may be discarded.
        """
        self._ranges(spec.T_DISCARD, self.limits.discard, offset, length, 0, queue)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False, queue: int = 0) -> None:
        """Make a range read as zeroes; with ``unmap`` it may be freed. Raises as ``discard``."""
        flags = spec.DISCARD_F_UNMAP if unmap else 0
        self._ranges(spec.T_WRITE_ZEROES, self.limits.write_zeroes, offset, length, flags, queue)

    def secure_erase(self, offset: int, length: int, *, queue: int = 0) -> None:
        """Erase every copy of a range. Raises as ``discard``."""
        self._ranges(spec.T_SECURE_ERASE, self.limits.secure_erase, offset, length, 0, queue)

    def get_id(self, *, queue: int = 0) -> str:
        """The device's ID string, at most 20 characters.

        Raises:
            BlkUnsupported: the device has none.
        """
        raw = self.request(spec.T_GET_ID, small=spec.ID_BYTES, queue=queue).small
        return raw.split(b"\0")[0].decode("latin-1")

    def get_lifetime(self, *, queue: int = 0) -> Lifetime:
        """Wear of the storage.

        Raises:
            Refused: LIFETIME was not negotiated.
        """
        self._need(spec.F_LIFETIME, "LIFETIME")
        raw = self.request(spec.T_GET_LIFETIME, small=spec.LIFETIME.itemsize, queue=queue).small
        return Lifetime(*(int(value) for value in np.frombuffer(raw, spec.LIFETIME)[0]))

    def request(
        self,
        kind: int,
        sector: int = 0,
        readable: Sequence[DmaBuffer] = (),
        writable: Sequence[DmaBuffer] = (),
        *,
        nbytes: int = 0,
        small: int = 0,
        queue: int = 0,
    ) -> Request:
        """One request of any type, waited for; what it says about itself is not checked.

        Raises:
            GuestpvError: its error.
        """
        requests = self.queues[queue]
        request = patiently(
            requests, self.timeout, kind, sector, readable, writable, nbytes=nbytes, small=small
        )
        requests.wait([request], self.timeout)
        request.check()
        return request

    # How.

    def _need(self, bit: int, name: str) -> None:
        if not self.transport.has(bit):
            raise Refused(f"{name} was not negotiated", where=self.transport.name)

    def check_range(self, offset: int, length: int, *, write: bool = False) -> None:
        """Whether a transfer lies on the disk, in whole blocks (DRV-BLK-13, DRV-BLK-17).

        Raises:
            UsageError: it does not.
            Refused: it is a write and the disk is read-only.
        """
        where, block = self.transport.name, self.block_size
        if write and self.read_only:
            raise Refused("the disk is read-only (RO)", where=where)
        if offset < 0 or length < 0 or offset % block or length % block:
            raise UsageError(f"{length} bytes at {offset} are not whole blocks of {block} bytes", where=where)
        if offset + length > self.capacity and (not self.refresh() or offset + length > self.capacity):
            raise UsageError(
                f"{length} bytes at {offset} reach beyond the end, {self.capacity} bytes", where=where
            )

    def _simple(self, kind: int, queue: int) -> None:
        self.request(kind, queue=queue)

    def _scattered(self, kind: int, offset: int, buffers: Sequence[DmaBuffer], queue: int) -> None:
        self.check_range(offset, sum(buffer.nbytes for buffer in buffers), write=kind == spec.T_OUT)
        scattered(self.queues[queue], self.limits, self.timeout, kind, offset, buffers)

    def _burst(
        self,
        kind: int,
        offsets: NDArray[Any],
        data: DmaBuffer,
        nbytes: int,
        queue: int,
        options: dict[str, Any],
    ) -> BurstResult:
        places = np.ascontiguousarray(offsets, np.uint64)
        if not 0 < nbytes <= self.limits.size_max:
            raise UsageError(
                f"a burst has requests of one segment: {self.block_size} to {self.limits.size_max} bytes, "
                f"not {nbytes}",
                where=self.transport.name,
            )
        if places.size:
            low, high = int(places.min()), int(places.max())
            self.check_range(high, nbytes, write=kind == spec.T_OUT)
            if low % self.block_size or np.any(places % np.uint64(self.block_size)):
                raise UsageError(f"an offset is no multiple of {self.block_size}", where=self.transport.name)
        depth = int(options.pop("depth", self.queues[queue].queue.size))
        return run_burst(
            self.queues[queue],
            kind,
            places // np.uint64(spec.SECTOR),
            data,
            nbytes,
            depth=depth,
            timeout=options.pop("timeout", self.timeout),
            spin_us=options.pop("spin_us", SPIN_US),
            **options,
        )

    def _ranges(
        self, kind: int, limits: RangeLimits, offset: int, length: int, flags: int, queue: int
    ) -> None:
        if limits.refusal:
            raise Refused(f"{spec.TYPE_NAMES[kind]}: {limits.refusal}", where=self.transport.name)
        self.check_range(offset, length, write=True)
        ranged(self.queues[queue], limits, self.timeout, kind, offset, length, flags)

    # The end.

    def restart(self, *, settle: bool = True) -> None:
        """Reset the device and start over. What is in flight ends as unknown.

        Args:
            settle: False where others used the queues, and know themselves what was in flight.

        Raises:
            Refused, FeaturesRefused, DeviceViolation: it did not come back as it was.
            TimeLimit, DeviceGone: it never left reset, or is gone.
        """
        if settle:
            self._settle("the device was reset")
        self.transport.revive()
        self._forget()
        self._start()

    def reconnect(self, timeout: float = 10.0) -> list[Request]:
        """Go on after the back end of a ``vhost-user:`` disk died (``DeviceGone``) and was started again.

        What it had completed is taken first. A back end with INFLIGHT_SHMFD goes on with the rest by itself;
        for any other the requests that had not come back are given to it once more. Such a write may so be
        carried out twice, with the same data, and an earlier flush covers it no longer than it covered any
        write in flight.

        Returns:
            The requests that were given once more; ``queues[n].wait`` ends them.

        Raises:
            UsageError: the transport cannot reconnect, a queue belongs to another thread, or a burst was
                under way: ``restart`` then.
            Refused, GuestpvError: as the transport has it: nobody listens, or what does is another device.
        """
        reconnect = getattr(self.transport, "reconnect", None)
        if reconnect is None:
            raise UsageError("this device cannot be reconnected to; restart() it", where=self.transport.name)
        for requests in self.queues:
            if requests.broken is not None:
                raise UsageError(
                    f"queue {requests.queue.index} cannot go on: {requests.broken.message}",
                    where=self.transport.name,
                    hint="restart() begins anew; what was in flight may be done or not",
                )
            requests.reap()
        again: dict[int, list[int]] = reconnect(timeout)
        sent: list[Request] = []
        for requests in self.queues:
            sent += requests.again(again.get(requests.queue.index, ()))
        return sent

    def _settle(self, why: str) -> None:
        for requests in self.queues:
            requests.own()
            requests.settle(GuestpvError(why, where=self.transport.name))

    def _forget(self) -> None:
        while self.queues:
            self.queues.pop().forget()

    def close(self) -> None:
        """Reset the device and give everything back. What is in flight ends as unknown. Idempotent."""
        if self.queues:
            self._settle("the device was closed")
            self.queues = []
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
