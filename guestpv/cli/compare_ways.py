"""One packet there and back, or one block read, through the kernel's driver or through ours."""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address

import numpy as np

from ..drivers.blk import Blk
from ..drivers.net import Net
from ..drivers.net_port import Frames
from ..errors import TimeLimit
from ..opener import open as open_transport
from ..spec.features import F_RING_PACKED
from ..system import SYSTEM, System
from ..vfio.binding import bind, unbind
from .compare_find import PACKET, Candidate

BLOCK_SIZE = 4096
AT_ONCE = 4
"""Frames that are looked at together."""
ANSWER_LIMIT = 5.0
LINK_LIMIT = 30.0
ETH_P_ARP = 0x0806
BROADCAST = b"\xff" * 6
ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")
"""Ethernet header and ARP packet (RFC 826)."""
FRAME = 60
"""Bytes of the shortest frame without its checksum."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Who asks for whom in the packets: our address, and that of somebody who answers."""

    own: IPv4Address
    peer: IPv4Address


@dataclass(frozen=True, slots=True)
class Way:
    """A driver that is ready.

    Attributes:
        times: so many packets or blocks, the next when the one before has come back; nanoseconds of each.
        kicks: device register accesses so far by our own count; None for the kernel's drivers.
        needles: words that mark its interrupts.
        ring: ``split`` or ``packed``, where it is ours.
    """

    times: Callable[[int], list[int]]
    kicks: Callable[[], int] | None
    needles: tuple[str, ...]
    ring: str = ""


def each_timed(once: Callable[[], None]) -> Callable[[int], list[int]]:
    """As ``Way.times``, from one operation."""

    def one() -> int:
        started = time.perf_counter_ns()
        once()
        return time.perf_counter_ns() - started

    return lambda count: [one() for _ in range(count)]


def arp_request(mac: bytes, ends: Ends) -> bytes:
    """A frame that asks who has the peer's address."""
    asked = ARP.pack(
        BROADCAST, mac, ETH_P_ARP, 1, 0x0800, 6, 4, 1, mac, ends.own.packed, bytes(6), ends.peer.packed
    )
    return asked.ljust(FRAME, b"\0")


def is_answer(frame: bytes, ends: Ends) -> bool:
    """Whether a frame is the peer's answer."""
    return len(frame) >= ARP.size and frame[20:22] == b"\0\2" and frame[28:32] == ends.peer.packed


def _no_answer(name: str, ends: Ends) -> TimeLimit:
    return TimeLimit(
        f"{ends.peer} did not answer an ARP request within {ANSWER_LIMIT:g} s",
        where=name,
        hint="guestpv compare --peer ADDRESS --own ADDRESS, with a peer on that link",
    )


@contextmanager
def kernels(candidate: Candidate, ends: Ends) -> Iterator[Way]:
    """The kernel's driver."""
    with ExitStack() as undo:
        make = kernels_link if candidate.kind == PACKET else kernels_disk
        yield Way(each_timed(make(candidate.name, ends, undo)), None, candidate.needles)


def kernels_link(name: str, ends: Ends, undo: ExitStack) -> Callable[[], None]:
    """A raw socket on the link, which is brought up, without IPv6, where it was down."""
    _bring_up(name, undo)
    mac = bytes.fromhex(SYSTEM.read_text(f"/sys/class/net/{name}/address").replace(":", ""))
    frame = arp_request(mac, ends)
    raw = undo.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)))
    raw.bind((name, ETH_P_ARP))
    raw.settimeout(ANSWER_LIMIT)

    def once() -> None:
        raw.send(frame)
        try:
            while not is_answer(raw.recv(2048), ends):
                pass
        except TimeoutError:
            raise _no_answer(name, ends) from None

    return once


def _bring_up(name: str, undo: ExitStack, system: System = SYSTEM) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        (index,) = netlink.link_lookup(ifname=name)
        (link,) = netlink.get_links(index)
        if not link["flags"] & 1:
            # What IPv6 sends by itself would be counted.
            setting = f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"
            with suppress(OSError):
                before = system.read_text(setting)
                system.write_text(setting, "1")
                undo.callback(system.write_text, setting, before)
            undo.callback(_set_down, index)
            netlink.link("set", index=index, state="up")
    deadline = time.monotonic() + LINK_LIMIT
    while system.read_text(f"/sys/class/net/{name}/carrier") != "1":
        if time.monotonic() > deadline:
            raise TimeLimit(f"no carrier within {LINK_LIMIT:g} s", where=name)
        time.sleep(0.05)


def _set_down(index: int) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        netlink.link("set", index=index, state="down")


def kernels_disk(name: str, ends: Ends, undo: ExitStack) -> Callable[[], None]:
    """Reads past the page cache."""
    fd = SYSTEM.open(f"/dev/{name}", os.O_RDONLY | os.O_DIRECT)
    undo.callback(SYSTEM.close, fd)
    memory = undo.enter_context(mmap.mmap(-1, BLOCK_SIZE))
    blocks = os.lseek(fd, 0, os.SEEK_END) // BLOCK_SIZE
    places = random.Random(1)

    def once() -> None:
        os.preadv(fd, [memory], places.randrange(blocks) * BLOCK_SIZE)

    return once


@contextmanager
def ours(candidate: Candidate, ends: Ends, mode: str) -> Iterator[Way]:
    """Our driver on the same function, which the kernel gets back afterwards."""
    address = candidate.address
    with ExitStack() as undo:
        if bind(address).changed:
            undo.callback(unbind, address)
        transport = undo.enter_context(open_transport(f"vfio:{address}?mode={mode}"))
        needles = (f"({address})",)
        if candidate.kind == PACKET:
            net = undo.enter_context(Net(transport))
            times = each_timed(_exchange(net, ends))
            queues = [net.pairs[0].tx, net.pairs[0].rx]
        else:
            disk = undo.enter_context(Blk(transport))
            times = _reader(disk)
            queues = [disk.queues[0].queue]
        ring = "packed" if transport.has(F_RING_PACKED) else "split"
        yield Way(times, lambda: sum(queue.kicks for queue in queues), needles, ring)


def _exchange(net: Net, ends: Ends) -> Callable[[], None]:
    port, frame = net.pairs[0], Frames.of([arp_request(net.mac, ends)])
    table = Frames(np.empty((AT_ONCE, port.stride), np.uint8), np.zeros(AT_ONCE, np.uint32))

    def once() -> None:
        port.send(frame)
        while port.rx.wait(ANSWER_LIMIT, spin_us=0):
            got = port.receive(AT_ONCE, out=table)
            if any(is_answer(got[row], ends) for row in range(len(got))):
                return
        raise _no_answer(net.transport.name, ends)

    return once


def _reader(disk: Blk) -> Callable[[int], list[int]]:
    memory, blocks = disk.allocate(BLOCK_SIZE), disk.capacity // BLOCK_SIZE
    random = np.random.default_rng(1)

    def times(count: int) -> list[int]:
        if not count:
            return []
        places = random.integers(0, blocks, count, np.uint64) * np.uint64(BLOCK_SIZE)
        result = disk.read_many(places, memory, BLOCK_SIZE, depth=1, latencies=True, spin_us=0)
        result.check()
        assert result.latencies is not None
        return [int(one) for one in result.latencies]

    return times
