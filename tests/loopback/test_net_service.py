"""The TAP link over our own network device: frames cross, counters tell, bad devices harm nobody."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from guestpv.devices.loopback import open_function
from guestpv.devices.models.net import Net as NetModel
from guestpv.devices.models.packet import Packet
from guestpv.errors import DeviceViolation, UsageError
from guestpv.services.net import NetService
from guestpv.spec import net as spec
from guestpv.transport.pci import PciTransport

ETH_P_TEST = 0x88B5
"""Local experimental EtherType (IEEE 802): nothing else on the link uses it."""
ARP = b"\x08\x06"
SIOCGIFFLAGS, SIOCGIFMTU, SIOCGIFHWADDR = 0x8913, 0x8921, 0x8927
IFF_RUNNING = 0x40
LOCAL = bytes.fromhex("525400000001")
REMOTE = bytes.fromhex("525400000099")

pytestmark = pytest.mark.usefixtures("own_network")


class Bench:
    """A service on ``loopback:net``, a raw socket on its TAP link, and the far end of the wire."""

    def __init__(self, poll: bool = False, queue_pairs: int = 1, **params: str) -> None:
        self.function = open_function("net", {"peer": "sink", "threaded": "on", **params})
        assert isinstance(self.function.model, NetModel)
        self.model = self.function.model
        self.arrived: list[bytes] = []
        self.model.peer = self._arrive
        self.service = NetService(PciTransport(self.function), poll=poll, queue_pairs=queue_pairs)
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_TEST))
        self.socket.bind((self.service.ifname, ETH_P_TEST))
        self.socket.settimeout(60)

    def _arrive(self, packet: Packet) -> None:
        if packet.data[12:14] == struct.pack("!H", ETH_P_TEST):
            self.arrived.append(bytes(packet.data))

    def wait_for_arrivals(self, count: int, timeout: float = 60) -> list[bytes]:
        deadline = time.monotonic() + timeout
        while len(self.arrived) < count and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.arrived

    def ask(self, request: int) -> bytes:
        """An interface ioctl: unlike sysfs it answers for the thread's own network namespace."""
        return fcntl.ioctl(self.socket, request, self.service.ifname.encode().ljust(32, b"\0"))[16:]

    def carrier(self) -> bool:
        return bool(struct.unpack_from("H", self.ask(SIOCGIFFLAGS))[0] & IFF_RUNNING)

    def close(self) -> None:
        self.socket.close()
        self.service.close()


def frame(number: int, size: int = 60, *, inbound: bool = False) -> bytes:
    ends = LOCAL + REMOTE if inbound else REMOTE + LOCAL
    return (ends + struct.pack("!HI", ETH_P_TEST, number)).ljust(size, bytes([number % 256]))


def who_has(address: str, sender: str) -> bytes:
    """An ARP request (RFC 826)."""
    ask = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    ends = REMOTE + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(address)
    return bytes([0xFF] * 6) + REMOTE + ARP + ask + ends


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**options: object) -> Bench:
        benches.append(Bench(**options))  # type: ignore[arg-type]
        return benches[-1]

    yield make
    for one in benches:
        one.close()
        assert [str(finding) for finding in one.function.findings] == []


VARIANTS = [
    {},
    {"packed": "on"},
    {"event_idx": "off", "indirect_desc": "off"},
    {"offer": "-mrg_rxbuf"},
    {"offer": "-mrg_rxbuf", "packed": "on", "in_order": "on"},
    {"offloads": "off", "notification_data": "on"},
    {"msix": "off"},
    {"msix": "1"},
    {"poll": True},
    {"queue_size": "4"},
]


@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain"
)
def test_frames_cross_both_ways_whole_and_in_order(
    bench: Callable[..., Bench], options: dict[str, object]
) -> None:
    one = bench(**options)
    outbound = [frame(n, 60 + 37 * n % 1400) for n in range(200)]
    for data in outbound:
        one.socket.send(data)
    assert one.wait_for_arrivals(len(outbound)) == outbound

    inbound = [frame(n, 60 + 41 * n % 1400, inbound=True) for n in range(200)]
    got = []
    for data in inbound:
        one.model.deliver(data)
        got.append(one.socket.recv(65536))
    assert got == inbound

    one.service.close()
    stats = one.service.stats()
    assert stats["tx"]["packets"] >= len(outbound)
    assert stats["rx"]["packets"] == len(inbound)
    assert stats["rx"]["bytes"] == sum(map(len, inbound))
    assert stats["rx"]["dropped"] == 0


@pytest.mark.requirement("DRV-NET-184")
def test_a_frame_over_many_merged_buffers_arrives_whole(bench: Callable[..., Bench]) -> None:
    one = bench(mtu="9000")
    assert one.service.features >> spec.F_MRG_RXBUF & 1
    data = frame(7, 9014, inbound=True)
    one.model.deliver(data)
    assert one.socket.recv(65536) == data


@pytest.mark.parametrize("packed", ["off", "on"])
def test_short_answers_to_a_stream_share_a_notification(bench: Callable[..., Bench], packed: str) -> None:
    """Of 250 frames that come in at once, each 25th makes the kernel answer."""
    one = bench(packed=packed, event_idx="off")
    answers: list[bytes] = []
    one.model.peer = lambda packet: answers.append(packet.data) if packet.data[12:14] == ARP else None
    with IPRoute() as route:
        link = route.link_lookup(ifname=one.service.ifname)[0]
        route.addr("add", index=link, address="10.77.0.1", prefixlen=24)
    receiveq = one.function.device.queues[0]
    with one.function.device.executor:
        receiveq.hold = True
    for number in range(250):
        one.model.deliver(frame(number, inbound=True) if number % 25 else who_has("10.77.0.1", "10.77.0.2"))
    wait_until(lambda: len(receiveq.held) == 250)
    before = one.service.stats()["tx"]["kicks"]
    with one.function.device.executor:
        receiveq.hold = False
        receiveq.release()
    wait_until(lambda: len(answers) == 10)
    assert one.service.stats()["tx"]["kicks"] - before <= 2


def test_the_link_has_the_devices_address_and_mtu(bench: Callable[..., Bench]) -> None:
    one = bench(mtu="1400")
    assert struct.unpack_from("i", one.ask(SIOCGIFMTU))[0] == 1400
    assert one.ask(SIOCGIFHWADDR)[2:8] == LOCAL
    assert (one.service.mac, one.service.mtu) == (LOCAL.hex(":"), 1400)


@pytest.mark.parametrize("options", [{}, {"msix": "off"}, {"poll": True}], ids=["msix", "intx", "poll"])
def test_link_changes_of_the_device_show_as_carrier(
    bench: Callable[..., Bench], options: dict[str, object]
) -> None:
    one = bench(**options)

    def carrier_becomes(wanted: bool) -> None:
        deadline = time.monotonic() + 60
        while one.carrier() is not wanted:
            # The kernel spreads the news of a carrier with a delay.
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def follow(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in one.service.watch(0.5):
            assert time.monotonic() < deadline, f"no {text!r}"

    carrier_becomes(True)
    one.model.set_link(False)
    follow("link down")
    carrier_becomes(False)
    one.model.set_link(True)
    follow("link up")
    carrier_becomes(True)


def test_a_request_to_let_go_is_an_event(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.function.request_removal()
    assert one.service.watch(60) == ["release requested"]


@pytest.mark.requirement("DRV-STATUS-04")
def test_a_device_that_needs_a_reset_ends_the_watch(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.function.device.need_reset()
    with pytest.raises(DeviceViolation, match="DEVICE_NEEDS_RESET"):
        one.service.watch(60)


@pytest.mark.requirement("DRV-NET-101", "DRV-NET-147")
def test_several_queue_pairs_each_carry_frames(bench: Callable[..., Bench]) -> None:
    one = bench(pairs="4", queue_pairs=4)
    outbound = [frame(n) for n in range(64)]
    for data in outbound:
        one.socket.send(data)
    assert sorted(one.wait_for_arrivals(len(outbound))) == sorted(outbound)
    assert len(one.service.stats()["queues"]) == 4


def test_more_pairs_than_there_are_is_refused_and_everything_given_back() -> None:
    function = open_function("net", {"pairs": "2"})
    with pytest.raises(UsageError, match="3 queue pairs asked for, the device has 2"):
        NetService(PciTransport(function), queue_pairs=3)
    assert function.device.status == 0
    assert not Path("/sys/class/net/pv0").exists()


def test_a_taken_name_is_refused_and_the_device_given_back(bench: Callable[..., Bench]) -> None:
    bench()
    function = open_function("net", {})
    with pytest.raises(UsageError, match="pv0"):
        NetService(PciTransport(function), ifname="pv0")
    assert function.device.status == 0


@pytest.mark.requirement("DEV-SPLIT-37")
def test_a_device_that_lies_in_the_ring_ends_the_watch_with_its_lie(bench: Callable[..., Bench]) -> None:
    one = bench()
    rx = one.service.net.pairs[0].rx
    rx.device["ring"][0] = (9999, 60)
    rx.device["idx"] = 1
    os.eventfd_write(rx.fileno(), 1)
    one.service.pumps[0].join(60)
    with pytest.raises(DeviceViolation, match="9999"):
        one.service.watch(0.1)


def test_closing_under_load_loses_no_thread(bench: Callable[..., Bench]) -> None:
    one = bench()
    for n in range(500):
        one.socket.send(frame(n))
    assert one.wait_for_arrivals(1)
    one.close()
    assert one.service.stats()["tx"]["packets"] > 0
