"""``vfio-user:``: our drivers and our models at the two ends of a socket, and what either must survive."""

from __future__ import annotations

import gc
import mmap
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from errno import EEXIST, EINVAL, ENOTSUP
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guestpv
from guestpv.devices.models.net import Net as NetModel
from guestpv.drivers.blk import Blk
from guestpv.drivers.net import Net
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceGone, GuestpvError, TimeLimit, UsageError
from guestpv.memory import DmaRegion, Segment
from guestpv.pci.vfio_user import CommandRefused, Session, VfioUserFunction
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.spec import balloon, pci
from guestpv.spec import features as feat
from guestpv.spec.pci import CfgType
from guestpv.system import SYSTEM
from guestpv.transport.pci import PciTransport
from guestpv.wire import vfio_user as wire
from guestpv.wire.stream import close_all
from guestpv.wire.vfio_user import (
    Channel,
    Command,
    DmaMap,
    DmaUnmap,
    IrqSet,
    IrqSetFlag,
    Message,
    RegionAccess,
    RegionFlag,
    Version,
)

PAGE = mmap.PAGESIZE
BUS = 1 << 40
RW = wire.DmaFlag.READ | wire.DmaFlag.WRITE
VIRTIO_BAR = 4
DEVICE_STATUS = 20

Serve = Callable[..., VfioUserServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Put a device on a socket, ``server.path``; at the end no driver may have broken a rule."""
    servers: list[VfioUserServer] = []
    unclean: set[VfioUserServer] = set()

    def run(device: str = "rng", *, findings: bool = False, **options: Any) -> VfioUserServer:
        path = str(tmp_path / f"{len(servers)}.sock")
        servers.append(VfioUserServer(make_function(device), path, **options).start())
        if findings:
            unclean.add(servers[-1])
        return servers[-1]

    yield run
    for server in servers:
        server.close()
        assert not os.path.exists(server.path)
        if server not in unclean:
            assert [str(finding) for finding in server.function.findings] == []


def opened(server: VfioUserServer, query: str = "") -> PciTransport:
    transport = guestpv.open(f"{server.name}{query}")
    assert isinstance(transport, PciTransport)
    return transport


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.002)


# The drivers.

WAYS = [
    "",
    "packed=on",
    "packed=on&in_order=on&notification_data=on",
    "event_idx=off&indirect_desc=off",
    "msix=off",
    "msix=1",
    "threaded=on",
    "multiplier=0",
    "offer=-access_platform",
    "flr=off",
    "queue_size=8",
]


@pytest.mark.parametrize("way", WAYS)
def test_rng(serve: Serve, way: str) -> None:
    server = serve(f"rng?most=100&{way}")
    for _ in range(2):
        with opened(server) as transport, Rng(transport) as rng:
            assert len(set(rng.read(5000))) > 200


@pytest.mark.parametrize("way", WAYS)
def test_net(serve: Serve, way: str) -> None:
    server = serve(f"net?{way}")
    with opened(server) as transport, Net(transport) as net:
        frames = [bytes([number]) * (60 + 40 * number) for number in range(30)]
        got: list[bytes] = []
        for start in range(0, 30, 3):
            assert net.send(frames[start : start + 3]) == 3
            while len(got) < start + 3:
                assert net.wait(60)
                got += net.receive()
        assert got == frames


@pytest.mark.parametrize("way", WAYS)
def test_blk(serve: Serve, way: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    server = serve(f"blk?file={disk}&size=8M&{way}")
    data = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)
    with opened(server) as transport, Blk(transport) as blk:
        blk.write(4096, data)
        blk.flush()
        assert np.array_equal(blk.read(4096, data.nbytes), data)
    assert disk.read_bytes()[4096 : 4096 + data.nbytes] == data.tobytes()
    with opened(server) as transport, Blk(transport) as blk:
        assert np.array_equal(blk.read(4096, data.nbytes), data)


def test_a_balloon_does_not_translate(serve: Serve) -> None:
    with opened(serve("balloon?target=100")) as transport:
        assert not transport.offered >> feat.F_ACCESS_PLATFORM & 1
        assert transport.config(balloon.CONFIG)["num_pages"] == 100


def test_frames_come_while_the_driver_sleeps(serve: Serve) -> None:
    server = serve("net?peer=sink")
    model = server.function.model
    assert isinstance(model, NetModel)
    with opened(server) as transport, Net(transport) as net:
        threading.Timer(0.1, model.deliver, [b"\xff" * 60]).start()
        assert net.wait(60)
        assert net.receive() == [b"\xff" * 60]


def test_a_changed_configuration_interrupts(serve: Serve) -> None:
    server = serve("net")
    model = server.function.model
    assert isinstance(model, NetModel)
    with opened(server) as transport, Net(transport) as net:
        assert net.link_up
        model.set_link(False)
        assert transport.config_fd is not None
        assert SYSTEM.poll([transport.config_fd], 60)
        assert not net.link_up


# The function behind the socket.


def test_it_is_a_whole_virtio_function(serve: Serve) -> None:
    server = serve("net?pairs=2")
    with opened(server) as transport:
        assert {capability.cfg_type for capability in transport.capabilities} == {
            CfgType.COMMON,
            CfgType.NOTIFY,
            CfgType.ISR,
            CfgType.DEVICE,
            CfgType.PCI_CFG,
        }
        assert transport.function.msix_vectors == 6
        with pytest.raises(UsageError, match="BAR"):
            transport.function.bar(1)
        with pytest.raises(UsageError, match="BARs 0 to 5"):
            transport.function.bar(6)
        with pytest.raises(UsageError, match="no 4-byte register"):
            transport.function.bar(VIRTIO_BAR).read(2, 4)


def test_registers_through_configuration_space(serve: Serve) -> None:
    """The PCI configuration access capability (4.1.4.9)."""
    with opened(serve()) as transport:
        window = next(c for c in transport.capabilities if c.cfg_type == CfgType.PCI_CFG).position
        common = next(c for c in transport.capabilities if c.cfg_type == CfgType.COMMON)
        write = transport.function.config_write
        write(window + 4, 1, common.bar)
        write(window + 8, 4, common.offset + DEVICE_STATUS)
        write(window + 12, 4, 1)
        write(window + 16, 1, 1)
        assert transport.status == 1
        assert transport.function.config_read(window + 16, 1) == 1


def test_a_reset_leaves_the_command_register(serve: Serve) -> None:
    with opened(serve()) as transport:
        transport.write_status(1)
        assert transport.function.reset()
        assert transport.status == 0
        command = transport.function.config_read(pci.PCI_CONFIG_COMMAND, 2)
        assert command & pci.COMMAND_MEMORY
        assert command & pci.COMMAND_BUS_MASTER


def test_the_next_client_finds_it_as_new(serve: Serve) -> None:
    server = serve()
    transport = opened(server)
    rng = Rng(transport)
    rng.read(10)
    transport.function.close()
    until(lambda: server.connection is None)
    assert server.function.device.status == 0
    assert not server.function.interrupts.enabled
    assert server.function.dma.windows() == ()
    second = VfioUserFunction(server.path)
    assert second.config_read(pci.PCI_CONFIG_COMMAND, 2) == 0
    second.close()


def test_a_second_client_is_turned_away_while_there_is_one(serve: Serve) -> None:
    said: list[str] = []
    server = serve(tell=said.append)
    with opened(server), pytest.raises(DeviceGone, match="it serves somebody else"):
        guestpv.open(server.name)
    with opened(server) as transport, Rng(transport) as rng:
        assert len(rng.read(8)) == 8
    assert "a second client was turned away" in said


@pytest.mark.provokes("a bad status")
def test_what_the_driver_breaks_is_told(serve: Serve) -> None:
    said: list[str] = []
    server = serve(findings=True, tell=said.append)
    with opened(server) as transport:
        transport.write_status(2)
    until(lambda: any("DRV-INIT-02" in text for text in said))


# Raw clients: the protocol itself.


@pytest.fixture
def raw(serve: Serve) -> Iterator[Session]:
    session = Session(serve("rng", findings=True).path, 60)
    yield session
    session.close()


def refused(
    session: Session, exchange: wire.Exchange[Any, Any], value: object, fds: tuple[int, ...] = ()
) -> int:
    """The errno with which the server refuses a command."""
    with pytest.raises(CommandRefused) as caught:
        session.call(exchange, value, fds)
    return caught.value.errno


def connected(server: VfioUserServer, *, greet: bool = True) -> Channel:
    """A connection below ``Session``."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(server.path)
    channel = Channel(sock, "raw", 60)
    if greet:
        channel.send(Message(1, Command.VERSION, wire.VERSION_FORM.pack(Version(0, 1, {}))))
        assert not channel.receive().failed
    return channel


@pytest.mark.parametrize("command", [*sorted(set(Command) - set(wire.EXCHANGES)), 0, 14, 77, 65535])
def test_other_commands_are_not_supported(serve: Serve, command: int) -> None:
    channel = connected(serve())
    channel.send(Message(9, command, b"whatever"))
    reply = channel.receive()
    assert (reply.id, reply.command, reply.errno, reply.payload) == (9, command, ENOTSUP, b"")
    channel.close()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message(1, Command.DEVICE_GET_INFO, bytes(16)), "before VERSION"),
        (Message(1, Command.VERSION, wire.VERSION_FORM.pack(Version(1, 0, {}))), "version 1.0"),
        (Message(1, Command.VERSION, b"\0"), "Version has 1 bytes"),
        (Message(1, Command.VERSION, b"", flags=wire.TYPE_REPLY), "nothing was asked"),
    ],
)
def test_a_client_that_starts_wrongly_is_sent_away(serve: Serve, message: Message, reason: str) -> None:
    said: list[str] = []
    server = serve(tell=said.append)
    channel = connected(server, greet=False)
    channel.send(message)
    with pytest.raises(DeviceGone):
        channel.receive()
    channel.close()
    until(lambda: any("sent away" in text and reason in text for text in said))
    with opened(server) as transport, Rng(transport) as rng:
        assert len(rng.read(8)) == 8


def test_only_limits_that_the_client_named_are_answered(serve: Serve) -> None:
    server = serve()
    channel = connected(server, greet=False)
    asked = Version(0, 9, {"max_msg_fds": 3, "twin_socket": {"supported": True}})
    channel.send(Message(1, Command.VERSION, wire.VERSION_FORM.pack(asked)))
    answer = wire.VERSION_FORM.unpack(channel.receive().payload)
    assert (answer.major, answer.minor, dict(answer.capabilities)) == (0, 1, {"max_msg_fds": wire.MAX_FDS})
    channel.close()


@pytest.mark.provokes("raw commands")
def test_commands_without_reply_are_carried_out_in_order(serve: Serve) -> None:
    channel = connected(serve(findings=True))

    def write(region: int, offset: int, data: bytes) -> None:
        payload = wire.ACCESS_FORM.pack(RegionAccess(offset, region, len(data), data))
        channel.send(Message(2, Command.REGION_WRITE, payload, flags=wire.FLAG_NO_REPLY))

    write(wire.CONFIG_REGION, pci.PCI_CONFIG_COMMAND, b"\6\0")
    write(VIRTIO_BAR, DEVICE_STATUS, b"\1")
    write(VIRTIO_BAR, DEVICE_STATUS, b"\3")
    channel.send(Message(3, Command.DMA_READ, flags=wire.FLAG_NO_REPLY))
    payload = wire.ACCESS_FORM.pack(RegionAccess(DEVICE_STATUS, VIRTIO_BAR, 1))
    channel.send(Message(4, Command.REGION_READ, payload))
    reply = channel.receive()
    assert (reply.id, wire.ACCESS_FORM.unpack(reply.payload).data) == (4, b"\3")
    channel.close()


def test_information(raw: Session) -> None:
    info, _ = raw.call(wire.GET_INFO, wire.DeviceInfo(16))
    assert info == wire.DeviceInfo(16, wire.DeviceFlag.PCI | wire.DeviceFlag.RESET, 9, 5)
    sizes = [raw.call(wire.GET_REGION_INFO, wire.RegionInfo(32, index=n))[0].size for n in range(9)]
    assert sizes == [4096, 0, 0, 0, 16384, 0, 0, 4096, 0]
    counts = [raw.call(wire.GET_IRQ_INFO, wire.IrqInfo(16, index=n))[0].count for n in range(5)]
    assert counts == [1, 0, 2, 1, 1]
    assert refused(raw, wire.GET_INFO, wire.DeviceInfo(15)) == EINVAL
    assert refused(raw, wire.GET_REGION_INFO, wire.RegionInfo(31, index=0)) == EINVAL
    assert refused(raw, wire.GET_REGION_INFO, wire.RegionInfo(32, index=9)) == EINVAL
    assert refused(raw, wire.GET_IRQ_INFO, wire.IrqInfo(16, index=5)) == EINVAL
    assert refused(raw, wire.VERSION, Version(0, 1, {})) == EINVAL, "a second time"


@pytest.mark.provokes("raw commands")
def test_regions_are_read_whole_and_in_any_piece(raw: Session) -> None:
    def read(region: int, offset: int, count: int) -> bytes:
        return raw.call(wire.REGION_READ, RegionAccess(offset, region, count))[0].data

    raw.call(wire.REGION_WRITE, RegionAccess(4, wire.CONFIG_REGION, 2, b"\6\0"))
    space = read(wire.CONFIG_REGION, 0, 4096)
    assert struct.unpack_from("<HH", space) == (0x1AF4, 0x1044)
    assert read(wire.CONFIG_REGION, 1, 7) == space[1:8]
    raw.call(wire.REGION_WRITE, RegionAccess(0, VIRTIO_BAR, 4, struct.pack("<I", 1)))
    registers = read(VIRTIO_BAR, 0, 22)
    features = raw.call(wire.REGION_READ, RegionAccess(4, VIRTIO_BAR, 4))[0].data
    assert registers[:8] == struct.pack("<I", 1) + features
    assert features[0] & 3 == 3, "VERSION_1 and ACCESS_PLATFORM"
    raw.call(wire.REGION_WRITE, RegionAccess(0, VIRTIO_BAR, 12, struct.pack("<III", 0, 0, 1)))
    assert read(VIRTIO_BAR, 8, 4) == struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("region", "offset", "count", "data"),
    [
        (VIRTIO_BAR, 16384, 1, b""),
        (VIRTIO_BAR, 16383, 2, b""),
        (VIRTIO_BAR, 0, 0, b""),
        (VIRTIO_BAR, 1 << 63, 4, b""),
        (1, 0, 4, b""),
        (wire.CONFIG_REGION, 4093, 4, b""),
        (9, 0, 4, b""),
        (VIRTIO_BAR, 0, 4, b"\0\0\0"),
        (VIRTIO_BAR, 0, 4, b"\0" * 5),
    ],
)
def test_accesses_outside_of_a_region_are_refused(
    raw: Session, region: int, offset: int, count: int, data: bytes
) -> None:
    exchange = wire.REGION_WRITE if data else wire.REGION_READ
    assert refused(raw, exchange, RegionAccess(offset, region, count, data)) == EINVAL


# Interrupts


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def fired(fd: int) -> bool:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True


def act(flags: int, index: int = wire.MSIX, start: int = 0, count: int = 1, data: bytes = b"") -> IrqSet:
    return IrqSet(20 + len(data), flags, index, start, count, data)


ATTACH = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
TRIGGER = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_TRIGGER


def test_vectors_are_attached_triggered_and_taken_away(raw: Session) -> None:
    fds = eventfd(), eventfd()
    raw.call(wire.SET_IRQS, act(ATTACH, count=2), fds)
    raw.call(wire.SET_IRQS, act(TRIGGER, start=1))
    assert [fired(fd) for fd in fds] == [False, True]
    raw.call(wire.SET_IRQS, act(IrqSetFlag.DATA_BOOL | IrqSetFlag.ACTION_TRIGGER, count=2, data=b"\1\0"))
    assert [fired(fd) for fd in fds] == [True, False]
    raw.call(wire.SET_IRQS, act(ATTACH, start=1))
    raw.call(wire.SET_IRQS, act(TRIGGER, count=2))
    assert [fired(fd) for fd in fds] == [True, False], "no descriptor takes vector 1's away"
    raw.call(wire.SET_IRQS, act(TRIGGER, count=0))
    raw.call(wire.SET_IRQS, act(TRIGGER, count=2))
    assert [fired(fd) for fd in fds] == [False, False]
    for fd in fds:
        os.close(fd)


def test_intx_is_masked_at_each_event_and_by_command(serve: Serve) -> None:
    server = serve()
    function, raw = server.function, Session(server.path, 60)
    fd = eventfd()
    raw.call(wire.SET_IRQS, act(ATTACH, wire.INTX), (fd,))

    def line(level: bool) -> None:
        with function.executor:
            function.interrupts.set_intx(level)

    def unmask() -> None:
        raw.call(wire.SET_IRQS, act(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK, wire.INTX))

    line(True)
    assert fired(fd)
    line(False)
    line(True)
    assert not fired(fd), "masked by the event before"
    unmask()
    assert fired(fd), "the line is still up"
    line(False)
    unmask()
    raw.call(wire.SET_IRQS, act(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_MASK, wire.INTX))
    line(True)
    assert not fired(fd)
    # MSI-X comes and goes; INTx stays as it was.
    raw.call(wire.SET_IRQS, act(TRIGGER, wire.MSIX, count=0))
    line(True)
    assert not fired(fd)
    unmask()
    assert fired(fd)
    raw.call(wire.SET_IRQS, act(TRIGGER, wire.INTX, count=0))
    line(False)
    line(True)
    assert not fired(fd)
    raw.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("action", "errno"),
    [
        (act(ATTACH, start=1, count=2), EINVAL),
        (act(ATTACH, index=wire.ERR, start=1), EINVAL),
        (act(ATTACH, index=1), EINVAL),
        (act(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK, index=wire.REQ), ENOTSUP),
        (act(IrqSetFlag.DATA_NONE, data=b"\1\1\1"), ENOTSUP),
        (act(ATTACH, index=9), EINVAL),
        (act(ATTACH, count=0), ENOTSUP),
        (act(IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_UNMASK, wire.INTX), ENOTSUP),
        (act(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_MASK, wire.MSIX), ENOTSUP),
        (act(IrqSetFlag.DATA_BOOL | IrqSetFlag.ACTION_TRIGGER, count=2, data=b"\1"), EINVAL),
        (act(IrqSetFlag.ACTION_TRIGGER), EINVAL),
        (act(0xFFFF_FFFF), EINVAL),
    ],
)
def test_interrupt_actions_that_make_no_sense_are_refused(raw: Session, action: IrqSet, errno: int) -> None:
    assert refused(raw, wire.SET_IRQS, action) == errno


def test_descriptors_that_do_not_fit_are_refused(raw: Session) -> None:
    fds = eventfd(), eventfd(), eventfd()
    assert refused(raw, wire.SET_IRQS, act(ATTACH, count=2), fds) == ENOTSUP
    assert refused(raw, wire.SET_IRQS, act(ATTACH), (0,)) == EINVAL
    assert refused(raw, wire.DMA_MAP, DmaMap(32, RW, 0, 0, PAGE), fds) == EINVAL
    assert refused(raw, wire.RESET, wire.Nothing(), fds[:1]) == EINVAL
    for fd in fds:
        os.close(fd)


def test_a_function_asks_to_be_let_go_of_and_reports_errors(serve: Serve) -> None:
    server = serve()
    with opened(server) as transport:
        request, error = transport.release_fds()
        assert request is not None
        assert error is not None
        server.function.request_removal()
        assert SYSTEM.poll([request, error], 60) == [request]
        server.function.report_error()
        assert SYSTEM.poll([error], 60) == [error]


# Memory


@pytest.fixture
def memory() -> Iterator[int]:
    """A memfd of 16 pages."""
    fd = os.memfd_create("guestpv-test-memory")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


def mappings() -> int:
    """How often the memfd of ``memory`` is mapped into this process, which is the server's, too."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:guestpv-test-memory")


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def dma(session: Session, at: int, pages: int, page: int, fd: int | None, flags: int = RW) -> None:
    """DMA_MAP of ``pages`` pages, from page ``page`` of the file on, at page ``at`` of the bus."""
    region = DmaMap(32, flags, page * PAGE, BUS + at * PAGE, pages * PAGE)
    session.call(wire.DMA_MAP, region, () if fd is None else (fd,))


def undma(session: Session, at: int, pages: int) -> None:
    unmap = DmaUnmap(24, 0, BUS + at * PAGE, pages * PAGE)
    assert session.call(wire.DMA_UNMAP, unmap)[0] == unmap


def test_regions_that_go_on_in_each_other_share_a_window(serve: Serve, memory: int) -> None:
    server = serve()
    raw = Session(server.path, 60)

    def windows() -> list[tuple[int, int]]:
        return [((w.start - BUS) // PAGE, len(w.memory) // PAGE) for w in server.function.dma.windows()]

    dma(raw, 0, 2, 0, memory)
    dma(raw, 4, 2, 4, memory)
    assert windows() == [(0, 2), (4, 2)]
    dma(raw, 2, 2, 2, memory)
    assert windows() == [(0, 6)]
    dma(raw, 6, 1, 9, memory)
    assert windows() == [(0, 6), (6, 1)], "adjacent on the bus, not in the file"
    dma(raw, 7, 1, 10, memory, wire.DmaFlag.READ)
    assert windows() == [(0, 6), (6, 1), (7, 1)], "read-only"
    assert [w.writable for w in server.function.dma.windows()] == [True, True, False]
    dma(raw, 8, 4, 0, None)
    assert windows() == [(0, 6), (6, 1), (7, 1)], "nothing can be seen without a descriptor"
    assert mappings() == 2, "once to write, once to read"
    os.pwrite(memory, b"through", 3 * PAGE - 3)
    assert bytes(server.function.dma.view(BUS + 3 * PAGE - 3, 7)) == b"through"

    undma(raw, 2, 2)
    assert windows() == [(0, 2), (4, 2), (6, 1), (7, 1)]
    undma(raw, 7, 1)
    assert mappings() == 1
    dma(raw, 2, 2, 2, memory)
    assert windows() == [(0, 6), (6, 1)]
    undma(raw, 8, 4)
    undma(raw, 0, 6)
    undma(raw, 6, 1)
    assert windows() == []
    assert mappings() == 0
    raw.close()


def test_all_regions_go_at_once_by_flag_and_with_the_client(serve: Serve, memory: int) -> None:
    server = serve()
    raw = Session(server.path, 60)
    for page in range(16):
        dma(raw, 2 * page, 1, page, memory)
    assert len(server.function.dma.windows()) == 16
    raw.call(wire.DMA_UNMAP, DmaUnmap(24, wire.UnmapFlag.ALL, 0, 0))
    assert (len(server.function.dma.windows()), mappings()) == (0, 0)
    dma(raw, 0, 1, 0, memory)
    raw.close()
    until(lambda: server.connection is None)
    assert (len(server.function.dma.windows()), mappings()) == (0, 0)


def test_a_random_life_of_regions_agrees_with_a_plain_model(serve: Serve, memory: int) -> None:
    server = serve()
    raw = Session(server.path, 60)
    dice = random.Random(3)
    for page in range(16):
        os.pwrite(memory, bytes([page + 1]) * PAGE, page * PAGE)
    model: dict[int, tuple[int, int]] = {}
    for _ in range(400):
        at, pages, page = dice.randrange(24), dice.randint(1, 4), dice.randrange(13)
        if dice.random() < 0.5:
            page = at % 13
        if dice.random() < 0.6:
            if any(a < at + pages and at < a + n for a, (n, _) in model.items()):
                with pytest.raises(CommandRefused) as caught:
                    dma(raw, at, pages, page, memory)
                assert caught.value.errno == EEXIST
            else:
                dma(raw, at, pages, page, memory)
                model[at] = (pages, page)
        elif model:
            at = dice.choice(sorted(model))
            undma(raw, at, model.pop(at)[0])
        seen = {}
        for window in server.function.dma.windows():
            first = (window.start - BUS) // PAGE
            seen.update({first + n: window.memory[n * PAGE] for n in range(len(window.memory) // PAGE)})
        assert seen == {a + n: p + n + 1 for a, (count, p) in model.items() for n in range(count)}
    raw.close()


@pytest.mark.parametrize(
    "region",
    [
        DmaMap(32, RW, 0, BUS, 0),
        DmaMap(32, RW, 0, (1 << 64) - PAGE, 2 * PAGE),
        DmaMap(32, RW, 8 * PAGE, BUS, 9 * PAGE),
        DmaMap(32, RW, (1 << 64) - PAGE, BUS, PAGE),
        DmaMap(32, 0, 0, BUS, PAGE),
    ],
)
def test_regions_that_cannot_be_are_refused(raw: Session, memory: int, region: DmaMap) -> None:
    assert refused(raw, wire.DMA_MAP, region, (memory,)) == EINVAL
    assert mappings() == 0


def test_regions_overlap_nothing_and_are_not_cut(raw: Session, memory: int) -> None:
    dma(raw, 2, 4, 0, memory)
    for at, pages in ((2, 4), (0, 3), (5, 1), (3, 1), (0, 16)):
        assert (
            refused(raw, wire.DMA_MAP, DmaMap(32, RW, 0, BUS + at * PAGE, pages * PAGE), (memory,)) == EEXIST
        )
    for at, pages in ((2, 3), (3, 1), (5, 3)):
        assert refused(raw, wire.DMA_UNMAP, DmaUnmap(24, 0, BUS + at * PAGE, pages * PAGE)) == EINVAL
    undma(raw, 0, 2)
    undma(raw, 0, 16)
    assert mappings() == 0


def test_descriptors_that_cannot_be_mapped_are_refused(raw: Session, tmp_path: Path, memory: int) -> None:
    read, write = os.pipe()
    assert refused(raw, wire.DMA_MAP, DmaMap(32, RW, 0, BUS, PAGE), (read,)) == EINVAL
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    only_read = os.open(path, os.O_RDONLY)
    assert refused(raw, wire.DMA_MAP, DmaMap(32, RW, 0, BUS, PAGE), (only_read,)) == 13
    dma(raw, 0, 1, 0, only_read, wire.DmaFlag.READ)
    for fd in (read, write, only_read):
        os.close(fd)


class MovableSpace:
    """A ``DmaSpace`` whose memory is taken from the device and given back, as hypervisors do with RAM."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.regions: list[tuple[int, int, int]] = []

    def map(self, size: int) -> DmaRegion:
        fd = os.memfd_create("guestpv-test-movable")
        os.ftruncate(fd, size)
        address = BUS + 2 * sum(length for _, length, _ in self.regions)
        self.regions.append((address, size, fd))
        self.session.call(wire.DMA_MAP, DmaMap(32, RW, 0, address, size), (fd,))
        array = np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)
        return DmaRegion(array, (Segment(address, size),), int(array.ctypes.data))

    def unmap(self, region: DmaRegion) -> None:
        """Everything goes with the connection."""

    def take(self) -> None:
        for address, size, _ in self.regions:
            self.session.call(wire.DMA_UNMAP, DmaUnmap(24, 0, address, size))

    def give(self, piece: int) -> None:
        for address, size, fd in self.regions:
            for start in range(0, size, piece):
                length = min(piece, size - start)
                self.session.call(wire.DMA_MAP, DmaMap(32, RW, start, address + start, length), (fd,))


def movable(server: VfioUserServer) -> tuple[PciTransport, MovableSpace]:
    function = VfioUserFunction(server.path)
    space = MovableSpace(function.session)
    function.dma = space  # type: ignore[assignment]
    return PciTransport(function), space


@pytest.mark.parametrize("piece", [1 << 20, 64 << 10, PAGE])
@pytest.mark.parametrize("ring", ["packed=off", "packed=on"])
def test_queues_go_on_when_their_memory_is_back_in_other_pieces(serve: Serve, ring: str, piece: int) -> None:
    server = serve(f"net?peer=sink&{ring}")
    model = server.function.model
    assert isinstance(model, NetModel)
    transport, space = movable(server)
    with transport, Net(transport) as net:
        model.deliver(b"\1" * 60)
        for number in range(3):
            space.take()
            assert not any(queue.ring for queue in server.function.device.queues)
            model.deliver(bytes([number]) * 70)
            space.give(piece)
            until(lambda: all(queue.ring for queue in server.function.device.queues[:2]))
            model.deliver(b"\2" * 80)
        got: list[bytes] = []
        while got.count(b"\2" * 80) < 3:
            assert net.wait(60)
            got += net.receive()
        assert got[0] == b"\1" * 60
        assert net.send([b"\3" * 60]) == 1
        until(lambda: model.sent == 1)


def test_a_kick_is_not_lost_while_the_memory_is_away(serve: Serve) -> None:
    server = serve("rng?seed=1")
    transport, space = movable(server)
    with transport, Rng(transport) as rng:
        rng.read(4)
        space.take()
        rng.queue.add(writable=[rng.buffer])
        rng.queue.publish()
        assert not rng.queue.wait(0.05)
        space.give(1 << 20)
        assert rng.queue.wait(60)


def test_a_reset_forgets_what_waited_for_its_memory(serve: Serve) -> None:
    server = serve("rng")
    transport, space = movable(server)
    with transport:
        rng = Rng(transport)
        rng.read(4)
        space.take()
        transport.write_status(0)
        space.give(1 << 20)
        assert server.function.device.queues[0].ring is None
        assert transport.status == 0


# Bad peers


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    with pytest.raises(GuestpvError, match="there is no such socket") as caught:
        guestpv.open(f"vfio-user:{path}")
    assert f"guestpv serve vfio-user:{path}" in caught.value.hint
    path.write_text("a file")
    with pytest.raises(GuestpvError, match="nobody listens"):
        guestpv.open(f"vfio-user:{path}")
    for body in ("", "x" * 108):
        with pytest.raises(UsageError, match="1 to 107 bytes"):
            guestpv.open(f"vfio-user:{body}")


@pytest.mark.parametrize("query", ["?timeout=0", "?timeout=soon", "?timeout=nan", "?speed=1"])
def test_parameters_that_make_no_sense(serve: Serve, query: str) -> None:
    with pytest.raises(UsageError, match=r"timeout|speed"):
        guestpv.open(f"vfio-user:{serve().path}{query}")


Script = Callable[[Channel, Message], bool]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[[Script], str]]:
    """A server of the test's own: the script answers each message, until it returns False."""
    threads: list[threading.Thread] = []
    failures: list[BaseException] = []

    def run(script: Script) -> str:
        path = str(tmp_path / "scripted.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        listener.settimeout(60)

        def answer() -> None:
            try:
                with listener:
                    channel = Channel(listener.accept()[0], "scripted", 60)
                while script(channel, channel.receive()):
                    pass
                channel.close()
            except DeviceGone:
                pass
            except BaseException as error:
                failures.append(error)

        threads.append(threading.Thread(target=answer, daemon=True))
        threads[-1].start()
        return path

    yield run
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


def ordinary(channel: Channel, message: Message) -> bool:
    """What a server says that has one 4 KiB BAR 0, a request interrupt, and nothing else."""
    exchange = wire.EXCHANGES[message.command]
    question = exchange.sends.unpack(message.payload)
    answers: dict[int, Callable[[], object]] = {
        Command.VERSION: lambda: Version(0, 0, {}),
        Command.DEVICE_GET_INFO: lambda: wire.DeviceInfo(16, wire.DeviceFlag.PCI, 9, 5),
        Command.DEVICE_GET_IRQ_INFO: lambda: wire.IrqInfo(
            16, 1, question.index, int(question.index == wire.REQ)
        ),
        Command.DEVICE_GET_REGION_INFO: lambda: wire.RegionInfo(32, 3, question.index, 0, PAGE),
        Command.REGION_READ: lambda: RegionAccess(
            question.offset, question.region, question.count, bytes(range(question.count))
        ),
        Command.REGION_WRITE: lambda: RegionAccess(question.offset, question.region, question.count),
        Command.DMA_UNMAP: lambda: question,
    }
    channel.send(message.answer(exchange.answers.pack(answers.get(message.command, wire.Nothing)())))
    return True


def test_a_bar_that_the_server_offers_is_mapped(scripted: Callable[[Script], str]) -> None:
    fd = os.memfd_create("guestpv-test-bar")
    os.ftruncate(fd, 2 * PAGE)
    os.pwrite(fd, struct.pack("<I", 0xCAFEF00D), PAGE + 8)
    reads: list[int] = []

    def script(channel: Channel, message: Message) -> bool:
        if message.command == Command.DEVICE_GET_REGION_INFO:
            flags = RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
            info = wire.RegionInfo(32, flags, 0, 0, PAGE, PAGE)
            reply = message.answer(wire.REGION_INFO_FORM.pack(info))
            channel.send(Message(reply.id, reply.command, reply.payload, (fd,), reply.flags))
            return True
        reads.append(message.command)
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    bar = function.bar(0)
    assert bar.pointer
    assert bar.read(8, 4) == 0xCAFEF00D
    bar.write(12, 2, 0xBEEF)
    assert os.pread(fd, 2, PAGE + 12) == b"\xef\xbe"
    assert Command.REGION_READ not in reads
    function.close()
    assert not Path("/proc/self/maps").read_text().count("guestpv-test-bar")
    with pytest.raises(DeviceGone):
        bar.read(8, 4)
    os.close(fd)


def test_a_server_without_reset_and_with_a_request_interrupt(scripted: Callable[[Script], str]) -> None:
    theirs: list[int] = []

    def script(channel: Channel, message: Message) -> bool:
        theirs.extend(message.fds)
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    assert function.reset() is False
    assert function.msix_vectors == 0
    assert function.error_fd() is None
    request = function.request_fd()
    assert request is not None
    assert function.request_fd() == request
    os.eventfd_write(theirs[0], 1)
    assert fired(request)
    with pytest.raises(UsageError, match="no legacy interrupt"):
        function.enable_intx()
    with pytest.raises(UsageError, match="1 of 0 MSI-X vectors"):
        function.enable_msix(1)
    function.close()
    close_all(theirs)


def test_vectors_are_sent_in_as_many_messages_as_the_server_needs(scripted: Callable[[Script], str]) -> None:
    sets: list[tuple[int, int, int]] = []

    def script(channel: Channel, message: Message) -> bool:
        if message.command == Command.DEVICE_SET_IRQS:
            action = wire.IRQ_SET_FORM.unpack(message.payload)
            sets.append((action.start, action.count, len(message.fds)))
            message.close_fds()
        if message.command == Command.VERSION:
            channel.send(message.answer(wire.VERSION_FORM.pack(Version(0, 1, {"max_msg_fds": 2}))))
            return True
        if message.command == Command.DEVICE_GET_IRQ_INFO:
            channel.send(message.answer(wire.IRQ_INFO_FORM.pack(wire.IrqInfo(16, 1, 2, 8))))
            return True
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    assert len(set(function.enable_msix(5))) == 5
    assert sets == [(0, 2, 2), (2, 2, 2), (4, 1, 1)]
    function.close()


def test_a_servers_own_commands_are_refused_and_do_no_harm(scripted: Callable[[Script], str]) -> None:
    refusals: list[int] = []

    def script(channel: Channel, message: Message) -> bool:
        if message.command == Command.REGION_READ:
            channel.send(Message(77, Command.DMA_READ, bytes(16)))
            reply = channel.receive()
            assert (reply.id, reply.command) == (77, Command.DMA_READ)
            refusals.append(reply.errno)
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    assert function.config_read(0, 4) == 0x03020100
    assert refusals == [ENOTSUP]
    function.close()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda m: Message(m.id + 1, m.command, flags=wire.TYPE_REPLY), GuestpvError, "number 2 is one to"),
        (lambda m: Message(m.id, 5, flags=wire.TYPE_REPLY), GuestpvError, "command 5"),
        (lambda m: m.answer(bytes(3)), GuestpvError, "DeviceInfo has 3 bytes where 16 belong"),
        (lambda m: m.answer(bytes(16)), GuestpvError, "no PCI device"),
        (lambda m: m.refuse(EINVAL), CommandRefused, "refused DEVICE_GET_INFO: Invalid argument"),
        (lambda m: m.refuse(0), CommandRefused, "no reason given"),
        (
            lambda m: Message(m.id, m.command, bytes(16), (0,), wire.TYPE_REPLY),
            GuestpvError,
            "1 descriptors came",
        ),
    ],
)
def test_answers_that_make_no_sense(
    scripted: Callable[[Script], str],
    wrong: Callable[[Message], Message],
    error: type[GuestpvError],
    text: str,
) -> None:
    def script(channel: Channel, message: Message) -> bool:
        if message.command != Command.DEVICE_GET_INFO:
            return ordinary(channel, message)
        channel.send(wrong(message))
        return True

    with pytest.raises(error, match=text):
        VfioUserFunction(scripted(script))


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (Version(1, 0, {}), "protocol version 1.0, 0.1 was proposed"),
        (Version(0, 2, {}), "protocol version 0.2"),
        (Version(0, 1, {"max_msg_fds": "many"}), "max_msg_fds is 'many'"),
    ],
)
def test_versions_that_do_not_fit(scripted: Callable[[Script], str], version: Version, text: str) -> None:
    def script(channel: Channel, message: Message) -> bool:
        channel.send(message.answer(wire.VERSION_FORM.pack(version)))
        return True

    with pytest.raises(GuestpvError, match=text):
        VfioUserFunction(scripted(script))


def test_a_server_that_speaks_something_else(tmp_path: Path) -> None:
    path = str(tmp_path / "chat.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def chat() -> None:
            with listener.accept()[0] as client:
                client.sendall(b"220 mail.example ready, at your service\r\n")

        thread = threading.Thread(target=chat)
        thread.start()
        # It may hang up before it is greeted.
        with pytest.raises(GuestpvError, match=r"does not speak vfio-user|no vfio-user server"):
            VfioUserFunction(path)
        thread.join()


def test_a_server_that_falls_silent_is_given_up(scripted: Callable[[Script], str]) -> None:
    over = threading.Event()

    def script(channel: Channel, message: Message) -> bool:
        if message.command == Command.REGION_READ:
            over.wait(60)
            return False
        return ordinary(channel, message)

    function = VfioUserFunction(scripted(script))
    channel = function.session._channel
    assert channel is not None
    channel.timeout = 0.2
    channel._socket.settimeout(0.2)
    with pytest.raises(TimeLimit, match=r"sent nothing for 0\.2 s") as caught:
        function.config_read(0, 2)
    assert "REGION_READ" in caught.value.hint
    with pytest.raises(DeviceGone, match="connection is closed"):
        function.config_read(0, 2)
    function.close()
    over.set()


def test_a_server_that_dies_in_the_middle(serve: Serve) -> None:
    server = serve("net?peer=sink")
    transport = opened(server)
    net = Net(transport)
    server.close()
    with pytest.raises(DeviceGone):
        net.send([bytes(60)])
    with pytest.raises(DeviceGone):
        transport.read_status()
    before = descriptors()
    net.close()
    assert descriptors() < before
    transport.function.close()


def test_a_client_that_dies_in_the_middle_of_a_message(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    server = serve(tell=said.append)
    with monkeypatch.context() as patch:
        patch.setattr("guestpv.serve.vfio_user.MESSAGE_SECONDS", 0.1)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(server.path)
        sock.sendall(wire.HEADER.pack(1, Command.VERSION, 100, 0, 0)[:9])
        until(lambda: any("sent nothing for 0.1 s" in text for text in said))
        sock.close()
    with opened(server) as transport, Rng(transport) as rng:
        assert len(rng.read(8)) == 8


LIKELY = [0, 1, 2, 4, 7, 20, 32, 33, 36, PAGE]
"""Lengths, flags, indexes and counts that nearly make sense."""


def test_random_messages_harm_nobody(serve: Serve, memory: int) -> None:
    server = serve("net", findings=True)
    dice = random.Random(7)
    event = eventfd()
    before = descriptors()
    for _ in range(40):
        channel = connected(server)
        for number in range(60):
            command = dice.choice([*wire.EXCHANGES, dice.randrange(70)])
            size = wire.EXCHANGES[command].sends.size if command in wire.EXCHANGES else 0
            words = [dice.choice([*LIKELY, dice.getrandbits(32)]) for _ in range(size // 4)]
            payload = struct.pack(f"<{len(words)}I", *words) + dice.randbytes(dice.choice([0, 0, 1, 4]))
            fds = dice.choice([(), (), (memory,), (event,), (0, memory)])
            channel.send(Message(number, command, payload, fds))
            reply = channel.receive()
            assert (reply.id, reply.command, reply.is_reply) == (number, command, True)
        channel.close()
        until(lambda: server.connection is None)
    assert descriptors() == before
    assert mappings() == 0
    os.close(event)
    with opened(server) as transport, Net(transport) as net:
        assert net.send([bytes(60)]) == 1


def test_where_it_listens(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    with pytest.raises(UsageError, match="somebody listens there already"):
        VfioUserServer(make_function("rng"), server.path)
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(UsageError, match="no socket"):
        VfioUserServer(make_function("rng"), str(file))
    assert file.read_text() == "precious"
    with pytest.raises(UsageError, match="cannot listen: No such file or directory"):
        VfioUserServer(make_function("rng"), str(tmp_path / "no" / "where"))
    with pytest.raises(UsageError, match="cannot listen: AF_UNIX path too long"):
        VfioUserServer(make_function("rng"), "/" + "x" * 200)
    left_behind = str(tmp_path / "left.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(left_behind)
    with VfioUserServer(make_function("rng"), left_behind) as fresh, opened(fresh) as transport:
        assert transport.device_type == 4
