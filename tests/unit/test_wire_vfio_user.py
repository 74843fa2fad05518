"""The vfio-user codec, byte for byte, and a channel between two ends of a socket pair."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from errno import EINVAL
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpv.errors import DeviceGone, TimeLimit
from guestpv.vfio import abi
from guestpv.wire import vfio_user as wire
from guestpv.wire.stream import ProtocolError
from guestpv.wire.vfio_user import (
    Channel,
    Command,
    DmaMap,
    DmaUnmap,
    Form,
    IrqSet,
    Message,
    RegionAccess,
    RegionFlag,
    RegionInfo,
    Version,
)

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the expected bytes are little-endian")

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ends = Channel(ours, "client", 0.2), Channel(theirs, "server", 0.2)
    yield ends
    for end in ends:
        end.close()


def pack(layout: str, *numbers: int) -> bytes:
    return struct.pack(f"<{layout}", *numbers)


@pytest.mark.parametrize(
    ("form", "payload", "expected"),
    [
        (wire.NOTHING, wire.Nothing(), b""),
        (wire.VERSION_FORM, Version(0, 1, {}), pack("HH", 0, 1) + b'{"capabilities": {}}\0'),
        (
            wire.VERSION_FORM,
            Version(0, 0, {"max_msg_fds": 8}),
            pack("HH", 0, 0) + b'{"capabilities": {"max_msg_fds": 8}}\0',
        ),
        (wire.DMA_MAP_FORM, DmaMap(32, 3, 4096, 1 << 36, 8192), pack("IIQQQ", 32, 3, 4096, 1 << 36, 8192)),
        (wire.DMA_UNMAP_FORM, DmaUnmap(24, 2, 1 << 36, 8192), pack("IIQQ", 24, 2, 1 << 36, 8192)),
        (wire.DEVICE_INFO_FORM, wire.DeviceInfo(16, 3, 9, 5), pack("IIII", 16, 3, 9, 5)),
        (
            wire.REGION_INFO_FORM,
            RegionInfo(40, 15, 4, 32, 16384, 4096, b"12345678"),
            pack("IIIIQQ", 40, 15, 4, 32, 16384, 4096) + b"12345678",
        ),
        (wire.IRQ_INFO_FORM, wire.IrqInfo(16, 1, 2, 3), pack("IIII", 16, 1, 2, 3)),
        (wire.IRQ_SET_FORM, IrqSet(22, 0x12, 2, 1, 2, b"\1\0"), pack("IIIII", 22, 0x12, 2, 1, 2) + b"\1\0"),
        (wire.ACCESS_FORM, RegionAccess(20, 4, 1, b"\x0f"), pack("QII", 20, 4, 1) + b"\x0f"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_payloads(form: Form[Any], payload: object, expected: bytes) -> None:
    assert form.pack(payload) == expected
    assert form.unpack(expected) == payload


@pytest.mark.parametrize(
    ("form", "data"),
    [
        (wire.NOTHING, b"\0"),
        (wire.DMA_MAP_FORM, bytes(31)),
        (wire.DMA_UNMAP_FORM, bytes(25)),
        (wire.REGION_INFO_FORM, bytes(31)),
        (wire.ACCESS_FORM, bytes(15)),
        (wire.VERSION_FORM, bytes(3)),
        (wire.VERSION_FORM, bytes(4) + b"{\0"),
        (wire.VERSION_FORM, bytes(4) + b"[1]\0"),
        (wire.VERSION_FORM, bytes(4) + b'{"capabilities": 7}\0'),
        (wire.VERSION_FORM, bytes(4) + b"\xff\0"),
        (wire.VERSION_FORM, bytes(4) + b"[" * 100_000),
    ],
)
def test_payloads_of_a_wrong_size_or_shape_are_refused(form: Form[Any], data: bytes) -> None:
    with pytest.raises(ProtocolError):
        form.unpack(data)


def test_a_version_without_data_has_no_capabilities() -> None:
    assert wire.VERSION_FORM.unpack(pack("HH", 0, 1)) == Version(0, 1, {})


def test_names_have_the_kernels_values() -> None:
    for kind, prefix in (
        (wire.DeviceFlag, "DEVICE_FLAGS"),
        (wire.RegionFlag, "REGION_INFO_FLAG"),
        (wire.IrqFlag, "IRQ_INFO"),
        (wire.DmaFlag, "DMA_MAP_FLAG"),
    ):
        for flag in kind:
            assert getattr(abi, f"{prefix}_{flag.name}") == flag
    known = [flag for flag in wire.IrqSetFlag if hasattr(abi, f"IRQ_SET_{flag.name}")]
    assert len(known) >= 4
    assert all(getattr(abi, f"IRQ_SET_{flag.name}") == flag for flag in known)
    assert (wire.INTX, wire.MSIX, wire.ERR, wire.REQ) == (
        abi.PCI_INTX_IRQ_INDEX,
        abi.PCI_MSIX_IRQ_INDEX,
        abi.PCI_ERR_IRQ_INDEX,
        abi.PCI_REQ_IRQ_INDEX,
    )
    assert (wire.BAR0_REGION, wire.BAR5_REGION, wire.CONFIG_REGION) == (
        abi.PCI_BAR0_REGION_INDEX,
        abi.PCI_BAR5_REGION_INDEX,
        abi.PCI_CONFIG_REGION_INDEX,
    )
    assert wire.CAP_SPARSE_MMAP == abi.REGION_INFO_CAP_SPARSE_MMAP


def test_structures_that_the_kernel_has_too_lie_as_the_kernels() -> None:
    for form, kernels in (
        (wire.REGION_INFO_FORM, abi.RegionInfo),
        (wire.IRQ_INFO_FORM, abi.IrqInfo),
        (wire.IRQ_SET_FORM, abi.IrqSet),
    ):
        assert form.size == kernels.size
    names = [name for name, _ in abi.RegionInfo.fields]
    assert [field.name for field in fields(RegionInfo)] == [*names, "capabilities"]


def test_every_row_is_listed_under_its_command() -> None:
    assert {number: exchange.command for number, exchange in wire.EXCHANGES.items()} == {
        number: Command(number) for number in wire.EXCHANGES
    }
    assert max(high for exchange in wire.EXCHANGES.values() for high in exchange.fds) <= wire.MAX_FDS


def areas(*pairs: tuple[int, int]) -> bytes:
    head = pack("HHI", 1, 1, 0) + pack("II", len(pairs), 0)
    return head + b"".join(pack("QQ", *pair) for pair in pairs)


@pytest.mark.parametrize(
    ("flags", "capabilities", "whole"),
    [
        (RegionFlag.READ, b"", False),
        (RegionFlag.MMAP, b"", True),
        (RegionFlag.MMAP | RegionFlag.CAPS, areas((0, 0x4000)), True),
        (RegionFlag.MMAP | RegionFlag.CAPS, areas((0x2000, 0x2000), (0, 0x2000)), True),
        (RegionFlag.MMAP | RegionFlag.CAPS, areas((0x3000, 0x1000)), False),
        (RegionFlag.MMAP | RegionFlag.CAPS, areas((0, 0x1000), (0x2000, 0x2000)), False),
        (RegionFlag.MMAP | RegionFlag.CAPS, areas(), False),
        (RegionFlag.MMAP | RegionFlag.CAPS, areas((0, 0x4000))[:20], False),
        (RegionFlag.MMAP | RegionFlag.CAPS, areas((0, 0x4000))[:10], False),
        # Another capability first, then the areas; and a chain that bites its tail.
        (RegionFlag.MMAP | RegionFlag.CAPS, pack("HHI", 9, 1, 40) + areas((0, 0x1000)), False),
        (RegionFlag.MMAP | RegionFlag.CAPS, pack("HHI", 9, 1, 32), True),
    ],
)
def test_a_region_is_mapped_only_as_a_whole(flags: int, capabilities: bytes, whole: bool) -> None:
    info = RegionInfo(32 + len(capabilities), flags, 4, 32, 0x4000, 0, capabilities)
    assert wire.covered(info) is whole


def test_a_message_and_its_descriptor_cross(pair: Pair) -> None:
    client, server = pair
    read, write = os.pipe()
    client.send(Message(7, Command.DMA_MAP, b"abc", (write,)))
    os.close(write)
    came = server.receive()
    assert (came.id, came.command, came.payload, came.is_reply) == (7, Command.DMA_MAP, b"abc", False)
    assert came.wants_reply
    os.write(came.fds[0], b"through")
    came.close_fds()
    assert os.read(read, 10) == b"through"
    os.close(read)

    server.send(came.answer(b"done"))
    reply = client.receive()
    assert (reply.id, reply.is_reply, reply.failed, reply.payload) == (7, True, False, b"done")
    server.send(came.refuse(EINVAL))
    reply = client.receive()
    assert (reply.id, reply.is_reply, reply.failed, reply.errno, reply.payload) == (
        7,
        True,
        True,
        EINVAL,
        b"",
    )


def test_the_header_is_that_of_the_protocol() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(ours, "client").send(Message(0x1234, Command.REGION_WRITE, b"xy", flags=wire.FLAG_NO_REPLY))
        assert theirs.recv(100) == pack("HHIII", 0x1234, 10, 18, 0x10, 0) + b"xy"


def test_pipelined_messages_keep_their_borders_and_descriptors(pair: Pair) -> None:
    client, server = pair
    read, write = os.pipe()
    client.send(Message(1, Command.REGION_WRITE, b"a" * 17))
    client.send(Message(2, Command.DMA_MAP, b"b" * 32, (read,)))
    client.send(Message(3, Command.DEVICE_RESET))
    messages = [server.receive() for _ in range(3)]
    assert [(m.id, len(m.payload), len(m.fds)) for m in messages] == [(1, 17, 0), (2, 32, 1), (3, 0, 0)]
    messages[1].close_fds()
    os.close(read)
    os.close(write)


def test_a_large_message_crosses_in_pieces(pair: Pair) -> None:
    client, server = pair
    payload = bytes(range(256)) * 2048
    sender = threading.Thread(target=client.send, args=(Message(1, Command.REGION_WRITE, payload),))
    sender.start()
    assert server.receive().payload == payload
    sender.join()


@pytest.mark.parametrize(
    "head",
    [
        pack("HHIII", 1, 1, 15, 0, 0),
        pack("HHIII", 1, 1, 1 << 30, 0, 0),
        pack("HHIII", 1, 1, 16, 2, 0),
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_what_is_no_vfio_user_message_is_refused(head: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(head)
        with pytest.raises(ProtocolError, match="does not speak vfio-user"):
            Channel(theirs, "server", 1).receive()


def test_too_many_descriptors_are_refused_and_none_stays_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = len(os.listdir("/proc/self/fd"))
        fds = [os.dup(0) for _ in range(wire.MAX_FDS + 5)]
        head = pack("HHIII", 1, 2, 16, 0, 0)
        rights = struct.pack(f"{len(fds)}i", *fds)
        ours.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        for fd in fds:
            os.close(fd)
        with pytest.raises(ProtocolError, match="more than 16 descriptors"):
            Channel(theirs, "server", 1).receive()
        assert len(os.listdir("/proc/self/fd")) == before


def test_half_a_message_is_waited_for_only_so_long(pair: Pair) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        channel = Channel(theirs, "server", 0.05)
        ours.sendall(pack("HHIII", 1, 1, 20, 0, 0) + b"ab")
        with pytest.raises(TimeLimit, match=r"sent nothing for 0\.05 s"):
            channel.receive()
        channel.close()


def test_a_peer_that_reads_nothing(pair: Pair) -> None:
    client, _ = pair
    with pytest.raises(TimeLimit, match="read nothing"):
        client.send(Message(1, Command.REGION_WRITE, bytes(wire.MAX_DATA)))


def test_a_peer_that_hung_up(pair: Pair) -> None:
    client, server = pair
    server.close()
    with pytest.raises(DeviceGone):
        client.receive()
    with pytest.raises(DeviceGone):
        client.send(Message(1, Command.DEVICE_RESET))


@given(st.sampled_from(sorted(wire.EXCHANGES)), st.binary(max_size=80))
def test_any_bytes_are_a_payload_or_a_protocol_error(command: int, data: bytes) -> None:
    for form in (wire.EXCHANGES[command].sends, wire.EXCHANGES[command].answers):
        try:
            payload = form.unpack(data)
        except ProtocolError:
            continue
        if form is not wire.VERSION_FORM:
            assert form.pack(payload) == data
