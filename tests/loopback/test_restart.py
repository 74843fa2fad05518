"""A device that breaks or asks for a reset: seen soon, given up in order, or reset and driven on."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from guestpv.cli.restarts import MOST, Restarts
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.loopback import open_function
from guestpv.devices.models.balloon import Balloon as BalloonModel
from guestpv.devices.models.net import Net as NetModel
from guestpv.devices.models.packet import Packet
from guestpv.errors import DeviceGone, DeviceViolation, GuestpvError, Refused
from guestpv.services import balloon as balloon_module
from guestpv.services import blk as blk_module
from guestpv.services import health as health_module
from guestpv.services import net as net_module
from guestpv.services.balloon import BalloonService
from guestpv.services.blk import BlkService
from guestpv.services.net import NetService
from guestpv.spec import net as net_spec
from guestpv.transport.pci import PciTransport
from guestpv.wire import nbd as wire

from .test_balloon_service import Guest
from .test_blk_nbd import Client

LIMIT = 30.0
LOOK = 0.01
"""Seconds between two looks at a device; users have a quarter of a second."""
ETH_P_TEST = 0x88B5
LOCAL = bytes.fromhex("525400000001")
OURS = bytes.fromhex("0200000000aa")


@pytest.fixture(autouse=True)
def short_sighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the next look."""
    for module in (balloon_module, blk_module, health_module, net_module):
        monkeypatch.setattr(module, "LOOK", LOOK)


def frame(number: int, to: bytes, size: int = 200) -> bytes:
    return (to + bytes(6) + struct.pack("!HI", ETH_P_TEST, number)).ljust(size, bytes([number % 256]))


def trouble(service: Any) -> GuestpvError:
    """What ends the watch; it has to come long before this machine could be called slow."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            service.watch(2 * LOOK)
        except GuestpvError as error:
            return error
    raise AssertionError("nothing was noticed")


def silent_reset(function: SoftwareFunction) -> None:
    """Somebody else resets the device, and no interrupt tells."""
    with function.executor:
        function.device.reset()


def whole_reset(function: SoftwareFunction) -> None:
    """The whole function is reset: bus master and decoding are off, too."""
    with function.executor:
        function._function_level_reset()


def lie(function: SoftwareFunction) -> None:
    """The device says that it used what it never got."""
    with function.executor:
        queue = next(queue for queue in function.device.queues if queue.ring is not None)
        used = queue.owner.memory.view(queue.device, 4, write=True)
        struct.pack_into("<HH", used, 0, 0, struct.unpack_from("<H", used, 2)[0] + 1000 & 0xFFFF)
        function.device._interrupt(queue)


BREAKS: dict[str, Callable[[SoftwareFunction], object]] = {
    "needs-reset": lambda function: function.device.need_reset(),
    "reset-by-others": silent_reset,
    "function-reset": whole_reset,
    "lie": lie,
}
breaks = pytest.mark.parametrize("name", BREAKS)


def broken(**kinds: dict[str, str]) -> pytest.MarkDecorator:
    """Every break of every kind of device; ``lie`` is one of split rings."""
    cases = [
        pytest.param(name, params, id=f"{name}-{kind}")
        for kind, params in kinds.items()
        for name in BREAKS
        if not (name == "lie" and "packed" in params)
    ]
    return pytest.mark.parametrize(("name", "params"), cases)


provokes = pytest.mark.provokes("devices that are reset under the driver see accesses out of order")


def gone(function: SoftwareFunction, value: int) -> None:
    """Every register reads so, and writes are lost, as after surprise removal."""
    for bar in function._bars:
        mapped = function.bar(bar)
        mapped.read = lambda offset, width: value & (1 << 8 * width) - 1  # type: ignore[method-assign]
        mapped.write = lambda offset, width, new: None  # type: ignore[method-assign]


removed = pytest.mark.parametrize(
    ("value", "error"), [(0xFFFFFFFF, DeviceGone), (0, DeviceViolation)], ids=["ones", "zeros"]
)


def never_comes_back(service: Any) -> None:
    """To restart a function that is not there any more fails every time, and is not tried for ever."""
    restarts, seen = Restarts(wanted=True), trouble(service)
    with pytest.raises(GuestpvError):
        restarts.mend(seen, service.restart, lambda text: None, lambda pause: False)
    assert restarts.report()["count"] <= MOST


# Networks.


class Network:
    """A TAP link over our device, a socket on it, and the far end."""

    def __init__(self, **params: str) -> None:
        poll = params.pop("mode", "") == "poll"
        pairs = int(params.get("pairs", "1"))
        self.function = open_function("net", {"peer": "sink", "threaded": "on", **params})
        assert isinstance(self.function.model, NetModel)
        self.model = self.function.model
        self.arrived: list[bytes] = []
        self.model.peer = self._arrive
        self.service = NetService(PciTransport(self.function), poll=poll, queue_pairs=pairs)
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_TEST))
        self.socket.bind((self.service.ifname, ETH_P_TEST))
        self.socket.settimeout(60)

    def _arrive(self, packet: Packet) -> None:
        if packet.data[12:14] == struct.pack("!H", ETH_P_TEST):
            self.arrived.append(bytes(packet.data))

    def exchange(self, number: int) -> None:
        """A frame each way."""
        self.socket.send(frame(number, OURS))
        deadline = time.monotonic() + LIMIT
        while frame(number, OURS) not in self.arrived:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        self.model.deliver(frame(number, LOCAL))
        while self.socket.recv(65536) != frame(number, LOCAL):
            pass

    def close(self) -> None:
        self.socket.close()
        self.service.close()


@provokes
@broken(split={}, packed={"packed": "on"}, poll={"mode": "poll"}, pairs={"pairs": "2"}, intx={"msix": "off"})
def test_a_network_goes_on_with_the_same_link(own_network: None, name: str, params: dict[str, str]) -> None:
    net = Network(**params)
    try:
        net.service.watch(0)
        ifname, fds = net.service.ifname, len(os.listdir("/proc/self/fd"))
        memory = net.service.transport.pool.in_use
        net.exchange(1)
        before = net.service.stats()
        for number in range(2, 6):
            BREAKS[name](net.function)
            assert isinstance(trouble(net.service), DeviceViolation)
            net.service.restart()
            net.exchange(number)
        after = net.service.stats()
        assert net.service.ifname == ifname
        # The last frame may be out and not counted yet.
        assert after["tx"]["packets"] >= before["tx"]["packets"] + 3
        assert after["rx"]["packets"] >= before["rx"]["packets"] + 3
        assert len(os.listdir("/proc/self/fd")) == fds
        assert net.service.transport.pool.in_use == memory
    finally:
        net.close()


@provokes
def test_what_the_link_asked_of_the_device_is_asked_again(own_network: None) -> None:
    net = Network()
    try:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            index = route.link_lookup(ifname=net.service.ifname)[0]
            route.link("set", index=index, address=OURS.hex(":"))
        deadline = time.monotonic() + LIMIT
        while net.service.net.mac != OURS and time.monotonic() < deadline:
            net.service.watch(0.1)
        net.function.device.need_reset()
        trouble(net.service)
        net.service.restart()
        assert net.service.net.mac == OURS
        assert net.model.config["mac"] == OURS
    finally:
        net.close()


@provokes
def test_a_network_that_comes_back_as_another_one_is_refused(own_network: None) -> None:
    net = Network()
    try:
        net.function.device.offered &= ~(1 << net_spec.F_MRG_RXBUF)
        net.function.device.need_reset()
        trouble(net.service)
        with pytest.raises(Refused, match="other features; the difference is MRG_RXBUF"):
            net.service.restart()
        assert net.service.stats()["rx"]["packets"] >= 0
    finally:
        net.close()


@provokes
@removed
def test_a_network_that_vanishes_is_seen(own_network: None, value: int, error: type[GuestpvError]) -> None:
    net = Network()
    gone(net.function, value)
    assert isinstance(trouble(net.service), error)
    net.close()
    assert not net.service.transport.queues


# Disks.


class Kernel:
    """What stands in for the kernel's netlink family ``nbd``: it takes the sockets and asks through them."""

    sockets: list[socket.socket] = []

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def connect(self, index: int | None, size: int, block: int, flags: int, fds: list[int]) -> int:
        Kernel.sockets = [socket.socket(fileno=os.dup(fd)) for fd in fds]
        return 99

    def resize(self, index: int, size: int) -> None:
        pass

    def disconnect(self, index: int) -> None:
        for end in Kernel.sockets:
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Any, BlkService, Client]]]:
    monkeypatch.setattr(blk_module, "Netlink", Kernel)
    monkeypatch.setattr(blk_module, "load_module", lambda: None)
    services: list[BlkService] = []

    def make(restarts: bool = True, **params: str) -> tuple[Any, BlkService, Client]:
        function = open_function("blk", {"size": "8M", "threaded": "on", "cache": "volatile", **params})
        service = BlkService(PciTransport(function), queues=1, restarts=restarts)
        services.append(service)
        return function, service, Client(Kernel.sockets[0])

    yield make
    for service in services:
        service.close()
    for end in Kernel.sockets:
        end.close()


@provokes
@broken(split={}, packed={"packed": "on"}, chains={"indirect_desc": "off"})
def test_what_a_disk_had_not_answered_is_done_once_more(
    disk: Callable[..., tuple[Any, BlkService, Client]], name: str, params: dict[str, str]
) -> None:
    function, service, client = disk(**params)
    content = np.random.default_rng(1).bytes(300 << 10)
    assert client.call(wire.CMD_WRITE, 0, content) == (0, b"")
    memory = service.transport.pool.in_use
    for number in range(3):
        function.device.hold = True
        requests = service.stats()["requests"] + 11
        asked = {
            client.ask(wire.CMD_READ, 0, len(content)): content,
            client.ask(wire.CMD_WRITE, 1 << 20, bytes([number + 1]) * 100352): b"",
            client.ask(wire.CMD_WRITE, 3 << 20, bytes([number + 5]) * 4096, 1): b"",
            client.ask(wire.CMD_FLUSH): b"",
            client.ask(wire.CMD_WRITE_ZEROES, 2 << 20, 1 << 19): b"",
            client.ask(wire.CMD_TRIM, 4 << 20, 1 << 19): b"",
        }
        deadline = time.monotonic() + LIMIT
        while service.stats()["requests"] < requests and time.monotonic() < deadline:
            time.sleep(0.002)
        BREAKS[name](function)
        assert isinstance(trouble(service), DeviceViolation)
        function.device.hold = False
        service.restart()
        for _ in range(len(asked)):
            handle, error, data = client.answer()
            assert (error, data) == (0, asked.pop(handle))
        assert client.call(wire.CMD_READ, 1 << 20, 100352) == (0, bytes([number + 1]) * 100352)
        assert client.call(wire.CMD_READ, 3 << 20, 4096) == (0, bytes([number + 5]) * 4096)
    stats = service.stats()
    assert stats["resubmitted"] == 18
    assert stats["errors"] == 0
    assert stats["kicks"] > 0
    assert service.transport.pool.in_use == memory


@provokes
@breaks
def test_without_a_restart_requests_in_flight_end_with_errors(
    disk: Callable[..., tuple[Any, BlkService, Client]], name: str
) -> None:
    function, service, client = disk(restarts=False)
    function.device.hold = True
    handles = {client.ask(wire.CMD_READ, 0, 4096), client.ask(wire.CMD_WRITE, 8192, bytes(512))}
    deadline = time.monotonic() + LIMIT
    while service.stats()["requests"] < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    BREAKS[name](function)
    trouble(service)
    # The connection stays until everybody has his answer.
    for export in service.exports:
        export.stop(0.0)
    assert {client.answer()[:2] for _ in range(2)} == {(handle, errno.EIO) for handle in handles}
    started = time.monotonic()
    service.close()
    assert time.monotonic() - started < 5
    assert service.stats()["errors"] == 2


@provokes
def test_given_up_after_it_was_meant_to_restart(disk: Callable[..., tuple[Any, BlkService, Client]]) -> None:
    function, service, client = disk(restarts=True)
    function.device.hold = True
    handle = client.ask(wire.CMD_READ, 0, 4096)
    while service.stats()["requests"] < 1:
        time.sleep(0.002)
    function.device.need_reset()
    trouble(service)
    for export in service.exports:
        export.stop(0.0)
    assert client.answer() == (handle, errno.EIO, b"")


@provokes
@removed
@pytest.mark.parametrize("restarts", [False, True], ids=["once", "restart"])
def test_a_disk_that_vanishes_fails_what_it_was_asked(
    disk: Callable[..., tuple[Any, BlkService, Client]],
    value: int,
    error: type[GuestpvError],
    restarts: bool,
) -> None:
    function, service, client = disk(restarts=restarts)
    function.device.hold = True
    handles = {client.ask(wire.CMD_READ, 0, 4096), client.ask(wire.CMD_WRITE, 8192, bytes(512))}
    deadline = time.monotonic() + LIMIT
    while service.stats()["requests"] < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    gone(function, value)
    if restarts:
        never_comes_back(service)
    else:
        assert isinstance(trouble(service), error)
    for export in service.exports:
        export.stop(0.0)
    assert {client.answer()[:2] for _ in range(2)} == {(handle, errno.EIO) for handle in handles}
    service.close()
    assert service.stats()["errors"] == 2
    assert not service.transport.queues


@provokes
@pytest.mark.parametrize("change", [{"blk_size": 4096}, {"size_max": 512}])
def test_a_disk_that_comes_back_smaller_is_refused(
    disk: Callable[..., tuple[Any, BlkService, Client]], change: dict[str, int]
) -> None:
    function, service, _ = disk(block_size="1024", size_max="8192")
    function.model.config |= change
    function.device.need_reset()
    trouble(service)
    with pytest.raises(Refused, match=r"another one|other limits|cannot hold"):
        service.restart()


@provokes
def test_a_disk_that_lies_about_a_read_shows_nobody_elses_data(
    disk: Callable[..., tuple[Any, BlkService, Client]],
) -> None:
    function, _, client = disk()
    secret = b"canary-canary-" * 4681
    secret += bytes(65536 - len(secret))
    for number in range(64):
        assert client.call(wire.CMD_WRITE, number * 65536, secret) == (0, b"")
    # It says OK and full length, and writes nothing.
    function.model.store.read = lambda offset, length: None
    function.model._read = lambda *words: 0
    for number in range(64):
        error, data = client.call(wire.CMD_READ, number * 65536, 65536)
        assert error or b"canary" not in data


# Balloons.


@provokes
@pytest.mark.parametrize("name", [name for name in BREAKS if name != "lie"])
def test_a_balloon_keeps_what_it_holds(name: str) -> None:
    function = open_function("balloon", {"threaded": "on", "target": str(40 * 256)})
    assert isinstance(function.model, BalloonModel)
    service = BalloonService(PciTransport(function), system=Guest(), keep_free=64 << 20, rate=1 << 40)
    try:
        service.watch(0)
        fds = len(os.listdir("/proc/self/fd"))
        for number in range(3):
            deadline = time.monotonic() + LIMIT
            while service.balloon.pages != 40 * 256 + number:
                assert time.monotonic() < deadline
                service.watch(0.05)
            memory, held = service.transport.pool.in_use, set(service.balloon.page_numbers().tolist())
            BREAKS[name](function)
            assert isinstance(trouble(service), DeviceViolation)
            service.restart()
            assert function.model.pages == set(service.balloon.page_numbers().tolist()) >= held
            assert function.model.config["actual"] == service.balloon.pages
            assert service.transport.pool.in_use == memory
            assert len(os.listdir("/proc/self/fd")) == fds
            function.model.set_target(40 * 256 + number + 1)
    finally:
        service.close()
    assert function.model.pages == set()


@provokes
def test_a_balloon_that_needs_a_reset_in_the_middle_of_a_request() -> None:
    function = open_function("balloon", {"threaded": "on", "target": str(8 * 256)})
    assert isinstance(function.model, BalloonModel)
    service = BalloonService(PciTransport(function), system=Guest(), keep_free=64 << 20, rate=1 << 40)
    try:
        function.device.hold = True
        ask = threading.Timer(0.2, function.device.need_reset)
        ask.start()
        started = time.monotonic()
        assert isinstance(trouble(service), DeviceViolation)
        assert time.monotonic() - started < 10
        ask.join()
        function.device.hold = False
        service.restart()
        deadline = time.monotonic() + LIMIT
        while service.balloon.pages != 8 * 256:
            assert time.monotonic() < deadline
            service.watch(0.05)
        assert len(function.model.pages) == 8 * 256
    finally:
        service.close()


@provokes
@removed
@pytest.mark.parametrize("asked", [False, True], ids=["idle", "asked"])
def test_a_balloon_that_vanishes_is_seen(value: int, error: type[GuestpvError], asked: bool) -> None:
    function = open_function("balloon", {"threaded": "on", "target": str(8 * 256)})
    service = BalloonService(PciTransport(function), system=Guest(), keep_free=64 << 20, rate=1 << 40)

    def vanish() -> None:
        """Once the driver waits for an answer, or holds what it is to hold."""
        deadline = time.monotonic() + LIMIT
        while not (service.transport.queues[0].outstanding if asked else service.balloon.pages == 8 * 256):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        gone(function, value)

    try:
        function.device.hold = asked
        thread = threading.Thread(target=vanish)
        thread.start()
        assert isinstance(trouble(service), error)
        thread.join()
    finally:
        service.close()
    assert not service.transport.queues
