"""Telling the network where we are: gratuitous ARP, neighbour advertisements, RARP (5.1.9.5.4)."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable
from typing import Final

from .link_watch import unpacked

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

BROADCAST: Final = b"\xff" * 6
ETH_ARP, ETH_RARP, ETH_IPV6 = 0x0806, 0x8035, 0x86DD
ALL_NODES: Final = ipaddress.IPv6Address("ff02::1")
ALL_NODES_MAC: Final = bytes.fromhex("333300000001")
ICMPV6, NEIGHBOUR_ADVERTISEMENT, OVERRIDE, TARGET_ADDRESS = 58, 136, 0x20000000, 2


def frames(mac: bytes, addresses: Iterable[Address]) -> list[bytes]:
    """Ethernet frames that bring ``mac`` with these addresses to the network's knowledge.

    Without any address it is one RARP request, from which switches learn the port.
    """
    made = [gratuitous_arp(mac, a) if a.version == 4 else advertisement(mac, a) for a in addresses]
    return made or [_arp(mac, ETH_RARP, 3, bytes(4), mac, bytes(4))]


def gratuitous_arp(mac: bytes, address: ipaddress.IPv4Address) -> bytes:
    """An ARP request of an address for itself (RFC 5227, section 3)."""
    return _arp(mac, ETH_ARP, 1, address.packed, bytes(6), address.packed)


def _arp(mac: bytes, kind: int, operation: int, sender: bytes, target_mac: bytes, target: bytes) -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac + sender + target_mac + target
    return (BROADCAST + mac + struct.pack("!H", kind) + body).ljust(60, b"\0")


def advertisement(mac: bytes, address: ipaddress.IPv6Address) -> bytes:
    """An unsolicited neighbour advertisement to all nodes (RFC 4861, section 7.2.6)."""
    body = struct.pack("!BBHI", NEIGHBOUR_ADVERTISEMENT, 0, 0, OVERRIDE) + address.packed
    body += struct.pack("!BB", TARGET_ADDRESS, 1) + mac
    pseudo = address.packed + ALL_NODES.packed + struct.pack("!II", len(body), ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    head = struct.pack("!IHBB", 6 << 28, len(body), ICMPV6, 255) + address.packed + ALL_NODES.packed
    return ALL_NODES_MAC + mac + struct.pack("!H", ETH_IPV6) + head + body


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def announce(indices: Iterable[int]) -> int:
    """Send from every one of these links what its addresses call for; returns how many frames went out.

    Raises:
        OSError: a link does not take frames.
    """
    from pyroute2 import IPRoute

    sent = 0
    with IPRoute() as route, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        for index in indices:
            (link,) = route.get_links(index)
            found = [ipaddress.ip_address(a.get_attr("IFA_ADDRESS")) for a in route.get_addr(index=index)]
            for frame in frames(unpacked(link.get_attr("IFLA_ADDRESS")), found):
                raw.sendto(frame, (link.get_attr("IFLA_IFNAME"), 0))
                sent += 1
    return sent
