"""QEMU sets DEVICE_NEEDS_RESET: its interrupt tells the three services, which reset it and drive it on.

It does so for a ring that cannot be, which is written here behind the driver's back. QEMU before 10 spins for
ever on packed ones, so these are split.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loopback.test_blk_nbd import Client
from loopback.test_restart import Kernel

from guestpv.errors import DeviceViolation
from guestpv.pci.qtest import QtestFunction
from guestpv.services import balloon as balloon_module
from guestpv.services import blk as blk_module
from guestpv.services import health as health_module
from guestpv.services import net as net_module
from guestpv.services.balloon import BalloonService
from guestpv.services.blk import BlkService
from guestpv.services.net import NetService
from guestpv.spec import features
from guestpv.spec.status import Status
from guestpv.transport.pci import PciTransport
from guestpv.virtqueue.layout import SplitRings
from guestpv.wire import nbd

Device = Callable[..., PciTransport]
LIMIT = 60.0
TIMES = 3
TEST_TYPE = struct.pack("!H", 0x88B5)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at ``device_status`` unasked after the first time: the interrupt has to tell."""
    for module in (balloon_module, blk_module, health_module, net_module):
        monkeypatch.setattr(module, "LOOK", 3600.0)


def spoil(transport: PciTransport) -> None:
    """Make a descriptor available that does not exist, in a queue that nobody else writes to meanwhile.

    The last queue of a network device is its control queue; a disk and a balloon are at rest.
    """
    index = max(transport.queues) if transport.device_type == features.NET else 0
    queue = transport.queues[index]
    assert isinstance(queue.rings, SplitRings)
    avail = queue.rings.avail
    avail["ring"][int(avail["idx"]) % queue.size] = 0xFFFF
    avail["idx"] = (int(avail["idx"]) + 1) & 0xFFFF
    # The queue belongs to the thread that drives it: its doorbell is rung by hand.
    transport.common.write("queue_select", index)
    offset = transport.common.read("queue_notify_off") * transport._notify.extra
    transport.function.bar(transport._notify.bar).write(transport._notify.offset + offset, 2, index)
    deadline = time.monotonic() + LIMIT
    while not transport.status & Status.NEEDS_RESET:
        assert time.monotonic() < deadline


def trouble(service: Any) -> DeviceViolation:
    """What ends the watch."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            service.watch(1.0)
        except DeviceViolation as violation:
            return violation
    raise AssertionError("nothing was noticed")


def goes_on(service: Any, oracle: Any) -> None:
    """What the spoilt ring led to is noticed, and the device is driven on."""
    transport = service.transport
    assert "DEVICE_NEEDS_RESET" in str(trouble(service))
    service.restart()
    status = transport.status
    assert status & Status.DRIVER_OK
    assert not status & Status.NEEDS_RESET
    view = oracle(transport)
    assert not view.broken
    assert view.status & Status.DRIVER_OK


@pytest.mark.parametrize("mode", ["msix", "intx"])
def test_a_network_goes_on(own_network: None, device: Device, wire: Any, oracle: Any, mode: str) -> None:
    transport = device("virtio-net-pci,disable-legacy=on", netdev=wire.netdev, mode=mode)
    service = NetService(transport)
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as end:
            end.bind((service.ifname, 0x88B5))
            end.settimeout(LIMIT)
            service.watch(0)
            for number in range(TIMES):
                spoil(transport)
                goes_on(service, oracle)
                frame = bytes.fromhex(service.mac.replace(":", "")) + bytes(6) + TEST_TYPE
                frame += bytes([number]) * 100
                end.send(frame)
                while wire.receive() != frame:
                    pass
                wire.send(frame)
                while end.recv(65536) != frame:
                    pass
    finally:
        service.close()


@pytest.fixture
def disk(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[BlkService]:
    monkeypatch.setattr(blk_module, "Netlink", Kernel)
    monkeypatch.setattr(blk_module, "load_module", lambda: None)
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    transport = device("virtio-blk-pci,disable-legacy=on", blockdev=f"driver=file,filename={image}")
    service = BlkService(transport, queues=1, restarts=True)
    yield service
    service.close()
    for end in Kernel.sockets:
        end.close()


def test_a_disk_goes_on_and_answers_what_it_was_asked(disk: BlkService, oracle: Any) -> None:
    client = Client(Kernel.sockets[0])
    disk.watch(0)
    for number in range(TIMES):
        content = bytes([number + 1]) * 65536
        assert client.call(nbd.CMD_WRITE, 65536 * number, content) == (0, b"")
        spoil(disk.transport)
        requests = disk.stats()["requests"]
        asked = client.ask(nbd.CMD_READ, 65536 * number, len(content))
        deadline = time.monotonic() + LIMIT
        while disk.stats()["requests"] == requests:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        goes_on(disk, oracle)
        assert client.answer() == (asked, 0, content)
    stats = disk.stats()
    assert (stats["errors"], stats["resubmitted"]) == (0, TIMES)


def test_a_balloon_goes_on(device: Device, oracle: Any) -> None:
    transport = device("virtio-balloon-pci,disable-legacy=on", memory="128")
    assert isinstance(transport.function, QtestFunction)
    qmp = transport.function.machine.qemu.qmp
    service = BalloonService(transport, keep_free=0, rate=1 << 40)
    try:
        for number in range(TIMES):
            size = (100 - number) * MIB
            qmp.execute("balloon", {"value": size})
            deadline = time.monotonic() + LIMIT
            while qmp.execute("query-balloon")["actual"] != size:
                assert time.monotonic() < deadline
                service.watch(0.05)
            held = set(service.balloon.page_numbers().tolist())
            spoil(transport)
            goes_on(service, oracle)
            assert set(service.balloon.page_numbers().tolist()) >= held
            assert qmp.execute("query-balloon")["actual"] == size
    finally:
        service.close()
