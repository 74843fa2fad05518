"""What is done to the TAP link reaches the device, and what the device says reaches the link."""

from __future__ import annotations

import ipaddress
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestpv.devices.loopback import open_function
from guestpv.devices.models.net import Net as NetModel
from guestpv.devices.models.net_control import ALLMULTI, NOBCAST, NOMULTI, NOUNI, PROMISC
from guestpv.errors import DeviceViolation
from guestpv.services.announce import advertisement, frames, gratuitous_arp
from guestpv.services.net import NetService
from guestpv.spec import net as spec
from guestpv.transport.pci import PciTransport

OWN = bytes.fromhex("525400000001")
PATIENCE = 60.0

pytestmark = pytest.mark.usefixtures("own_network")


class Bench:
    """A service on our own device, and what the device's cable and the service's user see."""

    def __init__(self, **params: str) -> None:
        self.function = open_function("net", {"peer": "sink", "threaded": "on", **params})
        assert isinstance(self.function.model, NetModel)
        self.model = self.function.model
        self.sent: list[bytes] = []
        self.model.peer = lambda packet: self.sent.append(bytes(packet.data))
        self.service = NetService(PciTransport(self.function))
        self.events: list[str] = []

    def until(self, holds: Callable[[], object]) -> None:
        """Look after the link until something is true."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, self.events
            self.events += self.service.watch(0.05)

    def answering(self, status: int) -> None:
        """Have every control command answered by this status."""

        def answer(queue: Any, chain: Any) -> None:
            queue.complete(chain, chain.write(bytes((status,))))

        self.model._command = answer  # type: ignore[method-assign]

    def close(self) -> None:
        self.service.close()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**params: str) -> Bench:
        benches.append(Bench(**params))
        return benches[-1]

    yield make
    for one in benches:
        one.close()
        assert [str(finding) for finding in one.function.findings] == []


def ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


def test_the_device_is_asked_for_what_the_link_wants(bench: Callable[..., Bench]) -> None:
    one = bench()
    assert one.model.control.modes == {ALLMULTI}
    ip("link set pv0 promisc on")
    one.until(lambda: PROMISC in one.model.control.modes)
    ip("link set pv0 promisc off")
    one.until(lambda: PROMISC not in one.model.control.modes)
    ip("link set pv0 down")
    one.until(lambda: {NOUNI, NOMULTI, NOBCAST} <= one.model.control.modes)
    ip("link set pv0 up")
    one.until(lambda: one.model.control.modes == {ALLMULTI})


@pytest.mark.requirement("DRV-NET-03", "DRV-NET-93")
def test_a_new_address_of_the_link_is_the_devices(bench: Callable[..., Bench]) -> None:
    one = bench()
    ip("link set pv0 address 52:54:00:00:00:77")
    one.until(lambda: one.model.config["mac"] == bytes.fromhex("525400000077"))
    one.until(lambda: "MAC address 52:54:00:00:00:77" in one.events)
    assert one.service.mac == "52:54:00:00:00:77"
    assert PROMISC not in one.model.control.modes


def test_a_device_that_cannot_learn_an_address_lets_everything_through(bench: Callable[..., Bench]) -> None:
    one = bench(offer="-ctrl_mac_addr")
    ip("link set pv0 address 52:54:00:00:00:77")
    one.until(lambda: PROMISC in one.model.control.modes)
    assert any("no CTRL_MAC_ADDR" in event for event in one.events)
    assert one.model.config["mac"] == OWN


def test_further_addresses_of_the_link_get_their_frames(bench: Callable[..., Bench]) -> None:
    """What a macvlan on top does; without one nothing else changes, so that something else has to."""
    one = bench()
    fdb = ["bridge", "fdb"]
    entry = ["52:54:00:00:00:55", "dev", "pv0", "self"]
    subprocess.run([*fdb, "add", *entry, "permanent"], check=True)
    ip("link set pv0 promisc on")
    one.until(lambda: bytes.fromhex("525400000055") in one.model.control.table)
    subprocess.run([*fdb, "del", *entry], check=True)
    ip("link set pv0 promisc off")
    one.until(lambda: not one.model.control.table)


def test_an_mtu_that_the_device_does_not_take_is_set_back(bench: Callable[..., Bench]) -> None:
    one = bench(mtu="1400")
    ip("link set pv0 mtu 9000")
    one.until(lambda: "MTU 9000 is more than the device takes: set back to 1400" in one.events)
    assert "mtu 1400" in ip("link show pv0")
    ip("link set pv0 mtu 1300")
    one.until(lambda: "MTU 1300" in one.events)


def test_another_name_and_another_namespace(bench: Callable[..., Bench], tmp_path: Path) -> None:
    one = bench()
    ip("link set pv0 down")
    ip("link set pv0 name lan7")
    ip("link set lan7 up")
    one.until(lambda: "the link is called lan7" in one.events)
    assert one.service.ifname == "lan7"
    sleeper = subprocess.Popen(["unshare", "--net", "sleep", "300"])
    try:
        own = Path("/proc/thread-self/ns/net").readlink()
        while Path(f"/proc/{sleeper.pid}/ns/net").readlink() == own:
            time.sleep(0.01)
        ip(f"link set lan7 netns {sleeper.pid}")
        one.until(lambda: any("another network namespace" in event for event in one.events))
        one.model.set_link(False)
        one.until(lambda: "link down" in one.events)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_device_that_refuses_is_an_event_and_no_end(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.answering(1)
    ip("link set pv0 promisc on")
    refused = (
        "could not set promisc on: the device refused the control command RX PROMISC (class 0 command 0)"
    )
    one.until(lambda: refused in one.events)
    del one.model._command
    ip("link set pv0 promisc off")
    ip("link set pv0 promisc on")
    one.until(lambda: PROMISC in one.model.control.modes)


def test_a_device_that_answers_nonsense_is_the_end(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.answering(9)
    ip("link set pv0 promisc on")
    with pytest.raises(DeviceViolation, match="status 9, which does not exist"):
        one.until(lambda: False)


@pytest.mark.requirement("DRV-NET-96", "DRV-NET-97")
def test_the_network_is_told_where_we_are(bench: Callable[..., Bench]) -> None:
    one = bench()
    ip("address add 192.0.2.7/24 dev pv0")
    ip("address add 2001:db8::7/64 dev pv0 nodad")
    one.model.announce()
    one.until(lambda: any(event.startswith("announced ourselves") for event in one.events))
    wanted = {
        gratuitous_arp(OWN, ipaddress.IPv4Address("192.0.2.7")),
        advertisement(OWN, ipaddress.IPv6Address("2001:db8::7")),
    }
    one.until(lambda: wanted <= set(one.sent))
    assert not one.model.config["status"] & spec.S_ANNOUNCE  # type: ignore[operator]


@pytest.mark.requirement("DRV-NET-13")
def test_the_devices_speed_is_the_links(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.model.change_config(speed=2500, duplex=0)
    one.until(lambda: "speed 2500 Mbit/s half duplex" in one.events)
    assert one.service.stats()["speed"] == "2500 Mbit/s half duplex"
    assert shown_speed("pv0") == (2500, 0)
    one.model.change_config(speed=0xFFFFFFFF, duplex=7)
    one.until(lambda: "speed unknown" in one.events)
    assert shown_speed("pv0") == (0xFFFFFFFF, 0xFF)


def shown_speed(name: str) -> tuple[int, int]:
    """Speed and duplex that ETHTOOL_GSET tells."""
    import ctypes
    import fcntl

    command = ctypes.create_string_buffer(struct.pack("=I40x", 1), 44)
    request = struct.pack("16sQ16x", name.encode(), ctypes.addressof(command))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8946, request)
    low, duplex, high = struct.unpack_from("=12xHB13xH", command.raw)
    return high << 16 | low, duplex


def test_announcements_are_what_the_rfcs_say() -> None:
    (rarp,) = frames(OWN, [])
    assert rarp[:14] == b"\xff" * 6 + OWN + b"\x80\x35"
    assert rarp[14:42] == bytes.fromhex("0001080006040003") + OWN + bytes(4) + OWN + bytes(4)
    arp = gratuitous_arp(OWN, ipaddress.IPv4Address("192.0.2.7"))
    assert arp[28:32] == arp[38:42] == bytes((192, 0, 2, 7))
    neighbour = advertisement(OWN, ipaddress.IPv6Address("2001:db8::7"))
    ones = neighbour[22:54] + struct.pack("!II", len(neighbour) - 54, 58) + neighbour[54:]
    total = sum(struct.unpack(f"!{len(ones) // 2}H", ones))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF
