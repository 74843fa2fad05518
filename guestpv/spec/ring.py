"""Virtqueue memory as numpy dtypes and constants (2.7 split, 2.8 packed). All fields little-endian."""

from __future__ import annotations

from typing import Final

import numpy as np

DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
PACKED_DESC_F_AVAIL: Final = 1 << 7
PACKED_DESC_F_USED: Final = 1 << 15

AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1

EVENT_FLAGS_ENABLE: Final = 0
EVENT_FLAGS_DISABLE: Final = 1
EVENT_FLAGS_DESC: Final = 2
"""``flags`` of an event suppression structure (2.8.10)."""

MAX_QUEUE_SIZE: Final = 32768

SPLIT_DESC: Final = np.dtype([("addr", "<u8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")])
USED_ELEM: Final = np.dtype([("id", "<u4"), ("len", "<u4")])
PACKED_DESC: Final = np.dtype([("addr", "<u8"), ("len", "<u4"), ("id", "<u2"), ("flags", "<u2")])
EVENT_SUPPRESS: Final = np.dtype([("desc", "<u2"), ("flags", "<u2")])
"""``desc`` holds the offset in bits 0-14 and the wrap counter in bit 15."""
