"""``vhost-user:net`` against passt: a whole network without a VM."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import guestpv
from guestpv.drivers.net import Net
from guestpv.spec import net as spec
from peers import tree
from peers.backend import PASST_ADDRESS, PASST_GATEWAY, Backend, passt

US, ROUTER = (socket.inet_aton(address) for address in (PASST_ADDRESS, PASST_GATEWAY))
BROADCAST = b"\xff" * 6
ARP, IPV4 = 0x0806, 0x0800
ICMP, UDP = 1, 17
ECHO_PORT = 7777
REPEAT = 6
"""How often the echo server returns what it gets: datagrams of several receive buffers."""

Opened = Callable[[Backend, str], Net]


@pytest.fixture(scope="module")
def peers() -> tree.Tree:
    """The tree with passt; downloaded the first time."""
    return tree.get("peers")


@pytest.fixture
def connect() -> Iterator[Opened]:
    """The network driver on a back end."""
    drivers: list[Net] = []

    def run(backend: Backend, features: str = "") -> Net:
        drivers.append(Net(guestpv.open(f"vhost-user:net:{backend.socket}?features={features}")))
        return drivers[-1]

    yield run
    for driver in drivers:
        driver.close()


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2]))
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Host:
    """Just enough of an IPv4 host, on top of the driver."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.router_mac = BROADCAST

    def send(self, kind: int, payload: bytes, to: bytes = b"") -> None:
        """One frame."""
        frame = (to or self.router_mac) + self.net.mac + struct.pack(">H", kind) + payload
        assert self.net.send([frame.ljust(60, b"\0")]) == 1

    def send_ip(self, protocol: int, payload: bytes, source: bytes = US, target: bytes = ROUTER) -> None:
        """One IPv4 packet."""
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + source + target
        head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
        self.send(IPV4, head + payload)

    def send_udp(
        self, port: int, to_port: int, data: bytes, source: bytes = US, target: bytes = ROUTER
    ) -> None:
        """One UDP datagram, its checksum left out as IPv4 allows."""
        self.send_ip(UDP, struct.pack(">HHHH", port, to_port, 8 + len(data), 0) + data, source, target)

    def frames(self, timeout: float = 60.0) -> Iterator[bytes]:
        """What comes in within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            yield from self.net.receive_within(left)
        pytest.fail(f"nothing of what was awaited came within {timeout:g} s")

    def packets(self, protocol: int) -> Iterator[bytes]:
        """Payloads of the IPv4 packets that come in; their headers' checksums are right."""
        for frame in self.frames():
            if struct.unpack_from(">H", frame, 12)[0] != IPV4 or frame[23] != protocol:
                continue
            length = struct.unpack_from(">H", frame, 16)[0]
            assert checksum(frame[14:34]) == 0
            yield frame[34 : 14 + length]

    def resolve(self) -> None:
        """ARP for the router."""
        fixed = struct.pack(">HHBBH", 1, IPV4, 6, 4, 1)
        self.send(ARP, fixed + self.net.mac + US + bytes(6) + ROUTER, BROADCAST)
        answer = next(frame for frame in self.frames() if frame[12:14] == struct.pack(">H", ARP))
        assert answer[:6] == self.net.mac
        assert answer[28:32] == ROUTER
        self.router_mac = answer[22:28]


def dhcp(host: Host, kind: int, extra: bytes = b"") -> dict[int, bytes]:
    """One DHCP exchange: options of the answer, with ``yiaddr`` as option 0."""
    fixed = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x6770760A, 0, 0x8000) + bytes(16)
    message = fixed + host.net.mac.ljust(16, b"\0") + bytes(192) + b"\x63\x82\x53\x63"
    message += bytes((53, 1, kind)) + extra + b"\x37\x04\x01\x03\x1a\x33\xff"
    host.send_udp(68, 67, message, bytes(4), BROADCAST[:4])
    answer = next(host.packets(UDP))[8:]
    assert struct.unpack_from(">I", answer, 4)[0] == 0x6770760A
    options = {0: answer[16:20]}
    at = 240
    while answer[at] != 255:
        options[answer[at]] = answer[at + 2 : at + 2 + answer[at + 1]]
        at += 2 + answer[at + 1]
    return options


@pytest.fixture
def network(tmp_path: Path, peers: tree.Tree) -> Iterator[Backend]:
    """A passt, with an echo server for UDP on its side."""
    with passt(tmp_path / "passt.sock", peers) as backend:
        yield backend


ECHO = f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", {ECHO_PORT}))
    print("bound", flush=True)
    while True:
        data, peer = server.recvfrom(65536)
        server.sendto(data * {REPEAT}, peer)
"""


@pytest.fixture
def echo(network: Backend) -> Iterator[None]:
    """A UDP server in passt's namespace that answers with everything it gets, several times over."""
    inside = ["nsenter", f"--target={network.pid}", "--net"]
    if os.geteuid():
        inside += ["--user", "--preserve-credentials"]
    with subprocess.Popen([*inside, sys.executable, "-c", ECHO], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"bound\n"
        yield
        server.kill()


def test_dhcp_arp_and_ping(network: Backend, connect: Opened) -> None:
    net = connect(network, "")
    assert net.transport.has(spec.F_MRG_RXBUF)
    assert not net.transport.has(spec.F_MAC)
    host = Host(net)
    offer = dhcp(host, 1)
    assert offer[53] == b"\2"
    assert offer[0] == US
    assert offer[3] == ROUTER
    assert struct.unpack(">H", offer[26])[0] > 1500
    assert dhcp(host, 3, b"\x32\x04" + US)[53] == b"\5"
    host.resolve()
    for number in range(50):
        request = struct.pack(">BBHHH", 8, 0, 0, 7, number) + bytes(range(56))
        host.send_ip(ICMP, request[:2] + struct.pack(">H", checksum(request)) + request[4:])
        answer = next(host.packets(ICMP))
        assert answer[:2] == b"\0\0"
        assert answer[4:] == request[4:]


@pytest.mark.usefixtures("echo")
def test_datagrams_come_back(network: Backend, connect: Opened) -> None:
    """Each answer is larger than a receive buffer, so frames are put together from several."""
    host = Host(connect(network, ""))
    host.resolve()
    for number in range(100):
        data = bytes((number,)) * 1400
        host.send_udp(5000, ECHO_PORT, data)
        answer = next(host.packets(UDP))
        assert struct.unpack_from(">HHH", answer) == (ECHO_PORT, 5000, 8 + REPEAT * len(data))
        assert answer[8:] == data * REPEAT


def test_a_network_that_ends_is_noticed(network: Backend, connect: Opened) -> None:
    net = connect(network, "")
    network.kill()
    with pytest.raises(guestpv.errors.DeviceGone):
        net.wait(60)
