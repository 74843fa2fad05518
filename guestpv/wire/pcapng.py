"""The pcapng capture file format: what Wireshark reads (draft-ietf-opsawg-pcapng)."""

from __future__ import annotations

import struct
from typing import Final

SECTION_HEADER: Final = 0x0A0D0D0A
INTERFACE_DESCRIPTION: Final = 1
INTERFACE_STATISTICS: Final = 5
ENHANCED_PACKET: Final = 6
BYTE_ORDER: Final = 0x1A2B3C4D
LINKTYPE_ETHERNET: Final = 1
OPT_COMMENT: Final = 1
SHB_USERAPPL: Final = 4
IF_NAME: Final = 2
IF_DESCRIPTION: Final = 3
IF_TSRESOL: Final = 9
EPB_FLAGS: Final = 2
ISB_IFDROP: Final = 5
INBOUND: Final = 1
OUTBOUND: Final = 2

Options = list[tuple[int, bytes]]


def section(application: str) -> bytes:
    """The block that every file begins with."""
    body = struct.pack("<IHHq", BYTE_ORDER, 1, 0, -1)
    return block(SECTION_HEADER, body, [(SHB_USERAPPL, application.encode())])


def interface(name: str, description: str = "") -> bytes:
    """An Ethernet interface with time stamps in nanoseconds; interfaces are numbered from 0 as they come."""
    options = [(IF_NAME, name.encode()), (IF_DESCRIPTION, description.encode()), (IF_TSRESOL, b"\x09")]
    return block(INTERFACE_DESCRIPTION, struct.pack("<HHI", LINKTYPE_ETHERNET, 0, 0), options)


def packet(
    number: int, nanoseconds: int, frame: bytes, direction: int, comment: str = "", *, length: int = 0
) -> bytes:
    """A frame as it crossed interface ``number``, with a comment; ``length`` where it was longer."""
    original = max(length, len(frame))
    head = struct.pack("<IIIII", number, nanoseconds >> 32, nanoseconds & 0xFFFFFFFF, len(frame), original)
    options = [(OPT_COMMENT, comment.encode()), (EPB_FLAGS, struct.pack("<I", direction))]
    return block(ENHANCED_PACKET, head + padded(frame), options)


def statistics(number: int, nanoseconds: int, dropped: int) -> bytes:
    """How many frames of interface ``number`` the capture lost."""
    body = struct.pack("<III", number, nanoseconds >> 32, nanoseconds & 0xFFFFFFFF)
    return block(INTERFACE_STATISTICS, body, [(ISB_IFDROP, struct.pack("<Q", dropped))])


def block(kind: int, body: bytes, options: Options) -> bytes:
    """A block with its length at either end; options without a value are left out."""
    there = [(code, value) for code, value in options if value]
    body += b"".join(struct.pack("<HH", code, len(value)) + padded(value) for code, value in there)
    body += bytes(4) if there else b""
    length = struct.pack("<I", 12 + len(body))
    return struct.pack("<I", kind) + length + body + length


def padded(data: bytes) -> bytes:
    """Zeroes up to a multiple of four bytes."""
    return data + bytes(-len(data) % 4)
