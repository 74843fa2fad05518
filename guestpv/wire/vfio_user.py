"""The vfio-user protocol: VFIO's calls as messages with file descriptors on a UNIX stream socket.

Both ends use this file. What a command carries and what answers it is a row of ``EXCHANGES``; how those bytes
lie is a ``Form``. Numbers are in the machine's own byte order; names and values are those of
``<linux/vfio.h>`` where it has them.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum, IntFlag
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar

from .stream import ProtocolError, Stream, close_all

MAJOR: Final = 0
MINOR: Final = 1

FLAG_TYPE: Final = 0xF
TYPE_COMMAND: Final = 0
TYPE_REPLY: Final = 1
FLAG_NO_REPLY: Final = 1 << 4
FLAG_ERROR: Final = 1 << 5

MAX_FDS: Final = 16
"""Descriptors in one message; QEMU accepts no larger offer."""
MAX_DATA: Final = 1 << 20
"""Bytes of data in one region access: the protocol's default."""
MAX_PAYLOAD: Final = MAX_DATA + 4096

NUM_REGIONS: Final = 9
BAR0_REGION: Final = 0
BAR5_REGION: Final = 5
CONFIG_REGION: Final = 7

NUM_IRQS: Final = 5
INTX: Final = 0
MSIX: Final = 2
ERR: Final = 3
REQ: Final = 4

CAP_SPARSE_MMAP: Final = 1


class Command(IntEnum):
    """What one end asks of the other."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class DeviceFlag(IntFlag):
    """Flags of ``DeviceInfo``."""

    RESET = 1 << 0
    PCI = 1 << 1


class RegionFlag(IntFlag):
    """Flags of ``RegionInfo``."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class IrqFlag(IntFlag):
    """Flags of ``IrqInfo``."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqSetFlag(IntFlag):
    """Flags of ``IrqSet``: one kind of data, one action."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


class DmaFlag(IntFlag):
    """Flags of ``DmaMap``."""

    READ = 1 << 0
    WRITE = 1 << 1


class UnmapFlag(IntFlag):
    """Flags of ``DmaUnmap``."""

    ALL = 1 << 1


@dataclass(frozen=True, slots=True)
class Version:
    """Protocol version, and limits of the sender by the protocol's names."""

    major: int
    minor: int
    capabilities: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DmaMap:
    """``size`` bytes of the descriptor sent along, from ``offset`` on, are at bus address ``address``."""

    argsz: int
    flags: int
    offset: int
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class DmaUnmap:
    """The device loses ``size`` bytes at bus address ``address``."""

    argsz: int
    flags: int
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What kind of device it is."""

    argsz: int
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """A region; ``capabilities`` are the bytes behind the structure, which ``cap_offset`` counts from."""

    argsz: int
    flags: int = 0
    index: int = 0
    cap_offset: int = 0
    size: int = 0
    offset: int = 0
    capabilities: bytes = b""


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """A kind of interrupt and how many of it there are."""

    argsz: int
    flags: int = 0
    index: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class IrqSet:
    """An action on ``count`` interrupts of a kind, from number ``start`` on."""

    argsz: int
    flags: int
    index: int
    start: int
    count: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class RegionAccess:
    """``count`` bytes at ``offset`` of a region; ``data`` where the message carries them."""

    offset: int
    region: int
    count: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Nothing:
    """No payload."""


T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")


class Form(Generic[T]):
    """How a payload lies on the wire: numbers in the order of its fields, then perhaps bytes.

    Args:
        kind: the payload's type.
        layout: ``struct`` format of the numbers.
        tail: whether the type's last field holds the bytes that follow.
    """

    def __init__(self, kind: Callable[..., T], layout: str, tail: bool = False) -> None:
        self._kind = kind
        self._name = getattr(kind, "__name__", "payload")
        self._struct = struct.Struct(f"={layout}")
        self._tail = tail
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        self._numbers: Callable[[T], tuple[int, ...]] = (
            attrgetter(*names[: len(layout)]) if names else lambda value: ()
        )
        self._data = attrgetter(names[-1]) if tail else lambda value: b""

    @property
    def size(self) -> int:
        """Bytes of the numbers."""
        return self._struct.size

    def pack(self, value: T) -> bytes:
        """The payload as bytes."""
        data: bytes = self._data(value)
        return self._struct.pack(*self._numbers(value)) + data

    def unpack(self, data: bytes) -> T:
        """Decode.

        Raises:
            ProtocolError: too short, or too long for a payload of fixed size.
        """
        size = self._struct.size
        if len(data) < size or (len(data) > size and not self._tail):
            raise ProtocolError(f"{self._name} has {len(data)} bytes where {size} belong")
        numbers = self._struct.unpack_from(data)
        return self._kind(*numbers, data[size:]) if self._tail else self._kind(*numbers)


class VersionForm(Form[Version]):
    """The version message: its capabilities are JSON, ended by a NUL."""

    def __init__(self) -> None:
        super().__init__(Version, "HH")

    def pack(self, value: Version) -> bytes:
        """The payload as bytes."""
        text = json.dumps({"capabilities": dict(value.capabilities)}).encode()
        return self._struct.pack(value.major, value.minor) + text + b"\0"

    def unpack(self, data: bytes) -> Version:
        """Decode; capabilities may be missing.

        Raises:
            ProtocolError: too short, or no JSON object.
        """
        head, text = data[: self.size], data[self.size :].rstrip(b"\0")
        if len(head) < self.size:
            raise ProtocolError(f"Version has {len(data)} bytes, {self.size} at least belong")
        try:
            capabilities = json.loads(text).get("capabilities", {}) if text else {}
            major, minor = self._struct.unpack(head)
            return Version(major, minor, dict(capabilities))
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise ProtocolError(f"the version message says {text[:100]!r}, which is no JSON object") from None


@dataclass(frozen=True)
class Exchange(Generic[Q, A]):
    """A command, what it sends, what its reply carries, and how many descriptors travel with it."""

    command: Command
    sends: Form[Q]
    answers: Form[A]
    fds: tuple[int, int] = (0, 0)
    answer_fds: int = 0


NOTHING: Final = Form(Nothing, "")
VERSION_FORM: Final = VersionForm()
DMA_MAP_FORM: Final = Form(DmaMap, "IIQQQ")
DMA_UNMAP_FORM: Final = Form(DmaUnmap, "IIQQ")
DEVICE_INFO_FORM: Final = Form(DeviceInfo, "IIII")
REGION_INFO_FORM: Final = Form(RegionInfo, "IIIIQQ", tail=True)
IRQ_INFO_FORM: Final = Form(IrqInfo, "IIII")
IRQ_SET_FORM: Final = Form(IrqSet, "IIIII", tail=True)
ACCESS_FORM: Final = Form(RegionAccess, "QII", tail=True)
CAP_HEADER: Final = struct.Struct("=HHI")
"""Id, version and offset of the next capability of a region."""
SPARSE_HEAD: Final = struct.Struct("=8xI4x")
"""Number of areas of a sparse mmap capability."""
SPARSE_AREA: Final = struct.Struct("=QQ")

VERSION: Final = Exchange(Command.VERSION, VERSION_FORM, VERSION_FORM)
DMA_MAP: Final = Exchange(Command.DMA_MAP, DMA_MAP_FORM, NOTHING, fds=(0, 1))
DMA_UNMAP: Final = Exchange(Command.DMA_UNMAP, DMA_UNMAP_FORM, DMA_UNMAP_FORM)
GET_INFO: Final = Exchange(Command.DEVICE_GET_INFO, DEVICE_INFO_FORM, DEVICE_INFO_FORM)
GET_REGION_INFO: Final = Exchange(
    Command.DEVICE_GET_REGION_INFO, REGION_INFO_FORM, REGION_INFO_FORM, answer_fds=1
)
GET_IRQ_INFO: Final = Exchange(Command.DEVICE_GET_IRQ_INFO, IRQ_INFO_FORM, IRQ_INFO_FORM)
SET_IRQS: Final = Exchange(Command.DEVICE_SET_IRQS, IRQ_SET_FORM, NOTHING, fds=(0, MAX_FDS))
REGION_READ: Final = Exchange(Command.REGION_READ, ACCESS_FORM, ACCESS_FORM)
REGION_WRITE: Final = Exchange(Command.REGION_WRITE, ACCESS_FORM, ACCESS_FORM)
RESET: Final = Exchange(Command.DEVICE_RESET, NOTHING, NOTHING)

EXCHANGES: Final[dict[int, Exchange[Any, Any]]] = {
    exchange.command: exchange
    for exchange in (
        VERSION,
        DMA_MAP,
        DMA_UNMAP,
        GET_INFO,
        GET_REGION_INFO,
        GET_IRQ_INFO,
        SET_IRQS,
        REGION_READ,
        REGION_WRITE,
        RESET,
    )
}
"""Commands spoken here; a server answers every other one with ENOTSUP."""


def covered(info: RegionInfo) -> bool:
    """Whether all of a region can be mapped: in one piece, or in sparse areas that leave no hole."""
    if not info.flags & RegionFlag.MMAP or not info.size:
        return False
    if not info.flags & RegionFlag.CAPS:
        return True
    body = bytes(REGION_INFO_FORM.size) + info.capabilities
    at, seen = info.cap_offset, set[int]()
    while REGION_INFO_FORM.size <= at <= len(body) - CAP_HEADER.size and at not in seen:
        seen.add(at)
        kind, _version, following = CAP_HEADER.unpack_from(body, at)
        if kind == CAP_SPARSE_MMAP:
            return _no_hole(body[at:], info.size)
        at = following
    return True


def _no_hole(capability: bytes, size: int) -> bool:
    if len(capability) < SPARSE_HEAD.size:
        return False
    count = SPARSE_HEAD.unpack_from(capability)[0]
    room = (len(capability) - SPARSE_HEAD.size) // SPARSE_AREA.size
    end = 0
    for offset, length in sorted(
        SPARSE_AREA.unpack_from(capability, SPARSE_HEAD.size + number * SPARSE_AREA.size)
        for number in range(min(count, room))
    ):
        if offset > end:
            return False
        end = max(end, offset + length)
    return end >= size


HEADER: Final = struct.Struct("=HHIII")


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it is on the wire.

    Attributes:
        id: chosen by whoever asks, repeated in the reply.
        command: number of the command.
        payload: the bytes behind the header.
        fds: descriptors that came with it; the receiver owns them.
        flags: type, ``FLAG_NO_REPLY``, ``FLAG_ERROR``.
        errno: in a reply with ``FLAG_ERROR``: why, or 0.
    """

    id: int
    command: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    flags: int = TYPE_COMMAND
    errno: int = 0

    @property
    def is_reply(self) -> bool:
        """Whether this answers a command."""
        return self.flags & FLAG_TYPE == TYPE_REPLY

    @property
    def wants_reply(self) -> bool:
        """Whether the sender waits for a reply."""
        return not self.flags & FLAG_NO_REPLY

    @property
    def failed(self) -> bool:
        """Whether this says that a command failed."""
        return bool(self.flags & FLAG_ERROR)

    def answer(self, payload: bytes) -> Message:
        """The reply to this command."""
        return Message(self.id, self.command, payload, flags=TYPE_REPLY)

    def refuse(self, errno: int) -> Message:
        """The reply that this command failed."""
        return replace(self.answer(b""), flags=TYPE_REPLY | FLAG_ERROR, errno=errno)

    def close_fds(self) -> None:
        """Close the descriptors that came with the message."""
        close_all(self.fds)


class Channel(Stream):
    """One end of a vfio-user connection: whole messages in, whole messages out.

    Args:
        sock: a connected stream socket, owned and closed by the channel.
        name: how messages call the connection.
        timeout: seconds that the peer has for each step; None: for ever.
    """

    def __init__(self, sock: socket.socket, name: str, timeout: float | None = None) -> None:
        super().__init__(sock, name, timeout, MAX_FDS)

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            DeviceGone: the peer closed the connection.
            TimeLimit: the peer reads nothing.
        """
        size = HEADER.size + len(message.payload)
        head = HEADER.pack(message.id, message.command, size, message.flags, message.errno)
        self.write(head + message.payload, message.fds)

    def receive(self) -> Message:
        """Receive one message.

        Raises:
            DeviceGone: the peer closed the connection.
            ProtocolError: what came is no vfio-user message.
            TimeLimit: no whole message came in time.
        """
        fds: list[int] = []
        try:
            head = self.read(HEADER.size, fds)
            number, command, size, flags, errno = HEADER.unpack(head)
            known = flags & FLAG_TYPE in (TYPE_COMMAND, TYPE_REPLY)
            if not known or not HEADER.size <= size <= HEADER.size + MAX_PAYLOAD:
                raise ProtocolError(f"the peer does not speak vfio-user: it sent {head!r}", where=self.name)
            payload = self.read(size - HEADER.size, fds)
            return Message(number, command, payload, tuple(fds), flags, errno)
        except BaseException:
            close_all(fds)
            raise
