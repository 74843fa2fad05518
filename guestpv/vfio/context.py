"""What a way into VFIO has to give: device files of functions, and an address space that they see memory in.

``Context`` is the surface; ``container``, ``iommufd`` and ``noiommu`` have one each. An ``Attachment`` is one
function in a context, which the functions of an IOMMU group share.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import ClassVar, Final

from ..errors import GuestpvError, Refused, UsageError
from ..memory import DmaRegion, DmaSpace, Segment
from ..system import HUGE_PAGE_SIZE, PAGE_SIZE, SYSTEM, System
from .dma import IovaAllocator, Memory
from .survey import members_of, not_viable

LOG: Final = logging.getLogger(__name__)


class Context(ABC):
    """An I/O address space of the kernel's that the group ``number`` is in, and a way to its functions.

    Attributes:
        backend: name of the way: ``type1``, ``iommufd`` or ``noiommu``.
        translated: whether an IOMMU stands between the functions and memory.
        node: the device node that messages name.
    """

    backend: ClassVar[str]
    translated: ClassVar[bool]

    def __init__(self, number: int, system: System) -> None:
        self._system = system
        self.number = number
        self.node = f"/dev/vfio/{number}"
        self._undo = ExitStack()

    @abstractmethod
    def device(self, address: str) -> int:
        """Descriptor of a function's device file, which the caller closes.

        Raises:
            Refused: the function is not bound to vfio-pci, or somebody else has it.
        """

    @abstractmethod
    def map(self, size: int) -> tuple[tuple[Segment, ...], Memory]:
        """Make ``size`` bytes (rounded up) of new memory visible; where functions see it, and the memory.

        Raises:
            GuestpvError: the kernel refuses; the message tells which limit was met.
        """

    @abstractmethod
    def unmap(self, address: int) -> None:
        """Take the memory whose first segment is at ``address`` away from the functions."""

    def close(self) -> None:
        """Give everything back; the kernel drops what is still mapped, then memory is freed. Idempotent."""
        self._undo.close()


class Translated(Context):
    """A context behind an IOMMU, where addresses are ours to choose.

    Attributes:
        ranges: I/O virtual addresses that may be mapped, as (first, last).
        granule: bytes that the size and place of a mapping are multiples of.
        mappings_allowed: how many mappings the kernel grants, or None where it does not say.
    """

    translated = True
    mappings_allowed: int | None = None

    def __init__(self, number: int, system: System) -> None:
        super().__init__(number, system)
        self._mapped: dict[int, Memory] = {}
        self.ranges: list[tuple[int, int]] = []
        self.granule = PAGE_SIZE
        self._iovas = IovaAllocator(())

    def _set_ranges(self, ranges: list[tuple[int, int]], granule: int) -> None:
        self.ranges, self.granule = ranges, granule
        self._iovas = IovaAllocator(ranges)

    @abstractmethod
    def _map(self, pointer: int, iova: int, size: int) -> None:
        """Have the kernel map; OSError where it does not."""

    @abstractmethod
    def _unmap(self, iova: int, size: int) -> int:
        """Have the kernel unmap; how many bytes it took away."""

    def map(self, size: int) -> tuple[tuple[Segment, ...], Memory]:
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
            self._map(memory.pointer, iova, size)
        except BaseException as error:
            self._iovas.free(iova, size)
            if isinstance(error, OSError):
                raise self._explain_map(error, size) from error
            raise
        self._mapped[iova] = memory
        LOG.debug("%s: mapped %d bytes at %#x", self.node, size, iova)
        return (Segment(iova, size),), memory

    def _explain_map(self, error: OSError, size: int) -> GuestpvError:
        message, hint = f"mapping {_mib(size)} for the device failed: {error}", ""
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
        elif error.errno == errno.ENOSPC and self.mappings_allowed is not None:
            message = f"the kernel grants no more DMA mappings ({self.mappings_allowed} at the start)"
            hint = "modprobe vfio_iommu_type1 dma_entry_limit=N"
        return GuestpvError(message, where=self.node, hint=hint)

    def unmap(self, address: int) -> None:
        """Take memory away from the device. Where that fails the memory stays until the context closes."""
        size = self._mapped[address].size
        done = self._unmap(address, size)
        if done != size:
            raise GuestpvError(
                f"the kernel took {done} of {size} bytes at {address:#x} away", where=self.node
            )
        del self._mapped[address]
        self._iovas.free(address, size)

    def _not_viable(self) -> Refused:
        blockers = [member for member in members_of(self.number, self._system) if member.blocks]
        message, hint = not_viable(self.number, blockers)
        if not blockers:
            message, hint = (
                f"IOMMU group {self.number} is not viable",
                "`dmesg | tail` says which driver holds it",
            )
        return Refused(message, where=self.node, hint=hint)

    def _unsafe_interrupts(self, module: str) -> Refused:
        return Refused(
            "the IOMMU does not remap interrupts, so the kernel does not let a process have the group",
            where=self.node,
            hint="QEMU: `-device intel-iommu,intremap=on` with `-machine kernel-irqchip=split`; in a "
            f"guest you trust: `modprobe {module} allow_unsafe_interrupts=1`",
        )


class Space:
    """The part of a context's memory that one function uses: a ``DmaSpace``."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._regions: dict[int, DmaRegion] = {}

    def map(self, size: int) -> DmaRegion:
        """Make ``size`` bytes (rounded up to pages) of zeroed memory visible to the function.

        Raises:
            GuestpvError: the kernel refuses; the message tells which limit was met.
        """
        segments, memory = self._context.map(size)
        region = DmaRegion(memory.array, segments, memory.pointer)
        self._regions[segments[0].address] = region
        return region

    def unmap(self, region: DmaRegion) -> None:
        """Take the region away from the device. Only after the device was reset.

        Raises:
            UsageError: it is not mapped here.
        """
        address = region.segments[0].address
        if self._regions.get(address) is not region:
            raise UsageError(f"the DMA region at bus address {address:#x} is not mapped by this function")
        self._context.unmap(address)
        del self._regions[address]

    def close(self) -> None:
        """Unmap everything that is left."""
        with ExitStack() as every:
            for region in self._regions.values():
                every.callback(self._context.unmap, region.segments[0].address)
            self._regions = {}


class Attachment:
    """One function of a context that this process shares among the functions of a group.

    Args:
        address: the function, bound to vfio-pci.
        group: its IOMMU group, or the one that VFIO made up for it.
        way: the kind of context.

    Attributes:
        backend: name of the way in.
        device: descriptor of the function's device file.
        dma: where the function sees memory.
        translated: whether an IOMMU stands between the function and memory.

    Raises:
        As the context does.
    """

    _lock = threading.Lock()
    _open: ClassVar[dict[tuple[System, type[Context], int], tuple[Context, int]]] = {}
    """(system, kind, group) -> context and how many attachments use it."""

    def __init__(self, address: str, group: int, way: type[Context], *, system: System = SYSTEM) -> None:
        self._key = (system, way, group)
        self.backend, self.translated = way.backend, way.translated
        with ExitStack() as undo:
            context = self._join()
            undo.callback(self._leave)
            self.device = context.device(address)
            space = Space(context)
            # Where nothing translates, closing the device file is what ends its access to memory.
            if not way.translated:
                undo.callback(space.close)
            undo.callback(system.close, self.device)
            if way.translated:
                undo.callback(space.close)
            self.dma: DmaSpace = space
            self._undo = undo.pop_all()

    def _join(self) -> Context:
        with self._lock:
            system, way, group = self._key
            context, users = self._open.get(self._key) or (way(group, system), 0)
            self._open[self._key] = (context, users + 1)
            return context

    def _leave(self) -> None:
        with self._lock:
            context, users = self._open.pop(self._key)
            if users > 1:
                self._open[self._key] = (context, users - 1)
            else:
                context.close()

    def close(self) -> None:
        """Unmap what the function still sees, close its device file, and the context after the last one."""
        self._undo.close()


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
