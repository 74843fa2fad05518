"""VFIO's no-IOMMU mode: nothing translates, nothing protects; only for who asks for it by name.

The device is given physical addresses, of huge pages, which the kernel leaves where they are. ``guardian``
holds them beyond this process' death, until VFIO has taken the function's access to memory away.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import threading
from contextlib import ExitStack
from typing import Final

import numpy as np

from ..errors import AccessDenied, GuestpvError, Refused, UsageError
from ..memory import Segment
from ..system import HUGE_PAGE_SIZE, PAGE_SIZE, SYSTEM, System
from . import abi, guardian
from .container import device_of_group, in_use, open_container
from .context import Context
from .dma import HugeMemory, Memory
from .survey import members_of
from .ways import ENABLE, HUGE_PAGES_HINT, NOIOMMU, RISK

LOG: Final = logging.getLogger(__name__)


class NoIommu(Context):
    """A container with the made-up group ``number`` in it, and physical memory behind a guardian.

    Raises:
        Refused: the group is in use, no huge pages are reserved, or the kernel does not tell addresses.
        AccessDenied: CAP_SYS_RAWIO is missing.
        GuestpvError: the kernel has no no-IOMMU mode.
    """

    backend = NOIOMMU
    translated = False

    def __init__(self, number: int, system: System = SYSTEM) -> None:
        super().__init__(number, system)
        self.node = f"/dev/vfio/noiommu-{number}"
        self._mapped: dict[int, HugeMemory] = {}
        self._telling = threading.Lock()
        LOG.warning("%s: %s", self.node, RISK)
        (self._function,) = (member.address for member in members_of(number, system))
        with ExitStack() as undo:
            # The guardian is left alone only after the kernel has stopped the function.
            undo.callback(self._forget)
            self._guardian = self._start_guardian()
            undo.callback(self._guardian.close)
            self._fd = open_container(system)
            undo.callback(system.close, self._fd)
            self._group = self._open_group()
            undo.callback(system.close, self._group)
            self._join()
            self._undo = undo.pop_all()

    def _start_guardian(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            command = [sys.executable, "-I", "-S", guardian.__file__, self._function]
            self._system.start_daemon(command, theirs.fileno())
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise GuestpvError(
                    f"the process that keeps the device's memory did not start: {error}", where=self._function
                ) from error
            raise
        finally:
            theirs.close()
        return ours

    def _open_group(self) -> int:
        try:
            return self._system.open(self.node, os.O_RDWR)
        except FileNotFoundError as error:
            raise Refused(
                "VFIO has no no-IOMMU group for the function",
                where=self.node,
                hint=f"{ENABLE}; guestpv bind --vfio-backend noiommu {self._function}",
            ) from error
        except PermissionError as error:
            raise AccessDenied(
                "no-IOMMU groups are for holders of CAP_SYS_RAWIO only", where=self.node, hint="run as root"
            ) from error
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise GuestpvError(f"cannot open the group: {error}", where=self.node) from error
            raise in_use(self.number, self.node, self._system) from error

    def _join(self) -> None:
        try:
            container = bytearray(self._fd.to_bytes(4, "little"))
            self._system.ioctl(self._group, abi.GROUP_SET_CONTAINER, container)
            self._system.ioctl(self._fd, abi.SET_IOMMU, abi.NOIOMMU_IOMMU)
        except PermissionError as error:
            raise AccessDenied(
                "no-IOMMU mode is for holders of CAP_SYS_RAWIO only", where=self.node, hint="run as root"
            ) from error
        except OSError as error:
            raise GuestpvError(f"the group does not enter a container: {error}", where=self.node) from error

    def device(self, address: str) -> int:
        return device_of_group(self._group, address, self.number, self._system)

    def map(self, size: int) -> tuple[tuple[Segment, ...], Memory]:
        if size <= 0:
            raise UsageError(f"cannot map {size} bytes for a device")
        size = -(-size // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
        try:
            memory = HugeMemory(size, self._system)
        except OSError as error:
            raise Refused(
                f"no {size >> 20} MiB of reserved huge pages for the device: {error}",
                where=self.node,
                hint=HUGE_PAGES_HINT,
            ) from error
        try:
            segments = self._physical(memory)
            # Before the device learns of the pages: from then on they outlive this process.
            self._tell(b"K%x" % segments[0].address, memory.fd)
        finally:
            memory.release()
        self._mapped[segments[0].address] = memory
        return segments, memory

    def _physical(self, memory: HugeMemory) -> tuple[Segment, ...]:
        """Where the memory is, as runs of neighbouring pages.

        Raises:
            Refused: the kernel does not tell, or what it tells is not made of huge pages.
        """
        frames = self._system.page_frames(memory.pointer, memory.size // PAGE_SIZE)
        if not frames.all():
            raise Refused(
                "the kernel does not tell this process which physical pages it has (/proc/self/pagemap)",
                where=self.node,
                hint="CAP_SYS_ADMIN is needed: run as root",
            )
        seams = np.flatnonzero(np.diff(frames.astype(np.int64)) != 1) + 1
        if (seams % (HUGE_PAGE_SIZE // PAGE_SIZE)).any():
            raise Refused("the kernel moved a page: these are no huge pages", where=self.node)
        return tuple(
            Segment(int(run[0]) * PAGE_SIZE, len(run) * PAGE_SIZE) for run in np.split(frames, seams)
        )

    def unmap(self, address: int) -> None:
        """Let the guardian drop the memory. Only after the device was reset: nothing else takes it away."""
        self._tell(b"D%x" % address)
        del self._mapped[address]

    def _tell(self, message: bytes, *fds: int) -> None:
        try:
            with self._telling:
                socket.send_fds(self._guardian, [message], list(fds))
                answer = self._guardian.recv(1)
        except OSError:
            answer = b""
        if answer != message[:1]:
            raise GuestpvError(
                "the process that guards the device's memory has died: the device must not get memory that "
                "nobody keeps for it",
                where=self._function,
            )

    def _forget(self) -> None:
        self._mapped.clear()
