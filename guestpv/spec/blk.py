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
