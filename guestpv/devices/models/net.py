"""Network device (5.1): two queues a pair, a control queue, and a wire to plug in."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from functools import partial

from ...errors import UsageError
from ...spec import features as ft
from ...spec import net
from ..evidence import DriverFault, Event
from ..model import DEFAULT_QUEUE_SIZE, Model
from ..queue import DeviceQueue
from ..ring import Chain
from .net_control import Control
from .net_hash import KEY_MOST, TABLE_MOST, TYPES, hash_of
from .packet import (
    ETHERNET,
    IPV6,
    VLAN_TAG,
    Flow,
    Packet,
    cuttable,
    flow,
    network_header,
    reverse,
    segments,
    vlan_id,
)

HEADER = struct.Struct("<BBHHHHH")
BASE = 12
HOST_GSO = {
    net.GSO_TCPV4: (net.F_HOST_TSO4, "DRV-NET-24"),
    net.GSO_TCPV6: (net.F_HOST_TSO6, "DRV-NET-26"),
    net.GSO_UDP: (net.F_HOST_UFO, "DRV-NET-28"),
    net.GSO_UDP_L4: (net.F_HOST_USO, "DRV-NET-30"),
}
GUEST_GSO = {
    net.GSO_TCPV4: net.F_GUEST_TSO4,
    net.GSO_TCPV6: net.F_GUEST_TSO6,
    net.GSO_UDP_L4: net.F_GUEST_USO4,
}
"""Receive offload for a gso_type; UDP over IPv6 has one of its own."""
BASIC = (net.F_MAC, net.F_STATUS, net.F_MRG_RXBUF, net.F_CTRL_VQ, net.F_CTRL_RX, net.F_CTRL_RX_EXTRA)
CONTROL = (net.F_CTRL_VLAN, net.F_CTRL_MAC_ADDR, net.F_GUEST_ANNOUNCE, net.F_SPEED_DUPLEX)
CHECKSUMS = (net.F_CSUM, net.F_GUEST_CSUM, net.F_CTRL_GUEST_OFFLOADS)
SEGMENTATION = (
    *(net.F_HOST_TSO4, net.F_HOST_TSO6, net.F_HOST_ECN, net.F_HOST_USO),
    *(net.F_GUEST_TSO4, net.F_GUEST_TSO6, net.F_GUEST_ECN, net.F_GUEST_USO4, net.F_GUEST_USO6),
)
NEVER = 127
FLOWS_KEPT = 1024

Peer = Callable[[Packet], None]
"""Where transmitted packets go."""


class Net(Model):
    """A network card.

    Args:
        mac: its address, 6 bytes.
        mtu: offered MTU, 0 not to offer one.
        pairs: queue pairs; more than one offers MQ.
        offloads: offer checksum and segmentation offload, both ways.
        depth: queue size offered.
        backlog: packets kept while the driver has no receive buffers; later ones are dropped.

    Attributes:
        peer: where transmitted packets go; None drops them.
        control: state behind the control queue.
        stray: what becomes of the header of a packet for the driver; leaves it as it is.
        unplug: called when the function is closed.
        sent, received, dropped, filtered: packets by the driver, to the driver, lost for lack of room or
            link, kept away by the receive filter.
    """

    device_type = ft.NET
    pci_class = 0x020000
    layout = net.CONFIG

    def __init__(
        self,
        mac: bytes = b"\x52\x54\x00\x00\x00\x01",
        mtu: int = 0,
        pairs: int = 1,
        offloads: bool = True,
        depth: int = DEFAULT_QUEUE_SIZE,
        backlog: int = 1024,
    ) -> None:
        super().__init__(depth)
        if len(mac) != 6 or mac[0] & 1:
            raise UsageError(f"{mac.hex(':')} is no unicast MAC address")
        if mtu and not 68 <= mtu <= 65535:
            raise UsageError(f"mtu {mtu} is not between 68 and 65535 (5.1.4.1)")
        if not 1 <= pairs <= 0x8000 - 1:
            raise UsageError(f"{pairs} queue pairs are not between 1 and 32767")
        self.pairs = pairs
        self.offered = ft.mask(BASIC + CONTROL)
        if offloads:
            self.offered |= ft.mask(CHECKSUMS + SEGMENTATION)
        self.offered |= (1 << net.F_MTU if mtu else 0) | (1 << net.F_MQ if pairs > 1 else 0)
        self._mac = mac
        self.config = {
            "mac": mac,
            "status": net.S_LINK_UP,
            "max_virtqueue_pairs": pairs,
            "mtu": mtu,
            "speed": 10_000,
            "duplex": 1,
            "rss_max_key_size": KEY_MOST,
            "rss_max_indirection_table_length": TABLE_MOST,
            "supported_hash_types": TYPES,
        }
        self.peer: Peer | None = None
        self.sent = self.received = self.dropped = self.filtered = 0
        self._limit = backlog
        self._backlog: dict[int, deque[Packet]] = {}
        self._spare: dict[int, list[Chain]] = {}
        self._flows: dict[Flow, int] = {}
        self.control = Control(self)
        self.stray: Callable[[bytes], bytes] = bytes
        self.unplug: Callable[[], None] = lambda: None

    # Queues (5.1.2)

    @property
    def num_queues(self) -> int:
        """All pairs and the control queue."""
        return 2 * self.pairs + 1

    def control_index(self, features: int) -> int | None:
        """Number of the control queue with these features, None without CTRL_VQ."""
        if not features >> net.F_CTRL_VQ & 1:
            return None
        return 2 * self._pairs_with(features)

    def _pairs_with(self, features: int) -> int:
        return self.pairs if features >> net.F_MQ & 1 or features >> net.F_RSS & 1 else 1

    def queue_size(self, index: int, features: int) -> int:
        """Queues beyond what the features call for do not exist."""
        return (
            self.depth
            if index < 2 * self._pairs_with(features) or index == self.control_index(features)
            else 0
        )

    def reset(self) -> None:
        """Forget filters, buffers and packets; the address is the card's own again."""
        self.control.reset()
        self.config["mac"] = self._mac
        self._backlog.clear()
        self._spare.clear()
        self._flows.clear()

    def queue_reset(self, queue: DeviceQueue) -> None:
        """Buffers of a queue that was reset are the driver's again."""
        self._spare.pop(queue.index, None)

    def start(self) -> None:
        """Offloads begin as negotiated."""
        self.control.start(self.device.features)

    def has(self, bit: int) -> bool:
        """Whether a feature was negotiated."""
        return bool(self.device.features >> bit & 1)

    @property
    def header_size(self) -> int:
        """Bytes of virtio_net_hdr with the negotiated features."""
        return net.header_dtype(self.device.features).itemsize

    def serve(self, queue: DeviceQueue) -> None:
        """A kick: requests on the control queue, packets on an odd one, buffers on an even one."""
        if queue.index == self.control_index(self.device.features):
            for chain in queue.chains():
                self._command(queue, chain)
        elif queue.index % 2:
            for chain in queue.chains():
                self._transmit(queue, chain)
        else:
            self._fill(queue)

    def close(self) -> None:
        """Leave the wire."""
        self.peer = None
        self.unplug()

    # From outside

    @property
    def link(self) -> bool:
        """Whether the link is up."""
        return bool(self._status & net.S_LINK_UP)

    @property
    def _status(self) -> int:
        status = self.config["status"]
        assert isinstance(status, int)
        return status

    @property
    def waiting(self) -> list[Packet]:
        """Packets that have no receive buffers yet."""
        return [packet for waiting in self._backlog.values() for packet in waiting]

    def set_link(self, up: bool) -> None:
        """Plug or unplug the cable: with STATUS the driver is notified."""
        status = self._status & ~net.S_LINK_UP | (net.S_LINK_UP if up else 0)
        if status != self._status:
            self.change_config(status=status)

    def announce(self) -> None:
        """Ask the driver to announce itself to the network (5.1.9.5.4)."""
        self.change_config(status=self._status | net.S_ANNOUNCE)

    @property
    def announcing(self) -> bool:
        """Whether the driver has yet to see the request to announce itself."""
        return bool(self._status & net.S_ANNOUNCE)

    def acknowledge_announce(self) -> None:
        """The driver has seen the request to announce itself."""
        self.config["status"] = self._status & ~net.S_ANNOUNCE
        self.device.bump_generation()

    def deliver(self, packet: Packet | bytes) -> None:
        """A packet arrives on the wire, for the driver."""
        whole = Packet(packet) if isinstance(packet, bytes) else packet
        self.device.executor.post(partial(self._arrive, whole))

    # Transmission (5.1.9.2)

    def _transmit(self, queue: DeviceQueue, chain: Chain) -> None:
        size = self.header_size
        data = chain.read()
        if chain.writable_bytes:
            self.device.find("DRV-NET-183", "transmit buffer with device-writable elements", queue.where)
        if len(data) < size:
            fault = DriverFault("DRV-NET-178", f"transmit buffer of {len(data)} bytes, header {size}")
            self.device.fault(fault, queue.where)
            return
        most, rule = self.control.transmits
        if queue.index // 2 >= most:
            self.device.find(rule, f"packet on transmitq{queue.index // 2 + 1} of {most}", queue.where)
        packet = self._parse(queue, data[:size], data[size:])
        if packet is not None:
            self.sent += 1
            self._learn(packet, queue.index // 2)
            if self.link and self.peer is not None:
                self.peer(packet)
        queue.complete(chain, 0)

    def _parse(self, queue: DeviceQueue, header: bytes, frame: bytes) -> Packet | None:
        """Header and frame as a packet; None for one that the device drops."""
        flags, kind, _, gso_size, start, offset, buffers = HEADER.unpack(header[:BASE])
        gso, ecn = kind & ~net.GSO_ECN, bool(kind & net.GSO_ECN)
        broken = self._check_header(flags, gso, ecn, gso_size, buffers, len(frame))
        for requirement, message in broken:
            self.device.find(requirement, message, queue.where)
        needs = bool(flags & net.HDR_F_NEEDS_CSUM)
        if needs and start + offset + 2 > len(frame):
            self.device.find(
                "DRV-NET-48", f"checksum at {start} + {offset} outside of the frame", queue.where
            )
            return None
        if gso and not (needs and gso in HOST_GSO and cuttable(frame, start, gso)):
            return None
        if len(frame) < ETHERNET:
            return None
        return Packet(frame, needs, start, offset, gso, ecn, gso_size)

    def _check_header(
        self, flags: int, gso: int, ecn: bool, gso_size: int, buffers: int, length: int
    ) -> list[tuple[str, str]]:
        found = []
        if buffers:
            found.append(("DRV-NET-19", f"num_buffers is {buffers} on transmit"))
        if flags and not self.has(net.F_CSUM):
            found.append(("DRV-NET-20", f"flags {flags:#x} without CSUM"))
        if flags & (net.HDR_F_DATA_VALID | net.HDR_F_RSC_INFO):
            found.append(("DRV-NET-64", f"flags {flags:#x} on transmit"))
        if gso:
            feature, rule = HOST_GSO.get(gso, (None, "DRV-NET-182"))
            if feature is None or not self.has(feature):
                found.append((rule, f"gso_type {gso} without its feature"))
            if not flags & net.HDR_F_NEEDS_CSUM:
                found.append(("DRV-NET-50", f"gso_type {gso} without NEEDS_CSUM"))
            if not gso_size:
                found.append(("DRV-NET-51", f"gso_type {gso} with gso_size 0"))
        elif self.has(net.F_MTU):
            mtu = self.config["mtu"]
            assert isinstance(mtu, int)
            if length > mtu + ETHERNET + 4:
                found.append(("DRV-NET-09", f"frame of {length} bytes with mtu {mtu}"))
        if ecn and not self.has(net.F_HOST_ECN):
            found.append(("DRV-NET-31", "ECN bit in gso_type without HOST_ECN"))
        return found

    def _learn(self, packet: Packet, pair: int) -> None:
        """Packets of this flow come back on the same pair (5.1.9.5.6)."""
        key = flow(packet.data) if self.control.pairs > 1 else None
        if key is not None:
            if len(self._flows) >= FLOWS_KEPT:
                self._flows.clear()
            self._flows[reverse(key)] = pair

    # Reception (5.1.9.3, 5.1.9.4)

    def _arrive(self, packet: Packet) -> None:
        if not self.device.running or not self.link:
            self.dropped += 1
            return
        if not self.control.accepts(packet.data):
            self.filtered += 1
            return
        for part in self._adapted(packet):
            queue = self._steer(part)
            if queue is None or self._too_long(part):
                self.dropped += 1
                continue
            waiting = self._backlog.setdefault(queue.index, deque())
            if len(waiting) >= self._limit:
                self.dropped += 1
                continue
            waiting.append(part)
            self._fill(queue)

    def _adapted(self, packet: Packet) -> list[Packet]:
        """The packet as this driver can take it: cut and checksummed unless it negotiated otherwise."""
        offloads = self.control.offloads
        if packet.gso_type:
            feature = GUEST_GSO.get(packet.gso_type, NEVER)
            if feature == net.F_GUEST_USO4 and network_header(packet.data)[0] == IPV6:
                feature = net.F_GUEST_USO6
            keep = offloads >> feature & 1
            if packet.ecn and not offloads >> net.F_GUEST_ECN & 1:
                keep = 0
            return [packet] if keep else list(segments(packet))
        return [packet if offloads >> net.F_GUEST_CSUM & 1 else packet.checksummed()]

    def _too_long(self, packet: Packet) -> bool:
        """Whether a packet exceeds the MTU that was negotiated (5.1.4.1)."""
        if packet.gso_type or not self.has(net.F_MTU):
            return False
        mtu = self.config["mtu"]
        assert isinstance(mtu, int)
        tag = 0 if vlan_id(packet.data) is None else VLAN_TAG
        return len(packet.data) > mtu + ETHERNET + tag

    def _steer(self, packet: Packet) -> DeviceQueue | None:
        """The receive queue for a packet: the flow's own, else any that is enabled."""
        pairs, steering = self.control.pairs, self.control.steering
        if steering is not None and steering.table:
            queue = self.device.queues[2 * steering.queue(packet.data)]
            return queue if queue.enabled else None
        key = flow(packet.data) if pairs > 1 else None
        first = 0 if key is None else self._flows.get(key, hash(key) % pairs)
        for step in range(pairs):
            queue = self.device.queues[2 * ((first + step) % pairs)]
            if queue.enabled:
                return queue
        return None

    def _fill(self, queue: DeviceQueue) -> None:
        """Put waiting packets into receive buffers while there are both."""
        waiting = self._backlog.setdefault(queue.index, deque())
        spare = self._spare.setdefault(queue.index, [])
        while waiting:
            size = self.header_size + len(waiting[0].data)
            if not self._gather(queue, spare, size):
                if self.device.running and len(spare) >= queue.size:
                    self._no_room(queue, waiting.popleft())
                    continue
                return
            packet = waiting.popleft()
            if sum(chain.writable_bytes for chain in spare) < size:
                self._no_room(queue, packet)
                continue
            self._put(queue, spare, packet)
        queue.rearm()

    def _no_room(self, queue: DeviceQueue, packet: Packet) -> None:
        """Drop a packet that the receive buffers are too small for."""
        self.dropped += 1
        self.device.journal.record(Event("drop", "packet", value=len(packet.data), queue=queue.index), packet)

    def _gather(self, queue: DeviceQueue, spare: list[Chain], size: int) -> bool:
        """Take buffers until ``size`` bytes fit, without MRG_RXBUF one; False when the driver has no more."""
        merge = self.has(net.F_MRG_RXBUF)
        while sum(chain.writable_bytes for chain in spare) < size and (merge or not spare):
            chain = queue.pop()
            if chain is None:
                if queue.rearm():
                    continue
                return False
            if chain.readable_bytes:
                self.device.find("DRV-NET-185", "receive buffer with device-readable elements", queue.where)
            if merge and chain.writable_bytes < self.header_size:
                text = f"receive buffer of {chain.writable_bytes} bytes"
                self.device.fault(DriverFault("DRV-NET-71", text), queue.where)
                return False
            spare.append(chain)
        return True

    def _put(self, queue: DeviceQueue, spare: list[Chain], packet: Packet) -> None:
        """Write a packet over as many buffers as it takes; all of them are used together (5.1.9.4.1)."""
        data = bytes(self.header_size) + packet.data
        done: list[tuple[Chain, int]] = []
        start = 0
        while start < len(data):
            chain = spare.pop(0)
            written = chain.write(data[start:])
            done.append((chain, written))
            start += written
        flags = net.HDR_F_NEEDS_CSUM if packet.needs_csum else 0
        kind = packet.gso_type | (net.GSO_ECN if packet.ecn else 0)
        length = packet.header_length if packet.gso_type else 0
        header = HEADER.pack(
            flags, kind, length, packet.gso_size, packet.csum_start, packet.csum_offset, len(done)
        )
        if self.has(net.F_HASH_REPORT) and self.control.steering is not None:
            steering = self.control.steering
            header += struct.pack("<IH", *hash_of(packet.data, steering.key, steering.types))
        done[0][0].write(self.stray(header))
        self.received += 1
        self.device.journal.record(Event("fill", "packet", value=len(packet.data), queue=queue.index), packet)
        queue.complete_together(done)

    # Control (5.1.9.5)

    def _command(self, queue: DeviceQueue, chain: Chain) -> None:
        if not chain.writable_bytes:
            self.device.fault(DriverFault("DRV-NET-186", "no room for ack"), queue.where)
            return
        accepted, requirement, message = self.control.command(chain.read())
        if requirement:
            self.device.find(requirement, message, queue.where)
        before, after = self.control.answer
        ack = net.CTRL_OK if accepted else net.CTRL_ERR
        queue.complete(chain, chain.write(before + bytes([ack]) + after * accepted))
