"""A network device in the hands of a case: ports with rings by hand, packets, and commands."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pytest

from ..memory import DmaBuffer
from ..spec import features as ft
from ..spec import net
from .queue import Queue
from .rig import Rig

OUR_MAC = bytes.fromhex("525400 7e5701")
"""Where frames of the checks come from."""
BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("01005e000001")
STRANGER = bytes.fromhex("525400 dead01")
ROOM = 2048
SHOWN = 32


def frame(target: bytes = BROADCAST, size: int = 60, *, vlan: int | None = None, mark: int = 0) -> bytes:
    """A frame of the experimental EtherType 0x88B5 whose content ``mark`` makes different from others."""
    tag = b"" if vlan is None else b"\x81\x00" + vlan.to_bytes(2, "big")
    head = target + OUR_MAC + tag + b"\x88\xb5"
    body = bytes((mark + at) & 0xFF for at in range(size - len(head)))
    return head + body


def tcp(payload: bytes, *, v6: bool = False, target: bytes = BROADCAST) -> tuple[bytes, int]:
    """A TCP segment whose checksum field holds the pseudo header sum, and where its header starts."""
    length = 20 + len(payload)
    if v6:
        ends = bytes.fromhex("20010db8" + "00" * 11 + "01" + "20010db8" + "00" * 11 + "02")
        pseudo = ends + struct.pack(">IxxxB", length, 6)
        head = b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, length, 6, 64) + ends
    else:
        ends = bytes([192, 0, 2, 1, 192, 0, 2, 2])
        pseudo = ends + struct.pack(">xBH", 6, length)
        bare = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 6, 0) + ends
        head = b"\x08\x00" + bare[:10] + ones_sum(bare).to_bytes(2, "big") + bare[12:]
    partial = ones_sum(pseudo) ^ 0xFFFF
    header = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 0, 0x50, 0x10, 0x1000, partial, 0)
    return target + OUR_MAC + head + header + payload, 14 + len(head) - 2


def ones_sum(data: bytes) -> int:
    """The complement of the ones' complement sum (RFC 1071)."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def checksum_holds(data: bytes, start: int) -> bool:
    """Whether the TCP or UDP checksum is right; ``start``: offset of the header that has it."""
    body = data[start:]
    if data[12:14] == b"\x08\x00":
        pseudo = data[26:34] + struct.pack(">xBH", data[23], len(body))
    else:
        pseudo = data[22:54] + struct.pack(">IxxxB", len(body), data[20])
    return ones_sum(pseudo + body) == 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One packet that the device put into receive buffers.

    Attributes:
        header: a record of ``net.header_dtype``.
        data: the frame, gathered.
        lengths: used length of each buffer.
        buffers: the buffers, in the order of their use.
    """

    header: np.void
    data: bytes
    lengths: list[int]
    buffers: list[DmaBuffer]

    def field(self, name: str) -> int:
        """A field of the header."""
        return int(self.header[name])


class Ports:
    """A running network device.

    Args:
        rig: the device, reset.
        ring: ring features.
        wanted: further features; the case is skipped where one is not offered.
        size: entries of each queue, or None for the default.

    Attributes:
        rx, tx: queues by pair.
        control: the control queue, or None.
        header: layout of the packet header.
    """

    def __init__(self, rig: Rig, ring: int = 0, *wanted: int, size: int | None = None) -> None:
        offered = rig.transport.offered
        for bit in wanted:
            if not offered >> bit & 1:
                pytest.skip(f"{ft.feature_name(ft.NET, bit)} is not offered")
        features = rig.features_for(ring) | ft.mask(wanted)
        rig.negotiate(features)
        self.rig = rig
        self.features = features
        self.pairs = 1
        if features & ft.mask((net.F_MQ, net.F_RSS)):
            field = net.CONFIG["max_virtqueue_pairs"]
            self.pairs = min(rig.transport.read_config(field.offset, field.width), 8)
        self.header = net.header_dtype(features)
        self.rx: list[Queue] = []
        self.tx: list[Queue] = []
        for pair in range(self.pairs):
            self.rx.append(rig.queue(2 * pair, size))
            self.tx.append(rig.queue(2 * pair + 1, size))
        self.control: Queue | None = None
        if features >> net.F_CTRL_VQ & 1:
            most = rig.transport.read_config(8, 2) if self.pairs > 1 else 1
            self.control = rig.queue(2 * most)
        self._posted: list[dict[int, DmaBuffer]] = [{} for _ in self.rx]
        self._early: list[list[Arrival]] = [[] for _ in self.rx]
        rig.transport.driver_ok()

    @property
    def overhead(self) -> int:
        """Bytes of the packet header."""
        return int(self.header.itemsize)

    def post(self, count: int = 8, size: int = ROOM, pair: int = 0) -> None:
        """Make receive buffers available."""
        for _ in range(count):
            buffer = self.rig.buffer(size)
            buffer.array[:] = 0xDD
            self._posted[pair][self.rx[pair].add(writable=[buffer], kick=False)] = buffer
        self.rx[pair].kick()

    def arrivals(self, pair: int = 0) -> list[Arrival]:
        """Packets that have come in since the last call."""
        found, self._early[pair] = self._early[pair], []
        used = self.rx[pair].used()
        while used:
            id, length = used.pop(0)
            first = self._posted[pair].pop(id)
            header = first.array[: self.overhead].view(self.header)[0]
            data, lengths, buffers = first.array[self.overhead : length].tobytes(), [length], [first]
            for _ in range(int(header["num_buffers"]) - 1 if self.features >> net.F_MRG_RXBUF & 1 else 0):
                assert used, f"num_buffers is {header['num_buffers']}, {len(lengths)} buffers were used"
                id, length = used.pop(0)
                buffers.append(self._posted[pair].pop(id))
                data += buffers[-1].array[:length].tobytes()
                lengths.append(length)
            found.append(Arrival(header, data, lengths, buffers))
        return found

    def arrival(self, pair: int = 0) -> Arrival:
        """Wait for one packet.

        Raises:
            AssertionError: none came.
        """
        found: list[Arrival] = []

        def came() -> bool:
            found.extend(self.arrivals(pair))
            return bool(found)

        self.rig.wait(came, f"packet in receive queue {pair + 1}")
        self._early[pair] += found[1:]
        return found[0]

    def gather(self, count: int, pair: int = 0) -> list[Arrival]:
        """Wait for ``count`` packets, and take those that come with them.

        Raises:
            AssertionError: fewer came.
        """
        found: list[Arrival] = []

        def came() -> bool:
            found.extend(self.arrivals(pair))
            return len(found) >= count

        self.rig.wait(came, f"{count} packets in receive queue {pair + 1}")
        return found

    def anywhere(self, count: int = 1) -> list[list[Arrival]]:
        """Wait until ``count`` packets are in any of the receive queues; those of each pair.

        Raises:
            AssertionError: fewer came.
        """
        found: list[list[Arrival]] = [[] for _ in self.rx]

        def came() -> bool:
            for pair, here in enumerate(found):
                here.extend(self.arrivals(pair))
            return sum(map(len, found)) >= count

        self.rig.wait(came, f"{count} packets in any receive queue")
        return found

    def nothing(self, pair: int = 0) -> None:
        """Nothing may have come.

        Raises:
            AssertionError: a packet came.
        """
        self.rig.settle()
        found = self.arrivals(pair)
        assert not found, (
            f"a packet of {len(found[0].data)} bytes arrived in receive queue {pair + 1}: "
            f"{found[0].data[:SHOWN].hex()}"
        )

    def forget(self, pair: int) -> None:
        """The queue was reset: what was in it is nobody's any more."""
        self._posted[pair].clear()
        self._early[pair].clear()

    def no_promiscuity(self) -> None:
        """Turn promiscuous and all-multicast mode off: how a device begins is its own affair.

        The case is skipped without CTRL_RX.
        """
        if not self.features >> net.F_CTRL_RX & 1:
            pytest.skip("CTRL_RX is not offered")
        for mode in (net.CTRL_RX_PROMISC, net.CTRL_RX_ALLMULTI):
            assert self.command(net.CTRL_RX, mode, b"\0")[0] == net.CTRL_OK, f"RX command {mode} is refused"

    def send(self, data: bytes, pair: int = 0, **fields: int) -> int:
        """Send a frame with these fields in its header and wait for it. Returns the used length."""
        header = np.zeros((), self.header)
        for name, value in fields.items():
            header[name] = value
        whole = header.tobytes() + data
        return self.tx[pair].run([self.rig.buffer(len(whole), whole)])

    def command(self, kind: int, command: int, data: bytes = b"", *, into: int = 0) -> tuple[int, int]:
        """A control command. Returns (ack, used length).

        Raises:
            Skipped: there is no control queue.
        """
        if self.control is None:
            pytest.skip("CTRL_VQ is not offered")
        readable = [self.rig.buffer(2, bytes([kind, command]))]
        if data:
            readable.append(self.rig.buffer(len(data), data))
        ack = self.rig.buffer(1 + into, b"\xee")
        length = self.control.run(readable, [ack])
        return int(ack.array[0]), length
