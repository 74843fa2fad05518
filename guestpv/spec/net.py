"""Network device (5.1): features, configuration, packet header, control commands."""

from __future__ import annotations

from typing import Final

import numpy as np

from .layout import Field, Layout

F_CSUM: Final = 0
F_GUEST_CSUM: Final = 1
F_CTRL_GUEST_OFFLOADS: Final = 2
F_MTU: Final = 3
F_MAC: Final = 5
F_GUEST_TSO4: Final = 7
F_GUEST_TSO6: Final = 8
F_GUEST_ECN: Final = 9
F_GUEST_UFO: Final = 10
F_HOST_TSO4: Final = 11
F_HOST_TSO6: Final = 12
F_HOST_ECN: Final = 13
F_HOST_UFO: Final = 14
F_MRG_RXBUF: Final = 15
F_STATUS: Final = 16
F_CTRL_VQ: Final = 17
F_CTRL_RX: Final = 18
F_CTRL_VLAN: Final = 19
F_CTRL_RX_EXTRA: Final = 20
F_GUEST_ANNOUNCE: Final = 21
F_MQ: Final = 22
F_CTRL_MAC_ADDR: Final = 23
F_DEVICE_STATS: Final = 50
F_HASH_TUNNEL: Final = 51
F_VQ_NOTF_COAL: Final = 52
F_NOTF_COAL: Final = 53
F_GUEST_USO4: Final = 54
F_GUEST_USO6: Final = 55
F_HOST_USO: Final = 56
F_HASH_REPORT: Final = 57
F_GUEST_HDRLEN: Final = 59
F_RSS: Final = 60
F_RSC_EXT: Final = 61
F_STANDBY: Final = 62
F_SPEED_DUPLEX: Final = 63
F_RSS_CONTEXT: Final = 64

CONFIG: Final = Layout(
    "virtio_net_config",
    "5.1.4",
    (
        Field("mac", 0, 1, 6, feature=F_MAC),
        Field("status", 6, 2, feature=F_STATUS),
        Field("max_virtqueue_pairs", 8, 2, feature=(F_MQ, F_RSS)),
        Field("mtu", 10, 2, feature=F_MTU),
        Field("speed", 12, 4, feature=F_SPEED_DUPLEX),
        Field("duplex", 16, 1, feature=F_SPEED_DUPLEX),
        Field("rss_max_key_size", 17, 1, feature=(F_RSS, F_HASH_REPORT)),
        Field("rss_max_indirection_table_length", 18, 2, feature=F_RSS),
        Field("supported_hash_types", 20, 4, feature=(F_RSS, F_HASH_REPORT)),
        Field("supported_tunnel_types", 24, 4, feature=F_HASH_TUNNEL),
    ),
)

S_LINK_UP: Final = 1
S_ANNOUNCE: Final = 2

HDR_F_NEEDS_CSUM: Final = 1
HDR_F_DATA_VALID: Final = 2
HDR_F_RSC_INFO: Final = 4

GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_UDP: Final = 3
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80

HEADER: Final = np.dtype(
    [
        ("flags", "u1"),
        ("gso_type", "u1"),
        ("hdr_len", "<u2"),
        ("gso_size", "<u2"),
        ("csum_start", "<u2"),
        ("csum_offset", "<u2"),
        ("num_buffers", "<u2"),
    ]
)
"""``struct virtio_net_hdr`` (5.1.6), 12 bytes; features may append to it."""
HEADER_HASH: Final = np.dtype(
    [
        *[(name, HEADER.fields[name][0]) for name in HEADER.names or ()],  # type: ignore[index]
        ("hash_value", "<u4"),
        ("hash_report", "<u2"),
        ("padding_reserved", "<u2"),
    ]
)
"""The header with VIRTIO_NET_F_HASH_REPORT, 20 bytes."""

HASH_TYPES: Final = {
    "ipv4": 1 << 0,
    "tcpv4": 1 << 1,
    "udpv4": 1 << 2,
    "ipv6": 1 << 3,
    "tcpv6": 1 << 4,
    "udpv6": 1 << 5,
    "ip_ex": 1 << 6,
    "tcp_ex": 1 << 7,
    "udp_ex": 1 << 8,
}
"""What a hash is taken over (5.1.9.4.3.1)."""
HASH_REPORTS: Final = ("none", *HASH_TYPES)
"""Meaning of ``hash_report`` in the packet header (5.1.9.4.5)."""
RSS_KEY_MIN: Final = 40
RSS_TABLE_MIN: Final = 128
"""What a device with RSS supports at least (5.1.4.1)."""
MQ_PAIRS_MAX: Final = 0x8000
MTU_MIN: Final = 68
SPEED_MAX: Final = 0x7FFFFFFF

CTRL_HEADER: Final = np.dtype([("class", "u1"), ("command", "u1")])
CTRL_OK: Final = 0
CTRL_ERR: Final = 1
CTRL_RX: Final = 0
CTRL_MAC: Final = 1
CTRL_VLAN: Final = 2
CTRL_ANNOUNCE: Final = 3
CTRL_MQ: Final = 4
CTRL_GUEST_OFFLOADS: Final = 5
CTRL_NOTF_COAL: Final = 6
CTRL_HASH_TUNNEL: Final = 7
CTRL_STATS: Final = 8
CTRL_RSS_CTX: Final = 9
CTRL_RX_PROMISC: Final = 0
CTRL_RX_ALLMULTI: Final = 1
CTRL_RX_ALLUNI: Final = 2
CTRL_RX_NOMULTI: Final = 3
CTRL_RX_NOUNI: Final = 4
CTRL_RX_NOBCAST: Final = 5
CTRL_MAC_TABLE_SET: Final = 0
CTRL_MAC_ADDR_SET: Final = 1
CTRL_VLAN_ADD: Final = 0
CTRL_VLAN_DEL: Final = 1
CTRL_ANNOUNCE_ACK: Final = 0
CTRL_MQ_VQ_PAIRS_SET: Final = 0
CTRL_MQ_RSS_CONFIG: Final = 1
CTRL_MQ_HASH_CONFIG: Final = 2
CTRL_GUEST_OFFLOADS_SET: Final = 0
CTRL_NOTF_COAL_TX_SET: Final = 0
CTRL_NOTF_COAL_RX_SET: Final = 1
CTRL_NOTF_COAL_VQ_SET: Final = 2
CTRL_NOTF_COAL_VQ_GET: Final = 3
CTRL_HASH_TUNNEL_SET: Final = 0
CTRL_STATS_QUERY: Final = 0
CTRL_STATS_GET: Final = 1

CTRL_NAMES: Final = {
    CTRL_RX: ("RX", ("PROMISC", "ALLMULTI", "ALLUNI", "NOMULTI", "NOUNI", "NOBCAST")),
    CTRL_MAC: ("MAC", ("TABLE_SET", "ADDR_SET")),
    CTRL_VLAN: ("VLAN", ("ADD", "DEL")),
    CTRL_ANNOUNCE: ("ANNOUNCE", ("ACK",)),
    CTRL_MQ: ("MQ", ("VQ_PAIRS_SET", "RSS_CONFIG", "HASH_CONFIG")),
    CTRL_GUEST_OFFLOADS: ("GUEST_OFFLOADS", ("SET",)),
    CTRL_NOTF_COAL: ("NOTF_COAL", ("TX_SET", "RX_SET", "VQ_SET", "VQ_GET")),
    CTRL_HASH_TUNNEL: ("HASH_TUNNEL", ("SET",)),
    CTRL_STATS: ("STATS", ("QUERY", "GET")),
    CTRL_RSS_CTX: ("RSS_CTX", ("CAP_GET", "ADD", "MOD", "DEL")),
}
"""Class -> its name and those of its commands, in order of their numbers (5.1.9.5)."""

RECEIVE_OFFLOADS: Final = (
    *(F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO),
    *(F_GUEST_USO4, F_GUEST_USO6),
)
"""Bits of GUEST_OFFLOADS_SET, which are their features' own numbers (5.1.9.5.9.1)."""

STATS_HEADER: Final = np.dtype(
    [("type", "u1"), ("reserved", "u1"), ("vq_index", "<u2"), ("reserved1", "<u2"), ("size", "<u2")]
)
"""``struct virtio_net_stats_reply_hdr`` (5.1.9.5.11.2)."""
STATS: Final = {
    32: ("command_num", "ok_num"),
    0: (
        *("rx_notifications", "rx_packets", "rx_bytes", "rx_interrupts"),
        *("rx_drops", "rx_drop_overruns"),
    ),
    1: ("rx_csum_valid", "rx_needs_csum", "rx_csum_none", "rx_csum_bad"),
    2: ("rx_gso_packets", "rx_gso_bytes", "rx_gso_packets_coalesced", "rx_gso_bytes_coalesced"),
    3: ("rx_packets_allowance_exceeded", "rx_bytes_allowance_exceeded"),
    16: (
        *("tx_notifications", "tx_packets", "tx_bytes", "tx_interrupts"),
        *("tx_drops", "tx_drop_malformed"),
    ),
    17: ("tx_csum_none", "tx_needs_csum"),
    18: (
        *("tx_gso_packets", "tx_gso_bytes", "tx_gso_segments", "tx_gso_segments_bytes"),
        *("tx_gso_packets_noseg", "tx_gso_bytes_noseg"),
    ),
    19: ("tx_packets_allowance_exceeded", "tx_bytes_allowance_exceeded"),
}
"""Statistics type (bit number in ``types_bitmap``) -> its le64 counters in order (5.1.9.5.11.3 on)."""


def command_name(kind: int, command: int) -> str:
    """A control command in words: ``RX PROMISC (class 0 command 0)``."""
    name, commands = CTRL_NAMES.get(kind, ("?", ()))
    verb = commands[command] if command < len(commands) else "?"
    return f"{name} {verb} (class {kind} command {command})"


def header_dtype(features: int) -> np.dtype[np.void]:
    """The packet header that the negotiated features (a bit mask) call for (5.1.6)."""
    return HEADER_HASH if features >> F_HASH_REPORT & 1 else HEADER


HEADER_FLAGS: Final = {
    HDR_F_NEEDS_CSUM: "NEEDS_CSUM",
    HDR_F_DATA_VALID: "DATA_VALID",
    HDR_F_RSC_INFO: "RSC_INFO",
}
GSO_NAMES: Final = {GSO_TCPV4: "TCPV4", GSO_UDP: "UDP", GSO_TCPV6: "TCPV6", GSO_UDP_L4: "UDP_L4"}


def header_words(header: np.void) -> list[str]:
    """A packet header field by field, such as ``flags=NEEDS_CSUM``; what is 0 is left out."""
    words = []
    for name in header.dtype.names or ():
        value = int(header[name])
        if name == "hash_report":
            words += [f"hash_report={HASH_REPORTS[value]}"] if value < len(HASH_REPORTS) else []
        elif not value or name == "padding_reserved":
            continue
        elif name == "flags":
            known = [word for bit, word in HEADER_FLAGS.items() if value & bit]
            rest = value & ~sum(HEADER_FLAGS)
            words.append("flags=" + "|".join(known + ([hex(rest)] if rest else [])))
        elif name == "gso_type":
            kind = value & ~GSO_ECN
            words.append(f"gso_type={GSO_NAMES.get(kind, kind)}" + ("|ECN" if value & GSO_ECN else ""))
        else:
            words.append(f"{name}={value:#x}" if name == "hash_value" else f"{name}={value}")
    return words
