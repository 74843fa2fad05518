"""VFIO's type1 back-end: a container (one I/O address space) with one IOMMU group in it.

A back-end gives ``VfioFunction`` an ``Attachment``: the function's device file, and the memory it sees.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from contextlib import ExitStack
from typing import Final, Protocol

from ..errors import AccessDenied, GuestpvError, Refused, UsageError
from ..memory import DmaRegion, DmaSpace, Segment
from ..system import HUGE_PAGE_SIZE, PAGE_SIZE, SYSTEM, System
from . import abi
from .dma import IovaAllocator, Memory
from .lock import holders
from .survey import members_of, not_viable

LOG: Final = logging.getLogger(__name__)
CONTAINER_NODE: Final = "/dev/vfio/vfio"


class Attachment(Protocol):
    """A function as a VFIO back-end hands it over.

    Attributes:
        device: descriptor of the function's device file.
        dma: where the function sees memory.
        translated: whether an IOMMU stands between the function and memory.
    """

    device: int
    dma: DmaSpace
    translated: bool

    def close(self) -> None:
        """Unmap what the function still sees, then close its device file. Only once it is quiet."""
        ...


class Type1Container:
    """An open container with the group ``number`` in it and a type1 IOMMU set.

    Attributes:
        node: the group's node in ``/dev/vfio``.
        ranges: I/O virtual addresses that may be mapped, as (first, last).
        granule: bytes that the size and place of a mapping are multiples of.
        mappings_allowed: how many mappings the kernel grants, or None where it does not say.

    Raises:
        Refused: the group is in use, other drivers hold members of it, or interrupts are not isolated.
        AccessDenied: no permission for a node in ``/dev/vfio``.
        GuestpvError: VFIO is not there, or not of the known version.
    """

    def __init__(self, number: int, *, system: System = SYSTEM) -> None:
        self._system = system
        self.number = number
        self.node = f"/dev/vfio/{number}"
        self._mapped: dict[int, Memory] = {}
        with ExitStack() as undo:
            # Memory goes only after the last descriptor, and with it every mapping, is gone.
            undo.callback(self._mapped.clear)
            self._fd = self._open_container()
            undo.callback(system.close, self._fd)
            version = system.ioctl(self._fd, abi.GET_API_VERSION)
            if version != abi.API_VERSION:
                raise GuestpvError(f"VFIO API version {version}, not {abi.API_VERSION}", where=CONTAINER_NODE)
            known = (abi.TYPE1v2_IOMMU, abi.TYPE1_IOMMU)
            kinds = [kind for kind in known if system.ioctl(self._fd, abi.CHECK_EXTENSION, kind) > 0]
            if not kinds:
                raise GuestpvError(
                    "VFIO has no type1 IOMMU back-end", where=CONTAINER_NODE, hint="modprobe vfio_iommu_type1"
                )
            self._group = self._open_group()
            undo.callback(system.close, self._group)
            self._join(kinds[0])
            self.ranges, self.granule, self.mappings_allowed = self._read_info()
            self._iovas = IovaAllocator(self.ranges)
            self._undo = undo.pop_all()

    def _open_container(self) -> int:
        try:
            return self._system.open(CONTAINER_NODE, os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise GuestpvError(
                "VFIO is not there: its kernel module is not loaded",
                where=CONTAINER_NODE,
                hint="modprobe vfio-pci",
            ) from error
        except PermissionError as error:
            raise AccessDenied(
                "no permission", where=CONTAINER_NODE, hint="every user may have it: chmod 666 /dev/vfio/vfio"
            ) from error
        except OSError as error:
            raise GuestpvError(
                f"cannot open it: {error}", where=CONTAINER_NODE, hint="modprobe vfio-pci"
            ) from error

    def _open_group(self) -> int:
        members = " ".join(member.address for member in members_of(self.number, self._system))
        try:
            return self._system.open(self.node, os.O_RDWR)
        except FileNotFoundError as error:
            raise Refused(
                f"no function of IOMMU group {self.number} is bound to vfio-pci",
                where=self.node,
                hint=f"guestpv bind ADDRESS, with one of: {members}",
            ) from error
        except PermissionError as error:
            raise AccessDenied(
                "no permission for the group's node",
                where=self.node,
                hint=f"run as root, or once: sudo guestpv bind --user $USER ADDRESS, with one of: {members}",
            ) from error
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise GuestpvError(f"cannot open the group: {error}", where=self.node) from error
            owners = ", ".join(holders(self.node, self._system)) or "a process that only root can see"
            raise Refused(
                f"IOMMU group {self.number} is in use by {owners}",
                where=self.node,
                hint="a group has one owner at a time: `guestpv net|blk|balloon down`, or kill that process",
            ) from error

    def _join(self, kind: int) -> None:
        status = abi.GroupStatus.pack()
        self._system.ioctl(self._group, abi.GROUP_GET_STATUS, status)
        if not abi.GroupStatus.unpack(status)["flags"] & abi.GROUP_FLAGS_VIABLE:
            raise self._not_viable()
        try:
            container = bytearray(self._fd.to_bytes(4, "little"))
            self._system.ioctl(self._group, abi.GROUP_SET_CONTAINER, container)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EBUSY):
                raise self._not_viable() from error
            raise GuestpvError(f"the group does not enter a container: {error}", where=self.node) from error
        try:
            self._system.ioctl(self._fd, abi.SET_IOMMU, kind)
        except PermissionError as error:
            raise Refused(
                "the IOMMU does not remap interrupts, so the kernel does not let a process have the group",
                where=self.node,
                hint="QEMU: `-device intel-iommu,intremap=on` with `-machine kernel-irqchip=split`; in a "
                "guest you trust: `modprobe vfio_iommu_type1 allow_unsafe_interrupts=1`",
            ) from error
        except OSError as error:
            raise GuestpvError(f"the IOMMU was not set: {error}", where=self.node) from error

    def _not_viable(self) -> Refused:
        blockers = [member for member in members_of(self.number, self._system) if member.blocks]
        message, hint = not_viable(self.number, blockers)
        if not blockers:
            message, hint = (
                f"IOMMU group {self.number} is not viable",
                "`dmesg | tail` says which driver holds it",
            )
        return Refused(message, where=self.node, hint=hint)

    def _read_info(self) -> tuple[list[tuple[int, int]], int, int | None]:
        reply = abi.query(self._system, self._fd, abi.IOMMU_GET_INFO, abi.Type1Info)
        info = abi.Type1Info.unpack(reply)
        granule, ranges, allowed = PAGE_SIZE, [], None
        if info["flags"] & abi.IOMMU_INFO_PGSIZES and info["iova_pgsizes"]:
            granule = max(granule, info["iova_pgsizes"] & -info["iova_pgsizes"])
        if info["flags"] & abi.IOMMU_INFO_CAPS:
            for kind, offset in abi.capabilities(reply, info["cap_offset"]):
                if kind == abi.IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                    count = abi.IovaRanges.unpack(reply, offset)["nr_iovas"]
                    found = abi.array(reply, offset + abi.IovaRanges.size, abi.IovaRange, count)
                    ranges = [(one["start"], one["end"]) for one in found]
                elif kind == abi.IOMMU_TYPE1_INFO_DMA_AVAIL:
                    allowed = abi.DmaAvail.unpack(reply, offset)["avail"]
        # Kernels before 5.4 do not say; every IOMMU takes 32 bits.
        return ranges or [(0, 0xFFFFFFFF)], granule, allowed

    def device(self, address: str) -> int:
        """Descriptor of a member function's device file.

        Raises:
            Refused: the function is not bound to vfio-pci.
        """
        try:
            return self._system.ioctl(
                self._group, abi.GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0")
            )
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise Refused(
                    f"not bound to vfio-pci, though IOMMU group {self.number} is",
                    where=address,
                    hint=f"guestpv bind {address}",
                ) from error
            raise GuestpvError(
                f"VFIO does not hand out the function: {error}", where=address, hint="`dmesg | tail` says why"
            ) from error

    def map(self, size: int) -> tuple[int, Memory]:
        """Map ``size`` bytes (rounded up) of new memory; its I/O virtual address, and the memory.

        Raises:
            GuestpvError: the kernel refuses; the message tells which limit was met.
        """
        if size <= 0:
            raise UsageError(f"cannot map {size} bytes for a device")
        size = -(-size // self.granule) * self.granule
        align = max(self.granule, PAGE_SIZE if size % HUGE_PAGE_SIZE else HUGE_PAGE_SIZE)
        try:
            memory = Memory(size, align, self._system)
        except OSError as error:
            raise GuestpvError(
                f"no {_mib(size)} of memory for the device: {error}", where=self.node
            ) from error
        iova = self._iovas.allocate(size, align)
        try:
            flags = abi.DMA_MAP_FLAG_READ | abi.DMA_MAP_FLAG_WRITE
            request = abi.DmaMap.pack(flags=flags, vaddr=memory.pointer, iova=iova, size=size)
            self._system.ioctl(self._fd, abi.IOMMU_MAP_DMA, request)
        except BaseException as error:
            self._iovas.free(iova, size)
            if isinstance(error, OSError):
                raise self._explain_map(error, size) from error
            raise
        self._mapped[iova] = memory
        LOG.debug("%s: mapped %d bytes at %#x", self.node, size, iova)
        return iova, memory

    def _explain_map(self, error: OSError, size: int) -> GuestpvError:
        message, hint = f"MAP_DMA of {_mib(size)} failed: {error}", ""
        limit = self._system.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if error.errno == errno.ENOMEM and limit != resource.RLIM_INFINITY:
            mapped = sum(memory.size for memory in self._mapped.values())
            message = (
                f"the kernel pins no more memory for the device: {_mib(size)} wanted, {_mib(mapped)} mapped "
                f"already, RLIMIT_MEMLOCK is {_mib(limit)}"
            )
            hint = (
                f"raise the limit: `sudo prlimit --memlock=unlimited --pid {os.getppid()}` for the shell you "
                "start from, `LimitMEMLOCK=infinity` in a systemd unit, or run as root"
            )
        elif error.errno == errno.ENOMEM:
            message, hint = f"no memory to pin {_mib(size)} for the device", "free -m"
        elif error.errno == errno.ENOSPC:
            message = f"the kernel grants no more DMA mappings ({self.mappings_allowed} at the start)"
            hint = "modprobe vfio_iommu_type1 dma_entry_limit=N"
        return GuestpvError(message, where=self.node, hint=hint)

    def unmap(self, iova: int) -> None:
        """Take memory away from the device. Where that fails the memory stays until the container closes."""
        size = self._mapped[iova].size
        request = abi.DmaUnmap.pack(iova=iova, size=size)
        self._system.ioctl(self._fd, abi.IOMMU_UNMAP_DMA, request)
        done = abi.DmaUnmap.unpack(request)["size"]
        if done != size:
            raise GuestpvError(f"UNMAP_DMA took {done} of {size} bytes at {iova:#x} away", where=self.node)
        del self._mapped[iova]
        self._iovas.free(iova, size)

    def close(self) -> None:
        """Close group and container; the kernel drops what is still mapped, then memory is freed."""
        self._undo.close()


class Type1Space:
    """The part of a container's address space that one function uses: a ``DmaSpace``."""

    def __init__(self, container: Type1Container) -> None:
        self._container = container
        self._regions: dict[int, DmaRegion] = {}

    def map(self, size: int) -> DmaRegion:
        """Make ``size`` bytes (rounded up to pages) of zeroed memory visible to the group, in one segment.

        Raises:
            GuestpvError: the kernel refuses; the message tells which limit was met.
        """
        iova, memory = self._container.map(size)
        region = DmaRegion(memory.array, (Segment(iova, memory.size),), memory.pointer)
        self._regions[iova] = region
        return region

    def unmap(self, region: DmaRegion) -> None:
        """Take the region away from the device. Only after the device was reset.

        Raises:
            UsageError: it is not mapped here.
        """
        iova = region.segments[0].address
        if self._regions.get(iova) is not region:
            raise UsageError(f"the DMA region at bus address {iova:#x} is not mapped by this function")
        self._container.unmap(iova)
        del self._regions[iova]

    def close(self) -> None:
        """Unmap everything that is left."""
        with ExitStack() as every:
            for region in self._regions.values():
                every.callback(self._container.unmap, region.segments[0].address)
            self._regions = {}


class Type1Attachment:
    """One function of a group in a type1 container that this process shares among the group's functions.

    Args:
        address: the function, bound to vfio-pci.
        group: its IOMMU group.

    Raises:
        As ``Type1Container``.
    """

    translated = True
    _lock = threading.Lock()
    _open: dict[tuple[System, int], tuple[Type1Container, int]] = {}
    """(system, group) -> container and how many attachments use it."""

    def __init__(self, address: str, group: int, *, system: System = SYSTEM) -> None:
        self._key = (system, group)
        with ExitStack() as undo:
            container = self._join()
            undo.callback(self._leave)
            self.device = container.device(address)
            undo.callback(system.close, self.device)
            space = Type1Space(container)
            undo.callback(space.close)
            self.dma: DmaSpace = space
            self._undo = undo.pop_all()

    def _join(self) -> Type1Container:
        with self._lock:
            system, group = self._key
            container, users = self._open.get(self._key) or (Type1Container(group, system=system), 0)
            self._open[self._key] = (container, users + 1)
            return container

    def _leave(self) -> None:
        with self._lock:
            container, users = self._open.pop(self._key)
            if users > 1:
                self._open[self._key] = (container, users - 1)
            else:
                container.close()

    def close(self) -> None:
        """Unmap what the function still sees, close its device file, and the container after the last one."""
        self._undo.close()


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
