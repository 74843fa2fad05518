"""What the bytes of a buffer mean to its device type: a request's header, a frame, page numbers, a status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..memory import DmaPool
from ..spec import balloon, blk, net
from ..spec import features as feat

ETHERTYPES: Final = {0x0800: "IPv4", 0x0806: "ARP", 0x86DD: "IPv6", 0x8100: "802.1Q", 0x88CC: "LLDP"}


@dataclass(frozen=True, slots=True)
class Element:
    """One element of a buffer: bytes at a bus address, for the device to read, or to write."""

    address: int
    length: int
    write: bool


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer that was made available.

    Attributes:
        elements: device-readable ones first.
        readable: the beginning of what the device may read, at most ``HEAD`` bytes.
    """

    elements: tuple[Element, ...]
    readable: bytes

    @property
    def readable_bytes(self) -> int:
        """All that the device may read."""
        return sum(element.length for element in self.elements if not element.write)

    @property
    def writable_bytes(self) -> int:
        """All that the device may write."""
        return sum(element.length for element in self.elements if element.write)


HEAD: Final = 64
"""Bytes of a buffer that its meaning is read off."""


class Memory:
    """Bytes by their bus address, as the device sees them."""

    def __init__(self, pool: DmaPool) -> None:
        self._pool = pool

    def read(self, address: int, length: int) -> bytes:
        """What is there now; fewer bytes where the memory ends, none where there is none."""
        return self._pool.look(address, length)

    def gather(self, elements: Sequence[Element], skip: int, length: int) -> bytes:
        """``length`` bytes of several elements one after the other, from byte ``skip`` on."""
        found = b""
        for element in elements:
            if skip >= element.length:
                skip -= element.length
                continue
            take = min(element.length - skip, length - len(found))
            found += self.read(element.address + skip, take)
            skip = 0
            if len(found) >= length:
                break
        return found


Added = Callable[[int, int, Buffer], str]
Taken = Callable[[int, int, Buffer, bytes, int], str]
"""Queue, features, buffer; then the beginning of what the device wrote, and the used length."""


def _blk_added(queue: int, features: int, buffer: Buffer) -> str:
    if len(buffer.readable) < blk.REQUEST_HEADER.itemsize:
        return ""
    head = np.frombuffer(buffer.readable, blk.REQUEST_HEADER, 1)[0]
    kind, sector = int(head["type"]), int(head["sector"])
    name = blk.TYPE_NAMES.get(kind, f"type {kind}")
    out = buffer.readable_bytes - blk.REQUEST_HEADER.itemsize
    back = buffer.writable_bytes - 1
    where = f" sector {sector}" if kind in (blk.T_IN, blk.T_OUT) or sector else ""
    data = f", {out} bytes of data to the device" if out else ""
    data += f", {back} bytes of data from it" if back > 0 else ""
    return f"{name}{where}{data}, 1 byte of status"


def _blk_taken(queue: int, features: int, buffer: Buffer, written: bytes, length: int) -> str:
    """``written`` ends with the status byte here."""
    if not written:
        return ""
    status = written[-1]
    name = blk.TYPE_NAMES.get(int.from_bytes(buffer.readable[:4], "little"), "request")
    return f"{name}: status {blk.STATUS_NAMES.get(status, status)}"


def frame_words(frame: bytes, length: int) -> str:
    """An Ethernet frame's addresses and type."""
    if len(frame) < 14:
        return f"frame of {length} bytes"
    kind = int.from_bytes(frame[12:14], "big")
    return (
        f"frame of {length} bytes, {ETHERTYPES.get(kind, f'type {kind:#06x}')}, "
        f"{frame[6:12].hex(':')} to {frame[:6].hex(':')}"
    )


def is_control(device_type: int | None, buffer: Buffer, queue: int) -> bool:
    """Whether it is a command to a network device: on the receive queues nothing is readable."""
    return device_type == feat.NET and queue % 2 == 0 and buffer.readable_bytes > 0


def _net_added(queue: int, features: int, buffer: Buffer) -> str:
    if is_control(feat.NET, buffer, queue):
        if len(buffer.readable) < 2:
            return "command"
        return f"command {net.command_name(buffer.readable[0], buffer.readable[1])}"
    if queue % 2 == 0:
        return f"receive buffer of {buffer.writable_bytes} bytes"
    dtype = net.header_dtype(features)
    if len(buffer.readable) < dtype.itemsize:
        return ""
    words = " ".join(net.header_words(np.frombuffer(buffer.readable, dtype, 1)[0])) or "all 0"
    frame = frame_words(buffer.readable[dtype.itemsize :], buffer.readable_bytes - dtype.itemsize)
    return f"net header {words}; {frame}"


def _net_taken(queue: int, features: int, buffer: Buffer, written: bytes, length: int) -> str:
    if is_control(feat.NET, buffer, queue):
        if not written:
            return ""
        return {net.CTRL_OK: "ack OK", net.CTRL_ERR: "ack ERR"}.get(written[-1], f"ack {written[-1]}")
    if queue % 2:
        return "sent"
    dtype = net.header_dtype(features)
    if len(written) < dtype.itemsize:
        return ""
    words = " ".join(net.header_words(np.frombuffer(written, dtype, 1)[0])) or "all 0"
    return f"net header {words}; {frame_words(written[dtype.itemsize :], length - dtype.itemsize)}"


def _numbered_densely(queue: int, features: int) -> bool:
    """Whether the standard has no queue of this number with these features, so that it means another one."""
    bit = balloon.OPTIONAL_QUEUES.get(queue)
    return bit is not None and not features >> bit & 1


def _balloon_added(queue: int, features: int, buffer: Buffer) -> str:
    if _numbered_densely(queue, features):
        return ""
    if queue == balloon.REPORTING_VQ:
        return f"report of {buffer.writable_bytes // balloon.PAGE_BYTES} free pages"
    if queue in (balloon.INFLATEQ, balloon.DEFLATEQ):
        count = buffer.readable_bytes // balloon.PAGE_NUMBER.itemsize
        kept = len(buffer.readable) // balloon.PAGE_NUMBER.itemsize
        pages = np.frombuffer(buffer.readable, balloon.PAGE_NUMBER, kept).tolist()
        shown = ", ".join(f"{page:#x}" for page in pages[:4]) + (", ..." if count > 4 else "")
        what = "inflate" if queue == balloon.INFLATEQ else "deflate"
        return f"{what} by {count} pages: {shown}"
    if queue == balloon.STATSQ:
        return f"{buffer.readable_bytes // balloon.STAT.itemsize} statistics"
    return ""


def _balloon_taken(queue: int, features: int, buffer: Buffer, written: bytes, length: int) -> str:
    if _numbered_densely(queue, features):
        return ""
    if queue == balloon.STATSQ:
        return "statistics are asked for"
    return "the host knows"


def _rng_added(queue: int, features: int, buffer: Buffer) -> str:
    return f"{buffer.writable_bytes} random bytes wanted"


def _rng_taken(queue: int, features: int, buffer: Buffer, written: bytes, length: int) -> str:
    return f"{length} random bytes"


def _console_added(queue: int, features: int, buffer: Buffer) -> str:
    return repr(buffer.readable)[1:] if queue % 2 else f"room for {buffer.writable_bytes} bytes"


def _console_taken(queue: int, features: int, buffer: Buffer, written: bytes, length: int) -> str:
    return "sent" if queue % 2 else repr(written)[1:]


def _nothing_added(queue: int, features: int, buffer: Buffer) -> str:
    return ""


def _nothing_taken(queue: int, features: int, buffer: Buffer, written: bytes, length: int) -> str:
    return ""


MEANINGS: Final[dict[int, tuple[Added, Taken, str]]] = {
    feat.NET: (_net_added, _net_taken, "5.1.9"),
    feat.BLK: (_blk_added, _blk_taken, "5.2.6"),
    feat.CONSOLE: (_console_added, _console_taken, "5.3.6"),
    feat.RNG: (_rng_added, _rng_taken, "5.4.6"),
    feat.BALLOON: (_balloon_added, _balloon_taken, "5.5.6"),
}
"""Virtio device id -> meaning of what is added, of what comes back, and the section of its operation."""

ENDS_WITH_STATUS: Final = frozenset({feat.BLK})
"""Device types whose last writable byte says how the request ended."""


class Meanings:
    """The meaning of buffers of one device."""

    def __init__(self, device_type: int | None, memory: Memory) -> None:
        self.device_type = device_type
        self._memory = memory
        self._added, self._taken, self.section = MEANINGS.get(
            device_type or 0, (_nothing_added, _nothing_taken, "")
        )

    def buffer(self, elements: Sequence[Element]) -> Buffer:
        """A buffer that was made available just now, with the beginning of what the device may read."""
        readable = [element for element in elements if not element.write]
        return Buffer(tuple(elements), self._memory.gather(readable, 0, HEAD))

    def added(self, queue: int, features: int, buffer: Buffer) -> str:
        """In words."""
        return self._added(queue, features, buffer)

    def taken(self, queue: int, features: int, buffer: Buffer, length: int) -> str:
        """What the device made of it, in words."""
        writable = [element for element in buffer.elements if element.write]
        if self.device_type in ENDS_WITH_STATUS or is_control(self.device_type, buffer, queue):
            written = self._memory.gather(writable, max(0, buffer.writable_bytes - 1), 1)
        else:
            written = self._memory.gather(writable, 0, min(length, HEAD))
        return self._taken(queue, features, buffer, written, length)

    def data(self, elements: Sequence[Element], *, write: bool, most: int, length: int) -> list[str]:
        """Hexadecimal content of the elements of one direction, at most ``most`` bytes of each.

        Args:
            length: used length: of what the device wrote no more than that many bytes mean something.
        """
        found = []
        for element in elements:
            if element.write != write:
                continue
            take = min(element.length, most, length) if write else min(element.length, most)
            found.append(self._memory.read(element.address, take).hex() if take > 0 else "")
            length -= element.length
        return found


def elements_json(elements: Sequence[Element]) -> list[list[Any]]:
    """Elements as an event keeps them: address, length, whether the device writes it."""
    return [[element.address, element.length, element.write] for element in elements]
