"""``VfioFunction``: a PCI function that the kernel lent to this process through VFIO."""

from __future__ import annotations

import errno
import mmap
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..core._core import lib
from ..errors import DeviceGone, GuestpvError, Refused, UsageError
from ..spec.pci import COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_MEMORY, PCI_CONFIG_COMMAND
from ..system import MAP_FIXED, SYSTEM, System
from . import abi
from .backends import choose
from .context import Attachment
from .lock import FunctionLock
from .survey import VFIO_DRIVER, Function, look_up
from .ways import AUTO, check_name

_READ: Final[dict[int, Any]] = {1: lib.gpv_read8, 2: lib.gpv_read16, 4: lib.gpv_read32}
_WRITE: Final[dict[int, Any]] = {1: lib.gpv_write8, 2: lib.gpv_write16, 4: lib.gpv_write32}


@dataclass(frozen=True, slots=True)
class Region:
    """A region of the device file: ``size`` bytes at ``offset``; ``mappable`` as one piece or not."""

    index: int
    size: int
    offset: int
    mappable: bool


class VfioBar:
    """A BAR: mapped where the kernel allows all of it, else by one read or write call per access.

    Attributes:
        size: bytes.
        pointer: CPU address, 0 where it is not mapped.
    """

    def __init__(self, name: str, system: System, device: int, region: Region) -> None:
        self._name = f"{name} BAR {region.index}"
        self._system = system
        self._device = device
        self._region = region
        self._window: weakref.ref[Any] | None = None
        self._closed = False
        self.size = region.size
        self.pointer = system.mmap(region.size, fd=device, offset=region.offset) if region.mappable else 0

    def read(self, offset: int, width: int) -> int:
        """One access of ``width`` 1, 2 or 4 bytes."""
        self._check(offset, width)
        if self.pointer:
            return int(_READ[width](self.pointer + offset))
        with _explained(self._name, f"reading {width} bytes at {offset:#x}"):
            return _whole(
                self._system.pread(self._device, width, self._region.offset + offset), width, self._name
            )

    def write(self, offset: int, width: int, value: int) -> None:
        """One access of ``width`` 1, 2 or 4 bytes."""
        self._check(offset, width)
        if self.pointer:
            _WRITE[width](self.pointer + offset, value)
            return
        with _explained(self._name, f"writing {width} bytes at {offset:#x}"):
            self._system.pwrite(self._device, value.to_bytes(width, "little"), self._region.offset + offset)

    def view(self) -> NDArray[np.uint8]:
        """The BAR as a numpy array, for looking: numpy does not promise single accesses of a width.

        A view that outlives the function is not dangerous: it then shows zeros.

        Raises:
            UsageError: the BAR is not mapped.
        """
        if not self.pointer:
            raise UsageError("not mapped into this process; read it register by register", where=self._name)
        window = self._window() if self._window else None
        if window is None:
            window = self._system.window(self.pointer, self.size)
            self._window = weakref.ref(window)
        return np.frombuffer(memoryview(window), dtype=np.uint8)

    def close(self) -> None:
        """Take the mapping out of the process: the group stays busy while there is one. Idempotent."""
        pointer, self.pointer = self.pointer, 0
        self._closed = True
        window = self._window() if self._window else None
        if not pointer:
            return
        if window is None:
            self._system.munmap(pointer, self.size)
            return
        # Somebody still looks: put plain zeros in the BAR's place, gone with the last view.
        weakref.finalize(window, self._system.munmap, pointer, self.size).atexit = False
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        self._system.mmap(self.size, protection=mmap.PROT_READ, flags=flags, address=pointer)

    def _check(self, offset: int, width: int) -> None:
        if width not in _READ or offset % width or not 0 <= offset <= self.size - width:
            raise UsageError(
                f"no {width}-byte register at offset {offset:#x} of {self.size:#x}", where=self._name
            )
        if self._closed:
            raise UsageError("the function is closed", where=self._name)


class VfioFunction:
    """A PCI function owned through VFIO; memory and bus master enabled. A ``PciFunction``.

    Args:
        address: PCI address of a virtio function that is bound to vfio-pci.
        backend: the way into VFIO: ``type1``, ``iommufd`` or ``noiommu``; ``auto`` is one of the first two.

    Attributes:
        info: what the survey says about it.
        backend: the way that was taken.

    Raises:
        UsageError: no such function, or not a virtio one.
        Refused: driven by another process, not bound, no IOMMU, or its group is not viable.
        AccessDenied: no permission for the group's node.
    """

    def __init__(self, address: str, *, backend: str = AUTO, system: System = SYSTEM) -> None:
        self._system = system
        self.info: Function = look_up(address, system)
        self.name = self.info.address
        self._bars: dict[int, VfioBar] = {}
        self._regions: dict[int, Region] = {}
        self._events: dict[int, list[int]] = {}
        if self.info.driver != VFIO_DRIVER:
            driver = f"it belongs to {self.info.driver}" if self.info.driver else "it has no driver"
            raise Refused(
                f"not bound to vfio-pci: {driver}", where=self.name, hint=f"guestpv bind {self.name}"
            )
        way, group = choose(self.info, backend, system)
        self.backend = way.backend
        with ExitStack() as undo:
            undo.callback(FunctionLock(self.name, system=system).close)
            attachment = Attachment(self.name, group, way, system=system)
            undo.callback(attachment.close)
            self._device = attachment.device
            self.dma = attachment.dma
            self.translated = attachment.translated
            reply = abi.query(system, self._device, abi.DEVICE_GET_INFO, abi.DeviceInfo)
            self._device_info = abi.DeviceInfo.unpack(reply)
            if not self._device_info["flags"] & abi.DEVICE_FLAGS_PCI:
                raise GuestpvError("VFIO does not call it a PCI function", where=self.name)
            undo.callback(self._unmap_bars)
            undo.callback(lambda: self._close_events(self._events))
            undo.callback(self._silence)
            self._command(COMMAND_MEMORY | COMMAND_BUS_MASTER, 0)
            self._undo = undo.pop_all()

    # Configuration space and BARs

    def config_read(self, offset: int, width: int) -> int:
        """Read 1, 2 or 4 bytes of PCI configuration space.

        Raises:
            DeviceGone: it no longer answers.
        """
        region = self._config_region(offset, width)
        with _explained(self.name, "reading configuration space"):
            return _whole(self._system.pread(self._device, width, region.offset + offset), width, self.name)

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of PCI configuration space."""
        region = self._config_region(offset, width)
        with _explained(self.name, "writing configuration space"):
            self._system.pwrite(self._device, value.to_bytes(width, "little"), region.offset + offset)

    def bar(self, index: int) -> VfioBar:
        """The window of BAR ``index``, mapped at the first call.

        Raises:
            UsageError: the function does not have it.
        """
        if index not in self._bars:
            if not abi.PCI_BAR0_REGION_INDEX <= index <= abi.PCI_BAR5_REGION_INDEX:
                raise UsageError(f"a PCI function has BARs 0 to 5, not {index}", where=self.name)
            region = self._region(index)
            if not region.size:
                raise UsageError(f"it has no BAR {index}", where=self.name)
            with _explained(self.name, f"mapping BAR {index}"):
                self._bars[index] = VfioBar(self.name, self._system, self._device, region)
        return self._bars[index]

    def _config_region(self, offset: int, width: int) -> Region:
        region = self._region(abi.PCI_CONFIG_REGION_INDEX)
        if width not in (1, 2, 4) or not 0 <= offset <= region.size - width:
            raise UsageError(f"no {width} bytes at {offset:#x} of configuration space", where=self.name)
        return region

    def _region(self, index: int) -> Region:
        if index not in self._regions:
            with _explained(self.name, f"asking for region {index}"):
                reply = abi.query(
                    self._system, self._device, abi.DEVICE_GET_REGION_INFO, abi.RegionInfo, index=index
                )
            info = abi.RegionInfo.unpack(reply)
            mappable = bool(info["flags"] & abi.REGION_INFO_FLAG_MMAP)
            if info["flags"] & abi.REGION_INFO_FLAG_CAPS:
                for kind, offset in abi.capabilities(reply, info["cap_offset"]):
                    if kind == abi.REGION_INFO_CAP_SPARSE_MMAP:
                        mappable = mappable and _covered(reply, offset, info["size"])
            self._regions[index] = Region(index, info["size"], info["offset"], mappable)
        return self._regions[index]

    def _command(self, add: int, remove: int) -> None:
        command = self.config_read(PCI_CONFIG_COMMAND, 2)
        self.config_write(PCI_CONFIG_COMMAND, 2, (command | add) & ~remove)

    # Interrupts

    @property
    def msix_vectors(self) -> int:
        """Number of MSI-X vectors, 0 where the function has no MSI-X."""
        return self._irq(abi.PCI_MSIX_IRQ_INDEX)["count"]

    def enable_msix(self, count: int) -> list[int]:
        """Enable ``count`` vectors; returns one eventfd each, owned by the function.

        Raises:
            UsageError: there are not so many, or interrupts are enabled already.
        """
        if not 0 < count <= self.msix_vectors:
            raise UsageError(f"{count} MSI-X vectors wanted, {self.msix_vectors} are there", where=self.name)
        return self._exclusive(abi.PCI_MSIX_IRQ_INDEX, count)

    def enable_intx(self) -> int:
        """Enable the legacy interrupt; returns its eventfd. It is masked at each event.

        Raises:
            UsageError: the function has none, or interrupts are enabled already.
        """
        irq = self._irq(abi.PCI_INTX_IRQ_INDEX)
        if not irq["count"] or not irq["flags"] & abi.IRQ_INFO_AUTOMASKED:
            raise UsageError("the function has no legacy interrupt", where=self.name)
        self._command(0, COMMAND_INTX_DISABLE)
        return self._exclusive(abi.PCI_INTX_IRQ_INDEX, 1)[0]

    def unmask_intx(self) -> None:
        """Let the next legacy interrupt through, after the ISR was read."""
        self._set_irqs(abi.IRQ_SET_DATA_NONE | abi.IRQ_SET_ACTION_UNMASK, abi.PCI_INTX_IRQ_INDEX, 1)

    def disable_interrupts(self) -> None:
        """Take the eventfds of MSI-X or INTx away from the function and close them."""
        for index in (abi.PCI_MSIX_IRQ_INDEX, abi.PCI_INTX_IRQ_INDEX):
            self._disarm(index)

    def request_fd(self) -> int | None:
        """Eventfd that asks the owner to let go of the function (hot-unplug, unbind), if there is one."""
        return self._single(abi.PCI_REQ_IRQ_INDEX)

    def error_fd(self) -> int | None:
        """Eventfd of an unrecoverable PCI error, if there is one."""
        return self._single(abi.PCI_ERR_IRQ_INDEX)

    def _single(self, index: int) -> int | None:
        if index not in self._events:
            if not self._irq(index)["count"]:
                return None
            self._arm(index, 1)
        return self._events[index][0]

    def _exclusive(self, index: int, count: int) -> list[int]:
        if self._events.keys() & {abi.PCI_MSIX_IRQ_INDEX, abi.PCI_INTX_IRQ_INDEX}:
            raise UsageError("interrupts are enabled already; disable_interrupts() first", where=self.name)
        return self._arm(index, count)

    def _arm(self, index: int, count: int) -> list[int]:
        with ExitStack() as undo:
            fds = []
            for _ in range(count):
                fds.append(self._system.eventfd())
                undo.callback(self._system.close, fds[-1])
            data = b"".join(fd.to_bytes(4, "little") for fd in fds)
            self._set_irqs(abi.IRQ_SET_DATA_EVENTFD | abi.IRQ_SET_ACTION_TRIGGER, index, count, data)
            self._events[index] = fds
            undo.pop_all()
        return list(fds)

    def _disarm(self, index: int) -> None:
        if index in self._events:
            self._set_irqs(abi.IRQ_SET_DATA_NONE | abi.IRQ_SET_ACTION_TRIGGER, index, 0)
            self._close_events([index])

    def _close_events(self, indexes: Iterable[int]) -> None:
        with ExitStack() as every:
            for index in list(indexes):
                for fd in self._events.pop(index):
                    every.callback(self._system.close, fd)

    def _irq(self, index: int) -> dict[str, int]:
        """What VFIO says about an interrupt index; a count of 0 where it does not know it."""
        if index < self._device_info["num_irqs"]:
            try:
                return abi.IrqInfo.unpack(
                    abi.query(self._system, self._device, abi.DEVICE_GET_IRQ_INFO, abi.IrqInfo, index=index)
                )
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return {"count": 0, "flags": 0}

    def _set_irqs(self, flags: int, index: int, count: int, data: bytes = b"") -> None:
        with _explained(self.name, f"setting interrupts (index {index}, {count} of them)"):
            request = abi.IrqSet.pack(data, flags=flags, index=index, count=count)
            self._system.ioctl(self._device, abi.DEVICE_SET_IRQS, request)

    # Reset and the end

    def reset(self) -> bool:
        """Function level reset. Returns False where the function has no way of doing it.

        Configuration space and interrupts are afterwards as before; the virtio device is in reset.
        """
        if not self._device_info["flags"] & abi.DEVICE_FLAGS_RESET:
            return False
        with _explained(self.name, "resetting the function"):
            self._system.ioctl(self._device, abi.DEVICE_RESET)
        self._command(COMMAND_MEMORY | COMMAND_BUS_MASTER, 0)
        return True

    def close(self) -> None:
        """Give the function back: interrupts off, bus master off, DMA unmapped, memory freed. Idempotent."""
        self._undo.close()

    def _silence(self) -> None:
        """Whatever the device was doing, it cannot reach memory after this."""
        with ExitStack() as every:
            every.callback(self._without_gone, self._command, 0, COMMAND_BUS_MASTER)
            for index in list(self._events):
                every.callback(self._without_gone, self._disarm, index)

    def _without_gone(self, step: Any, *arguments: int) -> None:
        with suppress(DeviceGone):  # an unplugged function reaches no memory and has no interrupts
            step(*arguments)

    def _unmap_bars(self) -> None:
        with ExitStack() as every:
            for bar in self._bars.values():
                every.callback(bar.close)


@contextmanager
def _explained(name: str, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EIO, errno.ENXIO):
            raise DeviceGone(f"the function is gone ({doing}: {error})", where=name) from error
        raise GuestpvError(f"{doing} failed: {error}", where=name) from error


def _covered(reply: bytearray, capability: int, size: int) -> bool:
    """Whether the sparse areas leave no hole in a region of ``size`` bytes."""
    count = abi.SparseMmap.unpack(reply, capability)["nr_areas"]
    areas = abi.array(reply, capability + abi.SparseMmap.size, abi.SparseMmapArea, count)
    end = 0
    for area in sorted(areas, key=lambda one: one["offset"]):
        if area["offset"] > end:
            return False
        end = max(end, area["offset"] + area["size"])
    return end >= size


def _whole(data: bytes, width: int, name: str) -> int:
    if len(data) != width:
        raise DeviceGone(f"the function is gone (read {len(data)} of {width} bytes)", where=name)
    return int.from_bytes(data, "little")


def open_function(body: str, params: Mapping[str, str]) -> VfioFunction:
    """The function that ``vfio:0000:01:00.0[?backend=type1|iommufd|noiommu]`` names."""
    left = dict(params)
    backend = check_name(left.pop("backend", ""), f"vfio:{body}")
    if left:
        raise UsageError(f"the vfio scheme knows no parameter {', '.join(left)}", where=f"vfio:{body}")
    return VfioFunction(body, backend=backend)
