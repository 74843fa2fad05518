"""Network drivers with one mistake (5.1)."""

from __future__ import annotations

import struct
from typing import Any

from guestpv.conformance.driver.rules_net import NEEDS
from guestpv.devices.scripted import RawQueue
from guestpv.spec import features as ft
from guestpv.spec import net
from guestpv.spec.pci import CfgType

from .driver_bench import Bench, healthy, mutant

CARD = "net"
CTRL = ft.mask((net.F_CTRL_VQ, net.F_CTRL_RX, net.F_CTRL_MAC_ADDR, net.F_CTRL_VLAN, net.F_CTRL_RX_EXTRA))
OFFLOADS = ft.mask((net.F_CTRL_VQ, net.F_CTRL_GUEST_OFFLOADS, net.F_GUEST_CSUM))
PAIRS = "net?pairs=2"
TSO = ft.mask((net.F_CSUM, net.F_HOST_TSO4))
TUNNEL = TSO | ft.mask((net.F_HOST_TSO6, net.F_HOST_USO, 67))


def start(b: Bench, features: int = 0, control: int = 0) -> list[RawQueue]:
    """Go live with one pair of queues, and a control queue of this number."""
    return b.start(features, {0: 8, 1: 8} | ({control: 8} if control else {}))


def send(b: Bench, queue: RawQueue, *, size: int = 60, writable: int = 0, **header: int) -> None:
    """A packet with this header."""
    fields = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset", "num_buffers")
    raw = struct.pack("<BBHHHHH", *(header.get(name, 0) for name in fields))
    queue.add([queue.buffer(12 + size, raw + bytes(size))], [queue.buffer(writable)] if writable else [])
    queue.kick()


def command(b: Bench, queue: RawQueue, kind: int, number: int, data: bytes = b"") -> None:
    """A control command."""
    queue.add([queue.buffer(2 + len(data), bytes((kind, number)) + data)], [queue.buffer(1)])
    queue.kick()


def steer(types: int = 1, mask: int = 0, table: tuple[int, ...] = (0,), key: int = 40) -> bytes:
    """Data of an RSS configuration."""
    words = struct.pack(f"<{len(table) + 2}H", 0, *table, 1)
    return struct.pack("<IH", types, mask) + words + bytes((key,)) + bytes(key)


def report(types: int = 1, reserved: int = 0, key: int = 40) -> bytes:
    """Data of a hash configuration."""
    return struct.pack("<I4H", types, reserved, 0, 0, 0) + bytes((key,)) + bytes(key)


@healthy(CARD)
def every_feature_is_offered(b: Bench) -> None:
    b.device.offered |= sum(1 << bit for bit, _ in NEEDS.values())
    b.start()


@healthy("net?mtu=1500")
def sends_plain_packets(b: Bench) -> None:
    _, tx = start(b, 1 << net.F_MTU)
    send(b, tx)


@healthy(CARD)
def sends_packets_to_be_cut(b: Bench) -> None:
    _, tx = start(b, TSO)
    send(b, tx, size=100, flags=1, gso_type=1, gso_size=20, csum_start=34, csum_offset=16)


@healthy(PAIRS)
def uses_two_pairs(b: Bench) -> None:
    queues = b.start(1 << net.F_MQ | 1 << net.F_CTRL_VQ, dict.fromkeys(range(5), 8))
    command(b, queues[4], net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, b"\2\0")
    send(b, queues[3])


@healthy(CARD)
def receives_a_packet(b: Bench) -> None:
    rx, _ = start(b, 1 << net.F_MRG_RXBUF)
    b.one(rx, 2000)
    b.model.deliver(b"\x52\x54\x00\x00\x00\x01".ljust(60))


@healthy(CARD)
def commands_of_every_class(b: Bench) -> None:
    control = start(b, CTRL | OFFLOADS | 1 << net.F_GUEST_ANNOUNCE, 2)[2]
    b.model.announce()
    b.driver.read_at(CfgType.DEVICE, 6, 2)
    for number in (net.CTRL_RX_PROMISC, net.CTRL_RX_NOBCAST):
        command(b, control, net.CTRL_RX, number, b"\1")
    command(b, control, net.CTRL_MAC, net.CTRL_MAC_ADDR_SET, b"\2\0\0\0\0\1")
    command(b, control, net.CTRL_VLAN, net.CTRL_VLAN_ADD, b"\5\0")
    command(b, control, net.CTRL_ANNOUNCE, net.CTRL_ANNOUNCE_ACK)
    command(b, control, net.CTRL_GUEST_OFFLOADS, net.CTRL_GUEST_OFFLOADS_SET, (2).to_bytes(8, "little"))
    b.watch.settle()


@healthy(CARD)
def knows_its_address(b: Bench) -> None:
    b.start(1 << net.F_MAC)
    read = [b.driver.read_at(CfgType.DEVICE, place, 1) for place in range(6)]
    b.watch.tell("mac", int.from_bytes(bytes(read), "little"))


HASHES = ft.mask((net.F_CTRL_VQ, net.F_RSS, net.F_HASH_REPORT))


@healthy(CARD)
def steers_and_hashes(b: Bench) -> None:
    control = hashing(b)
    command(b, control, net.CTRL_MQ, net.CTRL_MQ_RSS_CONFIG, steer())
    command(b, control, net.CTRL_MQ, net.CTRL_MQ_HASH_CONFIG, report())


def hashing(b: Bench, features: int = HASHES) -> RawQueue:
    """Go live with hashes; the control queue."""
    return start(b, features, 2)[2]


# Features


def without_needs(requirement: str) -> None:
    bit, _ = NEEDS[requirement]

    def walk(b: Bench) -> None:
        b.device.offered |= sum(1 << other for other, _ in NEEDS.values())
        b.driver.negotiate(b.must | 1 << bit)

    walk.__name__ = f"accepts_{bit}_alone"
    mutant(requirement, "DRV-FEAT-02", spec=CARD)(walk)


for name in NEEDS:
    without_needs(name)


# Packets


def sends(*breaks: str, name: str, features: int = 0, spec: str = CARD, **packet: Any) -> None:
    def walk(b: Bench) -> None:
        send(b, start(b, features)[1], **packet)

    walk.__name__ = name
    mutant(*(f"DRV-NET-{rule}" for rule in breaks), spec=spec)(walk)


CUT = {"flags": 1, "gso_size": 20, "csum_start": 34, "csum_offset": 16, "size": 100}
sends("09", name="sends_more_than_the_mtu", spec="net?mtu=100", features=1 << net.F_MTU, size=200)
sends("19", name="counts_transmit_buffers", num_buffers=1)
sends("20", name="wants_a_checksum_unasked", flags=1, csum_start=34, csum_offset=16, size=100)
sends("48", name="a_checksum_outside", features=1, flags=1, csum_start=500)
for feature, rule, kind in ((12, "24", 1), (11, "26", 4), (11, "28", 3), (11, "30", 5)):
    sends(rule, name=f"cuts_type_{kind}_unasked", features=1 | 1 << feature, gso_type=kind, **CUT)
sends("49", "24", name="cuts_although_nothing_allows_it", features=1, gso_type=1, **CUT)
sends("50", name="cuts_without_a_checksum", features=TSO, gso_type=1, gso_size=20)
sends("51", name="cuts_without_a_size", features=TSO, gso_type=1, **(CUT | {"gso_size": 0}))
sends("64", name="says_data_valid", features=1, flags=2)
sends("182", name="cuts_an_unknown_type", features=TSO, gso_type=9, **CUT)
sends("183", name="a_packet_to_be_written", writable=8)
sends("34", "61", "182", name="tunnels_unasked", features=TSO, gso_type=0x21, **CUT)
sends("42", "182", name="tunnels_fragments", features=TUNNEL, gso_type=0x23, **CUT)
sends("43", "182", name="tunnels_both_ways", features=TUNNEL, gso_type=0x61, **CUT)
sends("65", "64", "182", name="tunnels_data_valid", features=TUNNEL, gso_type=0x21, **(CUT | {"flags": 3}))
OUTER = CUT | {"flags": 1 | 8}
sends(
    "37",
    "40",
    "62",
    "182",
    name="an_outer_checksum_unasked",
    features=TUNNEL,
    gso_type=0x21,
    **OUTER,
)
sends("38", "44", name="an_outer_checksum_of_nothing", features=TUNNEL | 1 << 68, **OUTER)


@mutant("DRV-NET-178", spec=CARD)
def half_a_header_on_transmit(b: Bench) -> None:
    tx = start(b)[1]
    tx.add([tx.buffer(6)])
    tx.kick()


@mutant("DRV-NET-185", spec=CARD)
def a_receive_buffer_to_be_read(b: Bench) -> None:
    rx = start(b)[0]
    rx.add([rx.buffer(8)], [rx.buffer(2000)])
    rx.kick()
    b.model.deliver(b"\xff" * 60)


@mutant("DRV-NET-71", spec=CARD)
def a_receive_buffer_without_room(b: Bench) -> None:
    rx = start(b, 1 << net.F_MRG_RXBUF)[0]
    b.one(rx, 4)
    b.model.deliver(b"\xff" * 60)


@mutant("DRV-NET-103", spec=PAIRS)
def sends_on_the_second_pair_too_early(b: Bench) -> None:
    queues = b.start(1 << net.F_MQ | 1 << net.F_CTRL_VQ, dict.fromkeys(range(5), 8))
    send(b, queues[3])


# Configuration and queues


@mutant("DRV-NET-01", spec=CARD)
def writes_its_own_address(b: Bench) -> None:
    b.start()
    b.driver.write_at(CfgType.DEVICE, 0, 1, 1)


@mutant("DRV-NET-03", "DRV-CONFIG-07", spec=CARD)
def has_another_address(b: Bench) -> None:
    b.start(1 << net.F_MAC)
    b.watch.tell("mac", 0x010203040506)


@mutant("DRV-NET-147", "DRV-PCI-66", spec=PAIRS)
def a_control_queue_behind_all_pairs(b: Bench) -> None:
    b.driver.negotiate(b.must | 1 << net.F_CTRL_VQ)
    b.driver.queue(4, 8)


@mutant("DRV-NET-148", "DRV-PCI-66", spec=CARD)
def a_control_queue_without_its_feature(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.queue(2, 8)


@mutant("DRV-NET-175", "DRV-PCI-05", spec=CARD)
def reads_the_address_in_words(b: Bench) -> None:
    b.start()
    b.driver.read_at(CfgType.DEVICE, 0, 2)


# Commands


def commands(*breaks: str, name: str, features: int = CTRL, **what: Any) -> None:
    def walk(b: Bench) -> None:
        command(b, start(b, features | 1 << net.F_CTRL_VQ, 2)[2], **what)

    walk.__name__ = name
    mutant(*(f"DRV-NET-{rule}" for rule in breaks), spec=CARD)(walk)


commands("90", name="a_mode_unasked", features=0, kind=0, number=0, data=b"\1")
commands("91", name="a_further_mode_unasked", features=CTRL & ~(1 << 20), kind=0, number=5, data=b"\1")
commands("92", name="an_address_unasked", features=0, kind=1, number=1, data=bytes(6))
commands("94", name="a_table_cut_short", kind=1, number=0, data=b"\5\0\0\0")
commands(
    "114", name="an_offload_unasked", features=OFFLOADS, kind=5, number=0, data=(128).to_bytes(8, "little")
)

commands("187", name="a_class_that_is_not", kind=99, number=0)
commands("188", name="a_mode_of_two", kind=0, number=0, data=b"\2")
commands("189", name="a_short_address", kind=1, number=1, data=bytes(4))
commands("190", name="a_short_vlan", kind=2, number=0, data=b"\1")
commands("191", name="an_acknowledgement_with_data", features=1 << 21, kind=3, number=0, data=b"\1")
commands("192", name="pairs_in_four_bytes", kind=4, number=0, data=bytes(4))
commands("199", name="offloads_in_four_bytes", features=OFFLOADS, kind=5, number=0, data=bytes(4))
commands("106", name="steers_unasked", kind=4, number=1, data=steer())
for rules, data in {
    "107": steer(table=(9,)),
    "108 193": steer(mask=2, table=(0, 0, 0)),
    "109 193": steer(mask=255, table=(0,) * 256),
    "110 197 193": steer(types=1 << 20),
    "193": steer() + b"\0",
    "196 193": steer(key=60),
}.items():
    commands(*rules.split(), name=f"steers_against_{rules}", features=HASHES, kind=4, number=1, data=data)
commands("193", name="steers_by_too_little", features=HASHES, kind=4, number=1, data=steer()[:-1])
RESERVED, TYPES = report(reserved=1), report(types=1 << 6)
commands("105", "198", name="hashes_reserved", features=HASHES, kind=4, number=2, data=RESERVED)
commands(
    "110", "198", name="hashes_unsupported", features=HASHES, kind=4, number=2, data=report(types=1 << 6)
)


def paired(number: int, sizes: dict[int, int], *breaks: str) -> None:
    def walk(b: Bench) -> None:
        queues = b.start(1 << net.F_MQ | 1 << net.F_CTRL_VQ, sizes)
        command(b, queues[-1], net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, number.to_bytes(2, "little"))

    walk.__name__ = f"{number}_pairs_with_{len(sizes)}_queues"
    mutant(*breaks, spec=PAIRS)(walk)


paired(2, {0: 8, 1: 8, 4: 8}, "DRV-NET-101")
paired(5, dict.fromkeys(range(5), 8), "DRV-NET-102")


@mutant("DRV-NET-97", spec=CARD)
def does_not_announce_itself(b: Bench) -> None:
    start(b, ft.mask((net.F_CTRL_VQ, net.F_GUEST_ANNOUNCE, net.F_STATUS)), 2)
    b.model.announce()
    b.driver.read_at(CfgType.DEVICE, 6, 2)
    b.watch.settle()


@mutant("DRV-NET-186", spec=CARD)
def a_command_without_room_for_its_answer(b: Bench) -> None:
    control = start(b, CTRL, 2)[2]
    control.add([control.buffer(3, b"\0\0\1")])
    control.kick()
