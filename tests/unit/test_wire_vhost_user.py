"""The vhost-user codec, byte for byte, and a channel between two ends of a socket pair."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpv.errors import DeviceGone, TimeLimit
from guestpv.wire import vhost_user as wire
from guestpv.wire.stream import ProtocolError
from guestpv.wire.vhost_user import (
    U64,
    Channel,
    Config,
    Inflight,
    MemoryRegion,
    MemorySlot,
    MemoryTable,
    Message,
    Request,
    VringAddress,
    VringState,
)

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the expected bytes are little-endian")

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ends = Channel(ours, "front end", 0.2), Channel(theirs, "back end", 0.2)
    yield ends
    for end in ends:
        end.close()


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (U64(0x0123456789ABCDEF), u64(0x0123456789ABCDEF)),
        (VringState(3, 256), u32(3, 256)),
        # descriptor, used, available: not the order of the queue registers of PCI
        (VringAddress(1, 0, 0xD000, 0xE000, 0xA000), u32(1, 0) + u64(0xD000, 0xE000, 0xA000, 0)),
        (MemorySlot(1 << 36, 4096, 0x7F00, 0), bytes(8) + u64(1 << 36, 4096, 0x7F00, 0)),
        (Inflight(4096, 0, 4, 128), u64(4096, 0) + struct.pack("<HHI", 4, 128, 0)),
        (
            MemoryTable((MemoryRegion(1, 2, 3, 4), MemoryRegion(5, 6, 7, 8))),
            u32(2, 0) + u64(1, 2, 3, 4, 5, 6, 7, 8),
        ),
        (Config(32, b"\1\2", 1), u32(32, 2, 1) + b"\1\2"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_payloads(payload: wire.AnyPayload, expected: bytes) -> None:
    assert payload.pack() == expected
    assert type(payload).unpack(expected) == payload


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (U64, bytes(7)),
        (VringState, bytes(12)),
        (VringAddress, bytes(39)),
        (MemorySlot, bytes(32)),
        (MemoryTable, b""),
        (MemoryTable, u32(9, 0) + bytes(9 * 32)),
        (MemoryTable, u32(2, 0) + bytes(32)),
        (Config, bytes(11)),
        (Config, u32(0, 5, 0) + bytes(4)),
        (Config, u32(0, 257, 0) + bytes(257)),
    ],
)
def test_wrong_sizes_are_refused(kind: type[wire.AnyPayload], data: bytes) -> None:
    with pytest.raises(ProtocolError):
        kind.unpack(data)


@given(st.binary(max_size=400))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    for kind in (U64, VringState, VringAddress, MemorySlot, MemoryTable, Inflight, Config):
        try:
            payload = kind.unpack(data)
        except ProtocolError:
            continue
        assert len(payload.pack()) <= len(data) or isinstance(payload, Config)


def test_every_request_is_in_the_table() -> None:
    assert set(wire.REQUESTS) == set(Request)
    for request, exchange in wire.REQUESTS.items():
        assert (exchange.answers is not None) == request.name.startswith("GET_"), request


def test_a_message_arrives_with_its_descriptors(pair: Pair) -> None:
    front, back = pair
    fd = os.memfd_create("sent")
    os.write(fd, b"seen by both")
    front.send(Message(Request.SET_INFLIGHT_FD, Inflight(12, 0, 1, 8).pack(), (fd,)))
    os.close(fd)
    message = back.receive()
    assert message.request == Request.SET_INFLIGHT_FD
    assert not message.is_reply
    assert not message.wants_reply
    (came,) = message.fds
    assert os.pread(came, 20, 0) == b"seen by both"
    assert not os.get_inheritable(came)
    message.close_fds()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(came)


def test_the_header_is_request_flags_size(pair: Pair) -> None:
    front, back = pair
    front.send(Message(Request.SET_FEATURES, U64(5).pack(), flags=wire.VERSION | wire.FLAG_NEED_REPLY))
    message = back.receive()
    assert message.wants_reply
    back.send(message.answer(U64(0).pack()))
    reply = front.receive()
    assert (reply.request, reply.flags, reply.payload) == (2, 0b101, u64(0))
    os.write(back.fileno(), u32(2, 0b101, 8) + u64(7))
    assert U64.unpack(front.receive().payload) == U64(7)


def test_a_message_in_pieces_is_put_together(pair: Pair) -> None:
    front, back = pair
    data = u32(1, 5, 8) + u64(9)
    os.write(back.fileno(), data[:5])
    os.write(back.fileno(), data[5:14])
    os.write(back.fileno(), data[14:])
    assert front.receive() == Message(1, u64(9), (), 5)


@pytest.mark.parametrize(
    "greeting",
    [
        b'{"QMP": {"version": {"qemu": {}}}}\r\n',
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        u32(1, 1, 1 << 20),
        u32(1, 0, 8),
    ],
    ids=["qmp", "ssh", "too long", "version 0"],
)
def test_another_protocol_is_recognized(pair: Pair, greeting: bytes) -> None:
    front, back = pair
    os.write(back.fileno(), greeting)
    with pytest.raises(ProtocolError, match="does not speak vhost-user"):
        front.receive()


def test_a_silent_peer_is_a_time_limit(pair: Pair) -> None:
    front, back = pair
    with pytest.raises(TimeLimit, match=r"nothing for 0\.2 s"):
        front.receive()
    os.write(back.fileno(), u32(1, 5)[:6])
    with pytest.raises(TimeLimit):
        front.receive()


def test_a_closed_connection_is_a_gone_device(pair: Pair) -> None:
    front, back = pair
    os.write(back.fileno(), u32(1, 5, 8))
    back.close()
    with pytest.raises(DeviceGone):
        front.receive()
    with pytest.raises(DeviceGone):
        front.send(Message(Request.SET_OWNER))


def test_more_descriptors_than_a_message_may_have_are_refused_and_none_stays_open() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs, "back end", 1)
    with ours:
        before = len(os.listdir("/proc/self/fd"))
        rights = struct.pack(f"{wire.MAX_FDS + 5}i", *[ours.fileno()] * (wire.MAX_FDS + 5))
        ours.sendmsg([bytes(12)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        with pytest.raises(ProtocolError, match="more than 8 descriptors"):
            channel.receive()
        assert len(os.listdir("/proc/self/fd")) == before
        channel.close()
