"""A PCI function in software: configuration space, BARs, interrupts and DMA round a virtio device (4.1)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from ..errors import UsageError
from ..spec import features as ft
from ..spec import pci
from ..spec.pci import CfgType
from .device import Device
from .dma import SoftwareDma
from .evidence import Event, Finding, Journal, Observer
from .executor import Executor
from .interrupts import Interrupts, signal
from .looks import Looks
from .model import Model
from .pciconfig import (
    INITIATE_FLR,
    MSIX_ENABLE,
    MSIX_FUNCTION_MASK,
    STATUS_INTERRUPT,
    ConfigSpace,
    Structure,
    express_capability,
    msix_capability,
)
from .queue import DeviceQueue
from .registers import VirtioRegisters

MSIX_BAR = 0
PAGE = 4096
COMMON, ISR, DEVICE, NOTIFY = 0, PAGE, 2 * PAGE, 3 * PAGE
"""Where the structures lie in their BAR, behind ``Looks.shift``."""
MAX_VECTORS = 0x800


class SoftwareBar:
    """A BAR without memory behind: every access is a call."""

    pointer = 0

    def __init__(self, function: SoftwareFunction, index: int, size: int) -> None:
        self._function = function
        self._index = index
        self.size = size

    def read(self, offset: int, width: int) -> int:
        """One access of 1, 2 or 4 bytes."""
        return self._function.bar_read(self._index, offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        """One access of 1, 2 or 4 bytes."""
        self._function.bar_write(self._index, offset, width, value)


class SoftwareFunction:
    """A virtio PCI function; the driver is in this process, or behind a socket that calls the same methods.

    The device runs inside the driver's register writes, so that everything is deterministic, or, with
    ``threaded``, in a thread of its own. Nothing that the driver does raises: it becomes a ``Finding``.

    Args:
        model: the device type behind.
        name: how messages call the function.
        threaded: give the device a thread.
        vectors: size of the MSI-X table, 0 for none; by default one per queue and one for configuration.
        multiplier: notify_off_multiplier, 0 or a power of two from 4 on.
        flr: offer a function level reset.
        segment: bytes after which DMA memory continues elsewhere on the bus, 0 for never.
        translated: whether bus addresses are not guest-physical ones; the device then offers and requires
            ACCESS_PLATFORM.
        looks: how it presents itself.

    Attributes:
        device: the virtio device: status, features, queues; tests steer it from outside.
        registers: its register blocks, with the knobs of misbehaviour.
        interrupts: MSI-X and INTx state.
        dma: the memory the device sees.
        journal: evidence log, findings and observers.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        threaded: bool = False,
        vectors: int | None = None,
        multiplier: int = 4,
        flr: bool = True,
        segment: int = 0,
        translated: bool = True,
        looks: Looks = Looks(),  # noqa: B008 - it is frozen
    ) -> None:
        if multiplier & (multiplier - 1) or 0 < multiplier < 4 or multiplier > PAGE:
            raise UsageError(f"notify_off_multiplier {multiplier} is neither 0 nor a power of 2 in 4 to 4096")
        self.name = name
        self.translated = translated
        self.model = model
        self.journal = Journal(name)
        self.dma = SoftwareDma(segment)
        self.executor = Executor(name, threaded)
        self.device = Device(model, self.journal, self.dma, self.executor, self._interrupt)
        if translated:
            self.device.offered |= 1 << ft.F_ACCESS_PLATFORM
            self.device.required |= 1 << ft.F_ACCESS_PLATFORM
        count = min(len(self.device.queues) + 1, MAX_VECTORS) if vectors is None else vectors
        if not 0 <= count <= MAX_VECTORS:
            raise UsageError(f"{count} MSI-X vectors: PCI allows 0 to {MAX_VECTORS}")
        self.interrupts = Interrupts(count)
        self.registers = VirtioRegisters(self.device, count, multiplier, self._move_line)
        self.flr = flr
        self.dma.removed = self._memory_gone
        self.present(looks)
        self._own_fds: list[int] = []
        self._ask_fds: dict[str, int] = {}
        self._closed = False

    def present(self, looks: Looks) -> None:
        """Take on these looks, before a driver has seen the function."""
        self.looks = looks
        self._bars = self._lay_out(looks)
        self._obey_command()

    def _lay_out(self, looks: Looks) -> dict[int, SoftwareBar]:
        count = self.interrupts.vectors
        multiplier = self.registers.multiplier
        notify = max(multiplier * len(self.device.queues), 4)
        sizes = {looks.bar: _power_of_two(looks.shift + NOTIFY + notify)}
        self._pending_at = 0
        if count:
            self._pending_at = _power_of_two(16 * count)
            sizes[MSIX_BAR] = max(_power_of_two(self._pending_at + len(self.interrupts.pending)), PAGE)
        self.config = ConfigSpace(self.model.device_type, self.model.pci_class, sizes)
        self.config.identify(looks.vendor, looks.device, looks.revision)
        if count:
            body = msix_capability(count, (MSIX_BAR, 0), (MSIX_BAR, self._pending_at))
            at = self.config.add_capability("msix", pci.PCI_CAP_MSIX, body)
            self.config.mask[at + 3] = (MSIX_ENABLE | MSIX_FUNCTION_MASK) >> 8
        for number, body in enumerate(looks.first):
            self.config.add_capability(f"odd {number}", pci.PCI_CAP_VENDOR, body)
        self.config.add_structures(self._structures(looks, notify))
        if self.flr:
            at = self.config.add_capability("express", pci.PCI_CAP_EXPRESS, express_capability())
            self.config.put(at + 8, 2, 0, 0xFFFF)
        self.config.written = self._config_written
        return {index: SoftwareBar(self, index, size) for index, size in sizes.items()}

    def _structures(self, looks: Looks, notify: int) -> Iterator[Structure]:
        places = {
            CfgType.COMMON: (COMMON, pci.COMMON_CFG.size, b""),
            CfgType.ISR: (ISR, 1, b""),
            CfgType.NOTIFY: (NOTIFY, notify, self.registers.multiplier.to_bytes(4, "little")),
        }
        if self.model.layout is not None:
            places[CfgType.DEVICE] = (DEVICE, self.model.layout.size, b"")
        for kind in looks.order:
            if kind == CfgType.PCI_CFG:
                yield Structure(kind, 0, 0, 0, bytes(4 + looks.longer))
            elif kind in places:
                offset, length, extra = places[kind]
                # The notification structure ends with its BAR.
                length += 0 if kind == CfgType.NOTIFY else looks.spare
                yield Structure(kind, looks.bar, looks.shift + offset, length, extra + bytes(looks.longer))

    # What a transport uses.

    @property
    def findings(self) -> list[Finding]:
        """What the driver did wrong so far."""
        return self.journal.findings

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Let ``observer`` see every event; returns what ends it."""
        return self.journal.observe(observer)

    def bar(self, index: int) -> SoftwareBar:
        """The window of a BAR.

        Raises:
            UsageError: the function has no such BAR.
        """
        if index not in self._bars:
            raise UsageError(f"BAR {index} does not exist, there are {sorted(self._bars)}", where=self.name)
        return self._bars[index]

    def config_read(self, offset: int, width: int) -> int:
        """Read configuration space; the data field of the PCI access capability reads a BAR (4.1.4.9)."""
        with self.executor:
            if self._in_window(offset):
                self._window(None)
            self._show_line()
            value = self.config.read(offset, width)
            self.journal.record(Event("config-read", "PCI configuration", offset, width, value))
            return value

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Write configuration space."""
        with self.executor:
            self.journal.record(Event("config-write", "PCI configuration", offset, width, value))
            self.config.write(offset, width, value)

    def bar_read(self, index: int, offset: int, width: int) -> int:
        """One read access to a BAR. All ones while memory decoding is off."""
        with self.executor:
            if not self._decodes(index, offset, width):
                return (1 << 8 * width) - 1
            if index == MSIX_BAR:
                return self._msix_read(offset, width)
            offset -= self.looks.shift
            part = offset // PAGE
            if part == 0:
                return self.registers.common_read(offset, width)
            if part == 1:
                return self.registers.read_isr(offset - ISR, width)
            if part == 2:
                return self.registers.config_read(offset - DEVICE, width)
            if part < 0:
                self.device.find("DRV-PCI-56", "read of no structure", f"BAR {index} +{offset:#x}/{width}")
            return 0

    def bar_write(self, index: int, offset: int, width: int, value: int) -> None:
        """One write access to a BAR. Lost while memory decoding is off."""
        with self.executor:
            if not self._decodes(index, offset, width):
                return
            if index == MSIX_BAR:
                if offset < self._pending_at:
                    self.interrupts.table_write(offset, width, value)
                return
            offset -= self.looks.shift
            part = offset // PAGE
            if part == 0:
                self.registers.common_write(offset, width, value)
            elif part == 2:
                self.registers.config_write(offset - DEVICE, width, value)
            elif part >= 3:
                self.registers.notify(offset - NOTIFY, width, value)
            else:
                self.device.find("DRV-PCI-56", "write to no structure", f"BAR {index} +{offset:#x}/{width}")

    def _decodes(self, index: int, offset: int, width: int) -> bool:
        where = f"BAR {index} +{offset:#x}/{width}"
        if not self.config.command() & pci.COMMAND_MEMORY:
            self.device.find("", "access while memory decoding is off in the command register", where)
            return False
        if index not in self._bars or width not in (1, 2, 4, 8) or offset + width > self._bars[index].size:
            self.device.find("", "access outside of any BAR", where)
            return False
        return True

    def _msix_read(self, offset: int, width: int) -> int:
        if offset < self._pending_at:
            return self.interrupts.table_read(offset, width)
        return self.interrupts.pending_read(offset - self._pending_at, width)

    # The PCI configuration access capability (4.1.4.9).

    def _in_window(self, offset: int) -> bool:
        at = self.config.positions.get(CfgType.PCI_CFG)
        return at is not None and at + 16 <= offset < at + 20

    def _window(self, write: bytes | None) -> None:
        """Do the access that bar, offset and length of the capability describe."""
        config, at = self.config, self.config.positions[CfgType.PCI_CFG]
        bar, offset, length = config.data[at + 4], config.get(at + 8, 4), config.get(at + 12, 4)
        where = f"pci_cfg_data, bar {bar} +{offset:#x}/{length}"
        if length not in (1, 2, 4):
            self.device.find("DRV-PCI-75", f"length {length}", where)
            return
        if offset % length:
            self.device.find("DRV-PCI-36", "offset is no multiple of length", where)
            return
        if config.structure_at(bar, offset, length) is None:
            self.device.find("DRV-PCI-38", "outside of every virtio structure", where)
            return
        if write is not None:
            self.bar_write(bar, offset, length, int.from_bytes(write[:length], "little"))
        else:
            value = self.bar_read(bar, offset, length)
            config.data[at + 16 : at + 16 + length] = value.to_bytes(length, "little")

    def _config_written(self, offset: int, width: int) -> None:
        config = self.config
        for kind, at in config.positions.items():
            if not at <= offset < at + config.data[at + 2] or not isinstance(kind, CfgType):
                continue
            if kind != CfgType.PCI_CFG:
                self.device.find("DRV-PCI-17", f"capability {kind.name} written", f"+{offset:#x}")
            elif self._in_window(offset):
                self._window(bytes(config.data[at + 16 : at + 20]))
        if "msix" in config.positions and offset <= config.positions["msix"] + 3 < offset + width:
            control = config.get(config.positions["msix"] + 2, 2)
            self.interrupts.set_control(bool(control & MSIX_ENABLE), bool(control & MSIX_FUNCTION_MASK))
            self._move_line()
        if self.flr and config.get(config.positions["express"] + 8, 2) & INITIATE_FLR:
            self._function_level_reset()
        self._obey_command()

    # Interrupts.

    def _interrupt(self, queue: DeviceQueue | None) -> None:
        """4.1.5.3, 4.1.5.4: a message of the mapped vector, or an ISR bit and the line."""
        if queue is None:
            self.registers.raise_isr(pci.ISR_CONFIG)
        elif not self.interrupts.enabled:
            self.registers.raise_isr(pci.ISR_QUEUE)
        vector = pci.NO_VECTOR
        if self.interrupts.enabled:
            vector = self.registers.config_msix_vector if queue is None else queue.vector
        index = -1 if queue is None else queue.index
        name = "configuration change" if queue is None else "used buffer"
        self.journal.record(Event("interrupt", name, value=vector, queue=index))
        if vector != pci.NO_VECTOR and self.dma.enabled:
            self.interrupts.message(vector)

    def _obey_command(self) -> None:
        """Bus master and interrupt disable of the command register."""
        self.dma.enabled = bool(self.config.command() & pci.COMMAND_BUS_MASTER)
        self._move_line()

    def _move_line(self) -> None:
        """INTx follows the ISR unless MSI-X is enabled or the command register forbids it."""
        quiet = self.interrupts.enabled or self.config.command() & pci.COMMAND_INTX_DISABLE
        self.interrupts.set_intx(bool(self.registers.isr and not quiet))

    def _show_line(self) -> None:
        """Interrupt Status in the PCI status register is the OR of the ISR bits (4.1.4.5.1)."""
        status = self.config.get(pci.PCI_CONFIG_STATUS, 2) & ~STATUS_INTERRUPT
        if self.registers.isr and not self.interrupts.enabled:
            status |= STATUS_INTERRUPT
        self.config.data[pci.PCI_CONFIG_STATUS : pci.PCI_CONFIG_STATUS + 2] = status.to_bytes(2, "little")

    @property
    def msix_vectors(self) -> int:
        """Size of the MSI-X table, 0 for none."""
        return self.interrupts.vectors

    def set_irqs(self, fds: dict[int, int | None]) -> None:
        """Enable MSI-X and signal these eventfds for its vectors, as VFIO does; an empty dict disables it."""
        with self.executor:
            if not fds:
                self.interrupts.detach()
            self._enable_msix(bool(fds))
            for vector, fd in fds.items():
                self.interrupts.attach(vector, fd)

    def set_intx(self, fd: int | None) -> None:
        """Signal this eventfd when INTx goes up; None ends it."""
        with self.executor:
            self.interrupts.attach_intx(fd)

    def _enable_msix(self, on: bool) -> None:
        if "msix" not in self.config.positions:
            return
        at = self.config.positions["msix"] + 2
        control = self.config.get(at, 2) & ~(MSIX_ENABLE | MSIX_FUNCTION_MASK)
        self.config.data[at : at + 2] = (control | (MSIX_ENABLE if on else 0)).to_bytes(2, "little")
        self.interrupts.set_control(on, False)
        self._move_line()

    def enable_msix(self, count: int) -> list[int]:
        """Enable ``count`` vectors; returns one eventfd each, closed by ``disable_interrupts``.

        Raises:
            UsageError: the table is smaller.
        """
        if not 0 < count <= self.msix_vectors:
            raise UsageError(f"{count} of {self.msix_vectors} MSI-X vectors", where=self.name)
        self.disable_interrupts()
        self._own_fds = [_eventfd() for _ in range(count)]
        self.set_irqs(dict(enumerate(self._own_fds)))
        return list(self._own_fds)

    def enable_intx(self) -> int:
        """Enable INTx; returns its eventfd. It is masked at each event."""
        self.disable_interrupts()
        self._own_fds = [_eventfd()]
        self.set_intx(self._own_fds[0])
        return self._own_fds[0]

    def unmask_intx(self) -> None:
        """Let the next INTx event through."""
        with self.executor:
            self.interrupts.unmask_intx()

    def disable_interrupts(self) -> None:
        """Take all eventfds away and close those that were made here."""
        with self.executor:
            self.set_irqs({})
        for fd in self._own_fds:
            os.close(fd)
        self._own_fds = []

    def _memory_gone(self, address: int, length: int) -> None:
        """The driver took memory away: what is exposed in a live queue must not be in it (3.3.1)."""
        with self.executor:
            for queue in self.device.queues:
                ring = queue.ring
                if ring is None or not self.device.running:
                    continue
                areas = (queue.desc, queue.driver, queue.device)
                if any(address <= area < address + length for area in areas):
                    self.device.find("DRV-CLEANUP-02", "ring unmapped under a live queue", queue.where)
                    queue.ring = None
                    continue
                for chain in list(ring.outstanding.values()):
                    if any(address <= part.address < address + length for part in chain.elements):
                        text = f"memory of chain {chain.id} unmapped before it was used"
                        self.device.find("DRV-CLEANUP-02", text, queue.where)

    # Reset and the end.

    def _function_level_reset(self) -> None:
        self.registers.power_on()
        self.config.reset()
        self.interrupts.reset()
        self._obey_command()

    def reset(self) -> bool:
        """Function level reset, after which command, BARs and MSI-X are as they were, as with VFIO.

        Returns False, with nothing done, where the function has none.
        """
        if not self.flr:
            return False
        with self.executor:
            kept = bytes(self.config.data)
            table, enabled = bytes(self.interrupts.table), self.interrupts.enabled
            self._function_level_reset()
            self.config.data[:] = kept
            self.interrupts.table[:] = table
            self._enable_msix(enabled)
            self._obey_command()
        return True

    def request_fd(self) -> int | None:
        """Eventfd on which ``request_removal`` asks the driver to let go."""
        return self._ask("request")

    def error_fd(self) -> int | None:
        """Eventfd on which ``report_error`` tells of an unrecoverable bus error."""
        return self._ask("error")

    def request_removal(self) -> None:
        """Ask the driver to let go of the function, as hot-unplug does."""
        signal(self._ask("request"))

    def report_error(self) -> None:
        """Tell the driver of an unrecoverable bus error."""
        signal(self._ask("error"))

    def _ask(self, name: str) -> int:
        if name not in self._ask_fds:
            self._ask_fds[name] = _eventfd()
        return self._ask_fds[name]

    def close(self) -> None:
        """Stop the device and close what it opened. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self.executor.close)
            stack.callback(self._close_fds)
            stack.callback(self.model.close)
            stack.callback(self._power_off)

    def _power_off(self) -> None:
        with self.executor:
            self.registers.power_on()

    def _close_fds(self) -> None:
        self.disable_interrupts()
        for fd in self._ask_fds.values():
            os.close(fd)
        self._ask_fds.clear()


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
