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
CTRL_ANNOUNCE_ACK: Final = 0
CTRL_MQ_VQ_PAIRS_SET: Final = 0


def header_dtype(features: int) -> np.dtype[np.void]:
    """The packet header that the negotiated features (a bit mask) call for (5.1.6)."""
    return HEADER_HASH if features >> F_HASH_REPORT & 1 else HEADER
