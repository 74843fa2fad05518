"""The network model, driven by hand: frames, offloads, control queue (5.1)."""

from __future__ import annotations

import struct

import pytest

from guestpv.devices.models.net import Net
from guestpv.devices.models.packet import Packet, checksum, segments
from guestpv.devices.models.wire import Wire, echo, tap
from guestpv.devices.scripted import RawQueue
from guestpv.spec import features as ft
from guestpv.spec import net
from guestpv.spec.pci import CfgType

from .kit import V1, Bench

NET_HEADER = struct.Struct("<BBHHHHH")
MAC = bytes.fromhex("525400000001")
PEER = bytes.fromhex("525400000002")


def frame(target: bytes = MAC, source: bytes = PEER, size: int = 64, tag: int | None = None) -> bytes:
    vlan = b"" if tag is None else b"\x81\x00" + tag.to_bytes(2, "big")
    return (target + source + vlan + b"\x88\xb5").ljust(size, b"\x5a")


def tcp_frame(payload: bytes, v6: bool = False) -> tuple[bytes, int]:
    """A TCP frame with the pseudo header sum in its checksum field, and where TCP starts."""
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 7, 0, 5 << 4, 0x98 | 0x01, 100, 0, 0)
    length = len(tcp) + len(payload)
    if v6:
        ip = struct.pack(">IHBB", 6 << 28, length, 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
        addresses, kind = ip[8:], b"\x86\xdd"
    else:
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 5, 0, 64, 6, 0) + b"\x0a\0\0\1\x0a\0\0\2"
        ip = ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
        addresses, kind = ip[12:], b"\x08\x00"
    pseudo = ~checksum(addresses + struct.pack(">IHH", length, 0, 6)) & 0xFFFF
    tcp = tcp[:16] + pseudo.to_bytes(2, "big") + tcp[18:]
    return MAC + PEER + kind + ip + tcp + payload, 14 + len(ip)


def tcp_sum_is_right(data: bytes, transport: int, v6: bool = False) -> bool:
    addresses = data[14 + 8 : 14 + 40] if v6 else data[14 + 12 : 14 + 20]
    body = data[transport:]
    return checksum(addresses + struct.pack(">IHH", len(body), 0, 6) + body) == 0


def nic(
    open_bench, features: tuple[int, ...] = (), sizes: int = 2, **options: int
) -> tuple[Bench, list[RawQueue]]:
    threaded = bool(options.pop("threaded", 0))
    bench = open_bench(Net(depth=16, **options), threaded=threaded)
    return bench, bench.driver.start(V1 | ft.mask(features), dict.fromkeys(range(sizes), 16))


def transmit(queue: RawQueue, data: bytes, header: bytes = bytes(12)) -> None:
    queue.add([queue.buffer(len(header) + len(data), header + data)], [])
    queue.kick()


def received(queue: RawQueue, into: list) -> list[tuple[tuple[int, ...], bytes]]:
    """Header and frame of every packet; ``into`` holds the buffers by head, in order."""
    found = []
    for id, length in queue.used():
        raw = into[id].array[:length].tobytes()
        found.append((NET_HEADER.unpack(raw[:12]), raw[12:]))
    return found


def supply(queue: RawQueue, count: int, size: int) -> list:
    buffers = [queue.buffer(size) for _ in range(count)]
    for buffer in buffers:
        queue.add([], [buffer])
    queue.kick()
    return buffers


@pytest.mark.requirement(
    "DEV-NET-36", "DEV-NET-211", "DEV-NET-216", "DEV-NET-217", "DEV-NET-219", "DEV-NET-61"
)
def test_net_over_a_wire(open_bench) -> None:
    (one, (_, tx)), (other, (rx, _)) = nic(open_bench), nic(open_bench)
    Wire(one.function.model, other.function.model)
    buffers = supply(rx, 2, 1600)
    data = frame(size=100)
    tx.add([tx.buffer(12), tx.buffer(40, data[:40]), tx.buffer(60, data[40:])], [])
    tx.kick()
    assert tx.used() == [(0, 0)]
    assert received(rx, buffers) == [((0, 0, 0, 0, 0, 0, 1), data)]
    assert one.rules == other.rules == []


@pytest.mark.requirement("DEV-NET-37", "DEV-NET-38", "DEV-NET-39", "DEV-NET-218")
@pytest.mark.parametrize("packed", [0, ft.F_RING_PACKED])
def test_net_merged_buffers(open_bench, packed: int) -> None:
    bench = open_bench(Net(depth=16))
    bench.function.device.offered |= 1 << ft.F_RING_PACKED
    rx, _ = bench.driver.start(V1 | ft.mask((net.F_MRG_RXBUF, *([packed] if packed else []))), {0: 16, 1: 16})
    buffers = supply(rx, 4, 64)
    data = bytes(range(150))
    bench.function.model.deliver(data)
    used = rx.used()
    assert used == [(0, 64), (1, 64), (2, 34)]
    whole = b"".join(buffers[id].array[:length].tobytes() for id, length in used)
    assert NET_HEADER.unpack(whole[:12])[-1] == 3
    assert whole[12:] == data
    assert bench.function.device.queues[0].interrupts == 1


def test_net_waits_for_buffers(open_bench) -> None:
    bench, (rx, _) = nic(open_bench, backlog=2)
    for number in range(3):
        bench.function.model.deliver(frame(size=60 + number))
    buffers = supply(rx, 3, 1600)
    assert [len(data) for _, data in received(rx, buffers)] == [60, 61]
    assert bench.function.model.dropped == 1


@pytest.mark.requirement("DEV-NET-32")
def test_net_drops_what_does_not_fit_one_buffer(open_bench) -> None:
    bench, (rx, _) = nic(open_bench)
    buffers = supply(rx, 1, 80)
    bench.function.model.deliver(frame(size=100))
    bench.function.model.deliver(frame(size=60))
    assert [len(data) for _, data in received(rx, buffers)] == [60]
    assert bench.function.model.dropped == 1


@pytest.mark.requirement("DRV-NET-71", "DRV-NET-185")
def test_net_bad_receive_buffers(open_bench) -> None:
    bench, (rx, _) = nic(open_bench, (net.F_MRG_RXBUF,))
    rx.add([rx.buffer(4)], [rx.buffer(100)])
    rx.add([], [rx.buffer(11)])
    rx.kick()
    bench.function.model.deliver(frame(size=200))
    assert bench.rules == ["DRV-NET-185", "DRV-NET-71"]
    assert bench.broken


NET_MISTAKES = {
    "DRV-NET-09": (bytes(12), 1600, (net.F_MTU,)),
    "DRV-NET-19": (NET_HEADER.pack(0, 0, 0, 0, 0, 0, 1), 64, ()),
    "DRV-NET-20": (NET_HEADER.pack(1, 0, 0, 0, 14, 2, 0), 64, ()),
    "DRV-NET-24": (NET_HEADER.pack(1, 1, 54, 100, 34, 16, 0), 200, (net.F_CSUM,)),
    "DRV-NET-31": (NET_HEADER.pack(1, 0x81, 54, 100, 34, 16, 0), 200, (net.F_CSUM, net.F_HOST_TSO4)),
    "DRV-NET-48": (NET_HEADER.pack(1, 0, 0, 0, 60, 16, 0), 64, (net.F_CSUM,)),
    "DRV-NET-50": (NET_HEADER.pack(0, 1, 54, 100, 34, 16, 0), 200, (net.F_CSUM, net.F_HOST_TSO4)),
    "DRV-NET-51": (NET_HEADER.pack(1, 1, 54, 0, 34, 16, 0), 200, (net.F_CSUM, net.F_HOST_TSO4)),
    "DRV-NET-64": (NET_HEADER.pack(2, 0, 0, 0, 0, 0, 0), 64, (net.F_CSUM,)),
    "DRV-NET-182": (NET_HEADER.pack(1, 9, 54, 100, 34, 16, 0), 200, (net.F_CSUM,)),
}


@pytest.mark.parametrize("rule", NET_MISTAKES)
@pytest.mark.requirement(*NET_MISTAKES)
def test_net_transmit_mistakes(open_bench, rule: str) -> None:
    header, size, features = NET_MISTAKES[rule]
    bench, (_, tx) = nic(open_bench, features, mtu=1500)
    transmit(tx, frame(size=size), header)
    assert bench.rules == [rule]
    assert tx.used() == [(0, 0)]


@pytest.mark.requirement("DRV-NET-178", "DRV-NET-183")
def test_net_transmit_shapes(open_bench) -> None:
    bench, (_, tx) = nic(open_bench)
    tx.add([tx.buffer(80)], [tx.buffer(4)])
    tx.kick()
    transmit(tx, b"", bytes(11))
    assert bench.rules == ["DRV-NET-183", "DRV-NET-178"]


@pytest.mark.requirement("DEV-NET-40", "DEV-NET-41", "DEV-NET-52", "DEV-NET-55")
def test_net_checksum_is_done_for_those_who_cannot(open_bench) -> None:
    data, transport = tcp_frame(b"payload!")
    header = NET_HEADER.pack(1, 0, 0, 0, transport, 16, 0)
    one, (_, tx) = nic(open_bench, (net.F_CSUM,))
    plain, (rx, _) = nic(open_bench)
    Wire(one.function.model, plain.function.model)
    buffers = supply(rx, 1, 1600)
    transmit(tx, data, header)
    ((head, got),) = received(rx, buffers)
    assert head == (0, 0, 0, 0, 0, 0, 1)
    assert tcp_sum_is_right(got, transport)
    able, (rx, _) = nic(open_bench, (net.F_GUEST_CSUM,))
    Wire(one.function.model, able.function.model)
    buffers = supply(rx, 1, 1600)
    transmit(tx, data, header)
    assert received(rx, buffers) == [((1, 0, 0, 0, transport, 16, 1), data)]


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.requirement("DEV-NET-42", "DEV-NET-44", "DEV-NET-62", "DEV-NET-63", "DEV-NET-68")
def test_net_segmentation(open_bench, v6: bool) -> None:
    payload = bytes(range(250))
    data, transport = tcp_frame(payload, v6)
    kind = net.GSO_TCPV6 if v6 else net.GSO_TCPV4
    host, guest = (net.F_HOST_TSO6, net.F_GUEST_TSO6) if v6 else (net.F_HOST_TSO4, net.F_GUEST_TSO4)
    header = NET_HEADER.pack(1, kind, transport + 20, 100, transport, 16, 0)
    one, (_, tx) = nic(open_bench, (net.F_CSUM, host))
    plain, (rx, _) = nic(open_bench)
    Wire(one.function.model, plain.function.model)
    buffers = supply(rx, 4, 1600)
    transmit(tx, data, header)
    frames = received(rx, buffers)
    assert [len(got) - transport - 20 for _, got in frames] == [100, 100, 50]
    assert b"".join(got[transport + 20 :] for _, got in frames) == payload
    for number, (head, got) in enumerate(frames):
        assert head == (0, 0, 0, 0, 0, 0, 1)
        assert tcp_sum_is_right(got, transport, v6)
        assert int.from_bytes(got[transport + 4 : transport + 8], "big") == 7 + 100 * number
        assert bool(got[transport + 13] & 1) == (number == 2)
        assert bool(got[transport + 13] & 0x80) == (number == 0)
        if not v6:
            assert checksum(got[14:34]) == 0
            assert int.from_bytes(got[16:18], "big") == len(got) - 14
    able, (rx, _) = nic(open_bench, (net.F_GUEST_CSUM, guest))
    Wire(one.function.model, able.function.model)
    buffers = supply(rx, 1, 1600)
    transmit(tx, data, header)
    assert received(rx, buffers) == [((1, kind, transport + 20, 100, transport, 16, 1), data)]
    assert one.rules == plain.rules == able.rules == []


def test_udp_segmentation() -> None:
    data, transport = tcp_frame(b"")
    udp = data[:23] + b"\x11" + data[24:transport] + struct.pack(">HHHH", 1, 2, 8 + 300, 0) + bytes(300)
    parts = list(segments(Packet(udp, True, transport, 6, net.GSO_UDP_L4, False, 128)))
    assert [int.from_bytes(part.data[transport + 4 : transport + 6], "big") for part in parts] == [
        136,
        136,
        52,
    ]


@pytest.mark.requirement("DEV-NET-209", "DEV-CONFIG-03", "DEV-NET-109")
def test_net_link_and_announce(open_bench) -> None:
    bench, (_, tx, control) = nic(open_bench, (net.F_STATUS, net.F_CTRL_VQ, net.F_GUEST_ANNOUNCE), sizes=3)
    model = bench.function.model
    echo(model)
    model.set_link(False)
    assert bench.driver.read_at(CfgType.DEVICE, 6, 2) == 0
    transmit(tx, frame())
    assert model.sent == 1
    assert model.received + model.dropped == 0
    model.set_link(True)
    model.announce()
    assert bench.driver.read_at(CfgType.DEVICE, 6, 2) == 3
    assert command(control, 3, 0) == 0
    assert bench.driver.read_at(CfgType.DEVICE, 6, 2) == 1


def command(queue: RawQueue, kind: int, number: int, data: bytes = b"") -> int:
    """Ack of a control command."""
    ack = queue.buffer(1, b"\xee")
    queue.add([queue.buffer(2 + len(data), bytes([kind, number]) + data)], [ack])
    queue.kick()
    assert [length for _, length in queue.used()] == [1]
    return int(ack.array[0])


@pytest.mark.requirement(
    "DEV-NET-88",
    "DEV-NET-93",
    "DEV-NET-99",
    "DEV-NET-102",
    "DEV-NET-105",
    "DEV-NET-107",
    "DEV-NET-108",
    "DEV-NET-225",
    "DEV-NET-226",
    "DEV-NET-227",
)
def test_net_receive_filter(open_bench) -> None:
    features = (
        net.F_CTRL_VQ,
        net.F_CTRL_RX,
        net.F_CTRL_RX_EXTRA,
        net.F_CTRL_VLAN,
        net.F_CTRL_MAC_ADDR,
        net.F_MAC,
    )
    bench, (_, _, control) = nic(open_bench, features, sizes=3)
    model = bench.function.model
    other, group, everyone = b"\x02" * 6, b"\x03" * 6, b"\xff" * 6

    def passes(target: bytes, tag: int | None = None) -> bool:
        return model.control.accepts(frame(target, tag=tag))

    assert passes(MAC)
    assert not passes(other)
    assert not passes(group)
    assert passes(everyone)
    table = b"\1\0\0\0" + other + b"\1\0\0\0" + group
    assert command(control, 1, 0, table) == 0
    assert passes(other)
    assert passes(group)
    assert command(control, 0, 3, b"\1") == 0
    assert not passes(group)
    assert passes(everyone)
    assert command(control, 0, 5, b"\1") == 0
    assert not passes(everyone)
    assert command(control, 0, 2, b"\1") == 0
    assert passes(b"\x06" * 6)
    assert command(control, 0, 4, b"\1") == 0
    assert not passes(MAC)
    assert command(control, 0, 0, b"\1") == 0
    assert passes(b"\x06" * 6)
    assert not passes(MAC, tag=7)
    assert command(control, 2, 0, b"\7\0") == 0
    assert passes(MAC, tag=7)
    assert command(control, 2, 1, b"\7\0") == 0
    assert not passes(MAC, tag=7)
    assert command(control, 1, 1, other) == 0
    assert bytes(bench.driver.read_at(CfgType.DEVICE, place, 1) for place in range(6)) == other
    assert bench.rules == []
    bench.driver.reset()
    assert model.config["mac"] == MAC


@pytest.mark.parametrize(
    ("kind", "number", "data", "rule"),
    [
        (0, 0, b"\1", "DRV-NET-90"),
        (0, 5, b"\1", "DRV-NET-91"),
        (1, 0, b"", "DRV-NET-92"),
        (4, 0, b"\1\0", "DRV-NET-192"),
        (5, 0, bytes(8), "DRV-NET-199"),
        (3, 0, b"", "DRV-NET-191"),
        (200, 0, b"", None),
    ],
)
@pytest.mark.requirement("DEV-NET-223", "DEV-NET-224", "DRV-NET-90", "DRV-NET-91", "DRV-NET-92")
def test_net_commands_without_their_feature(
    open_bench, kind: int, number: int, data: bytes, rule: str | None
) -> None:
    bench, (_, _, control) = nic(open_bench, (net.F_CTRL_VQ,), sizes=3)
    assert command(control, kind, number, data) == net.CTRL_ERR
    assert bench.rules == ([rule] if rule else [])


@pytest.mark.requirement("DRV-NET-114", "DEV-NET-234")
def test_net_offloads_can_be_turned_off(open_bench) -> None:
    features = (net.F_CTRL_VQ, net.F_CTRL_GUEST_OFFLOADS, net.F_GUEST_CSUM)
    bench, (_, _, control) = nic(open_bench, features, sizes=3)
    assert bench.function.model.control.offloads == 1 << net.F_GUEST_CSUM
    assert command(control, 5, 0, bytes(8)) == 0
    assert bench.function.model.control.offloads == 0
    assert command(control, 5, 0, (1 << net.F_GUEST_TSO4).to_bytes(8, "little")) == 1
    assert bench.rules == ["DRV-NET-114"]


@pytest.mark.requirement(
    "DEV-NET-112", "DEV-NET-113", "DEV-NET-115", "DEV-NET-116", "DRV-NET-102", "DRV-NET-103", "DRV-NET-101"
)
def test_net_multiqueue(open_bench) -> None:
    features = (net.F_CTRL_VQ, net.F_MQ)
    bench, queues = nic(open_bench, features, sizes=5, pairs=2)
    model, control = bench.function.model, queues[4]
    buffers = {index: supply(queues[index], 4, 1600) for index in (0, 2)}
    data, _ = tcp_frame(b"x")
    back = data[:26] + data[30:34] + data[26:30] + data[36:38] + data[34:36] + data[38:]
    model.deliver(back)
    assert len(received(queues[0], buffers[0])) == 1
    transmit(queues[3], data)
    assert bench.rules == ["DRV-NET-103"]
    assert command(control, 4, 0, b"\2\0") == 0
    for pair in (1, 0):
        transmit(queues[2 * pair + 1], data)
        model.deliver(back)
        assert len(received(queues[2 * pair], buffers[2 * pair])) == 1
    assert command(control, 4, 0, b"\3\0") == 1
    assert command(control, 4, 0, b"\0\0") == 1
    assert bench.rules[1:] == ["DRV-NET-102", "DRV-NET-102"]
    other, queues = nic(open_bench, features, sizes=2, pairs=2)
    control = other.driver.queue(4, 8)
    assert command(control, 4, 0, b"\2\0") == 1
    assert other.rules == ["DRV-NET-101"]


def test_net_tap_gives_whole_frames(open_bench) -> None:
    bench, (rx, tx) = nic(open_bench, (net.F_CSUM,))
    seen: list[bytes] = []
    tap(bench.function.model, seen.append)
    data, transport = tcp_frame(b"abc")
    transmit(tx, data, NET_HEADER.pack(1, 0, 0, 0, transport, 16, 0))
    assert tcp_sum_is_right(seen[0], transport)
    assert rx.used() == []


def test_two_functions_echo_without_recursion(open_bench) -> None:
    (one, (rx1, tx1)), (other, (rx2, tx2)) = nic(open_bench), nic(open_bench)
    Wire(one.function.model, other.function.model)
    bounced = other.function.model
    echo_peer = one.function.model.deliver
    bounced.peer = echo_peer
    buffers = supply(rx2, 3, 1600)
    supply(rx1, 3, 1600)
    transmit(tx1, frame(size=70))
    transmit(tx2, frame(size=80))
    assert [len(data) for _, data in received(rx2, buffers)] == [70]
    assert one.function.model.received == 1


def test_threaded_device_moves_by_itself(open_bench) -> None:
    one, (_, tx) = nic(open_bench, threaded=1)
    other, (rx, _) = nic(open_bench, threaded=1)
    Wire(one.function.model, other.function.model)
    buffers = supply(rx, 8, 1600)
    for number in range(8):
        transmit(tx, frame(size=60 + number))
    got: list[int] = []
    while len(got) < 8:
        got += [len(data) for _, data in received(rx, buffers)]
    assert got == list(range(60, 68))
    assert one.rules == other.rules == []
