"""What the kernel's network block device is told: generic netlink messages, and the NBD flags they carry.

The numbers are those of the kernel's ``nbd-netlink.h``, ``nbd.h`` and ``genetlink.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

NLM_F_REQUEST: Final = 0x01
NLM_F_ACK: Final = 0x04
NLMSG_ERROR: Final = 2
NLA_F_NESTED: Final = 0x8000
NLA_TYPE_MASK: Final = 0x3FFF

GENL_ID_CTRL: Final = 0x10
CTRL_CMD_GETFAMILY: Final = 3
CTRL_ATTR_FAMILY_ID: Final = 1
CTRL_ATTR_FAMILY_NAME: Final = 2

FAMILY: Final = "nbd"
FAMILY_VERSION: Final = 1
CMD_CONNECT: Final = 1
CMD_DISCONNECT: Final = 2
CMD_RECONFIGURE: Final = 3

ATTR_INDEX: Final = 1
ATTR_SIZE_BYTES: Final = 2
ATTR_BLOCK_SIZE_BYTES: Final = 3
ATTR_TIMEOUT: Final = 4
ATTR_SERVER_FLAGS: Final = 5
ATTR_CLIENT_FLAGS: Final = 6
ATTR_SOCKETS: Final = 7
SOCK_ITEM: Final = 1
SOCK_FD: Final = 1

FLAG_HAS_FLAGS: Final = 1
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_CAN_MULTI_CONN: Final = 1 << 8
"""A flush on one connection covers what any connection has been told is done."""

HEADER: Final = struct.Struct("=IHHII")
GENERIC: Final = struct.Struct("=BBH")
ATTRIBUTE: Final = struct.Struct("=HH")

REQUEST: Final = struct.Struct(">IHH8sQI")
"""Head of a request: magic, flags, command, handle, offset, length."""
REQUEST_MAGIC: Final = 0x25609513
REPLY: Final = struct.Struct(">II8s")
"""Head of an answer: magic, error, handle; data of a read follows."""
REPLY_MAGIC: Final = 0x67446698
CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_WRITE_ZEROES: Final = 6
CMD_FLAG_FUA: Final = 1
CMD_FLAG_NO_HOLE: Final = 2


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    length = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def message(family: int, command: int, version: int, attributes: bytes, sequence: int) -> bytes:
    """A generic netlink request that asks for an acknowledgement."""
    body = GENERIC.pack(command, version, 0) + attributes
    return HEADER.pack(HEADER.size + len(body), family, NLM_F_REQUEST | NLM_F_ACK, sequence, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, sequence, body) of every message in what was received."""
    while len(data) >= HEADER.size:
        length, kind, _, sequence, _ = HEADER.unpack_from(data)
        if not HEADER.size <= length <= len(data):
            return
        yield kind, sequence, data[HEADER.size : length]
        data = data[length + -length % 4 :]


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by kind."""
    found = {}
    while len(data) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data)
        if not ATTRIBUTE.size <= length <= len(data):
            break
        found[kind & NLA_TYPE_MASK] = data[ATTRIBUTE.size : length]
        data = data[length + -length % 4 :]
    return found


def connect(index: int | None, size: int, block_size: int, flags: int, sockets: list[int]) -> bytes:
    """Attributes of CMD_CONNECT.

    Args:
        index: of ``/dev/nbdN``; None takes a free one.
        size, block_size: bytes.
        flags: ``FLAG_*``.
        sockets: descriptors of the kernel's ends.
    """
    items = b"".join(
        attribute(SOCK_ITEM | NLA_F_NESTED, attribute(SOCK_FD, struct.pack("=I", fd))) for fd in sockets
    )
    return (
        (b"" if index is None else attribute(ATTR_INDEX, struct.pack("=I", index)))
        + attribute(ATTR_SIZE_BYTES, struct.pack("=Q", size))
        + attribute(ATTR_BLOCK_SIZE_BYTES, struct.pack("=Q", block_size))
        + attribute(ATTR_SERVER_FLAGS, struct.pack("=Q", flags))
        + attribute(ATTR_SOCKETS | NLA_F_NESTED, items)
    )


def resize(index: int, size: int) -> bytes:
    """Attributes of CMD_RECONFIGURE that give ``/dev/nbdN`` another size in bytes."""
    return attribute(ATTR_INDEX, struct.pack("=I", index)) + attribute(
        ATTR_SIZE_BYTES, struct.pack("=Q", size)
    )


def disconnect(index: int) -> bytes:
    """Attributes of CMD_DISCONNECT."""
    return attribute(ATTR_INDEX, struct.pack("=I", index))
