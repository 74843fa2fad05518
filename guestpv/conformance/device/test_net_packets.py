"""Packets of a network device: headers, receive buffers, filters (5.1.6, 5.1.9)."""

from __future__ import annotations

from itertools import pairwise

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.net_ports import (
    BROADCAST,
    MULTICAST,
    OUR_MAC,
    ROOM,
    STRANGER,
    Arrival,
    Ports,
    checksum_holds,
    frame,
    tcp,
)
from guestpv.conformance.net_wire import Wire
from guestpv.conformance.rig import Rig
from guestpv.devices.models.packet import Packet
from guestpv.spec import net

pytestmark = [pytest.mark.device("net"), pytest.mark.formats]

MARK = 0xA5
TCP4 = (net.F_GUEST_CSUM, net.F_GUEST_TSO4)
TCP6 = (net.F_GUEST_CSUM, net.F_GUEST_TSO6)
BIG = 4000
MSS = 1000
PARTS = BIG // MSS
UNKNOWN_FLAGS = 0x70


@pytest.fixture
def ring(negotiated: Rig, rig: Rig) -> int:
    """Ring features of the combination; the device is reset again."""
    features = negotiated.transport.features
    rig.transport.reset(rig.limit)
    return features


@pytest.mark.requirement("DEV-NET-216", "DEV-NET-217")
def test_header_and_frame_in_any_descriptors(rig: Rig, ring: int, case: Case) -> None:
    """The same packet is sent however header and frame lie in descriptors; its used length is 0."""
    ports, wire = Ports(rig, ring), Wire(rig)
    data = bytes(ports.overhead) + frame()
    for cuts in ((), (ports.overhead,), (5,), (3, ports.overhead, ports.overhead + 14)):
        ends = [0, *cuts, len(data)]
        parts = [rig.buffer(end - start, data[start:end]) for start, end in pairwise(ends)]
        case.sent(f"a packet in {len(parts)} descriptors")
        assert ports.tx[0].run(parts) == 0, "used length of a transmit buffer"
        (packet,) = wire.take()
        assert packet.data == frame(), "another packet went out"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-NET-16")
def test_unknown_flags_on_transmit(rig: Rig, ring: int, case: Case) -> None:
    """Flags that are not defined are ignored."""
    ports, wire = Ports(rig, ring), Wire(rig)
    case.sent(f"flags {UNKNOWN_FLAGS:#x}")
    ports.send(frame(), flags=UNKNOWN_FLAGS)
    (packet,) = wire.take()
    assert packet.data == frame()
    assert not packet.needs_csum


@pytest.mark.requirement("DEV-NET-17")
def test_checksum_fields_without_their_flag(rig: Rig, ring: int, case: Case) -> None:
    """Without NEEDS_CSUM csum_start and csum_offset mean nothing."""
    ports, wire = Ports(rig, ring), Wire(rig)
    case.sent("csum_start 20 and csum_offset 4 without NEEDS_CSUM")
    ports.send(frame(), csum_start=20, csum_offset=4)
    (packet,) = wire.take()
    assert packet.data == frame(), "the packet was changed"


@pytest.mark.requirement("DEV-NET-22")
def test_header_lengths_are_not_relied_on(rig: Rig, ring: int, case: Case) -> None:
    """With segmentation negotiated a packet without it goes out whatever its hdr_len."""
    ports, wire = Ports(rig, ring, net.F_CSUM, net.F_HOST_TSO4), Wire(rig)
    for length in (1, 9999):
        case.sent(f"a frame of 60 bytes with hdr_len {length}")
        ports.send(frame(), hdr_len=length)
        (packet,) = wire.take()
        assert packet.data == frame(), "the packet was changed"


@pytest.mark.requirement("DEV-NET-07")
def test_frames_of_the_mtu_are_sent(rig: Rig, ring: int) -> None:
    """With MTU a frame of mtu bytes behind its header goes out whole."""
    ports, wire = Ports(rig, ring, net.F_MTU), Wire(rig)
    field = net.CONFIG["mtu"]
    whole = frame(size=14 + rig.transport.read_config(field.offset, field.width))
    ports.send(whole)
    assert [packet.data for packet in wire.take()] == [whole]


@pytest.mark.requirement("DEV-NET-06")
def test_frames_above_the_mtu_do_not_arrive(rig: Rig, ring: int, case: Case) -> None:
    """With MTU no frame of more than mtu bytes behind its header arrives."""
    ports, wire = Ports(rig, ring, net.F_MTU, net.F_MRG_RXBUF), Wire(rig)
    field = net.CONFIG["mtu"]
    mtu = rig.transport.read_config(field.offset, field.width)
    room = max(ROOM, -(-(mtu + 100) // 4))
    ports.post(8, room)
    wire.deliver(frame(size=14 + mtu))
    assert ports.arrival().data == frame(size=14 + mtu), "a frame of the mtu came in changed"
    case.sent(f"a frame of {15 + mtu} bytes, the mtu is {mtu}")
    wire.deliver(frame(size=15 + mtu))
    ports.nothing()


@pytest.mark.requirement("DEV-NET-70")
def test_wrong_checksums_are_not_valid(rig: Rig, ring: int, case: Case) -> None:
    """A packet whose checksum is wrong does not come with DATA_VALID."""
    ports, wire = Ports(rig, ring, net.F_GUEST_CSUM), Wire(rig)
    ports.post()
    for v6 in (False, True):
        data, start = tcp(b"corrupt", v6=v6)
        case.sent("a TCP packet with the checksum of another")
        wire.deliver(data)
        found = ports.arrival()
        assert not checksum_holds(found.data, start), "the checksum was made right"
        assert not found.field("flags") & net.HDR_F_DATA_VALID, "DATA_VALID with a wrong checksum"


@pytest.mark.requirement("DEV-NET-211", "DEV-NET-40", "DEV-NET-61", "DEV-NET-215")
def test_a_packet_arrives(rig: Rig, ring: int) -> None:
    """Without offloads the header is zero but for num_buffers, and the frame follows it."""
    ports, wire = Ports(rig, ring), Wire(rig)
    ports.post()
    wire.prompt(ports)
    found = ports.arrival()
    assert found.field("flags") == 0, f"flags {found.field('flags'):#x} without GUEST_CSUM"
    assert found.field("gso_type") == 0, f"gso_type {found.field('gso_type'):#x} without an offload"
    assert len(found.data) >= 42, f"{len(found.data)} bytes behind the header"
    own = bytes(rig.transport.read_config(at, 1) for at in range(6))
    assert found.data[:6] in (BROADCAST, own), "the frame does not begin behind a header of 12 bytes"


@pytest.mark.requirement("DEV-NET-32", "DEV-NET-36")
def test_one_buffer_without_mergeable_ones(rig: Rig, ring: int) -> None:
    """Without MRG_RXBUF a packet takes one buffer, and num_buffers is 1."""
    ports, wire = Ports(rig, ring), Wire(rig)
    ports.post(4)
    seen: list[Arrival] = []
    for _ in range(2):
        wire.prompt(ports)
        seen.append(ports.arrival())
        rig.settle()
        seen += ports.arrivals()
        assert len(seen) == 1, f"one packet took {len(seen)} buffers"
        number = seen.pop().field("num_buffers")
        assert number == 1, f"num_buffers is {number}"


@pytest.mark.requirement("DEV-NET-31", "DEV-NET-37", "DEV-NET-38", "DEV-NET-39", "DEV-NET-218", "DEV-NET-219")
def test_a_packet_over_several_buffers(rig: Rig, ring: int) -> None:
    """num_buffers tells the buffers of a packet, all full but the last, used together, one header."""
    ports, wire = Ports(rig, ring, net.F_MRG_RXBUF), Wire(rig)
    ports.post(8, 256)
    wire.deliver(frame(size=600, mark=MARK))
    found = ports.arrival()
    assert found.data == frame(size=600, mark=MARK), "the packet came in changed"
    assert found.lengths[:-1] == [256] * (len(found.lengths) - 1), f"used lengths {found.lengths}"
    assert len(found.lengths) == -(-(600 + ports.overhead) // 256)


@pytest.mark.requirement("DEV-NET-212", "DEV-NET-222")
def test_the_header_with_a_hash(rig: Rig, ring: int) -> None:
    """With HASH_REPORT the header has 20 bytes, and no hash before one is configured."""
    ports, wire = Ports(rig, ring, net.F_CTRL_VQ, net.F_HASH_REPORT), Wire(rig)
    ports.post()
    wire.deliver(frame(mark=MARK))
    found = ports.arrival()
    assert found.data == frame(mark=MARK), "the frame does not begin behind a header of 20 bytes"
    assert found.field("hash_report") == 0, f"hash_report {found.field('hash_report')} before any command"


@pytest.mark.requirement("DEV-NET-42", "DEV-NET-44", "DEV-NET-43", "DEV-NET-45", "DEV-NET-46", "DEV-NET-67")
def test_no_segmentation_that_was_not_negotiated(rig: Rig, ring: int) -> None:
    """A large segment arrives cut where its offload was not negotiated."""
    ports, wire = Ports(rig, ring, net.F_GUEST_CSUM, net.F_MRG_RXBUF), Wire(rig)
    ports.post(16)
    for v6 in (False, True):
        data, start = tcp(bytes(BIG), v6=v6)
        kind = net.GSO_TCPV6 if v6 else net.GSO_TCPV4
        wire.deliver(Packet(data, True, start, 16, kind, False, MSS))
        for part in ports.gather(PARTS):
            assert part.field("gso_type") == 0, f"gso_type {part.field('gso_type'):#x} was not negotiated"
            assert part.field("flags") & net.HDR_F_RSC_INFO == 0, "RSC_INFO without RSC_EXT"


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.requirement("DEV-NET-62", "DEV-NET-63", "DEV-NET-54", "DEV-NET-55", "DEV-NET-215")
def test_segmentation_offload_on_receive(rig: Rig, ring: int, v6: bool) -> None:
    """A large segment carries its gso_type and gso_size, and NEEDS_CSUM with the checksum's place."""
    ports, wire = Ports(rig, ring, net.F_MRG_RXBUF, *(TCP6 if v6 else TCP4)), Wire(rig)
    ports.post(8)
    data, start = tcp(bytes(BIG), v6=v6)
    kind = net.GSO_TCPV6 if v6 else net.GSO_TCPV4
    wire.deliver(Packet(data, True, start, 16, kind, False, MSS))
    found = ports.arrival()
    assert found.field("gso_type") == kind, f"gso_type {found.field('gso_type'):#x}"
    assert found.field("gso_size") == MSS, f"gso_size {found.field('gso_size')}, the segment size is {MSS}"
    assert found.field("flags") & net.HDR_F_NEEDS_CSUM, "gso_type without NEEDS_CSUM"
    assert (found.field("csum_start"), found.field("csum_offset")) == (start, 16)
    assert found.data == data, "the pseudo header sum or the frame was changed"


@pytest.mark.requirement("DEV-NET-49")
def test_ecn_on_receive(rig: Rig, ring: int) -> None:
    """With GUEST_ECN a segment with the ECN bit keeps it."""
    ports, wire = Ports(rig, ring, net.F_MRG_RXBUF, *TCP4, net.F_GUEST_ECN), Wire(rig)
    ports.post(8)
    data, start = tcp(bytes(BIG))
    wire.deliver(Packet(data, True, start, 16, net.GSO_TCPV4, True, MSS))
    kind = ports.arrival().field("gso_type")
    assert kind == net.GSO_TCPV4 | net.GSO_ECN, f"gso_type {kind:#x}"


@pytest.mark.requirement("DEV-NET-40", "DEV-NET-53")
def test_checksums_are_complete_without_the_offload(rig: Rig, ring: int) -> None:
    """Without GUEST_CSUM a packet arrives with its checksum and without flags."""
    ports, wire = Ports(rig, ring), Wire(rig)
    ports.post()
    data, start = tcp(b"no offload")
    wire.deliver(Packet(data, True, start, 16))
    found = ports.arrival()
    assert found.field("flags") == 0, f"flags {found.field('flags'):#x} without GUEST_CSUM"
    assert checksum_holds(found.data, start), "the TCP checksum is wrong"


@pytest.mark.requirement("DEV-NET-106")
def test_tagged_frames_without_vlan_filter(rig: Rig, ring: int) -> None:
    """Without CTRL_VLAN tagged frames arrive."""
    ports, wire = Ports(rig, ring), Wire(rig)
    ports.post()
    for tag in (0, 7, 4094):
        wire.deliver(frame(vlan=tag))
        assert ports.arrival().data == frame(vlan=tag)


@pytest.mark.requirement("DEV-NET-107", "DEV-NET-228", "DEV-NET-226")
def test_vlan_filter(rig: Rig, ring: int) -> None:
    """With CTRL_VLAN tags pass that were added, and only as long as they are not deleted."""
    ports, wire = Ports(rig, ring, net.F_CTRL_VQ, net.F_CTRL_VLAN, net.F_CTRL_RX), Wire(rig)
    ports.no_promiscuity()
    ports.post()
    seven = (7).to_bytes(2, "little")
    wire.deliver(frame(vlan=7))
    ports.nothing()
    assert ports.command(net.CTRL_VLAN, net.CTRL_VLAN_ADD, seven)[0] == net.CTRL_OK
    wire.deliver(frame(vlan=7))
    assert ports.arrival().data == frame(vlan=7)
    assert ports.command(net.CTRL_VLAN, net.CTRL_VLAN_DEL, seven)[0] == net.CTRL_OK
    wire.deliver(frame(vlan=7))
    ports.nothing()


@pytest.mark.requirement("DEV-NET-88", "DEV-NET-89", "DEV-NET-93", "DEV-NET-226", "DEV-NET-225")
def test_receive_modes(rig: Rig, ring: int) -> None:
    """Each receive mode that CTRL_RX and CTRL_RX_EXTRA bring can be switched on and off."""
    modes = [net.CTRL_RX_PROMISC, net.CTRL_RX_ALLMULTI]
    extra = bool(rig.transport.offered >> net.F_CTRL_RX_EXTRA & 1)
    more = (net.F_CTRL_RX_EXTRA,) if extra else ()
    if extra:
        modes += [net.CTRL_RX_ALLUNI, net.CTRL_RX_NOMULTI, net.CTRL_RX_NOUNI, net.CTRL_RX_NOBCAST]
    ports = Ports(rig, ring, net.F_CTRL_VQ, net.F_CTRL_RX, *more)
    for mode in modes:
        for value in (b"\1", b"\0"):
            ack, length = ports.command(net.CTRL_RX, mode, value)
            assert ack == net.CTRL_OK, f"ack {ack} of RX command {mode} with {value.hex()}"
            assert length == 1, f"used length {length} of a control buffer with a status only"


@pytest.mark.requirement("DEV-NET-103", "DEV-NET-102")
def test_address_filter(rig: Rig, ring: int) -> None:
    """The address table works once its command was used, and is empty after a reset."""
    features = (net.F_CTRL_VQ, net.F_CTRL_RX)
    ports, wire = Ports(rig, ring, *features), Wire(rig)
    ports.no_promiscuity()
    ports.post()
    table = b"\1\0\0\0" + STRANGER + b"\1\0\0\0" + MULTICAST
    assert ports.command(net.CTRL_MAC, net.CTRL_MAC_TABLE_SET, table)[0] == net.CTRL_OK
    for target in (STRANGER, MULTICAST):
        wire.deliver(frame(target))
        assert ports.arrival().data == frame(target)
    rig.transport.reset(rig.limit)
    again, wire = Ports(rig, ring, *features), Wire(rig)
    again.no_promiscuity()
    again.post()
    for target in (STRANGER, MULTICAST):
        wire.deliver(frame(target))
        again.nothing()


@pytest.mark.requirement("DEV-NET-104", "DEV-NET-227", "DEV-NET-226")
def test_a_new_address(rig: Rig, ring: int) -> None:
    """MAC_ADDR_SET changes mac in the configuration before its buffer is used."""
    ports = Ports(rig, ring, net.F_CTRL_VQ, net.F_CTRL_RX, net.F_CTRL_MAC_ADDR, net.F_MAC)
    assert ports.command(net.CTRL_MAC, net.CTRL_MAC_ADDR_SET, OUR_MAC)[0] == net.CTRL_OK
    found = bytes(rig.transport.read_config(at, 1) for at in range(6))
    assert found == OUR_MAC, f"mac is {found.hex(':')}"


@pytest.mark.requirement("DEV-NET-223", "DEV-NET-224")
def test_unknown_commands_are_refused(rig: Rig, ring: int, case: Case) -> None:
    """A class or command that does not exist is answered by 1 in one byte."""
    ports = Ports(rig, ring, net.F_CTRL_VQ)
    for kind, command in ((0x7F, 0), (net.CTRL_MQ, 0x7F)):
        case.sent(f"class {kind} command {command}")
        ack, _ = ports.command(kind, command, b"\0")
        assert ack == net.CTRL_ERR, f"ack {ack} of class {kind} command {command}"


@pytest.mark.requirement("DEV-NET-234")
def test_offloads_at_run_time(rig: Rig, ring: int) -> None:
    """Negotiated receive offloads are on, and GUEST_OFFLOADS_SET leaves on exactly those given."""
    ports = Ports(rig, ring, net.F_CTRL_VQ, net.F_CTRL_GUEST_OFFLOADS, net.F_MRG_RXBUF, *TCP4)
    wire = Wire(rig)
    ports.post(16)
    data, start = tcp(bytes(BIG))
    packet = Packet(data, True, start, 16, net.GSO_TCPV4, False, MSS)
    for offloads in (None, 1 << net.F_GUEST_CSUM, 1 << net.F_GUEST_CSUM | 1 << net.F_GUEST_TSO4):
        if offloads is not None:
            given = offloads.to_bytes(8, "little")
            command = ports.command(net.CTRL_GUEST_OFFLOADS, net.CTRL_GUEST_OFFLOADS_SET, given)
            assert command[0] == net.CTRL_OK
        wire.deliver(packet)
        on = offloads is None or bool(offloads >> net.F_GUEST_TSO4 & 1)
        came = ports.gather(1)
        kind = came[0].field("gso_type")
        assert bool(kind) == on, f"gso_type {kind} with offloads {offloads}"
        if not on:
            ports.gather(PARTS - len(came))
        ports.post(4)


@pytest.mark.requirement("DEV-NET-115", "DEV-NET-116", "DEV-NET-229", "DEV-NET-226")
def test_queue_pairs_in_use(rig: Rig, ring: int) -> None:
    """Packets arrive in receiveq1 alone until VQ_PAIRS_SET, and never above its value."""
    ports, wire = Ports(rig, ring, net.F_CTRL_VQ, net.F_MQ), Wire(rig)
    for pair in range(ports.pairs):
        ports.post(20, pair=pair)
    for pairs in (None, ports.pairs, 1):
        if pairs is not None:
            value = pairs.to_bytes(2, "little")
            assert ports.command(net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, value)[0] == net.CTRL_OK
        for port in range(6):
            wire.deliver(tcp(bytes([port]))[0])
        counts = [len(came) for came in ports.anywhere(6)]
        allowed = 1 if pairs is None else pairs
        assert not any(counts[allowed:]), f"with {allowed} pairs in use packets came in as {counts}"
        assert sum(counts) == 6, f"of 6 packets {sum(counts)} arrived"


@pytest.mark.requirement("DEV-NET-109", "DEV-NET-226")
def test_announcements_are_acknowledged(rig: Rig, ring: int) -> None:
    """ANNOUNCE_ACK clears the bit in status before its buffer is used."""
    ports = Ports(rig, ring, net.F_CTRL_VQ, net.F_GUEST_ANNOUNCE, net.F_STATUS)
    Wire(rig).announce()
    field = net.CONFIG["status"]
    before = rig.transport.read_config(field.offset, field.width)
    assert before & net.S_ANNOUNCE, "the device asks for no announcement"
    assert ports.command(net.CTRL_ANNOUNCE, net.CTRL_ANNOUNCE_ACK)[0] == net.CTRL_OK
    after = rig.transport.read_config(field.offset, field.width)
    assert not after & net.S_ANNOUNCE, f"status is {after:#x} after the acknowledgement"
