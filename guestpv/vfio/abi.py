"""What ``<linux/vfio.h>`` and ``<linux/iommufd.h>`` say, as one table of our own.

A test compares it with the kernel's headers. Names are VFIO's without the ``VFIO_`` prefix, and iommufd's as
they are (``IOMMU_IOAS_...``). All structures are in native byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from ..system import System

API_VERSION: Final = 0
TYPE1_IOMMU: Final = 1
TYPE1v2_IOMMU: Final = 3
NOIOMMU_IOMMU: Final = 8


def _request(number: int) -> int:
    return ord(";") << 8 | 100 + number


GET_API_VERSION: Final = _request(0)
CHECK_EXTENSION: Final = _request(1)
SET_IOMMU: Final = _request(2)
GROUP_GET_STATUS: Final = _request(3)
GROUP_SET_CONTAINER: Final = _request(4)
GROUP_GET_DEVICE_FD: Final = _request(6)
DEVICE_GET_INFO: Final = _request(7)
DEVICE_GET_REGION_INFO: Final = _request(8)
DEVICE_GET_IRQ_INFO: Final = _request(9)
DEVICE_SET_IRQS: Final = _request(10)
DEVICE_RESET: Final = _request(11)
IOMMU_GET_INFO: Final = _request(12)
IOMMU_MAP_DMA: Final = _request(13)
IOMMU_UNMAP_DMA: Final = _request(14)
DEVICE_BIND_IOMMUFD: Final = _request(18)
DEVICE_ATTACH_IOMMUFD_PT: Final = _request(19)

IOMMU_IOAS_ALLOC: Final = ord(";") << 8 | 0x81
IOMMU_IOAS_IOVA_RANGES: Final = ord(";") << 8 | 0x84
IOMMU_IOAS_MAP: Final = ord(";") << 8 | 0x85
IOMMU_IOAS_UNMAP: Final = ord(";") << 8 | 0x86
IOMMU_IOAS_MAP_FIXED_IOVA: Final = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE: Final = 1 << 1
IOMMU_IOAS_MAP_READABLE: Final = 1 << 2

GROUP_FLAGS_VIABLE: Final = 1 << 0
GROUP_FLAGS_CONTAINER_SET: Final = 1 << 1

DEVICE_FLAGS_RESET: Final = 1 << 0
DEVICE_FLAGS_PCI: Final = 1 << 1

REGION_INFO_FLAG_READ: Final = 1 << 0
REGION_INFO_FLAG_WRITE: Final = 1 << 1
REGION_INFO_FLAG_MMAP: Final = 1 << 2
REGION_INFO_FLAG_CAPS: Final = 1 << 3
REGION_INFO_CAP_SPARSE_MMAP: Final = 1

PCI_BAR0_REGION_INDEX: Final = 0
PCI_BAR5_REGION_INDEX: Final = 5
PCI_CONFIG_REGION_INDEX: Final = 7

IRQ_INFO_EVENTFD: Final = 1 << 0
IRQ_INFO_MASKABLE: Final = 1 << 1
IRQ_INFO_AUTOMASKED: Final = 1 << 2
IRQ_INFO_NORESIZE: Final = 1 << 3

PCI_INTX_IRQ_INDEX: Final = 0
PCI_MSIX_IRQ_INDEX: Final = 2
PCI_ERR_IRQ_INDEX: Final = 3
PCI_REQ_IRQ_INDEX: Final = 4

IRQ_SET_DATA_NONE: Final = 1 << 0
IRQ_SET_DATA_EVENTFD: Final = 1 << 2
IRQ_SET_ACTION_UNMASK: Final = 1 << 4
IRQ_SET_ACTION_TRIGGER: Final = 1 << 5

IOMMU_INFO_PGSIZES: Final = 1 << 0
IOMMU_INFO_CAPS: Final = 1 << 1
IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: Final = 1
IOMMU_TYPE1_INFO_DMA_AVAIL: Final = 3

DMA_MAP_FLAG_READ: Final = 1 << 0
DMA_MAP_FLAG_WRITE: Final = 1 << 1


@dataclass(frozen=True)
class CStruct:
    """A structure of the kernel: its name after ``struct``, and (field, ``struct`` format code) in order.

    A trailing array is not part of it.
    """

    name: str
    fields: tuple[tuple[str, str], ...]

    @cached_property
    def _packer(self) -> struct.Struct:
        return struct.Struct("=" + "".join(code for _, code in self.fields))

    @property
    def size(self) -> int:
        """Bytes from the first field to the end of the last."""
        return self._packer.size

    @property
    def offsets(self) -> dict[str, int]:
        """Offset in bytes of every field."""
        offsets, position = {}, 0
        for name, code in self.fields:
            offsets[name] = position
            position += struct.calcsize("=" + code)
        return offsets

    def pack(self, tail: bytes = b"", /, **values: int) -> bytearray:
        """The structure followed by ``tail``; its size is filled in, what is not given is 0."""
        first = self.fields[0][0]
        if first in ("argsz", "size"):
            values.setdefault(first, self.size + len(tail))
        return bytearray(self._packer.pack(*(values.get(name, 0) for name, _ in self.fields)) + tail)

    def unpack(self, data: bytes | bytearray, offset: int = 0) -> dict[str, int]:
        """The fields found ``offset`` bytes into ``data``."""
        return dict(
            zip((name for name, _ in self.fields), self._packer.unpack_from(data, offset), strict=True)
        )


_ARGS: Final = (("argsz", "I"), ("flags", "I"))
_HEADER: Final = (("header.id", "H"), ("header.version", "H"), ("header.next", "I"))

GroupStatus: Final = CStruct("vfio_group_status", _ARGS)
DeviceInfo: Final = CStruct(
    "vfio_device_info", (*_ARGS, ("num_regions", "I"), ("num_irqs", "I"), ("cap_offset", "I"))
)
RegionInfo: Final = CStruct(
    "vfio_region_info", (*_ARGS, ("index", "I"), ("cap_offset", "I"), ("size", "Q"), ("offset", "Q"))
)
CapHeader: Final = CStruct("vfio_info_cap_header", (("id", "H"), ("version", "H"), ("next", "I")))
SparseMmap: Final = CStruct(
    "vfio_region_info_cap_sparse_mmap", (*_HEADER, ("nr_areas", "I"), ("reserved", "I"))
)
SparseMmapArea: Final = CStruct("vfio_region_sparse_mmap_area", (("offset", "Q"), ("size", "Q")))
IrqInfo: Final = CStruct("vfio_irq_info", (*_ARGS, ("index", "I"), ("count", "I")))
IrqSet: Final = CStruct("vfio_irq_set", (*_ARGS, ("index", "I"), ("start", "I"), ("count", "I")))
Type1Info: Final = CStruct("vfio_iommu_type1_info", (*_ARGS, ("iova_pgsizes", "Q"), ("cap_offset", "I")))
IovaRanges: Final = CStruct(
    "vfio_iommu_type1_info_cap_iova_range", (*_HEADER, ("nr_iovas", "I"), ("reserved", "I"))
)
IovaRange: Final = CStruct("vfio_iova_range", (("start", "Q"), ("end", "Q")))
DmaAvail: Final = CStruct("vfio_iommu_type1_info_dma_avail", (*_HEADER, ("avail", "I")))
DmaMap: Final = CStruct("vfio_iommu_type1_dma_map", (*_ARGS, ("vaddr", "Q"), ("iova", "Q"), ("size", "Q")))
DmaUnmap: Final = CStruct("vfio_iommu_type1_dma_unmap", (*_ARGS, ("iova", "Q"), ("size", "Q")))
BindIommufd: Final = CStruct("vfio_device_bind_iommufd", (*_ARGS, ("iommufd", "i"), ("out_devid", "I")))
AttachIommufd: Final = CStruct("vfio_device_attach_iommufd_pt", (*_ARGS, ("pt_id", "I")))
IoasAlloc: Final = CStruct("iommu_ioas_alloc", (("size", "I"), ("flags", "I"), ("out_ioas_id", "I")))
IoasIovaRanges: Final = CStruct(
    "iommu_ioas_iova_ranges",
    (
        ("size", "I"),
        ("ioas_id", "I"),
        ("num_iovas", "I"),
        ("__reserved", "I"),
        ("allowed_iovas", "Q"),
        ("out_iova_alignment", "Q"),
    ),
)
IoasRange: Final = CStruct("iommu_iova_range", (("start", "Q"), ("last", "Q")))
IoasMap: Final = CStruct(
    "iommu_ioas_map",
    (
        ("size", "I"),
        ("flags", "I"),
        ("ioas_id", "I"),
        ("__reserved", "I"),
        ("user_va", "Q"),
        ("length", "Q"),
        ("iova", "Q"),
    ),
)
IoasUnmap: Final = CStruct(
    "iommu_ioas_unmap", (("size", "I"), ("ioas_id", "I"), ("iova", "Q"), ("length", "Q"))
)


def query(system: System, fd: int, request: int, layout: CStruct, **values: int) -> bytearray:
    """Ask for a structure that may grow: the kernel says in ``argsz`` how much room it wants."""
    reply = layout.pack(**values)
    system.ioctl(fd, request, reply)
    wanted = layout.unpack(reply)["argsz"]
    if wanted > len(reply):
        reply = layout.pack(bytes(wanted - layout.size), **values)
        system.ioctl(fd, request, reply)
    return reply


def capabilities(reply: bytearray, first: int) -> Iterator[tuple[int, int]]:
    """Id and offset of each capability in a reply's chain; a looping chain ends."""
    seen: set[int] = set()
    offset = first
    while 0 < offset <= len(reply) - CapHeader.size and offset not in seen:
        seen.add(offset)
        header = CapHeader.unpack(reply, offset)
        yield header["id"], offset
        offset = header["next"]


def array(reply: bytearray, offset: int, element: CStruct, count: int) -> list[dict[str, int]]:
    """``count`` structures from ``offset`` on, fewer where the reply ends before."""
    room = max(0, len(reply) - offset) // element.size
    return [element.unpack(reply, offset + i * element.size) for i in range(min(count, room))]
