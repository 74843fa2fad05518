"""Feature bits by name and their dependencies (2.2, chapter 6, and section 3 of each device type).

A feature set is an ``int`` used as a bit mask; bit numbers go beyond 63 (net, 1.4).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

F_INDIRECT_DESC: Final = 28
F_EVENT_IDX: Final = 29
F_VERSION_1: Final = 32
F_ACCESS_PLATFORM: Final = 33
F_RING_PACKED: Final = 34
F_IN_ORDER: Final = 35
F_ORDER_PLATFORM: Final = 36
F_SR_IOV: Final = 37
F_NOTIFICATION_DATA: Final = 38
F_NOTIF_CONFIG_DATA: Final = 39
F_RING_RESET: Final = 40
F_ADMIN_VQ: Final = 41
F_SUSPEND: Final = 43

NET, BLK, CONSOLE, RNG, BALLOON, SCSI, P9 = 1, 2, 3, 4, 5, 8, 9
DEVICE_NAMES: Final = {
    1: "net",
    2: "blk",
    3: "console",
    4: "rng",
    5: "balloon",
    8: "scsi",
    9: "9p",
    16: "gpu",
    18: "input",
    19: "vsock",
    20: "crypto",
    23: "iommu",
    24: "mem",
    25: "sound",
    26: "fs",
    27: "pmem",
}
"""Virtio device id -> short name (chapter 5)."""

COMMON_FEATURES: Final = {
    24: "NOTIFY_ON_EMPTY",
    27: "ANY_LAYOUT",
    28: "INDIRECT_DESC",
    29: "EVENT_IDX",
    32: "VERSION_1",
    33: "ACCESS_PLATFORM",
    34: "RING_PACKED",
    35: "IN_ORDER",
    36: "ORDER_PLATFORM",
    37: "SR_IOV",
    38: "NOTIFICATION_DATA",
    39: "NOTIF_CONFIG_DATA",
    40: "RING_RESET",
    41: "ADMIN_VQ",
    43: "SUSPEND",
}
DEVICE_FEATURES: Final = {
    NET: {
        0: "CSUM",
        1: "GUEST_CSUM",
        2: "CTRL_GUEST_OFFLOADS",
        3: "MTU",
        5: "MAC",
        6: "GSO",
        7: "GUEST_TSO4",
        8: "GUEST_TSO6",
        9: "GUEST_ECN",
        10: "GUEST_UFO",
        11: "HOST_TSO4",
        12: "HOST_TSO6",
        13: "HOST_ECN",
        14: "HOST_UFO",
        15: "MRG_RXBUF",
        16: "STATUS",
        17: "CTRL_VQ",
        18: "CTRL_RX",
        19: "CTRL_VLAN",
        20: "CTRL_RX_EXTRA",
        21: "GUEST_ANNOUNCE",
        22: "MQ",
        23: "CTRL_MAC_ADDR",
        50: "DEVICE_STATS",
        51: "HASH_TUNNEL",
        52: "VQ_NOTF_COAL",
        53: "NOTF_COAL",
        54: "GUEST_USO4",
        55: "GUEST_USO6",
        56: "HOST_USO",
        57: "HASH_REPORT",
        59: "GUEST_HDRLEN",
        60: "RSS",
        61: "RSC_EXT",
        62: "STANDBY",
        63: "SPEED_DUPLEX",
        64: "RSS_CONTEXT",
        65: "GUEST_UDP_TUNNEL_GSO",
        66: "GUEST_UDP_TUNNEL_GSO_CSUM",
        67: "HOST_UDP_TUNNEL_GSO",
        68: "HOST_UDP_TUNNEL_GSO_CSUM",
        69: "OUT_NET_HEADER",
        70: "IPSEC",
    },
    BLK: {
        0: "BARRIER",
        1: "SIZE_MAX",
        2: "SEG_MAX",
        4: "GEOMETRY",
        5: "RO",
        6: "BLK_SIZE",
        7: "SCSI",
        9: "FLUSH",
        10: "TOPOLOGY",
        11: "CONFIG_WCE",
        12: "MQ",
        13: "DISCARD",
        14: "WRITE_ZEROES",
        15: "LIFETIME",
        16: "SECURE_ERASE",
        17: "ZONED",
    },
    BALLOON: {
        0: "MUST_TELL_HOST",
        1: "STATS_VQ",
        2: "DEFLATE_ON_OOM",
        3: "FREE_PAGE_HINT",
        4: "PAGE_POISON",
        5: "PAGE_REPORTING",
    },
    RNG: {},
    CONSOLE: {0: "SIZE", 1: "MULTIPORT", 2: "EMERG_WRITE"},
}
"""Virtio device id -> bit -> name of the device type's own features."""

Requirement = tuple[tuple[int, ...], ...]
"""A conjunction of alternatives: every inner tuple needs one of its bits."""

DEPENDENCIES: Final[dict[int | None, dict[int, Requirement]]] = {
    None: {F_NOTIF_CONFIG_DATA: (), F_SUSPEND: ()},
    NET: {
        7: ((1,),),
        8: ((1,),),
        9: ((7, 8),),
        10: ((1,),),
        54: ((1,),),
        55: ((1,),),
        65: ((7,), (8,), (54,), (55,)),
        66: ((65,),),
        11: ((0,),),
        12: ((0,),),
        13: ((11, 12),),
        14: ((0,),),
        56: ((0,),),
        67: ((11,), (12,), (56,)),
        68: ((67,),),
        2: ((17,),),
        18: ((17,),),
        19: ((17,),),
        20: ((17,),),
        21: ((17,),),
        22: ((17,),),
        23: ((17,),),
        50: ((17,),),
        53: ((17,),),
        57: ((17,),),
        61: ((11, 12),),
        60: ((17,),),
        52: ((17,),),
        51: ((17,), (60, 57)),
        64: ((17,), (60,)),
    },
    BLK: {11: ((9,),)},
}
"""Feature -> what it requires (5.1.3.1, 5.2.3). Where the standard only advises a device not to offer
a control-queue feature without the queue, the dependency is taken as one: the feature cannot be used."""


def mask(bits: Iterable[int]) -> int:
    """The bit mask with the given bit numbers set."""
    result = 0
    for bit in bits:
        result |= 1 << bit
    return result


def bits(features: int) -> list[int]:
    """Bit numbers set in a mask, in rising order."""
    return [bit for bit in range(features.bit_length()) if features >> bit & 1]


def feature_name(device_type: int | None, bit: int) -> str:
    """The standard's name without its prefix (``MRG_RXBUF``), or ``bit N`` for an unknown one."""
    own = DEVICE_FEATURES.get(device_type or 0, {})
    return own.get(bit) or COMMON_FEATURES.get(bit) or f"bit {bit}"


def feature_names(device_type: int | None, features: int) -> list[str]:
    """Names of all features in a mask, in rising order of bit number."""
    return [feature_name(device_type, bit) for bit in bits(features)]


def feature_bit(device_type: int | None, name: str) -> int:
    """Bit number of a feature by name, in any case.

    ``VIRTIO_..._F_`` and ``RING_`` may be left out; ``bit N`` and ``N`` are understood too.

    Raises:
        KeyError: no feature of that device type or of the common ones has this name.
    """
    wanted = name.strip().upper()
    if "_F_" in wanted:
        wanted = wanted.split("_F_", 1)[1]
    number = wanted.removeprefix("BIT").strip()
    if number.isdigit():
        return int(number)
    for table in (DEVICE_FEATURES.get(device_type or 0, {}), COMMON_FEATURES):
        for bit, known in table.items():
            if known in (wanted, f"RING_{wanted}"):
                return bit
    raise KeyError(name)


OFFERED_TOGETHER: Final = {BLK: 1 << 11}
"""Dependencies that bind a device's offer only: a driver may accept these without the others (5.2.5.2)."""


def unmet(device_type: int, accepted: int) -> int:
    """Those of the accepted features that lack others without which a driver must not accept them (2.2.1)."""
    broken = accepted & ~close_dependencies(device_type, accepted)
    return broken & ~OFFERED_TOGETHER.get(device_type, 0)


def close_dependencies(device_type: int, features: int) -> int:
    """The largest subset of ``features`` in which every feature has what it requires (DRV-FEAT-02)."""
    rules = DEPENDENCIES.get(device_type, {})
    while True:
        dropped = 0
        for bit, needs in rules.items():
            if features >> bit & 1 and not all(any(features >> n & 1 for n in group) for group in needs):
                dropped |= 1 << bit
        if not dropped:
            return features
        features &= ~dropped
