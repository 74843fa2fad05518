"""A vfio-user server: any model of ``devices`` behind a UNIX socket, as a whole virtio PCI function.

QEMU 10.1 and later attach it to a guest (``-device vfio-user-pci``). Registers come as messages, guest memory
and interrupts as descriptors. A client's end is the function's power-off: the next one finds it fresh.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from errno import EINVAL, ENOTSUP
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qsl

from ..devices.function import SoftwareFunction
from ..devices.loopback import open_function
from ..devices.pciconfig import SIZE as CONFIG_SIZE
from ..errors import DeviceGone, GuestpvError, UsageError
from ..spec import features as ft
from ..spec import pci
from ..system import PAGE_SIZE, SYSTEM
from ..wire import vfio_user as wire
from ..wire.stream import ProtocolError, close_all
from ..wire.vfio_user import (
    EXCHANGES,
    Channel,
    Command,
    DeviceFlag,
    DeviceInfo,
    DmaFlag,
    DmaMap,
    DmaUnmap,
    Exchange,
    IrqInfo,
    IrqSet,
    Message,
    RegionAccess,
    RegionFlag,
    RegionInfo,
    Version,
)
from .vfio_user_interrupts import ClientInterrupts, Wishes
from .vfio_user_memory import ADDRESSES, MAX_MAPS, ClientMemory, Objection

MESSAGE_SECONDS: Final = 5.0
"""What a client has to finish a message that it began, or to take an answer."""
QUIET_SECONDS: Final = 0.05
"""After so long without a message a hypervisor is taken to have mapped all the memory it meant to."""
LIMITS: Final = {
    "max_msg_fds": wire.MAX_FDS,
    "max_data_xfer_size": wire.MAX_DATA,
    "max_dma_maps": MAX_MAPS,
    "pgsizes": PAGE_SIZE,
}

Handler = Callable[[Any, list[int]], object]
"""Takes a command's payload and its descriptors, of which it removes those it keeps; returns the answer's."""


class Connection:
    """One client.

    Args:
        function: what it uses.
        channel: the connected socket, owned from here on.
        tell: called with what a person may want to know.

    Attributes:
        interrupts: the client's eventfds.
    """

    def __init__(self, function: SoftwareFunction, channel: Channel, tell: Callable[[str], None]) -> None:
        self.function = function
        self.channel = channel
        self._tell = tell
        self._memory = ClientMemory(function)
        self._greeted = False
        self.interrupts = ClientInterrupts(function)
        self._handlers: dict[int, Handler] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
        }

    def serve(self) -> None:
        """Receive one command and carry it out.

        Raises:
            DeviceGone: the client closed the connection.
            GuestpvError: the connection cannot go on.
        """
        message = self.channel.receive()
        fds = list(message.fds)
        try:
            if message.is_reply:
                raise ProtocolError("a reply came, but nothing was asked", where=self.channel.name)
            reply = self._carry_out(message, fds)
        finally:
            close_all(fds)
        if message.wants_reply:
            self.channel.send(reply)

    def _carry_out(self, message: Message, fds: list[int]) -> Message:
        exchange = EXCHANGES.get(message.command)
        if not self._greeted and exchange is not wire.VERSION:
            raise ProtocolError(f"command {message.command} came before VERSION", where=self.channel.name)
        if exchange is None:
            return message.refuse(ENOTSUP)
        if exchange not in (wire.DMA_MAP, wire.DMA_UNMAP):
            self.resume()
        try:
            return message.answer(self._answer(exchange, message.payload, fds))
        except (Objection, ProtocolError) as error:
            self._tell(f"{exchange.command.name} refused: {error}")
            if not self._greeted:
                raise ProtocolError(str(error), where=self.channel.name) from None
            return message.refuse(error.errno if isinstance(error, Objection) else EINVAL)

    def _answer(self, exchange: Exchange[Any, Any], payload: bytes, fds: list[int]) -> bytes:
        low, high = exchange.fds
        if not low <= len(fds) <= high:
            raise Objection(EINVAL, f"it came with {len(fds)} descriptors")
        question = exchange.sends.unpack(payload)
        return exchange.answers.pack(self._handlers[exchange.command](question, fds))

    def _version(self, asked: Version, fds: list[int]) -> Version:
        if self._greeted or asked.major != wire.MAJOR:
            raise Objection(
                EINVAL, f"version {asked.major}.{asked.minor}; spoken is {wire.MAJOR}.{wire.MINOR}"
            )
        self._greeted = True
        ours = {name: value for name, value in LIMITS.items() if name in asked.capabilities}
        return Version(wire.MAJOR, min(asked.minor, wire.MINOR), ours)

    # Memory

    def _dma_map(self, asked: DmaMap, fds: list[int]) -> wire.Nothing:
        if not asked.flags & DmaFlag.READ:
            raise Objection(EINVAL, "memory that cannot be read")
        writable = bool(asked.flags & DmaFlag.WRITE)
        self._memory.map(asked.address, asked.size, asked.offset, writable, fds[0] if fds else None)
        return wire.Nothing()

    def _dma_unmap(self, asked: DmaUnmap, fds: list[int]) -> DmaUnmap:
        everything = asked.flags & wire.UnmapFlag.ALL
        start, size = (0, ADDRESSES) if everything else (asked.address, asked.size)
        for index in self._memory.unmap(start, size):
            self._tell(f"queue {index} stopped: memory that it uses was unmapped ({start:#x}/{size:#x})")
        return asked

    @property
    def may_resume(self) -> bool:
        """Whether stopped queues might have their memory back."""
        return self._memory.may_resume

    def resume(self) -> None:
        """Let stopped queues go on whose memory is back.

        Not at DMA_MAP itself: hypervisors unmap all RAM to map it in other pieces, and buffers of the queue
        may lie in one that is still to come.
        """
        if self._memory.may_resume:
            for index in self._memory.resume():
                self._tell(f"queue {index} goes on: its memory is mapped again")

    # Regions

    def _get_info(self, asked: DeviceInfo, fds: list[int]) -> DeviceInfo:
        _check_room(asked.argsz, wire.DEVICE_INFO_FORM.size)
        flags = DeviceFlag.PCI | (DeviceFlag.RESET if self.function.flr else 0)
        return DeviceInfo(wire.DEVICE_INFO_FORM.size, flags, wire.NUM_REGIONS, wire.NUM_IRQS)

    def _get_region_info(self, asked: RegionInfo, fds: list[int]) -> RegionInfo:
        _check_room(asked.argsz, wire.REGION_INFO_FORM.size)
        size = self._region_size(asked.index)
        flags = RegionFlag.READ | RegionFlag.WRITE if size else 0
        return RegionInfo(wire.REGION_INFO_FORM.size, flags, asked.index, 0, size)

    def _region_size(self, index: int) -> int:
        if index >= wire.NUM_REGIONS:
            raise Objection(EINVAL, f"there is no region {index}")
        if index == wire.CONFIG_REGION:
            return CONFIG_SIZE
        try:
            return self.function.bar(index).size
        except UsageError:
            return 0

    def _region_read(self, asked: RegionAccess, fds: list[int]) -> RegionAccess:
        self._check_access(asked)
        if asked.region == wire.CONFIG_REGION:
            data = self.function.config_read(asked.offset, asked.count).to_bytes(asked.count, "little")
        else:
            data = b"".join(
                self.function.bar_read(asked.region, at, width).to_bytes(width, "little")
                for at, width in _accesses(asked.offset, asked.count)
            )
        return RegionAccess(asked.offset, asked.region, asked.count, data)

    def _region_write(self, asked: RegionAccess, fds: list[int]) -> RegionAccess:
        self._check_access(asked)
        if len(asked.data) != asked.count:
            raise Objection(EINVAL, f"{len(asked.data)} bytes came, {asked.count} were announced")
        if asked.region == wire.CONFIG_REGION:
            value = int.from_bytes(asked.data, "little")
            self.function.config_write(asked.offset, asked.count, value)
        else:
            for at, width in _accesses(asked.offset, asked.count):
                value = int.from_bytes(asked.data[at - asked.offset :][:width], "little")
                self.function.bar_write(asked.region, at, width, value)
        return RegionAccess(asked.offset, asked.region, asked.count)

    def _check_access(self, asked: RegionAccess) -> None:
        size = self._region_size(asked.region)
        if not 0 < asked.count <= wire.MAX_DATA or asked.offset + asked.count > size:
            raise Objection(EINVAL, f"{asked.count} bytes at {asked.offset:#x} of region {asked.region}")

    # Interrupts

    def _get_irq_info(self, asked: IrqInfo, fds: list[int]) -> IrqInfo:
        _check_room(asked.argsz, wire.IRQ_INFO_FORM.size)
        return self.interrupts.info(asked.index)

    def _set_irqs(self, asked: IrqSet, fds: list[int]) -> wire.Nothing:
        self.interrupts.set(asked, fds)
        return wire.Nothing()

    # Reset and the end

    def _reset(self, asked: wire.Nothing, fds: list[int]) -> wire.Nothing:
        if not self.function.reset():
            raise Objection(ENOTSUP, "the function has no reset")
        return wire.Nothing()

    def close(self) -> None:
        """Switch the function off, forget the client's memory and eventfds, hang up."""
        function = self.function
        with function.executor:
            self.interrupts.close()
            function.registers.power_on()
            function.config.reset()
            function.interrupts.reset()
            # The command register is obeyed when it is written.
            function.config_write(pci.PCI_CONFIG_COMMAND, 2, 0)
            self._memory.close()
        self.channel.close()


class VfioUserServer:
    """A software PCI function behind a socket; one client at a time, others are turned away.

    >>> with VfioUserServer(make_function("blk?file=disk.img"), "/run/disk.sock"):   # doctest: +SKIP
    ...     input("serving; Enter ends it")

    Args:
        function: what is served; closed with the server.
        path: where to listen; a socket left behind there by an earlier server is replaced.
        tell: called, in the serving thread, with what a person may want to know: clients that come and go,
            commands refused, what the guest's driver did wrong.

    Attributes:
        connection: the client's, or None.
        failure: what the serving thread died of.

    Raises:
        UsageError: somebody listens at ``path`` already, or it cannot be a socket's path.
    """

    def __init__(
        self, function: SoftwareFunction, path: str, *, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self.function = function
        self.path = path
        self.name = function.journal.name = f"vfio-user:{path}"
        self.connection: Connection | None = None
        self.failure: BaseException | None = None
        self._tell = tell
        self._told = 0
        self._thread: threading.Thread | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listen()
        except BaseException:
            self._listener.close()
            raise
        self._stop = SYSTEM.eventfd()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wishes = Wishes(function)
        for fd in (self._stop, *self._wishes.fds):
            self._selector.register(fd, selectors.EVENT_READ)

    def _listen(self) -> None:
        if not self.path:
            raise UsageError("a socket needs a path", where=self.name)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._replace()
            self._listener.bind(self.path)
            self._listener.listen()
        except OSError as error:
            raise UsageError(
                f"cannot listen: {error.strerror or error}",
                where=self.name,
                hint="check that the directory exists and may be written to",
            ) from None

    def _replace(self) -> None:
        """Remove the socket of a server that is no more."""
        if not stat.S_ISSOCK(SYSTEM.stat(self.path).st_mode):
            raise UsageError("there is something that is no socket", where=self.name)
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                SYSTEM.unlink(self.path)
            else:
                raise UsageError("somebody listens there already", where=self.name)

    def run(self, until: int | None = None) -> None:
        """Serve clients, one after the other, until ``close`` or until ``until`` can be read."""
        ends = {self._stop}
        if until is not None:
            self._selector.register(until, selectors.EVENT_READ)
            ends.add(until)
        while True:
            waiting = self.connection is not None and self.connection.may_resume
            ready = {key.fd for key, _ in self._selector.select(QUIET_SECONDS if waiting else None)}
            if ready & ends:
                return
            for index in self._wishes.take(ready):
                if self.connection is not None:
                    self.connection.interrupts.fire(index, [0])
            # A client that went away makes room for the one that came after it.
            if self.connection is not None and self.connection.channel.fileno() in ready:
                self._serve(self.connection)
            elif self._listener.fileno() in ready:
                self._accept()
            elif self.connection is not None:
                self.connection.resume()
            self._report()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if self.connection is not None:
            sock.close()
            self._tell("a second client was turned away")
            return
        channel = Channel(sock, self.name, MESSAGE_SECONDS)
        self.connection = Connection(self.function, channel, self._tell)
        self._selector.register(channel.fileno(), selectors.EVENT_READ)
        self._tell("a client came")

    def _serve(self, connection: Connection) -> None:
        try:
            connection.serve()
        except DeviceGone:
            self._hang_up()
            self._tell("the client went")
        except GuestpvError as error:
            self._hang_up()
            self._tell(f"the client was sent away: {error.message}")

    def _report(self) -> None:
        """Tell of what the driver did wrong since the last time."""
        findings = self.function.findings
        for finding in findings[self._told :]:
            self._tell(f"driver: {finding}")
        self._told = len(findings)

    def _hang_up(self) -> None:
        connection = self.connection
        if connection is not None:
            try:
                self._selector.unregister(connection.channel.fileno())
                connection.close()
            finally:
                # Last: who sees that nobody is connected finds the function switched off.
                self.connection = None

    def start(self) -> Self:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self._run_thread, name="vfio-user-server", daemon=True)
        self._thread.start()
        return self

    def _run_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.failure = error
            # Nobody answers any more: a client must not wait for us.
            self._hang_up()

    def close(self) -> None:
        """Stop serving, hang up, remove the socket, close the function. Idempotent.

        Raises what the serving thread died of.
        """
        if self._stop < 0:
            return
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        self._hang_up()
        self._selector.close()
        self._listener.close()
        SYSTEM.close(self._stop)
        self._stop = -1
        with contextlib.suppress(FileNotFoundError):
            SYSTEM.unlink(self.path)
        self.function.close()
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_function(device: str) -> SoftwareFunction:
    """The function that ``net?mac=52:54:00:12:34:56`` names; see ``devices.loopback.open_function``.

    Raises:
        UsageError: there is no such device type or parameter.
    """
    kind, _, query = device.partition("?")
    function = open_function(kind, dict(parse_qsl(query, keep_blank_values=True)))
    if function.model.device_type == ft.BALLOON:
        # Linux clears the feature for the balloon, whose pages have physical numbers behind any IOMMU.
        function.device.offered &= ~(1 << ft.F_ACCESS_PLATFORM)
    return function


def _check_room(argsz: int, least: int) -> None:
    if argsz < least:
        raise Objection(EINVAL, f"argsz is {argsz}, the answer has {least} bytes")


def _accesses(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """The register accesses that a transfer means: itself, or aligned ones of 4, 2 and 1 bytes."""
    if count in (1, 2, 4, 8):
        yield offset, count
        return
    end = offset + count
    while offset < end:
        width = next(w for w in (4, 2, 1) if not offset % w and offset + w <= end)
        yield offset, width
        offset += width
