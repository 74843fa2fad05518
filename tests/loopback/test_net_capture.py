"""What `net capture` writes: each frame with its header, in a file that others read."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scapy.utils import RawPcapNgReader

from guestpv.devices.loopback import open_function
from guestpv.devices.models.net import Net as NetModel
from guestpv.errors import UsageError
from guestpv.services.capture import Captured, CaptureServer, captured
from guestpv.services.net import NetService
from guestpv.spec import net as spec
from guestpv.transport.pci import PciTransport
from guestpv.wire import pcapng

ETH_P_TEST = 0x88B5
LOCAL, REMOTE = bytes.fromhex("525400000001"), bytes.fromhex("525400000099")
PATIENCE = 60.0


def frame(number: int, size: int = 60, *, inbound: bool = False) -> bytes:
    ends = LOCAL + REMOTE if inbound else REMOTE + LOCAL
    return (ends + struct.pack("!HI", ETH_P_TEST, number)).ljust(size, bytes([number % 256]))


class Link:
    """A service on our own device with a capture socket, and a raw socket on the link."""

    def __init__(self, path: Path, **params: str) -> None:
        function = open_function("net", {"peer": "sink", "threaded": "on", **params})
        assert isinstance(function.model, NetModel)
        self.model = function.model
        self.service = NetService(PciTransport(function))
        self.path = path
        self.server = CaptureServer(path, self.service.capture)
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_TEST))
        self.socket.bind((self.service.ifname, ETH_P_TEST))
        self.socket.settimeout(PATIENCE)

    def collect(self, count: int) -> tuple[threading.Thread, list[Captured]]:
        """Capture so many frames of the test's own in the background; returns once frames come."""
        got: list[Captured] = []
        deadline = time.monotonic() + PATIENCE
        ready = threading.Event()

        def run() -> None:
            for one in captured(self.path, lambda: len(got) >= count or time.monotonic() > deadline, 0.05):
                ready.set()
                if one.frame[12:14] == struct.pack("!H", ETH_P_TEST) and one.frame[14:18] != b"\xff" * 4:
                    got.append(one)

        thread = threading.Thread(target=run)
        thread.start()
        while not ready.is_set():
            assert time.monotonic() < deadline
            self.socket.send(REMOTE + LOCAL + struct.pack("!HI", ETH_P_TEST, 0xFFFFFFFF) + bytes(42))
            ready.wait(0.01)
        return thread, got

    def close(self) -> None:
        self.server.close()
        self.socket.close()
        self.service.close()


@pytest.fixture
def link(own_network: None, tmp_path: Path) -> Iterator[Link]:
    one = Link(tmp_path / "c")
    yield one
    one.close()


def test_frames_of_both_ways_are_seen_as_the_device_has_them(link: Link) -> None:
    before = time.time_ns()
    thread, got = link.collect(3)
    link.socket.send(frame(1))
    link.model.deliver(frame(2, 1400, inbound=True))
    assert link.socket.recv(2048) == frame(2, 1400, inbound=True)
    link.model.deliver(frame(3, inbound=True))
    thread.join(PATIENCE)
    assert sorted((one.inbound, one.frame) for one in got) == [
        *((False, frame(1)), (True, frame(2, 1400, inbound=True)), (True, frame(3, inbound=True)))
    ]
    assert all(before <= one.nanoseconds <= time.time_ns() for one in got)
    inward = next(one for one in got if one.inbound)
    assert inward.comment == "rx queue pair 0 num_buffers=1"
    # Whoever captures goes away; the link goes on.
    for number in range(20):
        link.model.deliver(frame(number, inbound=True))
        while link.socket.recv(2048) != frame(number, inbound=True):
            pass


def test_the_next_one_who_captures_takes_over(link: Link) -> None:
    first, seen = link.collect(1)
    second, got = link.collect(1)
    link.socket.send(frame(5))
    second.join(PATIENCE)
    assert [one.frame for one in got] == [frame(5)]
    first.join(PATIENCE)
    assert seen == []


def test_a_reader_that_does_not_read_costs_frames_and_no_time(link: Link) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as reader:
        reader.connect(str(link.path))
        deadline = time.monotonic() + PATIENCE
        number = 0
        while not link.service.stats()["queues"][0]["capture_lost"]:
            assert time.monotonic() < deadline
            number += 1
            link.model.deliver(frame(number, 1400, inbound=True))
            while link.socket.recv(2048) != frame(number, 1400, inbound=True):
                pass
    assert link.service.stats()["rx"]["dropped"] == 0


def test_without_a_socket_the_reason_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no capture socket"):
        list(captured(tmp_path / "nothing", lambda: False))


def test_the_file_is_what_others_read(tmp_path: Path) -> None:
    header = np.zeros((), spec.HEADER)
    header["flags"], header["gso_type"], header["gso_size"] = 1, spec.GSO_TCPV6 | spec.GSO_ECN, 1440
    hashed = np.zeros((), spec.HEADER_HASH)
    hashed["flags"], hashed["hash_value"], hashed["hash_report"] = 0x86, 0xABCD, 2
    ones = [
        Captured(1_700_000_000_123_456_789, False, 0, header[()], frame(1)),
        Captured(1_700_000_000_123_456_790, True, 3, hashed[()], frame(2, 61)),
    ]
    path = tmp_path / "x.pcapng"
    path.write_bytes(
        pcapng.section("test")
        + pcapng.interface("pv0", "a link")
        + b"".join(
            pcapng.packet(0, one.nanoseconds, one.frame, 1 if one.inbound else 2, one.comment) for one in ones
        )
        + pcapng.statistics(0, 1_700_000_001_000_000_000, 7)
    )
    read = list(RawPcapNgReader(str(path)))
    assert [data for data, _ in read] == [one.frame for one in ones]
    for (_, about), one in zip(read, ones, strict=True):
        assert about.linktype == pcapng.LINKTYPE_ETHERNET
        assert (about.tshigh << 32 | about.tslow) == one.nanoseconds
        assert about.tsresol == 10**9
        assert one.comment.encode() in (about.comments if hasattr(about, "comments") else [about.comment])
    assert ones[0].comment == "tx queue pair 0 flags=NEEDS_CSUM gso_type=TCPV6|ECN gso_size=1440"
    assert ones[1].comment == (
        "rx queue pair 3 flags=DATA_VALID|RSC_INFO|0x80 hash_value=0xabcd hash_report=tcpv4"
    )
