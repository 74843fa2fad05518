"""A QEMU without a guest as a PCI host: configuration ports, address space, interrupts as eventfds.

MSI-X arrives as real eventfds: messages are aimed at the doorbell of an ivshmem device, which has no
other purpose here. INTx is seen by intercepting the inputs of the I/O APIC.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
from collections.abc import Callable, Sequence

from ..errors import GuestpvError, UsageError
from ..spec import pci as spec
from ..wire import qtest as wire
from .qemu import DEFAULT_EXECUTABLE, Qemu
from .qtest_session import QtestSession

CONFIG_ADDRESS_PORT = 0xCF8
CONFIG_DATA_PORT = 0xCFC
CONFIG_SIZE = 256
MEMORY_WINDOW = (0xE000_0000, 0xFE00_0000)
PORT_WINDOW = (0xC000, 0x1_0000)
BRIDGE_WINDOW = 2 << 20

COMMAND_IO = 1 << 0
CONFIG_PRIMARY_BUS = 0x18
CONFIG_MEMORY_BASE = 0x20
CONFIG_PREFETCH_BASE = 0x24
PREFETCH_CLOSED = 0x0000_FFF0
Q35_FIRST_INTERRUPT = 20
"""Where PIRQE..PIRQH of the q35 machine arrive at the I/O APIC."""
PIIX_SLOT = 1
PIIX_ROUTE = 0x60
PIIX_INTERRUPTS = (10, 11, 10, 11)
"""Where PIRQA..PIRQD of the pc machine are led; its firmware would have done it."""

IVSHMEM_DOORBELL = 12
IVSHMEM_US = 1
"""Our peer number at the doorbell; QEMU itself is 0."""

DEVICE_SLOT = 4
PORT_SLOT = 12
DOORBELL_SLOT = 20


class _Window:
    """Hands out naturally aligned addresses, rising."""

    def __init__(self, what: str, first: int, end: int) -> None:
        self._what = what
        self._next = first
        self._end = end

    def take(self, size: int) -> int:
        address = -(-self._next // size) * size
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


class _Doorbell:
    """The ivshmem device that turns messages of other devices into eventfds of ours.

    What its server would say is written into the socket before QEMU starts.
    """

    def __init__(self, vectors: int) -> None:
        self.eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(vectors)]
        self.free = list(range(vectors))
        self.address = 0
        shared = os.memfd_create("guestpv-ivshmem", os.MFD_CLOEXEC)
        os.ftruncate(shared, 4096)
        self._server, self._client = socket.socketpair()
        self.fd = self._client.fileno()
        version, own_id = 0, 0
        for number, fd in ((version, None), (own_id, None), (-1, shared)):
            self._say(number, fd)
        for fd in self.eventfds:
            self._say(IVSHMEM_US, fd)
        os.close(shared)

    def _say(self, number: int, fd: int | None) -> None:
        data = number.to_bytes(8, "little", signed=True)
        socket.send_fds(self._server, [data], [] if fd is None else [fd])

    @property
    def options(self) -> list[str]:
        """What QEMU's command line needs; ``fd`` has to be inherited."""
        device = f"ivshmem-doorbell,chardev=doorbell-socket,vectors={len(self.eventfds)}"
        return [
            *("-chardev", f"socket,id=doorbell-socket,fd={self.fd}"),
            *("-device", f"{device},addr={DOORBELL_SLOT:#x}"),
        ]

    def place(self, bar: QtestBar) -> None:
        """Note the address of the doorbell and wait until QEMU has all eventfds."""
        self.address = bar.address + IVSHMEM_DOORBELL
        last = len(self.eventfds) - 1
        # QEMU makes an eventfd blocking when it comes and non-blocking again when it connects it, so poll.
        poll = select.poll()
        poll.register(self.eventfds[last], select.POLLIN)
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            bar.write(IVSHMEM_DOORBELL, 4, self.message(last))
            bar.read(0, 4)
            if poll.poll(1):
                os.eventfd_read(self.eventfds[last])
                return
        raise GuestpvError("the ivshmem doorbell does not ring its eventfds", where="qtest")

    def message(self, vector: int) -> int:
        """Value to write to the doorbell for one of our vectors."""
        return IVSHMEM_US << 16 | vector

    def close(self) -> None:
        for fd in self.eventfds:
            os.close(fd)
        self.eventfds.clear()
        self._server.close()
        self._client.close()


class QtestMachine:
    """A QEMU without a guest and the PCI functions in it.

    Args:
        devices: QEMU's ``-device`` strings, without ``addr`` and ``bus``.
        options: further command line arguments (``-blockdev``, ``-netdev``, ``-object``, ...).
        root_ports: put each device behind a PCI Express root port of its own, which gives it function
            level reset; q35 only.
        vectors: MSI-X vectors that all functions together can have.
        machine, accel, executable, memory, pass_fds, answer_limit: as for ``Qemu``.

    Attributes:
        qemu: the process, with ``ram``, ``qmp``, ``pid``, ``version``.

    Raises:
        UsageError: QEMU refused an option; the message has its own words.
    """

    def __init__(
        self,
        devices: Sequence[str],
        options: Sequence[str] = (),
        *,
        root_ports: bool = False,
        vectors: int = 32,
        machine: str = "q35",
        accel: str = "tcg",
        executable: str = DEFAULT_EXECUTABLE,
        memory: int = 256 << 20,
        pass_fds: Sequence[int] = (),
        answer_limit: float = 5.0,
    ) -> None:
        self.devices = list(devices)
        self.root_ports = root_ports
        self.express = not re.match(r"pc(,|$)|pc-i440fx", machine)
        arguments = list(options)
        for number, device in enumerate(devices):
            if re.search(r",(addr|bus)=", device):
                raise UsageError("qtest: places the device itself; leave addr= and bus= out", where=device)
            place = f"addr={DEVICE_SLOT + number:#x}"
            if root_ports:
                arguments += [
                    "-device",
                    f"pcie-root-port,id=port{number},chassis={number + 1},addr={PORT_SLOT + number:#x}",
                ]
                place = f"bus=port{number},addr=0"
            arguments += ["-device", f"{device},{place}"]
        self._doorbell = _Doorbell(vectors)
        try:
            self.qemu = Qemu(
                arguments + self._doorbell.options,
                machine=machine,
                accel=accel,
                executable=executable,
                memory=memory,
                pass_fds=[*pass_fds, self._doorbell.fd],
                answer_limit=answer_limit,
            )
        except BaseException:
            self._doorbell.close()
            raise
        self.session = QtestSession(self.qemu)
        self._memory = _Window("memory", *MEMORY_WINDOW)
        self._ports = _Window("I/O", *PORT_WINDOW)
        self._handlers: dict[int, list[Callable[[bool], None]]] = {}
        try:
            self._doorbell.place(self.place_bars(0, DOORBELL_SLOT)[0])
        except BaseException:
            self.close()
            raise

    def config_read(self, bus: int, slot: int, offset: int, width: int) -> int:
        """Read 1, 2 or 4 bytes of a function's configuration space, through the ports 0xcf8 and 0xcfc."""
        lines, port = self._config(bus, slot, offset, width)
        return self.session.ask(lines + wire.read_port(port, width), 2).number

    def config_write(self, bus: int, slot: int, offset: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of a function's configuration space."""
        lines, port = self._config(bus, slot, offset, width)
        self.session.ask(lines + wire.write_port(port, width, value), 2)

    @staticmethod
    def _config(bus: int, slot: int, offset: int, width: int) -> tuple[bytes, int]:
        if width not in (1, 2, 4) or offset % width or not 0 <= offset < CONFIG_SIZE:
            raise UsageError(
                f"{width} bytes at {offset:#x}: configuration space is {CONFIG_SIZE} bytes, "
                "accessed by 1, 2 or 4 naturally aligned ones",
                where="qtest",
            )
        address = 1 << 31 | bus << 16 | slot << 11 | offset & 0xFC
        return wire.write_port(CONFIG_ADDRESS_PORT, 4, address), CONFIG_DATA_PORT + offset % 4

    def locate(self, number: int) -> tuple[int, int, _Window | None]:
        """Bus and slot of the ``number``-th device, and the window of the bridge before it.

        A root port is programmed first, so that the device answers.
        """
        if not self.root_ports:
            return 0, DEVICE_SLOT + number, None
        bridge, bus = PORT_SLOT + number, 1 + number
        base = self._memory.take(BRIDGE_WINDOW)
        limit = base + BRIDGE_WINDOW - 1
        self.config_write(0, bridge, CONFIG_PRIMARY_BUS, 4, bus << 16 | bus << 8)
        self.config_write(0, bridge, CONFIG_MEMORY_BASE, 4, limit & 0xFFF0_0000 | base >> 16)
        self.config_write(0, bridge, CONFIG_PREFETCH_BASE, 4, PREFETCH_CLOSED)
        command = spec.COMMAND_MEMORY | spec.COMMAND_BUS_MASTER
        self.config_write(0, bridge, spec.PCI_CONFIG_COMMAND, 2, command)
        return bus, 0, _Window("memory", base, limit + 1)

    def place_bars(self, bus: int, slot: int, window: _Window | None = None) -> dict[int, QtestBar]:
        """Size and place the BARs of a function, by index, and let it decode them.

        Raises:
            GuestpvError: there is no function, or no room.
        """
        if self.config_read(bus, slot, spec.PCI_CONFIG_VENDOR, 2) == 0xFFFF:
            raise GuestpvError(f"there is no PCI function at {bus:02x}:{slot:02x}.0", where="qtest")
        bars: dict[int, QtestBar] = {}
        index = 0
        while index < 6:
            register = spec.PCI_CONFIG_BAR0 + 4 * index
            self.config_write(bus, slot, register, 4, 0xFFFF_FFFF)
            low = self.config_read(bus, slot, register, 4)
            port = bool(low & 1)
            wide = not port and low & 6 == 4
            mask = low & (0xFFFF_FFFC if port else 0xFFFF_FFF0)
            if wide:
                self.config_write(bus, slot, register + 4, 4, 0xFFFF_FFFF)
                mask |= self.config_read(bus, slot, register + 4, 4) << 32
                self.config_write(bus, slot, register + 4, 4, 0)
            if mask:
                size = mask & -mask
                address = (self._ports if port else window or self._memory).take(size)
                self.config_write(bus, slot, register, 4, address)
                bars[index] = QtestBar(self.session, address, size, port)
            index += 2 if wide else 1
        decode = COMMAND_IO | spec.COMMAND_MEMORY | spec.COMMAND_INTX_DISABLE
        self.config_write(bus, slot, spec.PCI_CONFIG_COMMAND, 2, decode)
        return bars

    def intercept(self, bus: int, slot: int, pin: int, handler: Callable[[bool], None]) -> None:
        """Call ``handler`` when the legacy interrupt of a function on ``pin`` (0: INTA) rises or falls.

        It is called by whichever thread saw the change.
        """
        root_slot = slot if bus == 0 else PORT_SLOT + bus - 1
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

    def take_vectors(self, count: int) -> list[int]:
        """Reserve doorbell vectors; their numbers.

        Raises:
            UsageError: there are not so many left.
        """
        free = self._doorbell.free
        if count > len(free):
            raise UsageError(
                f"{count} MSI-X vectors asked for, {len(free)} of {len(self._doorbell.eventfds)} are left",
                where="qtest",
                hint="ask for more when opening: ?vectors=N",
            )
        taken, free[:count] = free[:count], []
        for vector in taken:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._doorbell.eventfds[vector])
        return taken

    def give_vectors(self, vectors: Sequence[int]) -> None:
        """Return doorbell vectors."""
        self._doorbell.free = sorted({*self._doorbell.free, *vectors})

    def message(self, vector: int) -> tuple[int, int, int]:
        """Address, data and eventfd of a doorbell vector."""
        return self._doorbell.address, self._doorbell.message(vector), self._doorbell.eventfds[vector]

    def close(self) -> None:
        """End QEMU. Idempotent."""
        self.session.close()
        try:
            self.qemu.close()
        finally:
            self._doorbell.close()

    def __enter__(self) -> QtestMachine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
