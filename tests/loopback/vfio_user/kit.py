"""What the tests of ``vfio-user:`` share."""

from __future__ import annotations

import gc
import mmap
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import guestpv
from guestpv.pci.vfio_user import CommandRefused, Session
from guestpv.serve.vfio_user import VfioUserServer
from guestpv.transport.pci import PciTransport
from guestpv.wire import vfio_user as wire
from guestpv.wire.vfio_user import (
    Channel,
    Command,
    DmaMap,
    Message,
    Version,
)

PAGE = mmap.PAGESIZE
BUS = 1 << 40
RW = wire.DmaFlag.READ | wire.DmaFlag.WRITE
VIRTIO_BAR = 4
DEVICE_STATUS = 20
Serve = Callable[..., VfioUserServer]
Script = Callable[[Channel, Message], bool]


def opened(server: VfioUserServer, query: str = "") -> PciTransport:
    transport = guestpv.open(f"{server.name}{query}")
    assert isinstance(transport, PciTransport)
    return transport


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.002)


def refused(
    session: Session, exchange: wire.Exchange[Any, Any], value: object, fds: tuple[int, ...] = ()
) -> int:
    """The errno with which the server refuses a command."""
    with pytest.raises(CommandRefused) as caught:
        session.call(exchange, value, fds)
    return caught.value.errno


def connected(server: VfioUserServer, *, greet: bool = True) -> Channel:
    """A connection below ``Session``."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(server.path)
    channel = Channel(sock, "raw", 60)
    if greet:
        channel.send(Message(1, Command.VERSION, wire.VERSION_FORM.pack(Version(0, 1, {}))))
        assert not channel.receive().failed
    return channel


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def fired(fd: int) -> bool:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


def mappings() -> int:
    """How often the memfd of ``memory`` is mapped into this process, which is the server's, too."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:guestpv-test-memory")


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def dma(session: Session, at: int, pages: int, page: int, fd: int | None, flags: int = RW) -> None:
    """DMA_MAP of ``pages`` pages, from page ``page`` of the file on, at page ``at`` of the bus."""
    region = DmaMap(32, flags, page * PAGE, BUS + at * PAGE, pages * PAGE)
    session.call(wire.DMA_MAP, region, () if fd is None else (fd,))
