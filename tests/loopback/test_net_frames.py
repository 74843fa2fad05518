"""The data path under our own device: offloads pass through, bad frames count, nothing stale gets out."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from guestpv.devices.loopback import open_function
from guestpv.devices.models.net import Net as NetModel
from guestpv.devices.models.packet import Packet
from guestpv.drivers import net_port
from guestpv.drivers.net import RECEIVE_OFFLOADS, SEND_OFFLOADS, Net
from guestpv.drivers.net_port import Frames
from guestpv.errors import DeviceViolation, UsageError
from guestpv.services import tap
from guestpv.services.net import NetService
from guestpv.spec import features as feat
from guestpv.spec import net as spec
from guestpv.transport.base import FeatureFilter
from guestpv.transport.pci import PciTransport

ETH_P_ALL, ETH_P_TEST = 3, 0x88B5
SOL_PACKET, PACKET_VNET_HDR = 263, 15
LOCAL, REMOTE = bytes.fromhex("525400000001"), bytes.fromhex("525400000099")
PATIENCE = 60.0
NEEDS_CSUM = spec.HDR_F_NEEDS_CSUM

pytestmark = pytest.mark.usefixtures("own_network")


def frame(number: int, size: int = 60) -> bytes:
    return (LOCAL + REMOTE + struct.pack("!HI", ETH_P_TEST, number)).ljust(size, bytes([number % 251 + 1]))


def header(
    flags: int = 0, gso: int = 0, size: int = 0, start: int = 0, offset: int = 0, buffers: int = 1
) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, 0, size, start, offset, buffers)


def write_raw(model: NetModel, data: bytes, used: int | None = None) -> None:
    """What a device could write into the next receive buffer, and the length that it claims."""
    queue = model.device.queues[0]
    chain = queue.pop()
    assert chain is not None
    written = chain.write(data)
    queue.complete(chain, written if used is None else used)


def tcp(version: int, payload: int, *, to: bytes = REMOTE, by: bytes = LOCAL) -> bytes:
    """An Ethernet frame with a TCP segment whose checksum is left open, and where it begins."""
    segment = struct.pack("!HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 1000, 0, 0) + bytes(payload)
    return ethernet(version, 6, segment, to, by)


def udp(version: int, payload: int, *, to: bytes = REMOTE, by: bytes = LOCAL) -> bytes:
    return ethernet(version, 17, struct.pack("!HHHH", 1000, 2000, 8 + payload, 0) + bytes(payload), to, by)


def ethernet(version: int, protocol: int, body: bytes, to: bytes, by: bytes) -> bytes:
    """An Ethernet frame whose checksum is left open: the field has the sum of the pseudo header."""
    ends = (
        bytes((192, 0, 2, 1)) + bytes((192, 0, 2, 2))
        if version == 4
        else bytes(15) + b"\1" + bytes(15) + b"\2"
    )
    total = sum(struct.unpack(f"!{len(ends) // 2}H", ends)) + protocol + len(body)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    at = 16 if protocol == 6 else 6
    body = body[:at] + total.to_bytes(2, "big") + body[at + 2 :]
    if version == 4:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0)
        return to + by + b"\x08\x00" + ip + ends + body
    return to + by + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + ends + body


class Bench:
    """A service on our own device in a thread, and a raw socket on its link."""

    def __init__(
        self, *, features: str = "", kind: int = ETH_P_TEST, poll: bool = False, **params: str
    ) -> None:
        self.function = open_function("net", {"peer": "sink", "threaded": "on", **params})
        assert isinstance(self.function.model, NetModel)
        self.model = self.function.model
        self.sent: list[Packet] = []
        self.model.peer = self.sent.append
        transport = PciTransport(self.function)
        transport.feature_filter = FeatureFilter.parse(features, feat.NET)
        self.service = NetService(transport, poll=poll)
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
        self.socket.bind((self.service.ifname, kind))
        self.socket.settimeout(PATIENCE)

    def frames_sent(self) -> list[bytes]:
        """What came out of the device of the test's own; the kernel sends things, too."""
        return [packet.data for packet in self.sent if packet.data[12:14] == struct.pack("!H", ETH_P_TEST)]

    def write_raw(self, data: bytes, used: int | None = None) -> None:
        self.function.device.executor.post(lambda: write_raw(self.model, data, used))

    def counts(self, name: str, wanted: int) -> None:
        """Wait until a counter of the only pair has a value."""
        self.until(lambda: self.service.stats()["queues"][0][name] == wanted)

    def until(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, self.service.stats()
            time.sleep(0.002)

    def end(self) -> DeviceViolation:
        """What ends the link."""
        with pytest.raises(DeviceViolation) as caught:  # noqa: PT012
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                self.service.watch(0.05)
        return caught.value

    def close(self) -> None:
        self.socket.close()
        self.service.close()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**options: Any) -> Bench:
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for one in benches:
        one.close()


# Offloads pass through.


@pytest.mark.requirement("DRV-NET-23", "DRV-NET-25", "DRV-NET-32", "DRV-NET-50", "DRV-NET-51", "DRV-NET-53")
@pytest.mark.parametrize(
    ("make", "version", "gso"),
    [
        (tcp, 4, spec.GSO_TCPV4),
        (tcp, 6, spec.GSO_TCPV6),
        (tcp, 4, spec.GSO_TCPV4 | spec.GSO_ECN),
        (udp, 4, spec.GSO_UDP_L4),
        (udp, 6, spec.GSO_UDP_L4),
    ],
    ids=["tso4", "tso6", "ecn", "uso4", "uso6"],
)
def test_what_the_kernel_leaves_to_the_device_gets_there_whole(
    bench: Callable[..., Bench], make: Callable[..., bytes], version: int, gso: int
) -> None:
    if make is udp and tap.unsupported_offloads():
        pytest.skip("Linux before 6.2 cuts UDP itself; run it on a newer one")
    one = bench()
    data = make(version, 30000)
    start = 14 + (20 if version == 4 else 40)
    transport, checksum = (20, 16) if make is tcp else (8, 6)
    one.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    left = struct.pack("=BBHHHH", NEEDS_CSUM, gso, start + transport, 1200, start, checksum)
    one.socket.sendto(left + data, (one.service.ifname, 0x0800 if version == 4 else 0x86DD))
    one.until(lambda: [packet for packet in one.sent if packet.data == data])
    (packet,) = (packet for packet in one.sent if packet.data == data)
    assert (packet.needs_csum, packet.csum_start, packet.csum_offset) == (True, start, checksum)
    assert (packet.gso_type | packet.ecn << 7, packet.gso_size) == (gso, 1200)
    assert not one.function.findings


@pytest.mark.parametrize("offer", ["-mrg_rxbuf", "+mrg_rxbuf"], ids=["big", "merged"])
@pytest.mark.parametrize("version", [4, 6])
def test_what_the_device_leaves_to_the_kernel_gets_there_whole(
    bench: Callable[..., Bench], version: int, offer: str
) -> None:
    one = bench(kind=ETH_P_ALL, offer=offer)
    data = tcp(version, 40000, to=LOCAL, by=REMOTE)
    start = 14 + (20 if version == 4 else 40)
    gso = spec.GSO_TCPV4 if version == 4 else spec.GSO_TCPV6
    one.model.deliver(Packet(data, True, start, 16, gso, False, 1448))
    while one.socket.recv(65536) != data:
        pass
    assert not one.function.findings


@pytest.mark.requirement("DRV-NET-01", "DRV-NET-18", "DRV-NET-179")
@pytest.mark.parametrize("packed", ["off", "on"])
def test_a_longer_header_crosses_the_link(bench: Callable[..., Bench], packed: str) -> None:
    one = bench(features="+hash_report", offer="+hash_report", packed=packed)
    for number in range(20):
        one.model.deliver(frame(number))
        assert one.socket.recv(2048) == frame(number)
        one.socket.send(frame(number))
    one.until(
        lambda: [p.data for p in one.sent if p.data[12:14] == b"\x88\xb5"] == [frame(n) for n in range(20)]
    )
    assert not one.function.findings


@pytest.mark.parametrize(
    ("release", "taken"), [("6.1.0-53-amd64", False), ("6.12.1", True), ("7.0.2+x", True)]
)
def test_udp_segments_are_asked_for_where_the_kernel_takes_them(
    monkeypatch: pytest.MonkeyPatch, release: str, taken: bool
) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "x", release, "v", "x86_64")))
    assert tap.unsupported_offloads() == (0 if taken else 1 << spec.F_GUEST_USO4 | 1 << spec.F_GUEST_USO6)


# Back-pressure.


def test_a_device_that_is_slow_loses_nothing(bench: Callable[..., Bench]) -> None:
    one = bench(queue_size="4")
    taken: list[Any] = []
    one.model._transmit = lambda queue, chain: taken.append((queue, chain))  # type: ignore[method-assign]
    outbound = [frame(number) for number in range(200)]
    for data in outbound:
        one.socket.send(data)
    one.until(lambda: len(taken) == 4)
    del one.model._transmit

    def go_on() -> None:
        for queue, chain in taken:
            one.model._transmit(queue, chain)

    one.function.device.executor.post(go_on)
    one.until(lambda: one.frames_sent() == outbound)


@pytest.mark.parametrize("mode", ["interrupts", "poll"])
def test_a_device_that_forgets_frames_is_reminded(bench: Callable[..., Bench], mode: str) -> None:
    """Also while others come in all the time."""
    one = bench(poll=mode == "poll")
    serve = one.model.serve

    def reminders() -> int:
        return int(one.service.stats()["queues"][0]["tx_reminders"])

    def forgetful(queue: Any) -> None:
        if queue.index != 1 or reminders():
            serve(queue)

    one.model.serve = forgetful  # type: ignore[method-assign]
    one.socket.send(frame(1))
    deadline = time.monotonic() + PATIENCE
    while frame(1) not in one.frames_sent():
        assert time.monotonic() < deadline, one.service.stats()
        one.model.deliver(frame(2))
        time.sleep(0.005)
    assert reminders()


def test_a_link_that_is_down_costs_frames_and_counts_them(bench: Callable[..., Bench]) -> None:
    one = bench()
    subprocess.run(["ip", "link", "set", "pv0", "down"], check=True)
    one.model.deliver(frame(1))
    one.counts("rx_dropped", 1)
    subprocess.run(["ip", "link", "set", "pv0", "up"], check=True)
    one.model.deliver(frame(2))
    one.counts("rx_packets", 1)
    assert one.service.stats()["queues"][0]["rx_malformed"] == 0


@pytest.mark.requirement("DRV-NET-09")
def test_no_frame_is_longer_than_the_device_takes_nor_cut(bench: Callable[..., Bench]) -> None:
    one = bench(mtu="1400")
    subprocess.run(["ip", "link", "set", "pv0", "mtu", "9000"], check=True)
    for size in (1418, 1419, 1500, 3000, 9000):
        one.socket.send(frame(size, size))
    one.counts("tx_dropped", 4)
    one.socket.send(frame(3))
    one.until(lambda: [len(data) for data in one.frames_sent()] == [1418, 60])
    assert not one.function.findings


# Frames that cannot be.


BAD = {
    "shorter than its header": (header() + frame(1), 11),
    "nothing at all": (b"", 0),
    "header alone": (header(), None),
    "num_buffers 0": (header(buffers=0) + frame(1), None),
    "unknown gso_type": (header(NEEDS_CSUM, 2, 1000, 34, 16) + tcp(4, 5000), None),
    "gso_type 31": (header(NEEDS_CSUM, 31, 1000, 34, 16) + tcp(4, 100), None),
    "gso_type 0x7f": (header(NEEDS_CSUM, 0x7F, 1000, 34, 16) + tcp(4, 100), None),
    "gso_size 0": (header(NEEDS_CSUM, spec.GSO_TCPV4, 0, 34, 16) + tcp(4, 100), None),
    "gso of a cut header": (header(NEEDS_CSUM, spec.GSO_TCPV4, 1448, 34, 16) + tcp(4, 0)[:40], None),
    "checksum outside": (header(NEEDS_CSUM, 0, 0, 5000, 16) + frame(1), None),
    "coalesced nothing": (header(spec.HDR_F_RSC_INFO, spec.GSO_TCPV4, 0, 4, 0) + frame(1), None),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_frame_is_dropped_and_counted(bench: Callable[..., Bench], bad: str) -> None:
    one = bench()
    data, used = BAD[bad]
    one.write_raw(data, used)
    one.counts("rx_malformed", 1)
    one.model.deliver(frame(2))
    assert one.socket.recv(65536) == frame(2)
    one.counts("rx_packets", 1)
    assert one.service.stats()["rx"]["dropped"] == 1
    assert one.service.watch(0.0) == []


def test_gso_that_was_not_negotiated_is_dropped(bench: Callable[..., Bench]) -> None:
    one = bench(offer="-guest_tso6")
    data = tcp(6, 1400)
    one.write_raw(header(NEEDS_CSUM, spec.GSO_TCPV6, 700, 54, 16) + data)
    one.counts("rx_malformed", 1)


@pytest.mark.parametrize("number", [65, 0xFFFF])
def test_an_impossible_number_of_buffers_ends_the_link(bench: Callable[..., Bench], number: int) -> None:
    one = bench()
    one.write_raw(header(buffers=number) + frame(1))
    assert f"num_buffers is {number}, more than a frame can have" in one.end().message


def test_buffers_that_never_come_end_the_link(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net_port, "PARTIAL_LIMIT", 0.05)
    one = bench()
    one.write_raw(header(buffers=3) + frame(1))
    error = one.end()
    assert "num_buffers is 3, but so many buffers never came" in error.message
    assert error.requirement == "DEV-NET-39"


# The library: tables of frames.


class Wire:
    """A driver over our own device that answers within each kick, and what it sent."""

    def __init__(self, offloads: int = 0, features: str = "", **params: str) -> None:
        self.function = open_function("net", {"peer": "sink", **params})
        assert isinstance(self.function.model, NetModel)
        self.model = self.function.model
        self.sent: list[Packet] = []
        self.model.peer = self.sent.append
        transport = PciTransport(self.function)
        transport.feature_filter = FeatureFilter.parse(features, feat.NET)
        self.net = Net(transport, offloads=offloads)


@pytest.fixture
def wire() -> Iterator[Callable[..., Wire]]:
    made: list[Wire] = []

    def make(**options: Any) -> Wire:
        made.append(Wire(**options))
        return made[-1]

    yield make
    for one in made:
        one.net.close()


@pytest.mark.parametrize(
    "params", [{}, {"packed": "on"}, {"offer": "-mrg_rxbuf"}], ids=["split", "packed", "whole"]
)
def test_tables_go_out_and_come_in(wire: Callable[..., Wire], params: dict[str, str]) -> None:
    one = wire(**params)
    random = np.random.default_rng(1)
    lengths = random.integers(14, 1519, 200, dtype=np.uint32)
    rows = random.integers(0, 256, (200, 1600), dtype=np.uint8)
    assert one.net.send_burst(Frames(rows, lengths)) == 200
    assert [p.data for p in one.sent] == [rows[n, : lengths[n]].tobytes() for n in range(200)]
    for packet in one.sent:
        one.model.deliver(packet)
    got = 0
    while len(table := one.net.receive_burst(64)):
        assert table.lengths.dtype == np.uint32
        assert [table[n] for n in range(len(table))] == [p.data for p in one.sent[got : got + len(table)]]
        got += len(table)
    assert got == 200


def test_a_table_may_be_filled_again(wire: Callable[..., Wire]) -> None:
    one = wire()
    out = Frames(np.zeros((4, 100), np.uint8), np.zeros(4, np.uint32))
    for number in range(6):
        one.model.deliver(frame(number))
    one.model.deliver(frame(6, 200))
    one.model.deliver(frame(7))
    first = one.net.receive_burst(out=out)
    assert np.shares_memory(first.data, out.data)
    assert [first[n] for n in range(4)] == [frame(n) for n in range(4)]
    second = one.net.receive_burst(out=out)
    # The long frame has no room in a row.
    assert [second[n] for n in range(len(second))] == [frame(4), frame(5), frame(7)]
    assert one.net.pairs[0].counters["rx_dropped"] == 1


def test_headers_go_out_and_come_in(wire: Callable[..., Wire]) -> None:
    one = wire(offloads=RECEIVE_OFFLOADS | SEND_OFFLOADS)
    data = np.frombuffer(tcp(4, 30000), np.uint8)[np.newaxis]
    headers = np.zeros(1, one.net.pairs[0].header)
    headers[0] = (NEEDS_CSUM, spec.GSO_TCPV4, 54, 1448, 34, 16, 7)
    table = Frames(data, np.array([data.shape[1]], np.uint32), headers)
    assert one.net.send_burst(table) == 1
    assert (one.sent[0].gso_type, one.sent[0].gso_size, one.sent[0].data) == (1, 1448, data.tobytes())
    assert not one.function.findings
    one.model.deliver(one.sent[0])
    got = one.net.receive_burst(headers=True)
    assert got.headers is not None
    assert got.headers[0].tolist()[:2] == (NEEDS_CSUM, spec.GSO_TCPV4)
    assert got.headers["gso_size"][0] == 1448
    assert got.headers["num_buffers"][0] > 1
    assert got[0] == data.tobytes()
    with pytest.raises(UsageError, match="headers are"):
        one.net.send_burst(Frames(data, table.lengths, np.ones(1, spec.HEADER_HASH)))
    with pytest.raises(UsageError, match="30054"):
        one.net.send_burst(Frames(data, table.lengths))


def test_nothing_stale_is_handed_out(wire: Callable[..., Wire]) -> None:
    """A secret in every receive buffer, and then frames that say they are longer than what was written."""
    one = wire()
    for number in range(one.net.pairs[0].rx.size):
        one.model.deliver(frame(number, 1500))
        assert one.net.receive() == [frame(number, 1500)]
    write_raw(one.model, header() + frame(1))
    assert one.net.receive() == [frame(1)]
    write_raw(one.model, header(buffers=2) + frame(2))
    write_raw(one.model, b"tail")
    assert one.net.receive() == [frame(2) + b"tail"]
    write_raw(one.model, header(), 12)
    assert one.net.receive() == []
    write_raw(one.model, header() + frame(3), 60000)
    with pytest.raises(DeviceViolation, match="60000"):
        one.net.receive()


def test_a_broken_port_stays_broken(wire: Callable[..., Wire]) -> None:
    one = wire()
    one.model.deliver(frame(1))
    write_raw(one.model, header(buffers=99) + frame(2))
    assert one.net.pairs[0].receive(1)[0] == frame(1)
    for _ in range(2):
        with pytest.raises(DeviceViolation, match="num_buffers is 99"):
            one.net.receive()


def test_a_closed_port_says_so(wire: Callable[..., Wire]) -> None:
    one = wire()
    one.net.close()
    for call in (one.net.receive, lambda: one.net.send([frame(1)])):
        with pytest.raises(UsageError, match="closed"):
            call()
