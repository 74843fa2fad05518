"""Ethernet frames between network devices, and the offloads that a device does for its driver (5.1.9)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...spec import net

ETHERNET = 14
VLAN_TAG = 4
VLAN_TYPES = (0x8100, 0x88A8)
IPV4, IPV6 = 0x0800, 0x86DD
TCP, UDP = 6, 17
TCP_FIN, TCP_PUSH, TCP_CWR = 0x01, 0x08, 0x80


@dataclass(frozen=True, slots=True)
class Packet:
    """A frame and what its sender left to be done.

    Attributes:
        data: Ethernet frame.
        needs_csum: the checksum at ``csum_start + csum_offset`` holds the pseudo header sum only.
        gso_type: ``net.GSO_*`` without the ECN bit; not NONE: the frame is to be cut to ``gso_size``.
        ecn: the ECN bit was set in gso_type.
        gso_size: payload bytes a segment.
    """

    data: bytes
    needs_csum: bool = False
    csum_start: int = 0
    csum_offset: int = 0
    gso_type: int = net.GSO_NONE
    ecn: bool = False
    gso_size: int = 0

    @property
    def header_length(self) -> int:
        """Bytes of all headers of a packet for segmentation, the transport header included."""
        if self.gso_type == net.GSO_UDP_L4:
            return self.csum_start + 8
        return self.csum_start + 4 * (self.data[self.csum_start + 12] >> 4)

    def checksummed(self) -> Packet:
        """The packet with its checksum completed."""
        if not self.needs_csum:
            return self
        at = self.csum_start + self.csum_offset
        if at + 2 > len(self.data):
            return self
        value = checksum(self.data[self.csum_start :])
        data = self.data[:at] + (value or 0xFFFF).to_bytes(2, "big") + self.data[at + 2 :]
        return replace(self, data=data, needs_csum=False, csum_start=0, csum_offset=0)


def checksum(data: bytes) -> int:
    """The internet checksum of RFC 1071."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def network_header(data: bytes) -> tuple[int, int]:
    """Ethertype and offset of the network header, behind any VLAN tags."""
    at = ETHERNET
    kind = int.from_bytes(data[12:14], "big")
    while kind in VLAN_TYPES and len(data) >= at + 4:
        kind = int.from_bytes(data[at + 2 : at + 4], "big")
        at += 4
    return kind, at


def vlan_id(data: bytes) -> int | None:
    """VLAN id of a tagged frame."""
    if int.from_bytes(data[12:14], "big") not in VLAN_TYPES or len(data) < 16:
        return None
    return int.from_bytes(data[14:16], "big") & 0xFFF


Flow = tuple[bytes, bytes, bytes, bytes]


def flow(data: bytes) -> Flow | None:
    """Source and destination address and port, where the frame has them."""
    kind, at = network_header(data)
    if kind == IPV4 and len(data) >= at + 20:
        source, target, protocol = data[at + 12 : at + 16], data[at + 16 : at + 20], data[at + 9]
        transport = at + 4 * (data[at] & 15)
    elif kind == IPV6 and len(data) >= at + 40:
        source, target, protocol = data[at + 8 : at + 24], data[at + 24 : at + 40], data[at + 6]
        transport = at + 40
    else:
        return None
    ports = data[transport : transport + 4] if protocol in (TCP, UDP) else b""
    return source, target, ports[:2], ports[2:]


def reverse(key: Flow) -> Flow:
    """The same flow in the other direction."""
    return key[1], key[0], key[3], key[2]


def cuttable(data: bytes, transport: int, gso_type: int) -> bool:
    """Whether a frame for segmentation has all of its headers, the transport header at ``transport``."""
    kind, network = network_header(data)
    if transport < network + (20 if kind == IPV4 else 40) or len(data) < transport + 20:
        return False
    return gso_type == net.GSO_UDP_L4 or 20 <= 4 * (data[transport + 12] >> 4) <= len(data) - transport


def segments(packet: Packet) -> Iterator[Packet]:
    """Cut a packet for TCP or UDP segmentation into complete frames (5.1.9.2 point 2)."""
    data, transport = packet.data, packet.csum_start
    kind, network = network_header(data)
    udp = packet.gso_type == net.GSO_UDP_L4
    header = packet.header_length
    payload = data[header:]
    size = packet.gso_size or len(payload)
    for number, start in enumerate(range(0, max(len(payload), 1), size)):
        part = payload[start : start + size]
        head = bytearray(data[:header])
        last = start + size >= len(payload)
        _fix_network(head, kind, network, header - network + len(part), number)
        if udp:
            head[transport + 4 : transport + 6] = (8 + len(part)).to_bytes(2, "big")
        else:
            sequence = int.from_bytes(head[transport + 4 : transport + 8], "big") + start
            head[transport + 4 : transport + 8] = (sequence & 0xFFFFFFFF).to_bytes(4, "big")
            if not last:
                head[transport + 13] &= ~(TCP_FIN | TCP_PUSH)
            if number:
                head[transport + 13] &= ~TCP_CWR
        _pseudo(head, kind, network, transport, packet.csum_offset, header - transport + len(part))
        yield Packet(bytes(head) + part, True, transport, packet.csum_offset).checksummed()


def _fix_network(head: bytearray, kind: int, at: int, length: int, number: int) -> None:
    """Length, and for IPv4 identification and header checksum, of one segment."""
    if kind == IPV4:
        head[at + 2 : at + 4] = length.to_bytes(2, "big")
        identification = int.from_bytes(head[at + 4 : at + 6], "big") + number
        head[at + 4 : at + 6] = (identification & 0xFFFF).to_bytes(2, "big")
        head[at + 10 : at + 12] = bytes(2)
        end = at + 4 * (head[at] & 15)
        head[at + 10 : at + 12] = checksum(bytes(head[at:end])).to_bytes(2, "big")
    else:
        head[at + 4 : at + 6] = (length - 40).to_bytes(2, "big")


def _pseudo(head: bytearray, kind: int, at: int, transport: int, offset: int, length: int) -> None:
    """Put the pseudo header sum where the checksum goes."""
    protocol = TCP if offset == 16 else UDP
    addresses = head[at + 12 : at + 20] if kind == IPV4 else head[at + 8 : at + 40]
    sum_ = ~checksum(bytes(addresses) + struct.pack(">IHH", length, 0, protocol)) & 0xFFFF
    head[transport + offset : transport + offset + 2] = sum_.to_bytes(2, "big")
