"""Hashes over packets and receive-side scaling, as a check expects them (5.1.9.4.3, 5.1.9.5.7)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ..spec import net
from .net_ports import BROADCAST, OUR_MAC

TCP, UDP, ICMP = 6, 17, 1
NAMES: Final = {TCP: "tcp", UDP: "udp"}
KEY: Final = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
"""The key that Microsoft's examples of the hash are computed with."""


def toeplitz(key: bytes, data: bytes) -> int:
    """The Toeplitz hash: a window of 32 bits moves over the key, one bit for each bit of the data."""
    window = int.from_bytes(key[:4], "big")
    result = 0
    for number, byte in enumerate(data):
        coming = key[number + 4] if number + 4 < len(key) else 0
        for bit in range(7, -1, -1):
            if byte >> bit & 1:
                result ^= window
            window = (window << 1 | coming >> bit & 1) & 0xFFFFFFFF
    return result


@dataclass(frozen=True, slots=True)
class Flow:
    """Packets from one address to another.

    Attributes:
        source, target: addresses of 4 or 16 bytes.
        protocol: TCP, UDP, or one without ports.
        ports: source and destination.
    """

    source: bytes
    target: bytes
    protocol: int
    ports: tuple[int, int] = (1000, 2000)

    @property
    def version(self) -> str:
        """``v4`` or ``v6``."""
        return "v4" if len(self.source) == 4 else "v6"

    def frame(self) -> bytes:
        """A packet of the flow."""
        if self.protocol == TCP:
            body = struct.pack(">HHIIBBHHH", *self.ports, 1, 0, 0x50, 0x10, 0x1000, 0, 0)
        elif self.protocol == UDP:
            body = struct.pack(">HHHH", *self.ports, 16, 0) + bytes(8)
        else:
            body = bytes(16)
        if self.version == "v4":
            kind = b"\x08\x00"
            head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0x4000, 64, self.protocol, 0)
        else:
            kind = b"\x86\xdd"
            head = struct.pack(">IHBB", 6 << 28, len(body), self.protocol, 64)
        whole = BROADCAST + OUR_MAC + kind + head + self.source + self.target + body
        return whole.ljust(60, b"\0")

    def hash(self, key: bytes, enabled: int) -> tuple[int, int]:
        """(hash_value, hash_report) with these hash types enabled; (0, 0) for no hash."""
        ends = self.source + self.target
        ported = NAMES.get(self.protocol, "") + self.version
        if enabled & net.HASH_TYPES.get(ported, 0):
            return toeplitz(key, ends + struct.pack(">HH", *self.ports)), net.HASH_REPORTS.index(ported)
        plain = f"ip{self.version}"
        if enabled & net.HASH_TYPES[plain]:
            return toeplitz(key, ends), net.HASH_REPORTS.index(plain)
        return 0, 0


def flows(count: int = 1) -> Iterator[Flow]:
    """``count`` flows of each kind: IPv4 and IPv6; TCP, UDP and neither."""
    for number in range(count):
        four = bytes([192, 0, 2, 1 + number]), bytes([198, 51, 100, 7])
        six = (
            bytes.fromhex("20010db8" + "00" * 11) + bytes([1 + number]),
            bytes.fromhex("20010db8" + "0a" * 12),
        )
        for source, target in (four, six):
            for protocol in (TCP, UDP, ICMP):
                yield Flow(source, target, protocol, (1000 + number, 2000))


def hash_sets(supported: int) -> Iterator[int]:
    """Sets of hash types to enable: each alone, with addresses, and all."""
    known = [bit for bit in net.HASH_TYPES.values() if bit & supported and bit <= net.HASH_TYPES["udpv6"]]
    addresses = supported & (net.HASH_TYPES["ipv4"] | net.HASH_TYPES["ipv6"])
    yield from dict.fromkeys([*known, *(bit | addresses for bit in known), sum(known), 0])


def rss_config(
    enabled: int, table: Sequence[int], unclassified: int = 0, transmit: int = 1, key: bytes = KEY
) -> bytes:
    """Data of MQ_RSS_CONFIG; the table has a power of two of receive queue numbers (``receiveq1`` is 0)."""
    head = struct.pack("<IHH", enabled, len(table) - 1, unclassified)
    rest = struct.pack(f"<{len(table)}H", *table) + struct.pack("<H", transmit)
    return head + rest + bytes([len(key)]) + key


def hash_config(enabled: int, key: bytes = KEY) -> bytes:
    """Data of MQ_HASH_CONFIG."""
    return struct.pack("<I8x", enabled) + bytes([len(key)]) + key
