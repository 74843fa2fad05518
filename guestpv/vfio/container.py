"""VFIO's type1 back-end: a container (one I/O address space) with one IOMMU group in it."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack

from ..errors import AccessDenied, GuestpvError, Refused
from ..system import PAGE_SIZE, SYSTEM, System
from . import abi
from .context import Translated
from .lock import holders
from .survey import members_of, nodes_of
from .ways import CONTAINER_NODE, TYPE1


def open_container(system: System) -> int:
    """Descriptor of a new container.

    Raises:
        AccessDenied: no permission.
        GuestpvError: VFIO is not there, or not of the known version.
    """
    try:
        fd = system.open(CONTAINER_NODE, os.O_RDWR)
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
    with ExitStack() as undo:
        undo.callback(system.close, fd)
        version = system.ioctl(fd, abi.GET_API_VERSION)
        if version != abi.API_VERSION:
            raise GuestpvError(f"VFIO API version {version}, not {abi.API_VERSION}", where=CONTAINER_NODE)
        undo.pop_all()
    return fd


def in_use(number: int, node: str, system: System) -> Refused:
    """Why the ``node`` of a group, or of a function in it, cannot be opened a second time."""
    found = [owner for path in nodes_of(number, system) for owner in holders(path, system)]
    owners = ", ".join(dict.fromkeys(found)) or "a process that only root can see"
    return Refused(
        f"IOMMU group {number} is in use by {owners}",
        where=node,
        hint="a group has one owner at a time: `guestpv net|blk|balloon down`, or kill that process",
    )


def device_of_group(group_fd: int, address: str, number: int, system: System) -> int:
    """Descriptor of a member function's device file.

    Raises:
        Refused: the function is not bound to vfio-pci.
    """
    try:
        return system.ioctl(group_fd, abi.GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise Refused(
                f"not bound to vfio-pci, though IOMMU group {number} is",
                where=address,
                hint=f"guestpv bind {address}",
            ) from error
        raise GuestpvError(
            f"VFIO does not hand out the function: {error}", where=address, hint="`dmesg | tail` says why"
        ) from error


class Type1Container(Translated):
    """An open container with the group ``number`` in it and a type1 IOMMU set.

    Raises:
        Refused: the group is in use, other drivers hold members of it, or interrupts are not isolated.
        AccessDenied: no permission for a node in ``/dev/vfio``.
        GuestpvError: VFIO is not there, or not of the known version.
    """

    backend = TYPE1

    def __init__(self, number: int, system: System = SYSTEM) -> None:
        super().__init__(number, system)
        with ExitStack() as undo:
            # Memory goes only after the last descriptor, and with it every mapping, is gone.
            undo.callback(self._mapped.clear)
            self._fd = open_container(system)
            undo.callback(system.close, self._fd)
            known = (abi.TYPE1v2_IOMMU, abi.TYPE1_IOMMU)
            kinds = [kind for kind in known if system.ioctl(self._fd, abi.CHECK_EXTENSION, kind) > 0]
            if not kinds:
                raise GuestpvError(
                    "VFIO has no type1 IOMMU back-end", where=CONTAINER_NODE, hint="modprobe vfio_iommu_type1"
                )
            self._group = self._open_group()
            undo.callback(system.close, self._group)
            self._join(kinds[0])
            self._read_info()
            self._undo = undo.pop_all()

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
            raise in_use(self.number, self.node, self._system) from error

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
            raise self._unsafe_interrupts("vfio_iommu_type1") from error
        except OSError as error:
            raise GuestpvError(f"the IOMMU was not set: {error}", where=self.node) from error

    def _read_info(self) -> None:
        reply = abi.query(self._system, self._fd, abi.IOMMU_GET_INFO, abi.Type1Info)
        info = abi.Type1Info.unpack(reply)
        granule, ranges = PAGE_SIZE, []
        if info["flags"] & abi.IOMMU_INFO_PGSIZES and info["iova_pgsizes"]:
            granule = max(granule, info["iova_pgsizes"] & -info["iova_pgsizes"])
        if info["flags"] & abi.IOMMU_INFO_CAPS:
            for kind, offset in abi.capabilities(reply, info["cap_offset"]):
                if kind == abi.IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                    count = abi.IovaRanges.unpack(reply, offset)["nr_iovas"]
                    found = abi.array(reply, offset + abi.IovaRanges.size, abi.IovaRange, count)
                    ranges = [(one["start"], one["end"]) for one in found]
                elif kind == abi.IOMMU_TYPE1_INFO_DMA_AVAIL:
                    self.mappings_allowed = abi.DmaAvail.unpack(reply, offset)["avail"]
        # Kernels before 5.4 do not say; every IOMMU takes 32 bits.
        self._set_ranges(ranges or [(0, 0xFFFFFFFF)], granule)

    def device(self, address: str) -> int:
        return device_of_group(self._group, address, self.number, self._system)

    def _map(self, pointer: int, iova: int, size: int) -> None:
        flags = abi.DMA_MAP_FLAG_READ | abi.DMA_MAP_FLAG_WRITE
        request = abi.DmaMap.pack(flags=flags, vaddr=pointer, iova=iova, size=size)
        self._system.ioctl(self._fd, abi.IOMMU_MAP_DMA, request)

    def _unmap(self, iova: int, size: int) -> int:
        request = abi.DmaUnmap.pack(iova=iova, size=size)
        self._system.ioctl(self._fd, abi.IOMMU_UNMAP_DMA, request)
        return abi.DmaUnmap.unpack(request)["size"]
