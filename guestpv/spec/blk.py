"""Block device (5.2): configuration and request header. Capacity and limits count 512-byte sectors."""

from __future__ import annotations

from typing import Final

import numpy as np

from .layout import Field, Layout

F_SIZE_MAX: Final = 1
F_SEG_MAX: Final = 2
F_GEOMETRY: Final = 4
F_RO: Final = 5
F_BLK_SIZE: Final = 6
F_FLUSH: Final = 9
F_TOPOLOGY: Final = 10
F_CONFIG_WCE: Final = 11
F_MQ: Final = 12
F_DISCARD: Final = 13
F_WRITE_ZEROES: Final = 14
F_LIFETIME: Final = 15
F_SECURE_ERASE: Final = 16
F_ZONED: Final = 17

SECTOR: Final = 512

CONFIG: Final = Layout(
    "virtio_blk_config",
    "5.2.4",
    (
        Field("capacity", 0, 8),
        Field("size_max", 8, 4, feature=F_SIZE_MAX),
        Field("seg_max", 12, 4, feature=F_SEG_MAX),
        Field("cylinders", 16, 2, feature=F_GEOMETRY),
        Field("heads", 18, 1, feature=F_GEOMETRY),
        Field("sectors", 19, 1, feature=F_GEOMETRY),
        Field("blk_size", 20, 4, feature=F_BLK_SIZE),
        Field("physical_block_exp", 24, 1, feature=F_TOPOLOGY),
        Field("alignment_offset", 25, 1, feature=F_TOPOLOGY),
        Field("min_io_size", 26, 2, feature=F_TOPOLOGY),
        Field("opt_io_size", 28, 4, feature=F_TOPOLOGY),
        Field("writeback", 32, 1, writable=True, feature=F_CONFIG_WCE),
        Field("num_queues", 34, 2, feature=F_MQ),
        Field("max_discard_sectors", 36, 4, feature=F_DISCARD),
        Field("max_discard_seg", 40, 4, feature=F_DISCARD),
        Field("discard_sector_alignment", 44, 4, feature=F_DISCARD),
        Field("max_write_zeroes_sectors", 48, 4, feature=F_WRITE_ZEROES),
        Field("max_write_zeroes_seg", 52, 4, feature=F_WRITE_ZEROES),
        Field("write_zeroes_may_unmap", 56, 1, feature=F_WRITE_ZEROES),
        Field("max_secure_erase_sectors", 60, 4, feature=F_SECURE_ERASE),
        Field("max_secure_erase_seg", 64, 4, feature=F_SECURE_ERASE),
        Field("secure_erase_sector_alignment", 68, 4, feature=F_SECURE_ERASE),
        Field("zone_sectors", 72, 4, feature=F_ZONED),
        Field("max_open_zones", 76, 4, feature=F_ZONED),
        Field("max_active_zones", 80, 4, feature=F_ZONED),
        Field("max_append_sectors", 84, 4, feature=F_ZONED),
        Field("write_granularity", 88, 4, feature=F_ZONED),
        Field("model", 92, 1, feature=F_ZONED),
    ),
    padding=3,
)

T_IN: Final = 0
T_OUT: Final = 1
T_FLUSH: Final = 4
T_GET_ID: Final = 8
T_GET_LIFETIME: Final = 10
T_DISCARD: Final = 11
T_WRITE_ZEROES: Final = 13
T_SECURE_ERASE: Final = 14

S_OK: Final = 0
S_IOERR: Final = 1
S_UNSUPP: Final = 2

REQUEST_HEADER: Final = np.dtype([("type", "<u4"), ("reserved", "<u4"), ("sector", "<u8")])
"""Device-readable head of every request, 16 bytes (5.2.6)."""
DISCARD_SEGMENT: Final = np.dtype([("sector", "<u8"), ("num_sectors", "<u4"), ("flags", "<u4")])
ID_BYTES: Final = 20

LIFETIME: Final = np.dtype(
    [("pre_eol_info", "<u2"), ("device_lifetime_est_typ_a", "<u2"), ("device_lifetime_est_typ_b", "<u2")]
)
"""Data of a GET_LIFETIME request, 6 bytes (5.2.6)."""
DISCARD_F_UNMAP: Final = 1

T_ZONE_APPEND: Final = 15
T_ZONE_REPORT: Final = 16
T_ZONE_OPEN: Final = 18
T_ZONE_CLOSE: Final = 20
T_ZONE_FINISH: Final = 22
T_ZONE_RESET: Final = 24
T_ZONE_RESET_ALL: Final = 26
ZONE_TYPES: Final = (
    T_ZONE_APPEND,
    T_ZONE_REPORT,
    T_ZONE_OPEN,
    T_ZONE_CLOSE,
    T_ZONE_FINISH,
    T_ZONE_RESET,
    T_ZONE_RESET_ALL,
)
"""Requests that only a device with ZONED negotiated knows."""

S_ZONE_INVALID_CMD: Final = 3
S_ZONE_UNALIGNED_WP: Final = 4
S_ZONE_OPEN_RESOURCE: Final = 5
S_ZONE_ACTIVE_RESOURCE: Final = 6

Z_NONE: Final = 0
Z_HM: Final = 1
Z_HA: Final = 2

ZONE_REPORT: Final = np.dtype([("nr_zones", "<u8"), ("reserved", "u1", (56,))])
"""Head of the data of a ZONE_REPORT request, 64 bytes; descriptors follow."""
ZONE_DESCRIPTOR: Final = np.dtype(
    [
        ("z_cap", "<u8"),
        ("z_start", "<u8"),
        ("z_wp", "<u8"),
        ("z_type", "u1"),
        ("z_state", "u1"),
        ("reserved", "u1", (38,)),
    ]
)
"""One zone in a report, 64 bytes; capacity, start and write pointer count 512-byte sectors."""

ZT_CONV: Final = 1
ZT_SWR: Final = 2
ZT_SWP: Final = 3

ZS_NOT_WP: Final = 0
ZS_EMPTY: Final = 1
ZS_IOPEN: Final = 2
ZS_EOPEN: Final = 3
ZS_CLOSED: Final = 4
ZS_RDONLY: Final = 13
ZS_FULL: Final = 14
ZS_OFFLINE: Final = 15

TYPE_NAMES: Final = {
    T_IN: "read",
    T_OUT: "write",
    T_FLUSH: "flush",
    T_GET_ID: "get_id",
    T_GET_LIFETIME: "get_lifetime",
    T_DISCARD: "discard",
    T_WRITE_ZEROES: "write_zeroes",
    T_SECURE_ERASE: "secure_erase",
    T_ZONE_APPEND: "zone_append",
    T_ZONE_REPORT: "zone_report",
    T_ZONE_OPEN: "zone_open",
    T_ZONE_CLOSE: "zone_close",
    T_ZONE_FINISH: "zone_finish",
    T_ZONE_RESET: "zone_reset",
    T_ZONE_RESET_ALL: "zone_reset_all",
}
"""Request type -> how messages call it."""

STATUS_NAMES: Final = {
    S_OK: "OK",
    S_IOERR: "IOERR",
    S_UNSUPP: "UNSUPP",
    S_ZONE_INVALID_CMD: "ZONE_INVALID_CMD",
    S_ZONE_UNALIGNED_WP: "ZONE_UNALIGNED_WP",
    S_ZONE_OPEN_RESOURCE: "ZONE_OPEN_RESOURCE",
    S_ZONE_ACTIVE_RESOURCE: "ZONE_ACTIVE_RESOURCE",
}
"""Every status that the standard defines (5.2.6)."""
