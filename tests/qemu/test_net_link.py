"""A link of ours and QEMU's network device follow each other."""

from __future__ import annotations

import ipaddress
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from guestpv.pci.qtest import QtestFunction
from guestpv.services.announce import gratuitous_arp
from guestpv.services.net import NetService
from guestpv.transport.pci import PciTransport

PATIENCE = 60.0
OWN = bytes.fromhex("525400aabb01")


@dataclass
class Bench:
    """A service over QEMU's device on a cable."""

    service: NetService
    qmp: Any
    wire: Any
    events: list[str] = field(default_factory=list)

    def rx_filter(self) -> dict[str, Any]:
        (answer,) = self.qmp.execute("query-rx-filter", {"name": "dev"})
        return answer  # type: ignore[no-any-return]

    def until(self, holds: Callable[[], object]) -> None:
        """Look after the link until something is true."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, (self.events, self.rx_filter())
            self.events += self.service.watch(0.05)


@pytest.fixture
def bench(own_network: None, device: Callable[..., PciTransport], wire: Any) -> Iterator[Bench]:
    transport = device(f"virtio-net-pci,mac={OWN.hex(':')},speed=1000,duplex=full", netdev=wire.netdev)
    assert isinstance(transport.function, QtestFunction)
    service = NetService(transport)
    yield Bench(service, transport.function.machine.qemu.qmp, wire)
    service.close()


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def test_what_is_done_to_the_link_reaches_qemu(bench: Bench) -> None:
    said = bench.rx_filter()
    assert (said["promiscuous"], said["multicast"], said["main-mac"]) == (False, "all", OWN.hex(":"))
    ip("link set pv0 promisc on")
    bench.until(lambda: bench.rx_filter()["promiscuous"])
    ip("link set pv0 promisc off")
    ip("link set pv0 address 52:54:00:aa:bb:77")
    bench.until(lambda: bench.rx_filter()["main-mac"] == "52:54:00:aa:bb:77")
    bench.until(lambda: not bench.rx_filter()["promiscuous"])
    subprocess.run(
        ["bridge", "fdb", "add", "52:54:00:aa:bb:88", "dev", "pv0", "self", "permanent"], check=True
    )
    ip("link set pv0 down")
    bench.until(lambda: bench.rx_filter()["unicast"] == "none")
    assert bench.rx_filter()["unicast-table"] == ["52:54:00:aa:bb:88"]
    ip("link set pv0 up")
    bench.until(lambda: bench.rx_filter()["unicast"] == "normal")


def test_what_qemu_does_reaches_the_link(bench: Bench) -> None:
    assert bench.service.stats()["speed"] == "1000 Mbit/s full duplex"
    bench.qmp.execute("set_link", {"name": "dev", "up": False})
    bench.until(lambda: "link down" in bench.events)
    bench.qmp.execute("set_link", {"name": "dev", "up": True})
    bench.until(lambda: "link up" in bench.events)


@pytest.mark.requirement("DRV-NET-96", "DRV-NET-97")
def test_the_network_is_told_where_we_are_when_qemu_asks_for_it(bench: Bench) -> None:
    ip("address add 192.0.2.7/24 dev pv0")
    wanted = gratuitous_arp(OWN, ipaddress.IPv4Address("192.0.2.7"))
    bench.qmp.execute("announce-self", {"initial": 1, "max": 1, "rounds": 1, "step": 1})
    bench.until(lambda: any(event.startswith("announced ourselves") for event in bench.events))
    # QEMU sends RARP frames of its own; ours comes through the virtqueue.
    while bench.wire.receive() != wanted:
        pass
    assert not bench.service.net.state.announce
