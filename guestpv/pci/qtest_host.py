"""A QEMU's PCI host seen through qtest: configuration space, address space, interrupt lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from ..errors import GuestpvError, UsageError
from ..spec import pci as spec
from ..wire import qtest as wire
from .qmp import Emulator
from .qtest_session import QtestSession

CONFIG_ADDRESS_PORT = 0xCF8
CONFIG_DATA_PORT = 0xCFC
CONFIG_SIZE = 256
EXPRESS_CONFIG_SIZE = 4096
PCIEXBAR = 0x60
"""Register of q35's host bridge: where configuration space lies in memory (ECAM), and whether it does."""
PCIEXBAR_ENABLE = 1 << 0
PCIEXBAR_LENGTH = 3 << 1
ECAM_ADDRESS = 0xB000_0000
"""Where firmware puts it, too: above all RAM that is below 4 GiB here, below the BARs."""
MEMORY_WINDOW = (0xE000_0000, 0xFE00_0000)
PORT_WINDOW = (0xC000, 0x1_0000)

COMMAND_IO = 1 << 0
Q35_FIRST_INTERRUPT = 20
"""Where PIRQE..PIRQH of the q35 machine arrive at the I/O APIC."""
PIIX_SLOT = 1
PIIX_ROUTE = 0x60
PIIX_INTERRUPTS = (10, 11, 10, 11)
"""Where PIRQA..PIRQD of the pc machine are led; its firmware would have done it."""


class Window:
    """Hands out naturally aligned addresses, rising.

    Args:
        taken: (first address, size) of what is in use already.
    """

    def __init__(self, what: str, first: int, end: int, taken: Sequence[tuple[int, int]] = ()) -> None:
        self._what = what
        self._next = first
        self._end = end
        self._taken = sorted(taken)

    def take(self, size: int) -> int:
        """The next free address for ``size`` bytes, a power of two.

        Raises:
            GuestpvError: there is no room left.
        """
        address = -(-self._next // size) * size
        for start, length in self._taken:
            if start < address + size and address < start + length:
                address = -(-(start + length) // size) * size
        if address + size > self._end:
            raise GuestpvError(f"no room for {size:#x} bytes of PCI {self._what} space", where="qtest")
        self._next = address + size
        return address


class QtestBar:
    """One BAR, every access a qtest command of that width.

    Attributes:
        size: bytes.
        pointer: 0, for it is not mapped here.
        address: where it was placed.
        port: True for I/O ports, False for memory.
    """

    pointer = 0

    def __init__(self, session: QtestSession, address: int, size: int, port: bool) -> None:
        self._session = session
        self.address = address
        self.size = size
        self.port = port

    def _place(self, offset: int, width: int) -> int:
        if width not in (1, 2, 4) or offset < 0 or offset + width > self.size:
            raise UsageError(f"{width} bytes at {offset:#x} of a BAR of {self.size:#x} bytes", where="qtest")
        return self.address + offset

    def read(self, offset: int, width: int) -> int:
        """One access of ``width`` 1, 2 or 4 bytes; waits for the writes before it."""
        line = wire.read_port if self.port else wire.read_memory
        return self._session.ask(line(self._place(offset, width), width)).number

    def write(self, offset: int, width: int, value: int) -> None:
        """One posted access of ``width`` 1, 2 or 4 bytes."""
        line = wire.write_port if self.port else wire.write_memory
        self._session.post(line(self._place(offset, width), width, value))


class QtestHost:
    """The PCI host of a QEMU.

    Args:
        qemu: owned and closed by the host.
        express: it is a q35, not a pc.
        taken: (first address, size) of memory and of ports that BARs have already; these BARs stay.

    Attributes:
        devices: what it has for us, as QEMU's ``-device`` strings.
        config_size: bytes of a function's configuration space: 4096 through ECAM, else 256.
        session: the qtest socket.
    """

    rings_doorbells = False
    """Whether MSI-X arrives, as eventfds."""

    def __init__(
        self,
        qemu: Emulator,
        devices: Sequence[str],
        *,
        express: bool,
        taken: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.qemu = qemu
        self.devices = list(devices)
        self.express = express
        self.session = QtestSession(qemu)
        self.config_size = CONFIG_SIZE
        self._ecam = 0
        self._taken = list(taken)
        self._memory = Window("memory", *MEMORY_WINDOW, self._taken)
        self._ports = Window("I/O", *PORT_WINDOW, self._taken)
        self._handlers: dict[int, list[Callable[[bool], None]]] = {}

    def open_ecam(self) -> None:
        """Reach configuration space through memory from now on, all 4096 bytes of it; a pc has only ports."""
        if not self.express:
            return
        low = self.config_read(0, 0, PCIEXBAR, 4)
        if not low & PCIEXBAR_ENABLE:
            low = ECAM_ADDRESS | PCIEXBAR_ENABLE
            self.config_write(0, 0, PCIEXBAR + 4, 4, 0)
            self.config_write(0, 0, PCIEXBAR, 4, low)
        high = self.config_read(0, 0, PCIEXBAR + 4, 4)
        self._ecam = high << 32 | low & ~(PCIEXBAR_LENGTH | PCIEXBAR_ENABLE)
        self.config_size = EXPRESS_CONFIG_SIZE

    def config_read(self, bus: int, slot: int, offset: int, width: int) -> int:
        """Read 1, 2 or 4 bytes of a function's configuration space."""
        if self._ecam:
            return self.session.ask(
                wire.read_memory(self._ecam_address(bus, slot, offset, width), width)
            ).number
        lines, port = self._config(bus, slot, offset, width)
        return self.session.ask(lines + wire.read_port(port, width), 2).number

    def config_write(self, bus: int, slot: int, offset: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of a function's configuration space."""
        if self._ecam:
            self.session.ask(wire.write_memory(self._ecam_address(bus, slot, offset, width), width, value))
            return
        lines, port = self._config(bus, slot, offset, width)
        self.session.ask(lines + wire.write_port(port, width, value), 2)

    def _check_config(self, offset: int, width: int) -> None:
        if width not in (1, 2, 4) or offset % width or not 0 <= offset < self.config_size:
            raise UsageError(
                f"{width} bytes at {offset:#x}: configuration space is {self.config_size} bytes, "
                "accessed by 1, 2 or 4 naturally aligned ones",
                where="qtest",
            )

    def _ecam_address(self, bus: int, slot: int, offset: int, width: int) -> int:
        self._check_config(offset, width)
        return self._ecam | bus << 20 | slot << 15 | offset

    def _config(self, bus: int, slot: int, offset: int, width: int) -> tuple[bytes, int]:
        self._check_config(offset, width)
        address = 1 << 31 | bus << 16 | slot << 11 | offset & 0xFC
        return wire.write_port(CONFIG_ADDRESS_PORT, 4, address), CONFIG_DATA_PORT + offset % 4

    def place_bars(self, bus: int, slot: int, window: Window | None = None) -> dict[int, QtestBar]:
        """Size and place the BARs of a function, by index, and let it decode them.

        Raises:
            GuestpvError: there is no function, or no room.
        """
        if self.config_read(bus, slot, spec.PCI_CONFIG_VENDOR, 2) == 0xFFFF:
            raise GuestpvError(f"there is no PCI function at {bus:02x}:{slot:02x}.0", where="qtest")
        # What decodes while it is sized would answer at addresses of others.
        self.config_write(bus, slot, spec.PCI_CONFIG_COMMAND, 2, spec.COMMAND_INTX_DISABLE)
        bars: dict[int, QtestBar] = {}
        index = 0
        while index < 6:
            register = spec.PCI_CONFIG_BAR0 + 4 * index
            before = self.config_read(bus, slot, register, 4)
            self.config_write(bus, slot, register, 4, 0xFFFF_FFFF)
            low = self.config_read(bus, slot, register, 4)
            port = bool(low & 1)
            wide = not port and low & 6 == 4
            mask = low & (0xFFFF_FFFC if port else 0xFFFF_FFF0)
            if wide:
                before |= self.config_read(bus, slot, register + 4, 4) << 32
                self.config_write(bus, slot, register + 4, 4, 0xFFFF_FFFF)
                mask |= self.config_read(bus, slot, register + 4, 4) << 32
            if mask:
                size = mask & -mask
                address = before & mask
                if (address, size) not in self._taken:
                    address = (self._ports if port else window or self._memory).take(size)
                self.config_write(bus, slot, register, 4, address & 0xFFFF_FFFF)
                if wide:
                    self.config_write(bus, slot, register + 4, 4, address >> 32)
                bars[index] = QtestBar(self.session, address, size, port)
            index += 2 if wide else 1
        decode = COMMAND_IO | spec.COMMAND_MEMORY | spec.COMMAND_INTX_DISABLE
        self.config_write(bus, slot, spec.PCI_CONFIG_COMMAND, 2, decode)
        return bars

    def _root_slot(self, bus: int, slot: int) -> int:
        """Slot on the root bus of a function, or of the root port before it."""
        return slot

    def locate(self, number: int) -> tuple[int, int, Window | None]:
        """Bus and slot of the ``number``-th device, and the window of the bridge before it."""
        raise NotImplementedError

    def take_vectors(self, count: int) -> list[int]:
        """Reserve doorbell vectors; their numbers.

        Raises:
            UsageError: there are not so many left.
        """
        raise UsageError(f"{count} MSI-X vectors asked for, this machine has none", where="qtest")

    def give_vectors(self, vectors: Sequence[int]) -> None:
        """Return doorbell vectors."""

    def message(self, vector: int) -> tuple[int, int, int]:
        """Address, data and eventfd of a doorbell vector."""
        raise NotImplementedError

    def intercept(self, bus: int, slot: int, pin: int, handler: Callable[[bool], None]) -> None:
        """Call ``handler`` when the legacy interrupt of a function on ``pin`` (0: INTA) rises or falls.

        It is called by whichever thread saw the change.
        """
        root_slot = self._root_slot(bus, slot)
        if self.express:
            line = Q35_FIRST_INTERRUPT + (root_slot + pin) % 4
        else:
            line = PIIX_INTERRUPTS[(root_slot + pin - 1) % 4]
        intercepted = bool(self._handlers)
        self._handlers.setdefault(line, []).append(handler)
        if intercepted:
            return
        if not self.express:
            for route, interrupt in enumerate(PIIX_INTERRUPTS):
                self.config_write(0, PIIX_SLOT, PIIX_ROUTE + route, 1, interrupt)
        self.session.intercept("ioapic", self._line_changed)

    def _line_changed(self, interrupt: wire.Interrupt) -> None:
        for handler in self._handlers.get(interrupt.line, ()):
            handler(interrupt.raised)

    def close(self) -> None:
        """End QEMU, or leave it. Idempotent."""
        self.session.close()
        self.qemu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
