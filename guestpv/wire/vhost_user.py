"""The vhost-user protocol: messages with file descriptors on a UNIX stream socket.

Both ends use this file. A request is a row of ``REQUESTS``: what it carries, what answers it, how
many descriptors travel with it. Numbers are in the machine's own byte order.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import ClassVar, Final, Protocol, Self

from .stream import ProtocolError, Stream, close_all

F_LOG_ALL: Final = 26
"""Feature bit in GET_FEATURES that is vhost's own: dirty logging for migration."""
F_PROTOCOL_FEATURES: Final = 30
"""Feature bit in GET_FEATURES that is vhost-user's own: GET_PROTOCOL_FEATURES is understood."""

VERSION: Final = 1
VERSION_MASK: Final = 3
FLAG_REPLY: Final = 1 << 2
FLAG_NEED_REPLY: Final = 1 << 3

NO_FD: Final = 1 << 8
"""In the payload of SET_VRING_KICK, CALL and ERR: no descriptor comes with it, poll instead."""
VRING_INDEX_MASK: Final = 0xFF

MAX_PAYLOAD: Final = 4096
"""Bytes; the protocol's largest message that is spoken here is far below."""
MAX_FDS: Final = 8
MAX_REGIONS: Final = 8
"""Regions in one SET_MEM_TABLE."""
MAX_CONFIG: Final = 256
"""Bytes of device configuration in one GET_CONFIG or SET_CONFIG."""


class ProtocolFeature(IntEnum):
    """Bits of GET_PROTOCOL_FEATURES."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    NET_MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19


class Request(IntEnum):
    """What the front end asks."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(IntEnum):
    """What the back end asks, on the channel of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


@dataclass(frozen=True, slots=True)
class Payload:
    """Base of fixed-size payloads; fields are in the order of the wire."""

    STRUCT: ClassVar[struct.Struct]

    def pack(self) -> bytes:
        """The payload as bytes."""
        return self.STRUCT.pack(*astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decode.

        Raises:
            ProtocolError: ``data`` does not have the payload's size.
        """
        if len(data) != cls.STRUCT.size:
            raise ProtocolError(f"{cls.__name__} has {len(data)} bytes where {cls.STRUCT.size} belong")
        return cls(*cls.STRUCT.unpack(data))


@dataclass(frozen=True, slots=True)
class U64(Payload):
    """One number: a feature mask, a status, a ring index with ``NO_FD``, an acknowledgement."""

    STRUCT = struct.Struct("=Q")
    value: int


@dataclass(frozen=True, slots=True)
class VringState(Payload):
    """A number that belongs to one ring: its size, its base, whether it is enabled."""

    STRUCT = struct.Struct("=II")
    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddress(Payload):
    """Where a ring lies, in front-end user addresses."""

    STRUCT = struct.Struct("=IIQQQQ")
    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int = 0


@dataclass(frozen=True, slots=True)
class MemoryRegion(Payload):
    """``size`` bytes of a descriptor from ``mmap_offset`` on, under their two addresses.

    Descriptors in rings hold guest addresses, SET_VRING_ADDR holds user addresses.
    """

    STRUCT = struct.Struct("=QQQQ")
    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class MemorySlot(Payload):
    """The region of ADD_MEM_REG and REM_MEM_REG."""

    STRUCT = struct.Struct("=8xQQQQ")
    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    @property
    def region(self) -> MemoryRegion:
        """The same, as a row of SET_MEM_TABLE."""
        return MemoryRegion(self.guest_address, self.size, self.user_address, self.mmap_offset)


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """The buffer in which a back end records requests in flight; padded, as C compilers do it."""

    STRUCT = struct.Struct("=QQHH4x")
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All regions at once; a descriptor for each comes with it, in the same order."""

    HEAD: ClassVar[struct.Struct] = struct.Struct("=II")
    regions: tuple[MemoryRegion, ...]

    def pack(self) -> bytes:
        """The payload as bytes."""
        return self.HEAD.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decode; bytes behind the last region are allowed, as some front ends send a fixed size.

        Raises:
            ProtocolError: too short for its own count, or more than ``MAX_REGIONS``.
        """
        head, row = cls.HEAD.size, MemoryRegion.STRUCT.size
        count = cls.HEAD.unpack_from(data)[0] if len(data) >= head else -1
        if not 0 <= count <= MAX_REGIONS or len(data) < head + count * row:
            raise ProtocolError(f"a memory table of {len(data)} bytes says it has {count} regions")
        return cls(
            tuple(MemoryRegion.unpack(data[at : at + row]) for at in range(head, head + count * row, row))
        )


@dataclass(frozen=True, slots=True)
class Config:
    """Bytes of device configuration. As an error the back end answers GET_CONFIG without any."""

    HEAD: ClassVar[struct.Struct] = struct.Struct("=III")
    offset: int
    data: bytes
    flags: int = 0

    def pack(self) -> bytes:
        """The payload as bytes."""
        return self.HEAD.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decode; no bytes at all are a back end's way to say that GET_CONFIG failed.

        Raises:
            ProtocolError: too short for its own size.
        """
        head = cls.HEAD.size
        if not data:
            return cls(0, b"")
        if len(data) < head:
            raise ProtocolError(f"a configuration payload has {len(data)} bytes, its head alone {head}")
        offset, size, flags = cls.HEAD.unpack_from(data)
        if size > min(MAX_CONFIG, len(data) - head):
            raise ProtocolError(f"a configuration payload of {len(data)} bytes says it holds {size}")
        return cls(offset, data[head : head + size], flags)


class AnyPayload(Protocol):
    """What every payload above can do."""

    def pack(self) -> bytes:
        """The payload as bytes."""
        ...

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decode.

        Raises:
            ProtocolError: ``data`` is no such payload.
        """
        ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """What belongs to a request.

    Attributes:
        sends: its payload.
        answers: the payload of the answer it always has. Others are acknowledged with a ``U64`` when
            REPLY_ACK was negotiated and the message asks for it; 0 is success.
        fds: least and most descriptors that come with it.
        needs: protocol feature without which it must not be sent.
    """

    sends: type[AnyPayload] | None = None
    answers: type[AnyPayload] | None = None
    fds: tuple[int, int] = (0, 0)
    needs: ProtocolFeature | None = None


REQUESTS: Final[dict[Request, Exchange]] = {
    Request.GET_FEATURES: Exchange(answers=U64),
    Request.SET_FEATURES: Exchange(U64),
    Request.SET_OWNER: Exchange(),
    Request.RESET_OWNER: Exchange(),
    Request.SET_MEM_TABLE: Exchange(MemoryTable, fds=(0, MAX_REGIONS)),
    Request.SET_VRING_NUM: Exchange(VringState),
    Request.SET_VRING_ADDR: Exchange(VringAddress),
    Request.SET_VRING_BASE: Exchange(VringState),
    Request.GET_VRING_BASE: Exchange(VringState, VringState),
    Request.SET_VRING_KICK: Exchange(U64, fds=(0, 1)),
    Request.SET_VRING_CALL: Exchange(U64, fds=(0, 1)),
    Request.SET_VRING_ERR: Exchange(U64, fds=(0, 1)),
    Request.GET_PROTOCOL_FEATURES: Exchange(answers=U64),
    Request.SET_PROTOCOL_FEATURES: Exchange(U64),
    Request.GET_QUEUE_NUM: Exchange(answers=U64, needs=ProtocolFeature.MQ),
    Request.SET_VRING_ENABLE: Exchange(VringState),
    Request.NET_SET_MTU: Exchange(U64, needs=ProtocolFeature.NET_MTU),
    Request.SET_BACKEND_REQ_FD: Exchange(fds=(1, 1), needs=ProtocolFeature.BACKEND_REQ),
    Request.GET_CONFIG: Exchange(Config, Config, needs=ProtocolFeature.CONFIG),
    Request.SET_CONFIG: Exchange(Config, needs=ProtocolFeature.CONFIG),
    Request.GET_INFLIGHT_FD: Exchange(Inflight, Inflight, needs=ProtocolFeature.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: Exchange(Inflight, fds=(1, 1), needs=ProtocolFeature.INFLIGHT_SHMFD),
    Request.RESET_DEVICE: Exchange(needs=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Exchange(answers=U64, needs=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Exchange(MemorySlot, fds=(1, 1), needs=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Exchange(MemorySlot, fds=(0, 1), needs=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Exchange(U64, needs=ProtocolFeature.STATUS),
    Request.GET_STATUS: Exchange(answers=U64, needs=ProtocolFeature.STATUS),
}

HEADER: Final = struct.Struct("=III")


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it is on the wire.

    Attributes:
        request: number of the request.
        flags: version, ``FLAG_REPLY``, ``FLAG_NEED_REPLY``.
        payload: the bytes behind the header.
        fds: descriptors that came with it; the receiver owns them.
    """

    request: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    flags: int = VERSION

    @property
    def is_reply(self) -> bool:
        """Whether this answers a request."""
        return bool(self.flags & FLAG_REPLY)

    @property
    def wants_reply(self) -> bool:
        """Whether the sender waits for an acknowledgement."""
        return bool(self.flags & FLAG_NEED_REPLY)

    def answer(self, payload: bytes, fds: tuple[int, ...] = ()) -> Message:
        """The reply to this request."""
        return Message(self.request, payload, fds, VERSION | FLAG_REPLY)

    def close_fds(self) -> None:
        """Close the descriptors that came with the message."""
        close_all(self.fds)


class Channel(Stream):
    """One end of a vhost-user connection: whole messages in, whole messages out.

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
        head = HEADER.pack(message.request, message.flags, len(message.payload))
        self.write(head + message.payload, message.fds)

    def receive(self) -> Message:
        """Receive one message.

        Raises:
            DeviceGone: the peer closed the connection.
            ProtocolError: what came is no vhost-user message.
            TimeLimit: no whole message came in time.
        """
        fds: list[int] = []
        try:
            head = self.read(HEADER.size, fds)
            request, flags, size = HEADER.unpack(head)
            if flags & VERSION_MASK != VERSION or size > MAX_PAYLOAD:
                raise ProtocolError(f"the peer does not speak vhost-user: it sent {head!r}", where=self.name)
            return Message(request, self.read(size, fds), tuple(fds), flags)
        except BaseException:
            close_all(fds)
            raise
