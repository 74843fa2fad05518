"""Where the three areas of a virtqueue lie and how they look (2.7, 2.8.10.1). Pure: no behaviour, no device.

Both halves of virtio use this file: the driver side allocates with it, the device side finds its way with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guestpv.spec.ring import (
    EVENT_SUPPRESS,
    MAX_QUEUE_SIZE,
    PACKED_DESC,
    SPLIT_DESC,
    USED_ELEM,
)

Bytes = NDArray[np.uint8]
Record = NDArray[Any]
"""A structured array; 0-d where the standard has one structure, 1-d where it has a table."""

CACHE_LINE = 64
"""Areas written by different sides are kept on different lines; the standard asks for 16, 2 and 4 only."""


@dataclass(frozen=True, slots=True)
class Area:
    """One part of a virtqueue: bytes from the start of the ring memory, and the alignment it has to have."""

    offset: int
    size: int
    align: int

    @property
    def end(self) -> int:
        """First byte after the area."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Offsets and sizes in bytes of the descriptor, driver and device area of one virtqueue.

    Attributes:
        queue_size: entries, 1 to 32768; a power of two for the split format.
        packed: whether VIRTIO_F_RING_PACKED was negotiated.
        desc, driver, device: the areas.
    """

    queue_size: int
    packed: bool
    desc: Area
    driver: Area
    device: Area

    @property
    def total(self) -> int:
        """Bytes to allocate for all three areas."""
        return _up(self.device.end)


def _up(value: int) -> int:
    return -(-value // CACHE_LINE) * CACHE_LINE


def check_size(queue_size: int, packed: bool) -> None:
    """Raise ValueError unless the format allows ``queue_size`` entries (2.7, 2.8.10.1)."""
    if not 1 <= queue_size <= MAX_QUEUE_SIZE:
        raise ValueError(
            f"queue size {queue_size} is not between 1 and {MAX_QUEUE_SIZE} (VIRTIO 1.4 section 2.7, 2.8)"
        )
    if not packed and queue_size & (queue_size - 1):
        raise ValueError(
            f"queue size {queue_size} of a split virtqueue is not a power of two (VIRTIO 1.4 section 2.7)"
        )


def ring_layout(queue_size: int, packed: bool) -> RingLayout:
    """Sizes of the areas as the standard's tables give them (2.7, 2.8.10.1), placed behind each other.

    Raises:
        ValueError: the format does not allow this size.
    """
    check_size(queue_size, packed)
    if packed:
        sizes = (16 * queue_size, 16), (4, 4), (4, 4)
    else:
        sizes = (16 * queue_size, 16), (6 + 2 * queue_size, 2), (6 + 8 * queue_size, 4)
    areas = []
    offset = 0
    for size, align in sizes:
        areas.append(Area(offset, size, align))
        offset = _up(offset + size)
    return RingLayout(queue_size, packed, *areas)


def avail_dtype(queue_size: int) -> np.dtype[np.void]:
    """The available ring (2.7.6): ``flags``, ``idx``, ``ring``, ``used_event``."""
    return np.dtype(
        [
            ("flags", "<u2"),
            ("idx", "<u2"),
            ("ring", "<u2", (queue_size,)),
            ("used_event", "<u2"),
        ]
    )


def used_dtype(queue_size: int) -> np.dtype[np.void]:
    """The used ring (2.7.8): ``flags``, ``idx``, ``ring`` of ``id`` and ``len``, ``avail_event``."""
    return np.dtype(
        [
            ("flags", "<u2"),
            ("idx", "<u2"),
            ("ring", USED_ELEM, (queue_size,)),
            ("avail_event", "<u2"),
        ]
    )


@dataclass(frozen=True, slots=True)
class SplitRings:
    """Live views on a split virtqueue.

    Attributes:
        desc: 1-d, ``addr``, ``len``, ``flags``, ``next`` (2.7.5).
        avail: 0-d, ``flags``, ``idx``, ``ring``, ``used_event`` (2.7.6).
        used: 0-d, ``flags``, ``idx``, ``ring`` (``id``, ``len``), ``avail_event`` (2.7.8).
    """

    desc: Record
    avail: Record
    used: Record


@dataclass(frozen=True, slots=True)
class PackedRings:
    """Live views on a packed virtqueue.

    Attributes:
        desc: 1-d, ``addr``, ``len``, ``id``, ``flags`` (2.8.13).
        driver: 0-d driver event suppression, ``desc`` and ``flags`` (2.8.14), written by the driver.
        device: 0-d device event suppression, the same fields, written by the device.
    """

    desc: Record
    driver: Record
    device: Record


def split_desc_view(area: Bytes, queue_size: int) -> Record:
    """The descriptor table in the first bytes of ``area`` (uint8, contiguous)."""
    return area[: 16 * queue_size].view(SPLIT_DESC)


def avail_view(area: Bytes, queue_size: int) -> Record:
    """The available ring in the first bytes of ``area``, 0-d."""
    return area[: 6 + 2 * queue_size].view(avail_dtype(queue_size)).reshape(())


def used_view(area: Bytes, queue_size: int) -> Record:
    """The used ring in the first bytes of ``area``, 0-d."""
    return area[: 6 + 8 * queue_size].view(used_dtype(queue_size)).reshape(())


def packed_desc_view(area: Bytes, queue_size: int) -> Record:
    """The descriptor ring in the first bytes of ``area``."""
    return area[: 16 * queue_size].view(PACKED_DESC)


def event_view(area: Bytes) -> Record:
    """An event suppression structure in the first 4 bytes of ``area``, 0-d."""
    return area[:4].view(EVENT_SUPPRESS).reshape(())


def split_rings(desc: Bytes, driver: Bytes, device: Bytes, queue_size: int) -> SplitRings:
    """Views on the three areas of a split virtqueue, wherever each of them lies."""
    return SplitRings(
        split_desc_view(desc, queue_size),
        avail_view(driver, queue_size),
        used_view(device, queue_size),
    )


def packed_rings(desc: Bytes, driver: Bytes, device: Bytes, queue_size: int) -> PackedRings:
    """Views on the three areas of a packed virtqueue, wherever each of them lies."""
    return PackedRings(packed_desc_view(desc, queue_size), event_view(driver), event_view(device))


def ring_views(memory: Bytes, layout: RingLayout) -> SplitRings | PackedRings:
    """Views on ring memory (uint8, at least ``layout.total`` bytes) laid out as ``layout`` says."""
    parts = [memory[area.offset : area.end] for area in (layout.desc, layout.driver, layout.device)]
    views = packed_rings if layout.packed else split_rings
    return views(parts[0], parts[1], parts[2], layout.queue_size)
