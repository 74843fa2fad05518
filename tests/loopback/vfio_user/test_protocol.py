"""The protocol itself, spoken by hand: what is answered, and what is refused."""

from __future__ import annotations

import struct
from errno import EINVAL, ENOTSUP

import pytest

from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceGone
from guestpv.pci.vfio_user import Session
from guestpv.spec import pci
from guestpv.wire import vfio_user as wire
from guestpv.wire.vfio_user import (
    Command,
    Message,
    RegionAccess,
    Version,
)

from .kit import DEVICE_STATUS, VIRTIO_BAR, Serve, connected, opened, refused, until


@pytest.mark.parametrize("command", [*sorted(set(Command) - set(wire.EXCHANGES)), 0, 14, 77, 65535])
def test_other_commands_are_not_supported(serve: Serve, command: int) -> None:
    channel = connected(serve())
    channel.send(Message(9, command, b"whatever"))
    reply = channel.receive()
    assert (reply.id, reply.command, reply.errno, reply.payload) == (9, command, ENOTSUP, b"")
    channel.close()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message(1, Command.DEVICE_GET_INFO, bytes(16)), "before VERSION"),
        (Message(1, Command.VERSION, wire.VERSION_FORM.pack(Version(1, 0, {}))), "version 1.0"),
        (Message(1, Command.VERSION, b"\0"), "Version has 1 bytes"),
        (Message(1, Command.VERSION, b"", flags=wire.TYPE_REPLY), "nothing was asked"),
    ],
)
def test_a_client_that_starts_wrongly_is_sent_away(serve: Serve, message: Message, reason: str) -> None:
    said: list[str] = []
    server = serve(tell=said.append)
    channel = connected(server, greet=False)
    channel.send(message)
    with pytest.raises(DeviceGone):
        channel.receive()
    channel.close()
    until(lambda: any("sent away" in text and reason in text for text in said))
    with opened(server) as transport, Rng(transport) as rng:
        assert len(rng.read(8)) == 8


def test_only_limits_that_the_client_named_are_answered(serve: Serve) -> None:
    server = serve()
    channel = connected(server, greet=False)
    asked = Version(0, 9, {"max_msg_fds": 3, "twin_socket": {"supported": True}})
    channel.send(Message(1, Command.VERSION, wire.VERSION_FORM.pack(asked)))
    answer = wire.VERSION_FORM.unpack(channel.receive().payload)
    assert (answer.major, answer.minor, dict(answer.capabilities)) == (0, 1, {"max_msg_fds": wire.MAX_FDS})
    channel.close()


@pytest.mark.provokes("raw commands")
def test_commands_without_reply_are_carried_out_in_order(serve: Serve) -> None:
    channel = connected(serve(findings=True))

    def write(region: int, offset: int, data: bytes) -> None:
        payload = wire.ACCESS_FORM.pack(RegionAccess(offset, region, len(data), data))
        channel.send(Message(2, Command.REGION_WRITE, payload, flags=wire.FLAG_NO_REPLY))

    write(wire.CONFIG_REGION, pci.PCI_CONFIG_COMMAND, b"\6\0")
    write(VIRTIO_BAR, DEVICE_STATUS, b"\1")
    write(VIRTIO_BAR, DEVICE_STATUS, b"\3")
    channel.send(Message(3, Command.DMA_READ, flags=wire.FLAG_NO_REPLY))
    payload = wire.ACCESS_FORM.pack(RegionAccess(DEVICE_STATUS, VIRTIO_BAR, 1))
    channel.send(Message(4, Command.REGION_READ, payload))
    reply = channel.receive()
    assert (reply.id, wire.ACCESS_FORM.unpack(reply.payload).data) == (4, b"\3")
    channel.close()


def test_information(raw: Session) -> None:
    info, _ = raw.call(wire.GET_INFO, wire.DeviceInfo(16))
    assert info == wire.DeviceInfo(16, wire.DeviceFlag.PCI | wire.DeviceFlag.RESET, 9, 5)
    sizes = [raw.call(wire.GET_REGION_INFO, wire.RegionInfo(32, index=n))[0].size for n in range(9)]
    assert sizes == [4096, 0, 0, 0, 16384, 0, 0, 4096, 0]
    counts = [raw.call(wire.GET_IRQ_INFO, wire.IrqInfo(16, index=n))[0].count for n in range(5)]
    assert counts == [1, 0, 2, 1, 1]
    assert refused(raw, wire.GET_INFO, wire.DeviceInfo(15)) == EINVAL
    assert refused(raw, wire.GET_REGION_INFO, wire.RegionInfo(31, index=0)) == EINVAL
    assert refused(raw, wire.GET_REGION_INFO, wire.RegionInfo(32, index=9)) == EINVAL
    assert refused(raw, wire.GET_IRQ_INFO, wire.IrqInfo(16, index=5)) == EINVAL
    assert refused(raw, wire.VERSION, Version(0, 1, {})) == EINVAL, "a second time"


@pytest.mark.provokes("raw commands")
def test_regions_are_read_whole_and_in_any_piece(raw: Session) -> None:
    def read(region: int, offset: int, count: int) -> bytes:
        return raw.call(wire.REGION_READ, RegionAccess(offset, region, count))[0].data

    raw.call(wire.REGION_WRITE, RegionAccess(4, wire.CONFIG_REGION, 2, b"\6\0"))
    space = read(wire.CONFIG_REGION, 0, 4096)
    assert struct.unpack_from("<HH", space) == (0x1AF4, 0x1044)
    assert read(wire.CONFIG_REGION, 1, 7) == space[1:8]
    raw.call(wire.REGION_WRITE, RegionAccess(0, VIRTIO_BAR, 4, struct.pack("<I", 1)))
    registers = read(VIRTIO_BAR, 0, 22)
    features = raw.call(wire.REGION_READ, RegionAccess(4, VIRTIO_BAR, 4))[0].data
    assert registers[:8] == struct.pack("<I", 1) + features
    assert features[0] & 3 == 3, "VERSION_1 and ACCESS_PLATFORM"
    raw.call(wire.REGION_WRITE, RegionAccess(0, VIRTIO_BAR, 12, struct.pack("<III", 0, 0, 1)))
    assert read(VIRTIO_BAR, 8, 4) == struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("region", "offset", "count", "data"),
    [
        (VIRTIO_BAR, 16384, 1, b""),
        (VIRTIO_BAR, 16383, 2, b""),
        (VIRTIO_BAR, 0, 0, b""),
        (VIRTIO_BAR, 1 << 63, 4, b""),
        (1, 0, 4, b""),
        (wire.CONFIG_REGION, 4093, 4, b""),
        (9, 0, 4, b""),
        (VIRTIO_BAR, 0, 4, b"\0\0\0"),
        (VIRTIO_BAR, 0, 4, b"\0" * 5),
    ],
)
def test_accesses_outside_of_a_region_are_refused(
    raw: Session, region: int, offset: int, count: int, data: bytes
) -> None:
    exchange = wire.REGION_WRITE if data else wire.REGION_READ
    assert refused(raw, exchange, RegionAccess(offset, region, count, data)) == EINVAL
