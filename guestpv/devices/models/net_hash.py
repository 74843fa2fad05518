"""The Toeplitz hash over packets, and receive-side scaling by it (5.1.9.4.3, 5.1.9.5.7)."""

from __future__ import annotations

from dataclasses import dataclass

from ...spec import net
from .packet import IPV4, IPV6, TCP, UDP, flow, network_header

KEY_MOST = 40
TABLE_MOST = 128
TYPES = sum(net.HASH_TYPES[name] for name in ("ipv4", "tcpv4", "udpv4", "ipv6", "tcpv6", "udpv6"))
"""Hashes over packets with IPv6 extension headers are not offered."""


def toeplitz(key: bytes, data: bytes) -> int:
    """The hash of ``data``: for each bit that is set, the 32 bits of the key that begin at its place."""
    bits, whole, result = 8 * len(key), int.from_bytes(key, "big"), 0
    for place in range(8 * len(data)):
        if data[place // 8] >> 7 - place % 8 & 1:
            shift = bits - 32 - place
            result ^= (whole >> shift if shift >= 0 else whole << -shift) & 0xFFFFFFFF
    return result


def hash_of(frame: bytes, key: bytes, types: int) -> tuple[int, int]:
    """(hash_value, hash_report) of a frame with these hash types enabled; (0, 0) without a hash."""
    kind, at = network_header(frame)
    parts = flow(frame)
    if parts is None:
        return 0, 0
    version = {IPV4: "v4", IPV6: "v6"}[kind]
    protocol = frame[at + 9] if kind == IPV4 else frame[at + 6]
    fragment = kind == IPV4 and int.from_bytes(frame[at + 6 : at + 8], "big") & 0x3FFF
    transport = {TCP: "tcp", UDP: "udp"}.get(protocol, "") + version
    name = transport if types & net.HASH_TYPES.get(transport, 0) and not fragment else f"ip{version}"
    if not types & net.HASH_TYPES[name]:
        return 0, 0
    data = b"".join(parts if name == transport else parts[:2])
    return toeplitz(key, data), net.HASH_REPORTS.index(name)


@dataclass(frozen=True, slots=True)
class Steering:
    """What MQ_RSS_CONFIG or MQ_HASH_CONFIG set.

    Attributes:
        table: receive queue numbers by hash value; empty where only hashes are reported.
        unclassified: receive queue for packets without a hash.
        transmits: transmit queues that the driver may use.
    """

    types: int
    key: bytes
    table: tuple[int, ...] = ()
    unclassified: int = 0
    transmits: int = 0

    @staticmethod
    def length(data: bytes, rss: bool) -> int:
        """Bytes that a command's data has to have by what is in it."""
        tail = 8 + 2 * (int.from_bytes(data[4:6], "little") + 1) + 2 if rss else 12
        return tail + 1 + (data[tail] if tail < len(data) else 0)

    @classmethod
    def parse(cls, data: bytes, rss: bool) -> Steering | None:
        """The configuration in a command's data; None where that is not well formed or cut short."""
        types, mask = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:6], "little")
        tail, end = 8 + 2 * (mask + 1) + 2 if rss else 12, cls.length(data, rss)
        if len(data) < end or not 0 < data[tail] <= KEY_MOST:
            return None
        if types & ~TYPES or (not rss and any(data[4:12])):
            return None
        words = [int.from_bytes(data[at : at + 2], "little") for at in range(6, tail, 2)]
        if rss and ((mask + 1) & mask or mask >= TABLE_MOST):
            return None
        if not rss:
            return cls(types, data[tail + 1 : end])
        return cls(types, data[tail + 1 : end], tuple(words[1:-1]), words[0], words[-1])

    def queue(self, frame: bytes) -> int:
        """Receive queue of a frame."""
        value, report = hash_of(frame, self.key, self.types)
        return self.table[value & (len(self.table) - 1)] if report else self.unclassified
