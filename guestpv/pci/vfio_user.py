"""A PCI function behind a vfio-user server (``vfio-user:``): registers by message, memory by descriptor."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, TypeVar

import numpy as np

from ..core._core import lib
from ..errors import DeviceGone, GuestpvError, TimeLimit, UsageError
from ..memory import DmaRegion, Segment
from ..spec import pci as spec
from ..system import PAGE_SIZE, SYSTEM
from ..wire import unix
from ..wire import vfio_user as wire
from ..wire.stream import ProtocolError, close_all
from ..wire.vfio_user import Channel, DmaFlag, Exchange, IrqFlag, IrqSetFlag, Message
from .capabilities import walk

FIRST_ADDRESS: Final = 1 << 36
"""Bus address of the first region: neither a CPU address nor an offset can be taken for one."""
DEFAULT_TIMEOUT: Final = 10.0
MSIX_CONTROL: Final = 2
MSIX_ENABLE: Final = 1 << 15
MSIX_FUNCTION_MASK: Final = 1 << 14

_READ: Final[dict[int, Any]] = {1: lib.gpv_read8, 2: lib.gpv_read16, 4: lib.gpv_read32}
_WRITE: Final[dict[int, Any]] = {1: lib.gpv_write8, 2: lib.gpv_write16, 4: lib.gpv_write32}

Q = TypeVar("Q")
A = TypeVar("A")


class CommandRefused(GuestpvError):
    """The server answered a command with an error.

    Attributes:
        errno: the server's reason, 0 where it gave none.
    """

    def __init__(self, command: wire.Command, number: int, where: str) -> None:
        reason = os.strerror(number) if number else "no reason given"
        super().__init__(f"the server refused {command.name}: {reason}", where=where)
        self.errno = number


class Session:
    """One connection to a server: a command, then its reply, from any thread.

    Args:
        path: the server's socket.
        timeout: seconds that the server has for each answer.

    Attributes:
        max_fds: descriptors that the server takes in one message.

    Raises:
        UsageError: it cannot be a socket's path.
        GuestpvError: nobody listens there.
        AccessDenied: no permission.
        ProtocolError: who listens speaks something else.
    """

    def __init__(self, path: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.name = f"vfio-user:{path}"
        self._lock = threading.Lock()
        self._id = 0
        self._channel: Channel | None = Channel(
            unix.connect(
                path,
                self.name,
                timeout,
                server="the server",
                start=f"guestpv serve vfio-user:{path} --device rng",
            ),
            self.name,
            timeout,
        )
        try:
            version = self._greet()
        except BaseException:
            self.close()
            raise
        self.max_fds = min(max(_limit(version, "max_msg_fds", 1), 1), wire.MAX_FDS)

    def _greet(self) -> wire.Version:
        ours = {"max_msg_fds": wire.MAX_FDS, "max_data_xfer_size": wire.MAX_DATA, "pgsizes": PAGE_SIZE}
        try:
            version, _ = self.call(wire.VERSION, wire.Version(wire.MAJOR, wire.MINOR, ours))
        except DeviceGone as error:
            raise DeviceGone(
                "the server hung up instead of answering: it serves somebody else, or is no vfio-user server",
                where=self.name,
            ) from error
        if version.major != wire.MAJOR or version.minor > wire.MINOR:
            raise ProtocolError(
                f"the server answers with protocol version {version.major}.{version.minor}, "
                f"{wire.MAJOR}.{wire.MINOR} was proposed",
                where=self.name,
            )
        return version

    def call(self, exchange: Exchange[Q, A], value: Q, fds: Sequence[int] = ()) -> tuple[A, tuple[int, ...]]:
        """Send a command and wait for its reply.

        Returns:
            What the reply carries, and the descriptors that came with it, owned by the caller.

        Raises:
            CommandRefused: the server answered with an error.
            DeviceGone: the server is gone, or was given up before.
            TimeLimit: no answer in time; the connection is given up.
            ProtocolError: the answer makes no sense; the connection is given up.
        """
        command = exchange.command
        with self._lock:
            if self._channel is None:
                raise DeviceGone("the connection is closed", where=self.name)
            self._id = (self._id + 1) & 0xFFFF
            try:
                self._channel.send(Message(self._id, command, exchange.sends.pack(value), tuple(fds)))
                reply = self._reply(self._channel)
                answer = self._decoded(exchange, reply)
            except (DeviceGone, TimeLimit, ProtocolError) as error:
                self._hang_up()
                error.hint = error.hint or f"while it was asked for {command.name}"
                raise
        if answer is None:
            raise CommandRefused(command, reply.errno, self.name)
        return answer, reply.fds

    def _reply(self, channel: Channel) -> Message:
        """The next reply; the server's own commands are refused: all memory is shared with it."""
        while not (message := channel.receive()).is_reply:
            message.close_fds()
            if message.wants_reply:
                channel.send(message.refuse(errno.ENOTSUP))
        return message

    def _decoded(self, exchange: Exchange[Q, A], reply: Message) -> A | None:
        """What a reply carries; None where it says that the command failed."""
        try:
            if (reply.id, reply.command) != (self._id, exchange.command):
                raise ProtocolError(
                    f"the answer to {exchange.command.name} number {self._id} is one to command "
                    f"{reply.command} number {reply.id}",
                    where=self.name,
                )
            if len(reply.fds) > exchange.answer_fds:
                raise ProtocolError(
                    f"{len(reply.fds)} descriptors came with the answer to {exchange.command.name}",
                    where=self.name,
                )
            if not reply.failed:
                return exchange.answers.unpack(reply.payload)
        except ProtocolError:
            reply.close_fds()
            raise
        reply.close_fds()
        return None

    def _hang_up(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """End the connection. Idempotent."""
        with self._lock:
            self._hang_up()


def _limit(version: wire.Version, key: str, default: int) -> int:
    value = version.capabilities.get(key, default)
    if not isinstance(value, int):
        raise ProtocolError(f"the server says {key} is {value!r}, which is no number")
    return value


class VfioUserMemory:
    """A ``DmaSpace`` of memfds that the server maps, at bus addresses of our choosing.

    A region that was taken away keeps its memory for as long as somebody holds a view of it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._next = FIRST_ADDRESS

    def map(self, size: int) -> DmaRegion:
        """Hand out ``size`` bytes, rounded up to pages, zeroed.

        Raises:
            GuestpvError: the kernel gives no memory, or the server refuses the mapping.
            DeviceGone: the server is gone.
        """
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        with ExitStack() as undo:
            try:
                fd = os.memfd_create("guestpv", os.MFD_CLOEXEC)
                undo.callback(os.close, fd)
                os.ftruncate(fd, size)
                memory = mmap.mmap(fd, size)
            except OSError as error:
                raise GuestpvError(
                    f"no shared memory of {size} bytes: {error.strerror}",
                    where=self._session.name,
                    hint="ulimit -v; cat /sys/fs/cgroup/memory.max",
                ) from None
            address = self._next
            flags = DmaFlag.READ | DmaFlag.WRITE
            self._session.call(
                wire.DMA_MAP, wire.DmaMap(wire.DMA_MAP_FORM.size, flags, 0, address, size), [fd]
            )
        self._next += 2 * size
        array = np.frombuffer(memory, dtype=np.uint8)
        return DmaRegion(array, (Segment(address, size),), int(array.ctypes.data), memory)

    def unmap(self, region: DmaRegion) -> None:
        """Take the region from the server; one that is gone has lost it already."""
        with contextlib.suppress(DeviceGone):
            for segment in region.segments:
                unmap = wire.DmaUnmap(wire.DMA_UNMAP_FORM.size, 0, segment.address, segment.length)
                self._session.call(wire.DMA_UNMAP, unmap)


class VfioUserBar:
    """A BAR: mapped where the server offers all of it, else each access is a message.

    Attributes:
        size: bytes.
        pointer: CPU address, 0 where it is not mapped.
    """

    def __init__(self, session: Session, index: int, info: wire.RegionInfo, fd: int | None) -> None:
        self._session = session
        self._name = f"{session.name} BAR {index}"
        self._index = index
        self.size = info.size
        self.pointer = 0
        self._unmap: Any = None
        if fd is not None and wire.covered(info):
            self.pointer = SYSTEM.mmap(info.size, fd=fd, offset=info.offset)
            self._unmap = weakref.finalize(self, SYSTEM.munmap, self.pointer, info.size)

    def read(self, offset: int, width: int) -> int:
        """One access of ``width`` 1, 2 or 4 bytes.

        Raises:
            UsageError: there is no such register.
            DeviceGone: the server is gone.
        """
        self._check(offset, width)
        if self.pointer:
            return int(_READ[width](self.pointer + offset))
        return read_region(self._session, self._index, offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        """One access of ``width`` 1, 2 or 4 bytes; as a message it is done when this returns."""
        self._check(offset, width)
        if self.pointer:
            _WRITE[width](self.pointer + offset, value)
            return
        write_region(self._session, self._index, offset, width, value)

    def _check(self, offset: int, width: int) -> None:
        if width not in _READ or offset % width or not 0 <= offset <= self.size - width:
            raise UsageError(
                f"no {width}-byte register at offset {offset:#x} of {self.size:#x}", where=self._name
            )

    def close(self) -> None:
        """Take the mapping out of the process; later accesses are messages to a closed connection."""
        self.pointer = 0
        if self._unmap is not None:
            self._unmap()


def read_region(session: Session, region: int, offset: int, width: int) -> int:
    """One read of a region.

    Raises:
        ProtocolError: the server answered with another number of bytes.
    """
    answer, _ = session.call(wire.REGION_READ, wire.RegionAccess(offset, region, width))
    if len(answer.data) != width:
        raise ProtocolError(
            f"{len(answer.data)} bytes came where {width} were read from region {region}", where=session.name
        )
    return int.from_bytes(answer.data, "little")


def write_region(session: Session, region: int, offset: int, width: int, value: int) -> None:
    """One write to a region; the device has seen it when this returns."""
    access = wire.RegionAccess(offset, region, width, value.to_bytes(width, "little"))
    session.call(wire.REGION_WRITE, access)


class VfioUserFunction:
    """A PCI function behind a vfio-user server; see ``PciFunction``.

    The server knows no memory but what it was told of, so the addresses it is told are physical ones to it.

    Args:
        path: the server's socket.
        timeout: seconds that the server has for each answer.

    Attributes:
        session: the connection to the server.

    Raises:
        ProtocolError: who listens does not speak vfio-user.
        GuestpvError: nobody listens there, or what it serves is no PCI device.
    """

    translated = False

    def __init__(self, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.session = Session(path, timeout)
        self.name = self.session.name
        self._bars: dict[int, VfioUserBar] = {}
        self._events: dict[int, list[int]] = {}
        self._closed = False
        try:
            self._info, _ = self.session.call(wire.GET_INFO, wire.DeviceInfo(wire.DEVICE_INFO_FORM.size))
            if not self._info.flags & wire.DeviceFlag.PCI:
                raise GuestpvError("what it serves is no PCI device", where=self.name)
        except BaseException:
            self.session.close()
            raise
        self.dma = VfioUserMemory(self.session)

    def config_read(self, offset: int, width: int) -> int:
        """Read 1, 2 or 4 bytes of PCI configuration space."""
        return read_region(self.session, wire.CONFIG_REGION, offset, width)

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of PCI configuration space."""
        write_region(self.session, wire.CONFIG_REGION, offset, width, value)

    def bar(self, index: int) -> VfioUserBar:
        """The window of BAR ``index``, asked for at the first call.

        Raises:
            UsageError: the function does not have it.
        """
        if index not in self._bars:
            if not wire.BAR0_REGION <= index <= wire.BAR5_REGION:
                raise UsageError(f"a PCI function has BARs 0 to 5, not {index}", where=self.name)
            question = wire.RegionInfo(wire.MAX_DATA, index=index)
            info, fds = self.session.call(wire.GET_REGION_INFO, question)
            try:
                if not info.size:
                    raise UsageError(f"it has no BAR {index}", where=self.name)
                self._bars[index] = VfioUserBar(self.session, index, info, fds[0] if fds else None)
            finally:
                close_all(fds)
        return self._bars[index]

    # Interrupts

    @property
    def msix_vectors(self) -> int:
        """Number of MSI-X vectors, 0 where the function has no MSI-X."""
        return self._irq(wire.MSIX).count

    def enable_msix(self, count: int) -> list[int]:
        """Enable ``count`` vectors; returns one eventfd each, owned by the function.

        Raises:
            UsageError: there are not so many.
        """
        self.disable_interrupts()
        if not 0 < count <= self.msix_vectors:
            raise UsageError(f"{count} of {self.msix_vectors} MSI-X vectors", where=self.name)
        fds = self._arm(wire.MSIX, count)
        self._msix_control(MSIX_ENABLE)
        return fds

    def enable_intx(self) -> int:
        """Enable the legacy interrupt; returns its eventfd. It is masked at each event.

        Raises:
            UsageError: the function has none.
        """
        self.disable_interrupts()
        irq = self._irq(wire.INTX)
        if not irq.count or not irq.flags & IrqFlag.AUTOMASKED:
            raise UsageError("the function has no legacy interrupt", where=self.name)
        self._command(clear=spec.COMMAND_INTX_DISABLE)
        return self._arm(wire.INTX, 1)[0]

    def unmask_intx(self) -> None:
        """Let the next legacy interrupt through, after the ISR was read."""
        self._set_irqs(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK, wire.INTX, 0, 1)

    def disable_interrupts(self) -> None:
        """Take the eventfds of MSI-X or INTx away and close them; a server that is gone lost them already."""
        with contextlib.suppress(DeviceGone):
            for index in self._events.keys() & {wire.MSIX, wire.INTX}:
                self._set_irqs(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_TRIGGER, index, 0, 0)
                if index == wire.MSIX:
                    self._msix_control(0)
        for index in (wire.MSIX, wire.INTX):
            close_all(self._events.pop(index, ()))

    def request_fd(self) -> int | None:
        """Eventfd that asks the owner to let go of the function, if the server has one."""
        return self._single(wire.REQ)

    def error_fd(self) -> int | None:
        """Eventfd of an unrecoverable error, if the server has one."""
        return self._single(wire.ERR)

    def _single(self, index: int) -> int | None:
        if index not in self._events:
            if not self._irq(index).count:
                return None
            self._arm(index, 1)
        return self._events[index][0]

    def _irq(self, index: int) -> wire.IrqInfo:
        """What the server says about a kind of interrupt; a count of 0 where it does not know it."""
        question = wire.IrqInfo(wire.IRQ_INFO_FORM.size, index=index)
        if index >= self._info.num_irqs:
            return question
        try:
            return self.session.call(wire.GET_IRQ_INFO, question)[0]
        except CommandRefused:
            return question

    def _arm(self, index: int, count: int) -> list[int]:
        fds = [SYSTEM.eventfd() for _ in range(count)]
        try:
            step = self.session.max_fds
            for start in range(0, count, step):
                part = fds[start : start + step]
                flags = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
                self._set_irqs(flags, index, start, len(part), part)
        except BaseException:
            close_all(fds)
            raise
        self._events[index] = fds
        return list(fds)

    def _set_irqs(self, flags: int, index: int, start: int, count: int, fds: Sequence[int] = ()) -> None:
        action = wire.IrqSet(wire.IRQ_SET_FORM.size, flags, index, start, count)
        self.session.call(wire.SET_IRQS, action, fds)

    def _msix_control(self, enable: int) -> None:
        """Enable MSI-X in configuration space too: some servers look at it."""
        for at, kind in walk(self.config_read):
            if kind == spec.PCI_CAP_MSIX:
                control = self.config_read(at + MSIX_CONTROL, 2) & ~(MSIX_ENABLE | MSIX_FUNCTION_MASK)
                self.config_write(at + MSIX_CONTROL, 2, control | enable)

    def _command(self, *, clear: int) -> None:
        command = self.config_read(spec.PCI_CONFIG_COMMAND, 2)
        self.config_write(spec.PCI_CONFIG_COMMAND, 2, command & ~clear)

    # Reset and the end

    def reset(self) -> bool:
        """Reset the function; its command register is afterwards as before.

        Returns False where the server has no reset. A function whose server is gone is as good as reset.
        """
        if not self._info.flags & wire.DeviceFlag.RESET:
            return False
        with contextlib.suppress(DeviceGone):
            command = self.config_read(spec.PCI_CONFIG_COMMAND, 2)
            self.session.call(wire.RESET, wire.Nothing())
            self.config_write(spec.PCI_CONFIG_COMMAND, 2, command)
        return True

    def close(self) -> None:
        """End the connection: the server forgets our memory and eventfds. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as every:
            every.callback(close_all, [fd for fds in self._events.values() for fd in fds])
            every.callback(self.session.close)
            for bar in self._bars.values():
                every.callback(bar.close)


def open_function(body: str, params: Mapping[str, str]) -> VfioUserFunction:
    """The function that ``vfio-user:/run/device.sock`` names.

    Args:
        body: path of the server's socket.
        params: ``timeout``: seconds that the server has for each answer (10).

    Raises:
        UsageError: a parameter does not exist or has no sense.
        GuestpvError: nobody listens there.
    """
    left = dict(params)
    text = left.pop("timeout", str(DEFAULT_TIMEOUT))
    if left:
        raise UsageError(f"vfio-user: has no parameter {sorted(left)[0]}", hint="it has timeout")
    try:
        timeout = float(text)
    except ValueError:
        timeout = 0.0
    if not 0 < timeout < float("inf"):
        raise UsageError(f"vfio-user: timeout={text} is no number of seconds")
    return VfioUserFunction(body, timeout=timeout)
