"""The network device (5.1): frames in and out.

``Net`` sets the device up and moves single frames for a person at a prompt or a test. What carries real
traffic is the C pump of ``services.net``, which takes over the same queues and buffers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceViolation, GuestpvError, QueueFull, TimeLimit, UsageError
from ..memory import DmaBuffer, DmaPool
from ..spec import net as spec
from ..spec.features import mask
from ..transport.base import Transport
from ..virtqueue.queue import Virtqueue

ETHERNET_HEADER = 14
VLAN_TAG = 4
DEFAULT_MTU = 1500
MERGEABLE_BUFFER = 2048
LARGEST_FRAME = 65536 + ETHERNET_HEADER + VLAN_TAG

BASE_FEATURES = mask(
    (
        spec.F_MAC,
        spec.F_STATUS,
        spec.F_MTU,
        spec.F_MRG_RXBUF,
        spec.F_CTRL_VQ,
        spec.F_MQ,
        spec.F_SPEED_DUPLEX,
    )
)
"""Features that concern frames as they are on the wire."""

RECEIVE_OFFLOADS = mask(
    (spec.F_GUEST_CSUM, spec.F_GUEST_TSO4, spec.F_GUEST_TSO6, spec.F_GUEST_ECN, spec.F_GUEST_UFO)
)
SEND_OFFLOADS = mask(
    (spec.F_CSUM, spec.F_HOST_TSO4, spec.F_HOST_TSO6, spec.F_HOST_ECN, spec.F_HOST_UFO, spec.F_HOST_USO)
)
"""Features under which frames carry a meaning in the virtio header; for users that look at it."""

_BIG_RECEIVE = mask((spec.F_GUEST_TSO4, spec.F_GUEST_TSO6, spec.F_GUEST_UFO))
_BIG_SEND = mask((spec.F_HOST_TSO4, spec.F_HOST_TSO6, spec.F_HOST_UFO, spec.F_HOST_USO))


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


@dataclass(slots=True)
class QueuePair:
    """One receive and one transmit queue with their buffers, used by one owner at a time."""

    rx: Virtqueue
    tx: Virtqueue
    rx_slab: Slab
    tx_slab: Slab


class Net:
    """A virtio network device.

    >>> with guestpv.open("vfio:0000:01:00.0") as t, Net(t) as net:   # doctest: +SKIP
    ...     net.send([frame])
    ...     net.receive()

    Args:
        transport: an opened network device; negotiated here, closed with the driver.
        queue_pairs: how many pairs to use; more than one needs MQ (5.1.5).
        offloads: mask of checksum and segmentation features whose header fields the user handles.
        started: whether receive buffers are handed out at once; the pump does that itself.

    Raises:
        Refused, FeaturesRefused: negotiation failed.
        UsageError: the device has fewer queue pairs.
    """

    def __init__(
        self, transport: Transport, *, queue_pairs: int = 1, offloads: int = 0, started: bool = True
    ) -> None:
        self.transport = transport
        wanted = BASE_FEATURES | offloads
        if queue_pairs == 1:
            wanted &= ~mask((spec.F_MQ,))
        self.features = transport.negotiate(supported=wanted)
        with transport.failing():
            self.header_size = spec.header_dtype(self.features).itemsize
            config = transport.config(spec.CONFIG)
            self._check_pairs(queue_pairs, config)
            self.mac = self._choose_mac(config)
            self.mtu = int(config.get("mtu", DEFAULT_MTU))
            if not 68 <= self.mtu <= 65535:
                raise DeviceViolation(
                    f"mtu is {self.mtu}, outside 68 to 65535",
                    requirement="DEV-NET-03",
                    section="5.1.4.1",
                    where=transport.name,
                )
            self.pairs = [self._make_pair(number) for number in range(queue_pairs)]
            self.control: Virtqueue | None = None
            if transport.has(spec.F_CTRL_VQ):
                pairs = int(config["max_virtqueue_pairs"]) if transport.has(spec.F_MQ) else 1
                self.control = transport.make_queue(2 * pairs)
                self._control_memory = transport.pool.allocate(4096)
            transport.driver_ok()
            if queue_pairs > 1:
                self._command(spec.CTRL_MQ, spec.CTRL_MQ_VQ_PAIRS_SET, queue_pairs.to_bytes(2, "little"))
        self._rx_tokens: dict[int, int] = {}
        self._tx_tokens: dict[int, int] = {}
        self._tx_free = list(range(len(self.pairs[0].tx_slab)))
        self._partial: list[bytes] = []
        self._missing = 0
        if started:
            for index in range(len(self.pairs[0].rx_slab)):
                self._give(index)
            self.pairs[0].rx.publish()

    # Set-up.

    def _check_pairs(self, wanted: int, config: dict[str, int | bytes]) -> None:
        most = int(config.get("max_virtqueue_pairs", 1)) if self.transport.has(spec.F_MQ) else 1
        if not 1 <= wanted <= most:
            raise UsageError(
                f"{wanted} queue pairs asked for, the device has {most}",
                where=self.transport.name,
                hint="QEMU: -device virtio-net-pci,mq=on and queues=N at the netdev" if wanted > most else "",
            )

    def _choose_mac(self, config: dict[str, int | bytes]) -> bytes:
        mac = config.get("mac")
        if isinstance(mac, bytes):
            if mac[0] & 1 or not any(mac):
                raise DeviceViolation(
                    f"the MAC address {mac.hex(':')} is no unicast address",
                    section="5.1.4",
                    where=self.transport.name,
                )
            return mac
        # Without F_MAC the driver picks a locally administered address (5.1.5).
        random = bytearray(np.random.default_rng().bytes(6))
        random[0] = random[0] & 0xFC | 0x02
        return bytes(random)

    def _make_pair(self, number: int) -> QueuePair:
        transport = self.transport
        rx, tx = transport.make_queue(2 * number), transport.make_queue(2 * number + 1)
        frame = self.header_size + ETHERNET_HEADER + VLAN_TAG + max(self.mtu, DEFAULT_MTU)
        rx_size = -(-frame // 64) * 64
        if transport.has(spec.F_MRG_RXBUF):
            rx_size = MERGEABLE_BUFFER
        elif self.features & _BIG_RECEIVE:
            rx_size = -(-(self.header_size + LARGEST_FRAME) // 4096) * 4096
        tx_size, tx_count = -(-frame // 64) * 64, tx.size
        if self.features & _BIG_SEND:
            # 64 KiB each: enough of them to fill a pipe, few enough for a memlock limit of 8 MiB.
            tx_size, tx_count = -(-(self.header_size + LARGEST_FRAME) // 4096) * 4096, min(tx.size, 64)
        rx_count = rx.size if rx_size <= 16384 else min(rx.size, 64)
        return QueuePair(
            rx, tx, Slab(transport.pool, rx_count, rx_size), Slab(transport.pool, tx_count, tx_size)
        )

    def _command(self, kind: int, command: int, data: bytes, timeout: float = 5.0) -> None:
        """One command on the control queue (5.1.9.5)."""
        control, memory = self.control, self._control_memory
        if control is None:
            raise UsageError("the device has no control queue", where=self.transport.name)
        memory.write(bytes((kind, command)) + data)
        memory.array[4095] = 0xFF
        control.add(readable=[memory[0:2], memory[2 : 2 + len(data)]], writable=[memory[4095:4096]])
        control.publish()
        if not control.wait(timeout):
            raise TimeLimit(
                f"control command class {kind} command {command} was not answered within {timeout:g} s",
                where=self.transport.name,
            )
        list(control.completions())
        if (status := int(memory.array[4095])) != spec.CTRL_OK:
            raise GuestpvError(
                f"the device refused control command class {kind} command {command} (status {status})",
                where=self.transport.name,
            )

    # State.

    @property
    def link_up(self) -> bool:
        """Whether the device says that its link is up; always True without F_STATUS (5.1.5)."""
        if not self.transport.has(spec.F_STATUS):
            return True
        return bool(int(self.transport.config(spec.CONFIG, "status")["status"]) & spec.S_LINK_UP)

    # Frames, one at a time.

    def send(self, frames: Iterable[bytes]) -> int:
        """Send Ethernet frames without their checksum; returns how many the device was given.

        Fewer than asked when the transmit queue is full; send the rest later.

        Raises:
            UsageError: a frame is shorter than its header or longer than the MTU allows.
        """
        pair = self.pairs[0]
        for token, _length in pair.tx.completions():
            self._tx_free.append(self._tx_tokens.pop(token))
        sent = 0
        longest = self.mtu + ETHERNET_HEADER + VLAN_TAG
        for frame in frames:
            if not ETHERNET_HEADER <= len(frame) <= longest:
                raise UsageError(
                    f"a frame of {len(frame)} bytes is not between {ETHERNET_HEADER} and {longest}"
                )
            if not self._tx_free:
                break
            index = self._tx_free[-1]
            buffer = pair.tx_slab[index]
            buffer.array[: self.header_size] = 0
            buffer.write(frame, self.header_size)
            try:
                token = pair.tx.add(readable=[buffer[: self.header_size + len(frame)]])
            except QueueFull:
                break
            self._tx_tokens[token] = self._tx_free.pop()
            sent += 1
        if sent:
            pair.tx.publish()
        return sent

    def receive(self) -> list[bytes]:
        """All whole frames that have come in, oldest first, without the virtio header.

        Raises:
            DeviceViolation: a used length is shorter than the header, or ``num_buffers`` is impossible.
        """
        pair = self.pairs[0]
        frames: list[bytes] = []
        for token, length in pair.rx.completions():
            index = self._rx_tokens.pop(token)
            data = pair.rx_slab[index].array[:length]
            self._collect(data, frames)
            self._give(index)
        pair.rx.publish()
        return frames

    def _collect(self, data: NDArray[np.uint8], frames: list[bytes]) -> None:
        if self._missing == 0:
            header = spec.HEADER.itemsize
            if data.nbytes < self.header_size:
                raise DeviceViolation(
                    f"a received buffer has {data.nbytes} bytes, its header alone {self.header_size}",
                    section="5.1.9.4",
                    where=self.transport.name,
                )
            number = int(data[:header].view(spec.HEADER)["num_buffers"][0])
            self._missing = number if self.transport.has(spec.F_MRG_RXBUF) else 1
            if not 1 <= self._missing <= self.pairs[0].rx.size:
                raise DeviceViolation(
                    f"num_buffers is {number}",
                    requirement="DEV-NET-37",
                    section="5.1.9.4",
                    where=self.transport.name,
                )
            data = data[self.header_size :]
        self._partial.append(data.tobytes())
        self._missing -= 1
        if self._missing == 0:
            frames.append(b"".join(self._partial))
            self._partial.clear()

    def _give(self, index: int) -> None:
        pair = self.pairs[0]
        self._rx_tokens[pair.rx.add(writable=[pair.rx_slab[index]])] = index

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until something was received; False when ``timeout`` seconds went by."""
        return self.pairs[0].rx.wait(timeout)

    def receive_within(self, timeout: float) -> list[bytes]:
        """The first frames that come within ``timeout`` seconds, or an empty list."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if self.wait(left) and (frames := self.receive()):
                return frames
        return []

    def close(self) -> None:
        """Reset the device and give everything back."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
