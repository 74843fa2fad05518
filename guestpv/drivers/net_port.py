"""One queue pair of a network device with its buffers: frames in bursts, no object for each (5.1.9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..core._core import ffi, lib
from ..errors import DeviceViolation, UsageError
from ..memory import DmaBuffer, DmaPool
from ..spec import net as spec
from ..transport.base import Transport
from .net_config import DEFAULT_MTU

ETHERNET_HEADER: Final = 14
VLAN_TAG: Final = 4
MERGEABLE_BUFFER: Final = 4096
LARGEST_FRAME: Final = 65589
"""What a receive buffer has room for where segments may come joined, without the virtio header (5.1.9.3)."""
PARTIAL_LIMIT = 5.0
"""Seconds; all buffers of a frame become visible together (DEV-NET-39), so any wait is generous."""
GSO_TYPES: Final = {
    spec.F_GUEST_TSO4: spec.GSO_TCPV4,
    spec.F_GUEST_TSO6: spec.GSO_TCPV6,
    spec.F_GUEST_UFO: spec.GSO_UDP,
    spec.F_GUEST_USO4: spec.GSO_UDP_L4,
    spec.F_GUEST_USO6: spec.GSO_UDP_L4,
}
HOST_SEGMENTATION: Final = (spec.F_HOST_TSO4, spec.F_HOST_TSO6, spec.F_HOST_UFO, spec.F_HOST_USO)


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames as rows of a table.

    Attributes:
        data: uint8, shape (n, stride), Ethernet frames without checksum, each at the start of its row.
        lengths: uint32, shape (n,), bytes of each.
        headers: shape (n,) of ``spec.net.header_dtype``, or None: not asked for, or all zero.
    """

    data: NDArray[np.uint8]
    lengths: NDArray[np.uint32]
    headers: NDArray[np.void] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> bytes:
        """One frame as bytes."""
        return self.data[index, : self.lengths[index]].tobytes()

    @classmethod
    def of(cls, frames: list[bytes]) -> Frames:
        """A table of single frames."""
        lengths = np.array([len(frame) for frame in frames], np.uint32)
        data = np.zeros((len(frames), int(lengths.max(initial=1))), np.uint8)
        for row, frame in zip(data, frames, strict=True):
            row[: len(frame)] = np.frombuffer(frame, np.uint8)
        return cls(data, lengths)


class Slab:
    """Equal buffers, each contiguous on the bus.

    Attributes:
        size: bytes of one buffer.
        pointers: uint64, shape (count,), the CPU address of each buffer.
        bus: uint64, shape (count,), its bus address.
    """

    def __init__(self, pool: DmaPool, count: int, size: int) -> None:
        self._buffers = [pool.allocate(size) for _ in range(count)]
        self.size = size
        self.pointers: NDArray[np.uint64] = np.array([b.pointer for b in self._buffers], dtype=np.uint64)
        self.bus: NDArray[np.uint64] = np.array([b.address for b in self._buffers], dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, index: int) -> DmaBuffer:
        return self._buffers[index]

    def free(self, pool: DmaPool) -> None:
        """Give the buffers back. Only after the device was reset."""
        while self._buffers:
            pool.free(self._buffers.pop())


class NetPort:
    """One receive and one transmit queue with their buffers, used by one thread at a time.

    Args:
        transport: the negotiated device, before DRIVER_OK.
        number: which pair, from 0.
        mtu: largest payload that the device takes unsegmented, in bytes.

    Attributes:
        rx, tx: the queues; where the port is used they are its own.
        rx_slab, tx_slab: the buffers.
        handle: the core's ``struct gpv_port *``.
        core_ffi, core_lib: the build of the core that it belongs to, the queues' own.
        header: dtype of the virtio header.
        longest: bytes of the longest frame that may be sent unsegmented.
        stride: bytes of the longest frame that can come in.
    """

    def __init__(self, transport: Transport, number: int, mtu: int) -> None:
        self._name = transport.name
        self.rx, self.tx = transport.make_queue(2 * number), transport.make_queue(2 * number + 1)
        features = transport.features
        self.header = spec.header_dtype(features)
        self.longest = ETHERNET_HEADER + VLAN_TAG + mtu
        header, has = self.header.itemsize, transport.has
        gso = [kind for bit, kind in GSO_TYPES.items() if has(bit)]
        frame = max(self.longest, ETHERNET_HEADER + VLAN_TAG + DEFAULT_MTU)
        # Room for whole numbers of cache lines, and for seeing that a frame is too long.
        small = (header + frame) // 64 * 64 + 64
        big = -(-(header + LARGEST_FRAME) // 4096) * 4096
        rx_size = MERGEABLE_BUFFER if has(spec.F_MRG_RXBUF) else big if gso else small
        tx_size = big if any(has(bit) for bit in HOST_SEGMENTATION) else small
        # 64 KiB each: enough of them to fill a pipe, few enough for a memlock limit of 8 MiB.
        self.rx_slab, self.tx_slab = (
            Slab(transport.pool, queue.size if size <= 16384 else min(queue.size, 64), size)
            for queue, size in ((self.rx, rx_size), (self.tx, tx_size))
        )
        self.stride = LARGEST_FRAME if gso or has(spec.F_MRG_RXBUF) else rx_size - header
        self.core_ffi, self.core_lib = self.rx.core_ffi, self.rx.core_lib
        config = self.core_ffi.new("struct gpv_port_config *")
        config.rx, config.tx = self.rx.handle, self.tx.handle
        self._keep: list[Any] = []
        self._describe(config.rx_buffers, self.rx_slab)
        self._describe(config.tx_buffers, self.tx_slab)
        config.header, config.mergeable = header, has(spec.F_MRG_RXBUF)
        config.gso = sum({1 << kind for kind in gso})
        config.longest, config.partial_ms = self.longest, int(PARTIAL_LIMIT * 1000)
        self.handle = self.core_ffi.gc(self.core_lib.gpv_port_new(config), self.core_lib.gpv_port_free)
        if self.handle == self.core_ffi.NULL:
            raise MemoryError("no memory for a network port")

    def _describe(self, buffers: Any, slab: Slab) -> None:
        memory, bus = (self.core_ffi.from_buffer("uint64_t[]", array) for array in (slab.pointers, slab.bus))
        self._keep += [memory, bus]
        buffers.memory, buffers.bus, buffers.size, buffers.count = memory, bus, slab.size, len(slab)

    def _open(self) -> None:
        # The core's port knows its queues by pointers that end with them.
        if not self.rx.handle or not self.tx.handle:
            raise UsageError("the network port is closed", where=self._name)

    def remind(self, others: list[NetPort]) -> None:
        """Whenever the device had run out of receive buffers here, notify those of ``others``, too."""
        queues = ffi.new("struct gpv_queue *[]", [other.rx.handle for other in others])
        self._keep.append(queues)
        lib.gpv_port_siblings(self.handle, queues, len(others))

    def own(self) -> None:
        """Make the calling thread the owner of both queues."""
        self.rx.own()
        self.tx.own()

    def free(self, pool: DmaPool) -> None:
        """Give the buffers back. Only after the device was reset; the port is of no use any more."""
        for slab in (self.rx_slab, self.tx_slab):
            slab.free(pool)

    def start(self) -> None:
        """Hand every receive buffer to the device."""
        self._open()
        # Sent frames are taken back when the next one needs their room.
        self.tx.disable_interrupts()
        self.check(self.core_lib.gpv_port_start(self.handle))

    def check(self, code: int) -> int:
        """Raise what a negative result of the core means; the result otherwise.

        Raises:
            DeviceViolation: the device broke a queue, or a frame that cannot be.
        """
        if code >= 0:
            return code
        if code in (lib.GPV_PORT_EFRAGMENTS, lib.GPV_PORT_EPARTIAL):
            number = int(self.core_lib.gpv_port_fragments(self.handle))
            impossible = code == lib.GPV_PORT_EFRAGMENTS
            raise DeviceViolation(
                f"num_buffers is {number}, more than a frame can have"
                if impossible
                else f"num_buffers is {number}, but so many buffers never came",
                requirement="DEV-NET-37" if impossible else "DEV-NET-39",
                section="5.1.9.4.1",
                where=self.rx.name,
            )
        if code == lib.GPV_EBROKEN:
            for queue in (self.rx, self.tx):
                # Taking from a broken queue raises what broke it.
                queue.own()
                queue.reap_burst()
        return self.tx._fail(code)

    def send(self, frames: Frames) -> int:
        """Send rows of a table; returns how many the device was given, fewer when its queue is full.

        ``headers`` of the frames go out as they are but for ``num_buffers``, which is the device's.

        Raises:
            UsageError: the table is not well formed, or a frame is shorter than its Ethernet header or longer
                than the device takes; nothing was sent.
        """
        self._open()
        rows, lengths = frames.data, np.ascontiguousarray(frames.lengths, np.uint32)
        if not len(lengths):
            return 0
        if rows.ndim != 2 or rows.dtype != np.uint8 or len(rows) < len(lengths) or rows.strides[1] != 1:
            raise UsageError(f"frames are a uint8 table of rows, not {rows.dtype} of shape {rows.shape}")
        headers = frames.headers
        segmented = np.zeros(len(lengths), bool) if headers is None else headers["gso_type"] & 0x7F != 0
        room = min(rows.shape[1], self.tx_slab.size - self.header.itemsize)
        most = np.where(segmented, room, min(room, self.longest))
        if (wrong := (lengths < ETHERNET_HEADER) | (lengths > most)).any():
            raise UsageError(
                f"a frame of {lengths[wrong][0]} bytes is not between {ETHERNET_HEADER} and {most[wrong][0]}",
                where=self._name,
            )
        table = self._table(rows, lengths, headers)
        return self.check(self.core_lib.gpv_port_send(self.handle, table, len(lengths)))

    def table(self, rows: int, *, headers: bool = False) -> Frames:
        """An empty table for so many received frames, to hand to ``receive`` again and again."""
        return Frames(
            np.empty((rows, self.stride), np.uint8),
            np.zeros(rows, np.uint32),
            np.zeros(rows, self.header) if headers else None,
        )

    def receive(self, most: int = 64, *, headers: bool = False, out: Frames | None = None) -> Frames:
        """What has come in, at most ``most`` frames, oldest first.

        Args:
            headers: hand out the virtio headers, too.
            out: a table to fill, instead of a new one, with headers or without; the result is a view of it.

        Raises:
            DeviceViolation: the device broke the queue; frames from before that were given out before.
        """
        self._open()
        if out is None:
            out = self.table(most, headers=headers)
        got = self.check(
            self.core_lib.gpv_port_receive(self.handle, self._table(out.data, out.lengths, out.headers))
        )
        return Frames(out.data[:got], out.lengths[:got], None if out.headers is None else out.headers[:got])

    def _table(
        self, data: NDArray[np.uint8], lengths: NDArray[np.uint32], headers: NDArray[np.void] | None
    ) -> Any:
        if headers is not None and (headers.dtype != self.header or not headers.flags.c_contiguous):
            raise UsageError(f"headers are a contiguous array of {self.header}")
        ffi = self.core_ffi
        table = ffi.new("struct gpv_frames *")
        table.data, table.stride = ffi.cast("uint8_t *", data.ctypes.data), data.strides[0]
        table.lengths, table.capacity = ffi.cast("uint32_t *", lengths.ctypes.data), len(lengths)
        if headers is not None:
            table.headers = ffi.cast("uint8_t *", headers.ctypes.data)
        return table

    @property
    def counters(self) -> dict[str, int]:
        """Since the start: ``rx_packets``, ``rx_bytes``, ``rx_dropped``, ``rx_malformed``, ``tx_...``.

        ``rx`` is from the device. Readable from any thread.
        """
        live = self.core_lib.gpv_port_counters(self.handle)
        return {name: int(getattr(live, name)) for name in COUNTERS}


COUNTERS: Final = tuple(field for field, _ in ffi.typeof("struct gpv_port_counters").fields)
