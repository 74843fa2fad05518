"""The network driver's control queue over our own device: what commands do, and answers that cannot be."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from guestpv.conformance import net_steering as steering
from guestpv.devices.loopback import open_function
from guestpv.devices.models.net import Net as NetModel
from guestpv.devices.models.net_hash import toeplitz
from guestpv.drivers.net import Net
from guestpv.drivers.net_control import Coalescing, CommandRefused, ControlQueue, Rss
from guestpv.errors import DeviceViolation, GuestpvError, TimeLimit, UsageError
from guestpv.spec import features as feat
from guestpv.spec import net as spec
from guestpv.transport.base import FeatureFilter
from guestpv.transport.pci import PciTransport

OWN = bytes.fromhex("525400000001")
OTHER, GROUP = bytes.fromhex("525400000002"), bytes.fromhex("01005e000001")
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
"""The key of Microsoft's RSS verification suite."""


class Bench:
    """A network driver over a device of ours that answers within each kick."""

    def __init__(self, features: str = "", offer: str = "", queue_pairs: int = 1, **params: str) -> None:
        self.function = open_function("net", {"peer": "sink", **params} | ({"offer": offer} if offer else {}))
        assert isinstance(self.function.model, NetModel)
        self.model = self.function.model
        transport = PciTransport(self.function)
        transport.feature_filter = FeatureFilter.parse(features, feat.NET)
        self.net = Net(transport, queue_pairs=queue_pairs)

    @property
    def control(self) -> ControlQueue:
        assert self.net.control is not None
        return self.net.control

    def arrives(self, destination: bytes, vlan: int | None = None) -> bool:
        """Whether a frame to this address comes in."""
        tag = b"" if vlan is None else struct.pack("!HH", 0x8100, vlan)
        self.model.deliver(destination + OTHER + tag + b"\x88\xb5" + bytes(60))
        return bool(self.net.receive())

    def answering(self, answer: Callable[[Any, Any], None]) -> None:
        """Have the control queue answered by ``answer(queue, chain)``."""
        self.model._command = answer  # type: ignore[method-assign]


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**options: Any) -> Bench:
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for one in benches:
        one.net.close()
        assert [str(finding) for finding in one.function.findings] == []


RINGS = [{}, {"packed": "on"}, {"indirect_desc": "off", "in_order": "on"}]


# The receive filter.


@pytest.mark.requirement("DRV-NET-90", "DRV-NET-91", "DRV-NET-188")
@pytest.mark.parametrize("ring", RINGS, ids=["split", "packed", "in_order"])
def test_receive_modes(bench: Callable[..., Bench], ring: dict[str, str]) -> None:
    one = bench(features="+ctrl_rx,+ctrl_rx_extra", **ring)
    assert (one.arrives(OWN), one.arrives(OTHER), one.arrives(GROUP)) == (True, False, False)
    one.control.set_mode("promisc", True)
    assert one.arrives(OTHER)
    one.control.set_mode("promisc", False)
    assert not one.arrives(OTHER)
    one.control.set_mode("allmulti", True)
    assert (one.arrives(GROUP), one.arrives(OTHER)) == (True, False)
    one.control.set_mode("alluni", True)
    assert one.arrives(OTHER)
    for mode, target in (("nomulti", GROUP), ("nouni", OWN), ("nobcast", b"\xff" * 6)):
        assert one.arrives(target)
        one.control.set_mode(mode, True)
        assert not one.arrives(target)
        one.control.set_mode(mode, False)
        assert one.arrives(target)


@pytest.mark.requirement("DRV-NET-92", "DRV-NET-94", "DRV-NET-95", "DRV-NET-189")
def test_addresses_and_their_table(bench: Callable[..., Bench]) -> None:
    one = bench(features="+ctrl_rx,+ctrl_mac_addr")
    one.control.set_filter([OTHER], [GROUP])
    assert (one.arrives(OWN), one.arrives(OTHER), one.arrives(GROUP)) == (True, True, True)
    one.control.set_filter(multicast=[GROUP])
    assert (one.arrives(OTHER), one.arrives(GROUP)) == (False, True)
    one.control.set_filter()
    assert not one.arrives(GROUP)
    one.control.set_mac(OTHER)
    assert (one.arrives(OWN), one.arrives(OTHER)) == (False, True)
    many = [struct.pack("!HI", 0x0200, n) for n in range(1000)]
    one.control.set_filter(many)
    assert (one.arrives(many[0]), one.arrives(many[-1])) == (True, True)


@pytest.mark.requirement("DRV-NET-190")
def test_the_vlan_filter_starts_empty(bench: Callable[..., Bench]) -> None:
    one = bench(features="+ctrl_vlan")
    assert not one.arrives(OWN, vlan=5)
    one.control.add_vlan(5)
    assert (one.arrives(OWN, vlan=5), one.arrives(OWN, vlan=6)) == (True, False)
    one.control.remove_vlan(5)
    assert not one.arrives(OWN, vlan=5)
    assert one.arrives(OWN)


def test_without_a_request_the_device_filters_nothing(bench: Callable[..., Bench]) -> None:
    one = bench()
    assert all(one.arrives(target) for target in (OWN, OTHER, GROUP))
    assert one.arrives(OWN, vlan=5)


# Queues, steering, hashes.


@pytest.mark.requirement("DRV-NET-147", "DRV-NET-192")
def test_fewer_and_more_queue_pairs_at_run_time(bench: Callable[..., Bench]) -> None:
    one = bench(queue_pairs=4, pairs="4")
    assert one.model.control.pairs == 4
    one.control.set_pairs(2)
    assert one.model.control.pairs == 2
    with pytest.raises(UsageError, match="5 queue pairs, enabled are 4"):
        one.control.set_pairs(5)


def udp(source: int, target: int) -> bytes:
    """An Ethernet frame with a UDP datagram over IPv4, from and to these ports."""
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 28 + 18, 1, 0, 64, 17, 0, bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
    )
    return OWN + OTHER + b"\x08\x00" + ip + struct.pack("!HHHH", source, target, 26, 0) + bytes(18)


@pytest.mark.requirement(
    "DRV-NET-106", "DRV-NET-107", "DRV-NET-108", "DRV-NET-165", "DRV-NET-193", "DRV-NET-194", "DRV-NET-197"
)
@pytest.mark.parametrize("mq", ["+mq", "-mq"])
def test_rss_brings_each_flow_to_the_queue_of_its_hash(bench: Callable[..., Bench], mq: str) -> None:
    """With RSS alone the control queue is where it is with MQ (DRV-NET-147)."""
    one = bench(features=f"+rss,{mq}", offer="+rss", queue_pairs=4, pairs="4")
    table = [3, 1, 0, 2] * 4
    one.control.set_rss(Rss(KEY, table, spec.HASH_TYPES["udpv4"], unclassified=2))
    expected: list[list[bytes]] = [[], [], [], []]
    for port in range(40):
        frame = udp(1000 + port, 53)
        value = toeplitz(KEY, frame[26:34] + frame[34:38])
        expected[table[value % len(table)]].append(frame)
        one.model.deliver(frame)
    arp = OWN + OTHER + b"\x08\x06" + bytes(46)
    expected[2].append(arp)
    one.model.deliver(arp)
    for number, frames in enumerate(expected):
        got = one.net.receive_burst(pair=number)
        assert [got[n] for n in range(len(got))] == frames
    assert sum(map(bool, expected)) == 4
    # The device had no buffers at first: a notification of one queue is one of all, because of QEMU.
    assert all(port.counters["rx_reminders"] >= 3 for port in one.net.pairs)


@pytest.mark.requirement("DRV-NET-107", "DRV-NET-108", "DRV-NET-109", "DRV-NET-110", "DRV-NET-196")
def test_rss_that_the_device_cannot_do_is_not_asked_of_it(bench: Callable[..., Bench]) -> None:
    one = bench(features="+rss", offer="+rss", queue_pairs=2, pairs="4")
    known = len(one.model.control.log)
    for rss, says in [
        (Rss(KEY, [0, 1, 0]), "3 entries is no power of two"),
        (Rss(KEY, []), "0 entries"),
        (Rss(KEY, [0] * 256), "256 entries is no power of two up to 128"),
        (Rss(KEY, [0, 2]), "no receive queue 2: enabled are 2"),
        (Rss(KEY, [0, -1]), "no receive queue -1"),
        (Rss(KEY, [0, 1], unclassified=9), "no receive queue 9"),
        (Rss(KEY + b"x", [0, 1]), "41 bytes, the device takes 1 to 40"),
        (Rss(b"", [0, 1]), "a hash key of 0 bytes"),
        (Rss(KEY, [0, 1], spec.HASH_TYPES["tcp_ex"]), "no hash over tcp_ex"),
        (Rss(KEY, [0, 1], transmit_queues=3), "3 transmit queues"),
    ]:
        with pytest.raises(UsageError, match=says):
            one.control.set_rss(rss)
    assert len(one.model.control.log) == known


@pytest.mark.requirement("DRV-NET-105", "DRV-NET-179", "DRV-NET-198")
def test_hashes_are_delivered_with_the_frames(bench: Callable[..., Bench]) -> None:
    one = bench(features="+hash_report", offer="+hash_report")
    one.control.set_hash(KEY)
    frames = [udp(1766, 2794), OWN + OTHER + b"\x08\x06" + bytes(46)]
    for frame in frames:
        one.model.deliver(frame)
    got = one.net.receive_burst(headers=True)
    assert [got[n] for n in range(len(got))] == frames
    assert got.headers is not None
    assert [spec.HASH_REPORTS[n] for n in got.headers["hash_report"]] == ["udpv4", "none"]
    assert got.headers["hash_value"][0] == toeplitz(KEY, frames[0][26:38])
    one.control.set_hash(KEY, spec.HASH_TYPES["ipv4"])
    one.model.deliver(frames[0])
    got = one.net.receive_burst(headers=True)
    assert got.headers is not None
    assert spec.HASH_REPORTS[got.headers["hash_report"][0]] == "ipv4"
    assert one.net.send([frames[0]]) == 1


@pytest.mark.parametrize(
    ("source", "target", "ports", "plain"),
    [
        ("66.9.149.187:2794", "161.142.100.80:1766", 0x51CCC178, 0x323E8FC2),
        ("199.92.111.2:14230", "65.69.140.83:4739", 0xC626B0EA, 0xD718262A),
        ("24.19.198.95:12898", "12.22.207.184:38024", 0x5C2B394A, 0xD2D0A5DE),
    ],
)
def test_the_models_hash_and_the_suites_are_the_published_one(
    source: str, target: str, ports: int, plain: int
) -> None:
    """Values of the RSS verification suite; the tests above lean on this hash."""
    ends = [end.split(":") for end in (source, target)]
    addresses = b"".join(bytes(map(int, host.split("."))) for host, _ in ends)
    assert toeplitz(KEY, addresses) == steering.toeplitz(KEY, addresses) == plain
    whole = addresses + b"".join(int(port).to_bytes(2, "big") for _, port in ends)
    assert toeplitz(KEY, whole) == steering.toeplitz(KEY, whole) == ports


# The other classes.


@pytest.mark.requirement("DRV-NET-97", "DRV-NET-191")
def test_an_announcement_is_acknowledged(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.model.announce()
    assert one.net.state.announce
    one.control.acknowledge_announce()
    assert not one.net.state.announce
    assert one.net.state.up


@pytest.mark.requirement("DRV-NET-114", "DRV-NET-199")
def test_receive_offloads_change_at_run_time(bench: Callable[..., Bench]) -> None:
    one = bench(features="")
    assert not one.net.transport.has(spec.F_CTRL_GUEST_OFFLOADS)
    with pytest.raises(UsageError, match="CTRL_GUEST_OFFLOADS was not negotiated"):
        one.control.set_offloads(0)

    function = open_function("net", {"peer": "sink"})
    wanted = feat.mask((spec.F_GUEST_CSUM, spec.F_GUEST_TSO4, spec.F_CTRL_GUEST_OFFLOADS))
    with Net(PciTransport(function), offloads=wanted) as net:
        assert net.control is not None
        model = function.model
        assert isinstance(model, NetModel)
        net.control.set_offloads(1 << spec.F_GUEST_CSUM)
        assert model.control.offloads == 1 << spec.F_GUEST_CSUM
        with pytest.raises(UsageError, match="GUEST_TSO6: not receive offloads"):
            net.control.set_offloads(1 << spec.F_GUEST_TSO6)
        net.control.set_offloads(0)
        assert model.control.offloads == 0


@pytest.mark.requirement("DRV-NET-115", "DRV-NET-116", "DRV-NET-117", "DRV-NET-200")
def test_coalescing_for_all_queues_and_for_one(bench: Callable[..., Bench]) -> None:
    one = bench(offer="+notf_coal,+vq_notf_coal", queue_pairs=2, pairs="2")
    one.control.set_coalescing("rx", Coalescing(15, 10))
    one.control.set_coalescing("tx", Coalescing(8, 20))
    one.control.set_queue_coalescing(2, Coalescing(1, 2))
    assert [one.control.queue_coalescing(n) for n in range(4)] == [
        *(Coalescing(15, 10), Coalescing(8, 20), Coalescing(1, 2), Coalescing(8, 20))
    ]
    with pytest.raises(UsageError, match="virtqueue 4 is no enabled data queue"):
        one.control.queue_coalescing(4)
    with pytest.raises(UsageError, match="'both' is neither"):
        one.control.set_coalescing("both", Coalescing(1, 1))


@pytest.mark.requirement("DRV-NET-118")
def test_a_refused_question_for_coalescing_has_no_answer(bench: Callable[..., Bench]) -> None:
    one = bench(offer="+vq_notf_coal")
    one.answering(lambda queue, chain: queue.complete(chain, chain.write(b"\x55" * 8 + b"\x01")))
    with pytest.raises(CommandRefused, match="NOTF_COAL VQ_GET"):
        one.control.queue_coalescing(0)


@pytest.mark.requirement("DRV-NET-119", "DRV-NET-120", "DRV-NET-121", "DRV-NET-201")
def test_statistics_of_the_device(bench: Callable[..., Bench]) -> None:
    one = bench(offer="+device_stats", queue_pairs=2, pairs="2")
    assert one.net.send([OTHER + OWN + b"\x88\xb5" + bytes(46)] * 3) == 3
    assert one.arrives(OWN)
    found = one.control.statistics()
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert found[1]["tx_packets"] == 3
    assert found[0]["rx_packets"] == 1
    assert found[4]["command_num"] == found[4]["ok_num"] > 2
    assert set(found[3]) == set(spec.STATS[16])


@pytest.mark.parametrize(
    "reply",
    [struct.pack("<BxH2xH", 0, 0, 4), struct.pack("<BxH2xH", 0, 0, 999), struct.pack("<BxH2xH", 5, 0, 8)],
)
def test_statistics_that_do_not_add_up(bench: Callable[..., Bench], reply: bytes) -> None:
    one = bench(offer="+device_stats")

    def answer(queue: Any, chain: Any) -> None:
        query = chain.read()[1] == spec.CTRL_STATS_QUERY
        queue.complete(chain, chain.write(b"\x00" + ((1).to_bytes(8, "little") if query else reply)))

    one.answering(answer)
    with pytest.raises(DeviceViolation, match="statistics of type"):
        one.control.statistics()


def test_commands_without_their_feature_are_not_sent(bench: Callable[..., Bench]) -> None:
    one = bench()
    control = one.control
    for call, name in [
        (lambda: control.set_mode("promisc", True), "CTRL_RX"),
        (lambda: control.set_mode("nouni", True), "CTRL_RX_EXTRA"),
        (lambda: control.set_mac(OTHER), "CTRL_RX"),
        (lambda: control.set_filter(), "CTRL_RX"),
        (lambda: control.add_vlan(1), "CTRL_VLAN"),
        (lambda: control.set_pairs(1), "MQ"),
        (lambda: control.set_rss(Rss(KEY, [0])), "RSS"),
        (lambda: control.set_hash(KEY), "HASH_REPORT"),
        (lambda: control.set_hash_tunnels(0), "HASH_TUNNEL"),
        (lambda: control.set_coalescing("rx", Coalescing(0, 0)), "NOTF_COAL"),
        (lambda: control.queue_coalescing(0), "VQ_NOTF_COAL"),
        (lambda: control.statistics(), "DEVICE_STATS"),
    ]:
        with pytest.raises(UsageError, match=f"^{one.net.transport.name}: {name} was not negotiated"):
            call()
    assert one.model.control.log == []


# Answers that cannot be.


def test_a_refused_command_names_class_and_command(bench: Callable[..., Bench]) -> None:
    one = bench(features="+ctrl_rx")
    one.answering(lambda queue, chain: queue.complete(chain, chain.write(b"\x01")))
    with pytest.raises(CommandRefused) as caught:
        one.control.set_mode("promisc", True)
    assert "RX PROMISC (class 0 command 0)" in caught.value.message
    assert (caught.value.kind, caught.value.command) == (spec.CTRL_RX, spec.CTRL_RX_PROMISC)
    assert isinstance(caught.value, GuestpvError)


@pytest.mark.parametrize("status", [b"\x02", b"\x80"])
def test_a_status_that_does_not_exist(bench: Callable[..., Bench], status: bytes) -> None:
    one = bench(features="+ctrl_rx")
    one.answering(lambda queue, chain: queue.complete(chain, chain.write(status)))
    with pytest.raises(DeviceViolation, match=f"status {status[0]}, which does not exist"):
        one.control.set_mode("allmulti", False)


def test_no_status_at_all(bench: Callable[..., Bench]) -> None:
    one = bench(features="+ctrl_rx")
    one.answering(lambda queue, chain: queue.complete(chain, 0))
    with pytest.raises(DeviceViolation, match=r"answered the control command RX ALLMULTI .* with no status"):
        one.control.set_mode("allmulti", True)


def test_a_silent_device_and_its_late_answer(bench: Callable[..., Bench]) -> None:
    one = bench(features="+ctrl_rx")
    kept: list[tuple[Any, Any]] = []
    one.answering(lambda queue, chain: kept.append((queue, chain)))
    one.control.timeout = 0.05
    with pytest.raises(TimeLimit, match=r"RX PROMISC .* was not answered within 0.05 s"):
        one.control.set_mode("promisc", True)
    # Its memory is still the device's: nothing is written over it.
    with pytest.raises(TimeLimit, match=r"RX PROMISC .* is still not answered"):
        one.control.set_mode("allmulti", True)
    assert len(kept) == 1
    queue, chain = kept[0]
    assert chain.read() == bytes((spec.CTRL_RX, spec.CTRL_RX_PROMISC, 1))
    queue.complete(chain, chain.write(b"\x00"))
    del one.model._command
    one.control.set_mode("allmulti", True)
    assert one.arrives(GROUP)


# What the device says of itself.


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"mtu": 0}, "mtu is 0, outside 68 to 65535"),
        ({"mtu": 67}, "mtu is 67"),
        ({"max_virtqueue_pairs": 0}, "max_virtqueue_pairs is 0, outside 1 to 32768"),
        ({"max_virtqueue_pairs": 65535}, "max_virtqueue_pairs is 65535"),
        ({"mac": bytes.fromhex("010203040506")}, "mac is 01:02:03:04:05:06, a multicast address"),
        ({"mac": bytes(6)}, "mac is 00:00:00:00:00:00"),
        ({"rss_max_key_size": 39}, "rss_max_key_size is 39, below 40"),
        ({"rss_max_indirection_table_length": 1}, "rss_max_indirection_table_length is 1, below 128"),
    ],
)
def test_configuration_that_cannot_be_is_refused_by_name(config: dict[str, Any], says: str) -> None:
    function = open_function("net", {"mtu": "1500", "pairs": "2", "offer": "+rss"})
    assert isinstance(function.model, NetModel)
    function.model.config |= config
    function.model._mac = config.get("mac", OWN)
    transport = PciTransport(function)
    transport.feature_filter = FeatureFilter.parse("+rss", feat.NET)
    with pytest.raises(DeviceViolation, match=says):
        Net(transport, queue_pairs=2)
    assert transport.status & 0x80
    transport.close()


@pytest.mark.requirement("DRV-NET-11", "DRV-NET-12", "DRV-NET-13")
@pytest.mark.parametrize(
    ("speed", "duplex", "state"),
    [
        (1000, 1, (1000, "full")),
        (0, 0, (0, "half")),
        (0x7FFFFFFF, 0xFF, (0x7FFFFFFF, None)),
        (0x80000000, 2, (None, None)),
        (0xFFFFFFFF, 1, (None, "full")),
    ],
)
def test_speed_and_duplex(
    bench: Callable[..., Bench], speed: int, duplex: int, state: tuple[int | None, str | None]
) -> None:
    one = bench()
    one.model.change_config(speed=speed, duplex=duplex)
    assert (one.net.state.speed, one.net.state.duplex) == state


@pytest.mark.requirement("DRV-NET-04", "DRV-NET-05")
def test_without_mac_and_status(bench: Callable[..., Bench]) -> None:
    one, other = bench(offer="-mac,-status"), bench(offer="-mac,-status")
    assert one.net.mac[0] & 3 == 2
    assert one.net.mac != other.net.mac
    assert one.net.link_up
    one.model.config["status"] = 0
    assert one.net.link_up


def test_a_standby_is_taken_only_on_request(bench: Callable[..., Bench]) -> None:
    assert not bench(offer="+standby").net.transport.has(spec.F_STANDBY)
    assert bench(offer="+standby", features="+standby").net.transport.has(spec.F_STANDBY)


def test_a_table_of_frames_is_checked_before_anything_is_sent(bench: Callable[..., Bench]) -> None:
    from guestpv.drivers.net_port import Frames

    one = bench()
    port = one.net.pairs[0]
    good = np.zeros((3, 1518), np.uint8)
    for frames in (
        Frames(good, np.array([60, 13, 60], np.uint32)),
        Frames(good, np.array([60, 1519, 60], np.uint32)),
        Frames(np.zeros((3, 4000), np.uint8), np.array([60, 1519, 60], np.uint32)),
        Frames(good.astype(np.uint16), np.array([60], np.uint32)),
        Frames(good, np.array([60] * 4, np.uint32)),
        Frames(good[:, ::2], np.array([60], np.uint32)),
    ):
        with pytest.raises(UsageError):
            port.send(frames)
    assert one.model.sent == 0
    assert port.send(Frames(good, np.array([60, 1518, 14], np.uint32))) == 3
    assert one.model.sent == 3
    assert port.send(Frames(good, np.zeros(0, np.uint32))) == 0
