"""A link of ours over QEMU's device and its TAP: files stay whole both ways, with every option of the device.

The other end of QEMU's TAP is in another network namespace, so that all traffic crosses the virtqueues.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from guestpv.drivers.net_control import Rss
from guestpv.services.net import NetService
from guestpv.spec import features as feat
from guestpv.transport.pci import PciTransport
from guestvm import network
from peers import tree

SIZE = 4 << 20
PATIENCE = 120.0
DATA = random.Random(1).randbytes(SIZE)
KEY = bytes.fromhex("6d5a56da") * 10
UDP_SEGMENT = 103
"""Of <linux/udp.h>: one call sends many datagrams of this size."""


@dataclass(frozen=True)
class Case:
    """A device: its options, what of QEMU's TAP, what of the service, features it must and must not have."""

    options: str = ""
    queues: int = 1
    mtu: int = 1500
    wanted: str = ""
    poll: bool = False
    features: str = ""
    without: str = ""


OFFLOADS = "CSUM GUEST_CSUM GUEST_TSO4 GUEST_TSO6 GUEST_ECN GUEST_UFO HOST_TSO4 HOST_TSO6 HOST_ECN HOST_UFO"
CASES = {
    "offloads": Case(features=f"{OFFLOADS} MRG_RXBUF CTRL_RX CTRL_MAC_ADDR GUEST_ANNOUNCE"),
    "packed": Case("packed=on", features=f"RING_PACKED {OFFLOADS}"),
    "big buffers": Case("mrg_rxbuf=off,page-per-vq=on", features="GUEST_TSO4", without="MRG_RXBUF"),
    "packed big buffers": Case("packed=on,mrg_rxbuf=off", features="RING_PACKED", without="MRG_RXBUF"),
    "polling": Case(poll=True),
    "queues": Case("mq=on,vectors=6", queues=2, features="MQ"),
    "steered": Case(
        "mq=on,rss=on,hash=on,packed=on,vectors=6",
        queues=2,
        wanted="+rss,+hash_report",
        features="RSS HASH_REPORT RING_PACKED",
    ),
    "jumbo": Case("host_mtu=9000,status=off,rx_queue_size=1024", mtu=9000, features="MTU", without="STATUS"),
    "few controls": Case(
        "ctrl_rx=off,ctrl_vlan=off,ctrl_mac_addr=off,ctrl_guest_offloads=off,guest_announce=off",
        features="CTRL_VQ",
        without="CTRL_RX CTRL_VLAN CTRL_MAC_ADDR CTRL_GUEST_OFFLOADS GUEST_ANNOUNCE",
    ),
    "coalesced": Case("guest_rsc_ext=on", wanted="+rsc_ext", features="RSC_EXT"),
    "one vector": Case("vectors=1"),
    "no vector": Case("vectors=0,ctrl_vq=off", without="CTRL_VQ"),
    "small buffers": Case(
        "csum=off,guest_csum=off,mrg_rxbuf=off", without="CSUM GUEST_CSUM HOST_TSO4 GUEST_TSO4 MRG_RXBUF"
    ),
}


class Far:
    """The other end: a network namespace with a server for files."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self._ready, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live)
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    def _live(self) -> None:
        with network.own_network() as self.inside:
            self.place = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
            both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
            self._listener = socket.create_server(("::", 0), **both)  # type: ignore[arg-type]
            self.port: int = self._listener.getsockname()[1]
            self.datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            self.datagrams.bind(("::", self.port))
            self.datagrams.settimeout(PATIENCE)
            self._ready.set()
            self._over.wait()

    def run(self, words: str) -> None:
        subprocess.run([*self.inside, *words.split()], check=True)

    def join(self, service: NetService, mtu: int = 1500) -> None:
        """Put the TAP at the other end of the device there, and give both ends addresses."""
        # The TAP takes its queues along, and loses its addresses.
        subprocess.run(["ip", "link", "set", "tap0", "netns", self.place], check=True)
        self.run(f"ip link set tap0 mtu {mtu} up")
        self.run("ip address add 10.9.0.1/24 dev tap0")
        self.run("ip address add fd09::1/64 dev tap0 nodad")
        for words in (
            f"address add 10.9.0.2/24 dev {service.ifname}",
            f"-6 address add fd09::2/64 dev {service.ifname} nodad",
        ):
            subprocess.run(["ip", *words.split()], check=True)

    def serve(self) -> threading.Thread:
        """Take a file from the next who connects, then give him one."""

        def exchange() -> None:
            client, _ = self._listener.accept()
            with client:
                client.settimeout(PATIENCE)
                digest = hashlib.sha256()
                left = SIZE
                while left and (part := client.recv(min(left, 1 << 18))):
                    digest.update(part)
                    left -= len(part)
                self.taken.append(digest.digest())
                client.sendall(DATA)

        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._listener.close()
        self.datagrams.close()


@pytest.fixture
def far(own_network: None) -> Iterator[Far]:
    one = Far()
    yield one
    one.close()


@pytest.mark.requirement("DRV-NET-45", "DRV-NET-178", "DRV-NET-184")
@pytest.mark.parametrize("name", CASES)
def test_files_stay_whole_both_ways(device: Callable[..., PciTransport], far: Far, name: str) -> None:
    case = CASES[name]
    netdev = network.add_tap("tap0", 0, case.queues, case.mtu).replace("id=tap0,", "")
    options = f",{case.options}" if case.options else ""
    transport = device(f"virtio-net-pci{options}", netdev=netdev, features=case.wanted)
    rss = Rss.even(KEY, 2) if "RSS" in case.features.split() else None
    service = NetService(transport, poll=case.poll, queue_pairs=case.queues, rss=rss)
    try:
        negotiated = set(feat.feature_names(feat.NET, service.features))
        assert set(case.features.split()) <= negotiated
        assert not set(case.without.split()) & negotiated
        assert service.mtu == case.mtu
        far.join(service, case.mtu)
        for host in ("10.9.0.1", "fd09::1"):
            serving = far.serve()
            with socket.create_connection((host, far.port), timeout=PATIENCE) as peer:
                peer.sendall(DATA)
                back = bytearray()
                while len(back) < SIZE and (part := peer.recv(1 << 18)):
                    back += part
            serving.join(PATIENCE)
            assert far.taken.pop() == hashlib.sha256(DATA).digest()
            assert bytes(back) == DATA
        stats = service.stats()
        assert [queue["rx_malformed"] for queue in stats["queues"]] == [0] * case.queues
        assert (stats["rx"]["dropped"], stats["tx"]["dropped"]) == (0, 0)
        assert service.watch(0.0) == []
    finally:
        service.close()


SEGMENT, SEGMENTS = 1200, 40


@pytest.mark.requirement("DRV-NET-178")
@pytest.mark.parametrize(("near", "other"), [("10.9.0.2", "10.9.0.1"), ("fd09::2", "fd09::1")])
def test_udp_segments_cross_unsegmented(
    device: Callable[..., PciTransport], far: Far, tmp_path: Path, near: str, other: str
) -> None:
    """The newest QEMU offers USO: 40 datagrams of one call are one frame on the ring, in both directions."""
    netdev = network.add_tap("tap0", 0).replace("id=tap0,", "")
    qemu = str(tree.get("qemu").qemu(tmp_path))
    transport = device(
        "virtio-net-pci", netdev=netdev, qemu=qemu, features="+host_uso,+guest_uso4,+guest_uso6"
    )
    service = NetService(transport)
    try:
        far.join(service)
        family = socket.AF_INET6 if ":" in near else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as ours:
            ours.bind((near, 0))
            ours.settimeout(PATIENCE)
            # The neighbours get to know each other first.
            ours.sendto(b"hello", (other, far.port))
            hello, address = far.datagrams.recvfrom(100)
            assert hello == b"hello"
            far.datagrams.sendto(b"hello", address)
            assert ours.recv(100) == b"hello"
            for way, sender, target, receiver in (
                ("tx", ours, (other, far.port), far.datagrams),
                ("rx", far.datagrams, address, ours),
            ):
                before = service.stats()[way]
                sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, SEGMENT)
                data = DATA[: SEGMENT * SEGMENTS]
                assert sender.sendto(data, target) == len(data)
                assert b"".join(receiver.recv(65536) for _ in range(SEGMENTS)) == data
                after = service.stats()[way]
                # Router solicitations and the like may come in between, but not that many.
                assert after["packets"] - before["packets"] < SEGMENTS // 2
                assert after["bytes"] - before["bytes"] > len(data)
    finally:
        service.close()
