"""Real QEMU devices without a guest, reached through QEMU's qtest socket (scheme ``qtest:``).

Register accesses are lines on a socket. Writes are posted, as they are on a PCI bus: they are carried
out in order, and whoever reads waits for them. MSI-X arrives as real eventfds: the device's messages
are aimed at the doorbell of an ivshmem device, which has no other purpose here. INTx is seen by
intercepting the inputs of the I/O APIC.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ..errors import GuestpvError, UsageError
from ..memory import DmaSpace
from ..spec import pci as spec
from ..wire import qtest as wire
from .capabilities import walk
from .qemu import DEFAULT_EXECUTABLE, Qemu

CONFIG_ADDRESS_PORT = 0xCF8
CONFIG_DATA_PORT = 0xCFC
CONFIG_SIZE = 256
MEMORY_WINDOW = (0xE000_0000, 0xFE00_0000)
PORT_WINDOW = (0xC000, 0x1_0000)
BRIDGE_WINDOW = 2 << 20
POSTED_LIMIT = 64
"""Posted writes without a look at their answers: few enough for both socket buffers."""

COMMAND_IO = 1 << 0
CONFIG_PRIMARY_BUS = 0x18
CONFIG_MEMORY_BASE = 0x20
CONFIG_PREFETCH_BASE = 0x24
PIIX_ROUTE = 0x60
PIIX_INTERRUPTS = (10, 11, 10, 11)
"""Where PIRQA..PIRQD of the pc machine are led; its firmware would have done it."""

EXPRESS_DEVICE_CAPABILITIES = 4
EXPRESS_DEVICE_CONTROL = 8
EXPRESS_FLR_CAPABLE = 1 << 28
EXPRESS_FLR_START = 1 << 15
EXPRESS_FLR_SECONDS = 0.1
MSIX_CONTROL = 2
MSIX_TABLE = 4
MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENTRY = 16

IVSHMEM_DOORBELL = 12
IVSHMEM_US = 1
"""Our peer number at the doorbell; QEMU itself is 0."""

DEVICE_SLOT = 4
PORT_SLOT = 12
DOORBELL_SLOT = 20


class QtestSession:
    """The qtest socket of one QEMU: lines out, answers and interrupts in. Any thread may use it."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu
        self._socket = qemu.qtest
        self.lock = threading.RLock()
        self._partial = b""
        self._outstanding = 0
        self._last = wire.Answer()
        self._doing = "start"
        self._on_interrupt: Callable[[wire.Interrupt], None] | None = None
        self._listener: threading.Thread | None = None
        self._closing = False

    def post(self, lines: bytes, count: int = 1) -> None:
        """Send ``count`` lines without waiting for their answers."""
        with self.lock:
            self._send(lines, count)
            if self._outstanding >= POSTED_LIMIT:
                self._collect()

    def ask(self, lines: bytes, count: int = 1) -> wire.Answer:
        """Send ``count`` lines; returns the answer to the last once all posted ones were answered too.

        Raises:
            TimeLimit: QEMU did not answer in time and was killed.
            DeviceGone: QEMU is not there any more.
            GuestpvError: QEMU did not carry a command out.
        """
        with self.lock:
            self._send(lines, count)
            self._collect()
            return self._last

    def intercept(self, controller: str, handler: Callable[[wire.Interrupt], None]) -> None:
        """Report changes of the input pins of an interrupt controller to ``handler``, in some thread."""
        with self.lock:
            self._on_interrupt = handler
            self.ask(wire.intercept_inputs(controller))
        self._listener = threading.Thread(target=self._listen, name="guestpv-qtest", daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Stop listening."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._listener is not None:
            self._listener.join()

    def _send(self, lines: bytes, count: int) -> None:
        self._qemu.check()
        self._doing = lines.decode().strip().replace("\n", "; ")
        try:
            self._socket.sendall(lines)
        except BlockingIOError:
            raise self._qemu.stuck(self._doing) from None
        except OSError as error:
            raise self._qemu.died(self._doing) from error
        self._outstanding += count

    def _collect(self) -> None:
        while self._outstanding:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                raise self._qemu.stuck(self._doing) from None
            except OSError as error:
                raise self._qemu.died(self._doing) from error
            if not data:
                raise self._qemu.died(self._doing)
            self._take(data)
        self._qemu.answered = True

    def _take(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            message = wire.parse(line)
            if isinstance(message, wire.Interrupt):
                if self._on_interrupt is not None:
                    self._on_interrupt(message)
                continue
            self._outstanding -= 1
            if isinstance(message, wire.Failure):
                raise GuestpvError(
                    f"{self._qemu.name} refused `{self._doing}`: {message.reason}", where="qtest"
                )
            self._last = message

    def _listen(self) -> None:
        """Take interrupts that come while nobody waits for an answer."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while not self._closing:
            poll.poll()
            with self.lock:
                try:
                    data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                self._take(data)


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
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            bar.write(IVSHMEM_DOORBELL, 4, self.message(last))
            bar.read(0, 4)
            with contextlib.suppress(BlockingIOError):
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
        self._pins: dict[int, list[QtestFunction]] = {}
        self._intercepted = False
        try:
            doorbell = QtestFunction(self, "ivshmem-doorbell", 0, DOORBELL_SLOT)
            self._doorbell.place(doorbell.bar(0))
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

    def function(self, number: int = 0) -> QtestFunction:
        """The function of the ``number``-th device, with its BARs placed."""
        name = "qtest:" + self.devices[number].split(",")[0]
        if not self.root_ports:
            return QtestFunction(self, name, 0, DEVICE_SLOT + number)
        bridge, bus = PORT_SLOT + number, 1 + number
        base = self._memory.take(BRIDGE_WINDOW)
        limit = base + BRIDGE_WINDOW - 1
        self.config_write(0, bridge, CONFIG_PRIMARY_BUS, 4, bus << 16 | bus << 8)
        self.config_write(0, bridge, CONFIG_MEMORY_BASE, 4, limit & 0xFFF00000 | base >> 16)
        self.config_write(0, bridge, CONFIG_PREFETCH_BASE, 4, 0x0000_FFF0)
        command = spec.COMMAND_MEMORY | spec.COMMAND_BUS_MASTER
        self.config_write(0, bridge, spec.PCI_CONFIG_COMMAND, 2, command)
        return QtestFunction(self, name, bus, 0, window=_Window("memory", base, limit + 1))

    def place(self, size: int, port: bool) -> int:
        """An address for a BAR on the root bus."""
        return (self._ports if port else self._memory).take(size)

    def intercept(self, function: QtestFunction, pin: int) -> None:
        """Report the legacy interrupt of a function on ``pin`` (0 is INTA) to its ``line_changed``."""
        slot = function.slot if function.bus == 0 else PORT_SLOT + function.bus - 1
        line = 20 + (slot + pin) % 4 if self.express else PIIX_INTERRUPTS[(slot + pin - 1) % 4]
        self._pins.setdefault(line, []).append(function)
        if self._intercepted:
            return
        if not self.express:
            for route, interrupt in enumerate(PIIX_INTERRUPTS):
                self.config_write(0, 1, PIIX_ROUTE + route, 1, interrupt)
        self.session.intercept("ioapic", self._line_changed)
        self._intercepted = True

    def _line_changed(self, interrupt: wire.Interrupt) -> None:
        for function in self._pins.get(interrupt.line, ()):
            function.line_changed(interrupt.raised)

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
        self.qemu.close()
        self._doorbell.close()

    def __enter__(self) -> QtestMachine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class QtestFunction:
    """A PCI function of a ``QtestMachine``; see ``PciFunction``.

    As the kernel does for VFIO, it decodes memory and ports but has neither bus mastering nor INTx
    enabled until its owner says so.
    """

    translated = False

    def __init__(
        self,
        machine: QtestMachine,
        name: str,
        bus: int,
        slot: int,
        *,
        window: _Window | None = None,
        owns_machine: bool = False,
    ) -> None:
        self.machine = machine
        self.name = name
        self.bus = bus
        self.slot = slot
        self.dma: DmaSpace = machine.qemu.ram
        self.owns_machine = owns_machine
        self._bars: dict[int, QtestBar] = {}
        self._vectors: list[int] = []
        self._intx_fd = -1
        self._intx_raised = False
        self._intx_masked = True
        self._intx_known = False
        if self.config_read(spec.PCI_CONFIG_VENDOR, 2) == 0xFFFF:
            raise GuestpvError(f"there is no PCI function at {bus:02x}:{slot:02x}.0", where=name)
        self._place_bars(window)
        self._msix = next((at for at, kind in walk(self.config_read) if kind == spec.PCI_CAP_MSIX), 0)

    def _place_bars(self, window: _Window | None) -> None:
        index = 0
        while index < 6:
            register = spec.PCI_CONFIG_BAR0 + 4 * index
            self.config_write(register, 4, 0xFFFF_FFFF)
            low = self.config_read(register, 4)
            port = bool(low & 1)
            wide = not port and low & 6 == 4
            mask = low & (0xFFFF_FFFC if port else 0xFFFF_FFF0)
            if wide:
                self.config_write(register + 4, 4, 0xFFFF_FFFF)
                mask |= self.config_read(register + 4, 4) << 32
                self.config_write(register + 4, 4, 0)
            if mask:
                size = mask & -mask
                address = window.take(size) if window and not port else self.machine.place(size, port)
                self.config_write(register, 4, address)
                self._bars[index] = QtestBar(self.machine.session, address, size, port)
            index += 2 if wide else 1
        decode = COMMAND_IO | spec.COMMAND_MEMORY | spec.COMMAND_INTX_DISABLE
        self.config_write(spec.PCI_CONFIG_COMMAND, 2, decode)

    def config_read(self, offset: int, width: int) -> int:
        """Read 1, 2 or 4 bytes of PCI configuration space."""
        return self.machine.config_read(self.bus, self.slot, offset, width)

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of PCI configuration space."""
        self.machine.config_write(self.bus, self.slot, offset, width, value)

    def bar(self, index: int) -> QtestBar:
        """The window of BAR ``index``.

        Raises:
            UsageError: the function has no such BAR.
        """
        if index not in self._bars:
            raise UsageError(f"the function has BARs {sorted(self._bars)}, not {index}", where=self.name)
        return self._bars[index]

    @property
    def msix_vectors(self) -> int:
        """Size of the MSI-X table, 0 without MSI-X."""
        return (self.config_read(self._msix + MSIX_CONTROL, 2) & 0x7FF) + 1 if self._msix else 0

    def enable_msix(self, count: int) -> list[int]:
        """Enable ``count`` vectors; returns one eventfd each, which belong to the machine.

        Raises:
            UsageError: the function has fewer, or the machine has fewer left.
        """
        self.disable_interrupts()
        if not 0 < count <= self.msix_vectors:
            raise UsageError(f"{count} MSI-X vectors of {self.msix_vectors}", where=self.name)
        control = self.config_read(self._msix + MSIX_CONTROL, 2)
        where = self.config_read(self._msix + MSIX_TABLE, 4)
        table, start = self.bar(where & 7), where & ~7
        self._vectors = self.machine.take_vectors(count)
        self.config_write(self._msix + MSIX_CONTROL, 2, control | MSIX_ENABLE | MSIX_FUNCTION_MASK)
        eventfds = []
        for entry, vector in enumerate(self._vectors):
            address, data, eventfd = self.machine.message(vector)
            words = (address & 0xFFFF_FFFF, address >> 32, data, 0)
            for number, word in enumerate(words):
                table.write(start + entry * MSIX_ENTRY + 4 * number, 4, word)
            eventfds.append(eventfd)
        self.config_write(self._msix + MSIX_CONTROL, 2, control & ~MSIX_FUNCTION_MASK | MSIX_ENABLE)
        return eventfds

    def enable_intx(self) -> int:
        """Enable the legacy interrupt; returns its eventfd. It is masked at each event.

        Raises:
            UsageError: the function has no interrupt pin.
        """
        self.disable_interrupts()
        pin = self.config_read(spec.PCI_CONFIG_INTERRUPT_PIN, 1)
        if not pin:
            raise UsageError("the function has no interrupt pin", where=self.name)
        if not self._intx_known:
            self.machine.intercept(self, pin - 1)
            self._intx_known = True
        self._intx_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._command(clear=spec.COMMAND_INTX_DISABLE)
        self.unmask_intx()
        return self._intx_fd

    def line_changed(self, raised: bool) -> None:
        """Take a change of the function's interrupt line; called by whichever thread saw it."""
        self._intx_raised = raised
        if raised and not self._intx_masked:
            self._intx_masked = True
            os.eventfd_write(self._intx_fd, 1)

    def unmask_intx(self) -> None:
        """Let the next legacy interrupt through, after the ISR was read; a line still raised is one."""
        with self.machine.session.lock:
            self._intx_masked = False
            self.line_changed(self._intx_raised)

    def disable_interrupts(self) -> None:
        """Take the eventfds away from the function."""
        if self._vectors:
            control = self.config_read(self._msix + MSIX_CONTROL, 2)
            self.config_write(self._msix + MSIX_CONTROL, 2, control & ~MSIX_ENABLE)
            self.machine.give_vectors(self._vectors)
            self._vectors = []
        if self._intx_fd >= 0:
            self._command(set=spec.COMMAND_INTX_DISABLE)
            with self.machine.session.lock:
                self._intx_masked = True
                os.close(self._intx_fd)
                self._intx_fd = -1

    def _command(self, *, set: int = 0, clear: int = 0) -> None:
        command = self.config_read(spec.PCI_CONFIG_COMMAND, 2)
        self.config_write(spec.PCI_CONFIG_COMMAND, 2, command & ~clear | set)

    def reset(self) -> bool:
        """Function level reset; BARs and command register are put back as they were.

        Returns False where the function has none: QEMU's have one behind a root port only.
        """
        express = next((at for at, kind in walk(self.config_read) if kind == spec.PCI_CAP_EXPRESS), 0)
        if not express:
            return False
        if not self.config_read(express + EXPRESS_DEVICE_CAPABILITIES, 4) & EXPRESS_FLR_CAPABLE:
            return False
        self.disable_interrupts()
        command = self.config_read(spec.PCI_CONFIG_COMMAND, 2)
        control = self.config_read(express + EXPRESS_DEVICE_CONTROL, 2)
        self.config_write(express + EXPRESS_DEVICE_CONTROL, 2, control | EXPRESS_FLR_START)
        time.sleep(EXPRESS_FLR_SECONDS)
        for index, bar in self._bars.items():
            self.config_write(spec.PCI_CONFIG_BAR0 + 4 * index, 4, bar.address)
        self.config_write(spec.PCI_CONFIG_COMMAND, 2, command)
        return True

    def request_fd(self) -> None:
        """None: nobody else wants the function."""

    def error_fd(self) -> None:
        """None: the root port's error reporting is not set up."""

    def close(self) -> None:
        """End the machine if it was started for this function alone. Idempotent."""
        if self.owns_machine:
            self.machine.close()


PARAMETERS = (
    "blockdev, netdev, object, chardev, machine, accel, qemu, memory, vectors, root_port, answer_limit"
)


def open_function(body: str, params: Mapping[str, str]) -> QtestFunction:
    """Start a QEMU for one device: ``qtest:virtio-blk-pci,packed=on?blockdev=driver=null-co,size=1048576``.

    Args:
        body: QEMU's ``-device`` string, without ``addr`` and ``bus``: ``virtio-net-pci,packed=on``. On the
            root bus a virtio device is transitional unless it says ``disable-legacy=on``.
        params:
            ``blockdev``, ``netdev``, ``object``, ``chardev``: QEMU's option of that name. Without
            ``node-name`` or ``id`` it gets one, and the device is attached to it by its property
            ``drive``, ``netdev``, ``iothread`` (an ``object=iothread``), ``rng`` (an ``object=rng-...``) or
            ``chardev``, unless the body has that property.
            ``machine``: ``q35`` (default) or ``pc`` or a versioned one. ``accel``: ``tcg`` (default).
            ``qemu``: path of qemu-system-x86_64. ``memory``: MiB of guest RAM (256).
            ``vectors``: MSI-X vectors that can be enabled (32). ``root_port=1``: behind a PCI Express root
            port, which gives it function level reset. ``answer_limit``: seconds until a QEMU that does not
            answer is killed (5).

    Raises:
        UsageError: a parameter does not exist or has no sense, QEMU is missing, or it refused an option
            (its own words are in the message).
        Refused: QEMU is older than 7.2, or ``accel=kvm``.
    """
    left = dict(params)
    device = body
    options: list[str] = []
    for option, naming, prop in (
        ("blockdev", "node-name", "drive"),
        ("netdev", "id", "netdev"),
        ("object", "id", ""),
        ("chardev", "id", "chardev"),
    ):
        text = left.pop(option, None)
        if text is None:
            continue
        if option == "object":
            prop = "iothread" if text.startswith("iothread") else "rng" if text.startswith("rng-") else ""
        named = re.search(rf",{naming}=([^,]+)", f",{text}")
        name = named[1] if named else f"{option}0"
        options += [f"-{option}", text if named else f"{text},{naming}={name}"]
        if prop and f",{prop}=" not in device:
            device += f",{prop}={name}"
    machine, accel = left.pop("machine", "q35"), left.pop("accel", "tcg")
    executable = left.pop("qemu", DEFAULT_EXECUTABLE)
    memory, vectors = _number(left, "memory", 256), _number(left, "vectors", 32)
    root_port, answer_limit = _number(left, "root_port", 0), _number(left, "answer_limit", 5)
    if left:
        raise UsageError(f"qtest: has no parameter {sorted(left)[0]}", hint=f"it has {PARAMETERS}")
    if not device.split(",")[0]:
        raise UsageError("qtest: needs a device, such as qtest:virtio-rng-pci")
    opened = QtestMachine(
        [device],
        options,
        root_ports=bool(root_port),
        vectors=vectors,
        machine=machine,
        accel=accel,
        executable=executable,
        memory=memory << 20,
        answer_limit=answer_limit,
    )
    try:
        function = opened.function()
    except BaseException:
        opened.close()
        raise
    function.owns_machine = True
    return function


def _number(params: dict[str, str], name: str, default: int) -> int:
    text = params.pop(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"qtest: {name}={text} is not a number")
    return int(text)
