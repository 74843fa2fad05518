"""The way in through iommufd and a function's own character device, without groups and containers."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import ExitStack, suppress
from typing import Final

from ..errors import AccessDenied, GuestpvError
from ..system import PAGE_SIZE, SYSTEM, System
from . import abi
from .container import in_use
from .context import Translated
from .survey import cdev_of
from .ways import IOMMUFD
from .ways import IOMMUFD_NODE as NODE

MOST_RANGES: Final = 256
"""How many allowed ranges are asked for; an IOMMU has a handful of holes."""


class Iommufd(Translated):
    """An I/O address space of iommufd that the functions of the group ``number`` are attached to.

    Raises:
        Refused: the group is in use, other drivers hold members of it, or interrupts are not isolated.
        AccessDenied: no permission for ``/dev/iommu`` or the function's node.
        GuestpvError: the kernel has no iommufd.
    """

    backend = IOMMUFD

    def __init__(self, number: int, system: System = SYSTEM) -> None:
        super().__init__(number, system)
        self.node = NODE
        with ExitStack() as undo:
            undo.callback(self._mapped.clear)
            self._fd = self._open()
            undo.callback(system.close, self._fd)
            request = abi.IoasAlloc.pack()
            system.ioctl(self._fd, abi.IOMMU_IOAS_ALLOC, request)
            self._ioas = abi.IoasAlloc.unpack(request)["out_ioas_id"]
            self._undo = undo.pop_all()

    def _open(self) -> int:
        try:
            return self._system.open(NODE, os.O_RDWR)
        except PermissionError as error:
            raise AccessDenied(
                "no permission",
                where=NODE,
                hint="as root: chmod 666 /dev/iommu (who opens it gets an address space, and no device)",
            ) from error
        except OSError as error:
            raise GuestpvError(
                f"the kernel has no iommufd, or its module is not loaded: {error}",
                where=NODE,
                hint="modprobe iommufd, in a kernel built with IOMMUFD; or use --vfio-backend type1",
            ) from error

    def device(self, address: str) -> int:
        """Bind the function to the iommufd and attach it to the address space.

        Raises:
            Refused: not bound to vfio-pci, in use, not viable, or interrupts are not isolated.
            AccessDenied: no permission for the node.
            GuestpvError: the kernel makes no node for functions (VFIO_DEVICE_CDEV).
        """
        node = cdev_of(address, self._system)
        if node is None:
            raise GuestpvError(
                "VFIO has no character device for it: not bound to vfio-pci, or a kernel built without "
                "VFIO_DEVICE_CDEV",
                where=address,
                hint=f"guestpv bind {address}; or use --vfio-backend type1",
            )
        with ExitStack() as undo:
            try:
                fd = self._system.open(node, os.O_RDWR)
            except PermissionError as error:
                raise AccessDenied(
                    "no permission for the function's node",
                    where=node,
                    hint=f"run as root, or once: sudo guestpv bind --user $USER {address}",
                ) from error
            except OSError as error:
                raise GuestpvError(f"cannot open the function's node: {error}", where=node) from error
            undo.callback(self._system.close, fd)
            self._bind(fd, node)
            request = abi.AttachIommufd.pack(pt_id=self._ioas)
            try:
                self._system.ioctl(fd, abi.DEVICE_ATTACH_IOMMUFD_PT, request)
            except OSError as error:
                raise GuestpvError(
                    f"the function does not enter the address space: {error}",
                    where=node,
                    hint="`dmesg | tail` may say why",
                ) from error
            if not self.ranges:
                self._read_ranges()
            undo.pop_all()
        return fd

    def _bind(self, fd: int, node: str) -> None:
        try:
            self._system.ioctl(fd, abi.DEVICE_BIND_IOMMUFD, abi.BindIommufd.pack(iommufd=self._fd))
        except OSError as error:
            raise self._explain_bind(error, node) from error

    def _explain_bind(self, error: OSError, node: str) -> GuestpvError:
        refusal = self._not_viable()
        if "not viable:" in refusal.message:
            return refusal
        if error.errno == errno.EPERM and not self._has_isolated_interrupts():
            return self._unsafe_interrupts("iommufd")
        if error.errno in (errno.EPERM, errno.EBUSY, errno.EINVAL):
            # Somebody has the group through its own node, or this function, or another one of the group.
            return in_use(self.number, node, self._system)
        return GuestpvError(
            f"VFIO does not hand out the function: {error}", where=node, hint="`dmesg | tail` says why"
        )

    def _has_isolated_interrupts(self) -> bool:
        with suppress(OSError):
            return " IR-" in self._system.read_text("/proc/interrupts")
        return False

    def _read_ranges(self) -> None:
        """What may be mapped is known once a function is attached."""
        room = (ctypes.c_uint64 * (2 * MOST_RANGES))()
        request = abi.IoasIovaRanges.pack(
            ioas_id=self._ioas, num_iovas=MOST_RANGES, allowed_iovas=ctypes.addressof(room)
        )
        self._system.ioctl(self._fd, abi.IOMMU_IOAS_IOVA_RANGES, request)
        reply = abi.IoasIovaRanges.unpack(request)
        found = abi.array(bytearray(room), 0, abi.IoasRange, reply["num_iovas"])
        self._set_ranges(
            [(one["start"], one["last"]) for one in found], max(PAGE_SIZE, reply["out_iova_alignment"])
        )

    def _map(self, pointer: int, iova: int, size: int) -> None:
        flags = abi.IOMMU_IOAS_MAP_FIXED_IOVA | abi.IOMMU_IOAS_MAP_WRITEABLE | abi.IOMMU_IOAS_MAP_READABLE
        request = abi.IoasMap.pack(flags=flags, ioas_id=self._ioas, user_va=pointer, length=size, iova=iova)
        self._system.ioctl(self._fd, abi.IOMMU_IOAS_MAP, request)

    def _unmap(self, iova: int, size: int) -> int:
        request = abi.IoasUnmap.pack(ioas_id=self._ioas, iova=iova, length=size)
        self._system.ioctl(self._fd, abi.IOMMU_IOAS_UNMAP, request)
        return abi.IoasUnmap.unpack(request)["length"]
