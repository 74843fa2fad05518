"""Which receive queue packets come to, and hashes over packets (5.1.9.4.3-5, 5.1.9.5.5-7)."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.net_ports import Arrival, Ports, frame
from guestpv.conformance.net_steering import KEY, flows, hash_config, hash_sets, rss_config
from guestpv.conformance.net_wire import Wire
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Rig
from guestpv.spec import features as ft
from guestpv.spec import net

pytestmark = [pytest.mark.device("net"), pytest.mark.formats]

HASHED = (net.F_CTRL_VQ, net.F_HASH_REPORT)
STEERED = (net.F_CTRL_VQ, net.F_RSS)
MANY = 6
"""Flows of each kind for a check of steering."""


@pytest.fixture
def ring(negotiated: Rig, rig: Rig) -> int:
    """Ring features of the combination; the device is reset again."""
    features = negotiated.transport.features
    rig.transport.reset(rig.limit)
    return features


def key_of(rig: Rig) -> bytes:
    """A key of the largest size that the device takes."""
    field = net.CONFIG["rss_max_key_size"]
    size = rig.transport.read_config(field.offset, field.width)
    return (KEY * -(-size // len(KEY)))[:size]


def supported(rig: Rig) -> int:
    """Hash types of the device."""
    field = net.CONFIG["supported_hash_types"]
    return rig.transport.read_config(field.offset, field.width)


def steer(ports: Ports, data: bytes) -> None:
    """Set RSS parameters."""
    ack, _ = ports.command(net.CTRL_MQ, net.CTRL_MQ_RSS_CONFIG, data)
    assert ack == net.CTRL_OK, f"ack {ack} of RSS_CONFIG"


def report(ports: Ports, data: bytes) -> None:
    """Set hash parameters."""
    ack, _ = ports.command(net.CTRL_MQ, net.CTRL_MQ_HASH_CONFIG, data)
    assert ack == net.CTRL_OK, f"ack {ack} of HASH_CONFIG"


def place(ports: Ports) -> int:
    """The pair that the next packet comes to."""
    (pair,) = [pair for pair, came in enumerate(ports.anywhere()) for _ in came]
    return pair


def several(ports: Ports, count: int) -> None:
    """Receive buffers for ``count`` packets in each queue; the case is skipped with one pair."""
    if ports.pairs < 2:
        pytest.skip("the device has one pair of queues")
    for pair in range(ports.pairs):
        ports.post(min(count, ports.rx[pair].size), pair=pair)


# Hashes


@pytest.mark.requirement("DEV-NET-82", "DEV-NET-83", "DEV-NET-232")
def test_rss_configures_reported_hashes(rig: Rig, ring: int) -> None:
    """With HASH_REPORT and RSS offered, RSS_CONFIG is supported, also with the longest key."""
    ports = Ports(rig, ring, *HASHED, net.F_RSS)
    steer(ports, rss_config(supported(rig), (0,), key=key_of(rig)))


@pytest.mark.requirement("DEV-NET-82", "DEV-NET-84", "DEV-NET-232")
def test_hashes_are_configured_without_rss(rig: Rig, ring: int) -> None:
    """With HASH_REPORT and without RSS offered, HASH_CONFIG is supported."""
    if rig.transport.offered >> net.F_RSS & 1:
        pytest.skip("RSS is offered")
    ports = Ports(rig, ring, *HASHED)
    report(ports, hash_config(supported(rig), key_of(rig)))


@pytest.mark.requirement("DEV-NET-119")
def test_hashes_are_configured_beside_automatic_steering(rig: Rig, ring: int) -> None:
    """With HASH_REPORT and MQ negotiated, and not RSS, HASH_CONFIG is supported."""
    ports = Ports(rig, ring, *HASHED, net.F_MQ)
    report(ports, hash_config(supported(rig), key_of(rig)))


def compare(ports: Ports, wire: Wire, configure: Callable[[int], object], case: Case) -> None:
    """Look at the hash of each kind of packet with each set of hash types."""
    key = key_of(ports.rig)
    for enabled in hash_sets(supported(ports.rig)):
        configure(enabled)
        for flow in flows():
            ports.post(1)
            case.sent(f"hash types {enabled:#x}, a packet of protocol {flow.protocol} over IP{flow.version}")
            wire.deliver(flow.frame())
            found: Arrival = ports.arrival()
            value, kind = flow.hash(key, enabled)
            said = found.field("hash_report")
            assert said == kind, f"hash_report is {said}, expected {kind} ({net.HASH_REPORTS[kind]})"
            said = found.field("hash_value")
            assert not kind or said == value, f"hash_value is {said:#010x}, expected {value:#010x}"


@pytest.mark.requirement("DEV-NET-120", "DEV-NET-220", "DEV-NET-221")
def test_hashes_with_rss(rig: Rig, ring: int, case: Case) -> None:
    """The hash is taken over addresses and ports of the most specific type that is enabled."""
    ports, wire = Ports(rig, ring, *HASHED, net.F_RSS), Wire(rig)
    key = key_of(rig)
    compare(ports, wire, lambda enabled: steer(ports, rss_config(enabled, (0,), key=key)), case)


@pytest.mark.requirement("DEV-NET-220", "DEV-NET-221")
def test_hashes_without_rss(rig: Rig, ring: int, case: Case) -> None:
    """The same by HASH_CONFIG."""
    ports, wire = Ports(rig, ring, *HASHED), Wire(rig)
    key = key_of(rig)
    compare(ports, wire, lambda enabled: report(ports, hash_config(enabled, key)), case)


# Steering


@pytest.mark.requirement("DEV-NET-120", "DEV-NET-122", "DEV-NET-230", "DEV-NET-231")
@pytest.mark.parametrize("entries", [1, 8, 128])
def test_the_table_says_where_packets_go(rig: Rig, ring: int, case: Case, entries: int) -> None:
    """A packet comes to the queue at hash & mask of the table, whose numbers are those of pairs."""
    ports, wire = Ports(rig, ring, *STEERED), Wire(rig)
    chosen = [flow for flow in flows(MANY) if flow.hash(KEY, supported(rig))[1]]
    several(ports, len(chosen))
    order, key = random.Random(entries), key_of(rig)
    table = [order.randrange(ports.pairs) for _ in range(entries)]
    if entries == 1:
        table = [ports.pairs - 1]
    steer(ports, rss_config(supported(rig), table, 0, ports.pairs, key))
    for flow in chosen:
        value, _ = flow.hash(key, supported(rig))
        case.sent(f"a packet with hash {value:#010x} and a table of {entries}")
        wire.deliver(flow.frame())
        pair, wanted = place(ports), table[value & (entries - 1)]
        assert pair == wanted, f"the packet came to receiveq{pair + 1}, the table says receiveq{wanted + 1}"


@pytest.mark.requirement("DEV-NET-121", "DEV-NET-230", "DEV-NET-231")
def test_packets_without_a_hash(rig: Rig, ring: int) -> None:
    """Packets that have no hash come to the queue for unclassified ones."""
    ports, wire = Ports(rig, ring, *STEERED), Wire(rig)
    several(ports, 4)
    for last in (ports.pairs - 1, 0):
        other = 0 if last else ports.pairs - 1
        steer(ports, rss_config(supported(rig), (other, other), last, ports.pairs, key_of(rig)))
        wire.deliver(frame())
        pair = place(ports)
        assert pair == last, f"the packet came to receiveq{pair + 1}, unclassified is receiveq{last + 1}"


@pytest.mark.requirement("DEV-NET-112")
def test_automatic_steering_after_rss(rig: Rig, ring: int) -> None:
    """VQ_PAIRS_SET makes automatic steering of what RSS_CONFIG set before."""
    ports, wire = Ports(rig, ring, *STEERED, net.F_MQ), Wire(rig)
    several(ports, 12)
    last = ports.pairs - 1
    steer(ports, rss_config(supported(rig), (last,), last, ports.pairs, key_of(rig)))
    one = (1).to_bytes(2, "little")
    assert ports.command(net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, one)[0] == net.CTRL_OK
    for flow in flows():
        wire.deliver(flow.frame())
        pair = place(ports)
        assert not pair, f"a packet came to receiveq{pair + 1} as RSS had it, VQ_PAIRS_SET said 1"


def again(ports: Ports, pair: int) -> None:
    """Set a receive queue up again after its reset, with buffers."""
    ports.rx[pair] = ports.rig.queue(2 * pair)
    ports.forget(pair)
    ports.post(8, pair=pair)


def take_away(rig: Rig, queue: Queue) -> None:
    """Reset a receive queue."""
    rig.case.sent(f"a reset of queue {queue.index}")
    rig.transport.reset_queue(queue.index)


@pytest.mark.requirement("DEV-NET-118")
def test_packets_without_any_queue(rig: Rig, ring: int) -> None:
    """A packet that arrives while all receive queues are in reset is dropped."""
    ports, wire = Ports(rig, ring | 1 << ft.F_RING_RESET, net.F_CTRL_VQ, net.F_MQ, ft.F_RING_RESET), Wire(rig)
    several(ports, 8)
    value = ports.pairs.to_bytes(2, "little")
    assert ports.command(net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, value)[0] == net.CTRL_OK
    for queue in ports.rx:
        take_away(rig, queue)
    wire.deliver(frame(mark=1))
    rig.settle()
    for pair in range(ports.pairs):
        again(ports, pair)
    wire.deliver(frame(mark=2))
    came = [packet.data for here in ports.anywhere() for packet in here]
    assert came == [frame(mark=2)], "a packet came that arrived while there was no receive queue"


@pytest.mark.requirement("DEV-NET-123")
def test_packets_for_a_queue_in_reset(rig: Rig, ring: int) -> None:
    """With RSS a packet whose queue is in reset is dropped."""
    ports, wire = Ports(rig, ring | 1 << ft.F_RING_RESET, *STEERED, ft.F_RING_RESET), Wire(rig)
    several(ports, 8)
    last = ports.pairs - 1
    steer(ports, rss_config(supported(rig), (last,), last, ports.pairs, key_of(rig)))
    take_away(rig, ports.rx[last])
    wire.deliver(frame(mark=1))
    rig.settle()
    again(ports, last)
    wire.deliver(frame(mark=2))
    came = [(pair, packet.data) for pair, here in enumerate(ports.anywhere()) for packet in here]
    assert came == [(last, frame(mark=2))], "a packet came though its receive queue was in reset"
