"""The vhost-user front end against our own back end: what others do not offer, and deaths at will."""

from __future__ import annotations

import gc
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guestpv
from guestpv.devices.loopback import open_function
from guestpv.devices.model import Model
from guestpv.devices.models.blk import Blk
from guestpv.devices.models.blk_store import Store
from guestpv.devices.models.net import Net as NetModel
from guestpv.devices.models.rng import Rng as RngModel
from guestpv.devices.models.wire import echo
from guestpv.devices.scripted import ScriptedDriver
from guestpv.drivers.net import Net
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceGone, FeaturesRefused, GuestpvError, Refused, UsageError
from guestpv.serve.vhost_user import PROTOCOL_FEATURES, VhostUserServer
from guestpv.serve.vhost_user_rings import enable
from guestpv.spec import blk as spec
from guestpv.spec import features as feat
from guestpv.spec import net
from guestpv.spec.features import F_ACCESS_PLATFORM, F_RING_PACKED, F_VERSION_1, mask
from guestpv.spec.status import Status
from guestpv.transport.vhost_user import VhostUserTransport
from guestpv.virtqueue.queue import Virtqueue
from guestpv.wire.vhost_user import ProtocolFeature as PF
from peers.mortal import immortal, mortal_disk

SIZE = 1 << 20
BLOCK = 4096
PACKED = 1 << feat.F_RING_PACKED

Serve = Callable[..., VhostUserServer]
Open = Callable[..., VhostUserTransport]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Put a model on a socket, ``server.path``."""
    servers: list[VhostUserServer] = []

    def run(model: Model, **options: Any) -> VhostUserServer:
        servers.append(VhostUserServer(model, str(tmp_path / f"{len(servers)}.sock"), **options).start())
        return servers[-1]

    yield run
    for server in servers:
        server.close()


@pytest.fixture
def connect() -> Iterator[Open]:
    """``guestpv.open`` on a socket."""
    transports: list[VhostUserTransport] = []

    def run(kind: str, path: object, parameters: str = "") -> VhostUserTransport:
        transport = guestpv.open(f"vhost-user:{kind}:{path}{parameters}")
        assert isinstance(transport, VhostUserTransport)
        transports.append(transport)
        return transport

    yield run
    for transport in transports:
        transport.close()


def live(transport: VhostUserTransport, queues: int = 1, size: int = 128) -> list[Virtqueue]:
    transport.negotiate(supported=mask((spec.F_FLUSH, spec.F_MQ, spec.F_CONFIG_WCE)))
    made = [transport.make_queue(index, size) for index in range(queues)]
    transport.driver_ok()
    return made


class Writes:
    """One write of a block for each slot, each with content of its own."""

    def __init__(self, transport: VhostUserTransport, queue: Virtqueue, count: int) -> None:
        self.queue = queue
        self.count = count
        self.memory = transport.pool.allocate(2 * BLOCK * count, align=4096)
        self.content = np.random.default_rng(count).bytes(BLOCK * count)
        self.done: list[int] = []
        for slot in range(count):
            base = 2 * BLOCK * slot
            self.memory[base : base + 16].array.view(spec.REQUEST_HEADER)[0] = (spec.T_OUT, 0, 8 * slot)
            self.memory[base + BLOCK : base + 2 * BLOCK].write(
                self.content[BLOCK * slot : BLOCK * (slot + 1)]
            )
            self.memory.array[base + 16] = 0xFF
            self.add(slot)

    def add(self, slot: int) -> None:
        base = 2 * BLOCK * slot
        parts = [self.memory[base : base + 16], self.memory[base + BLOCK : base + 2 * BLOCK]]
        self.queue.add(parts, [self.memory[base + 16 : base + 17]], cookie=slot)

    def slot_of(self, token: int) -> int:
        slot = self.queue.cookie(token)
        assert isinstance(slot, int)
        return slot

    def take(self) -> None:
        for token, length in self.queue.completions():
            assert length == 1
            slot = self.slot_of(token)
            assert self.memory.array[2 * BLOCK * slot + 16] == spec.S_OK
            self.done.append(slot)

    def finish(self) -> None:
        while len(self.done) < self.count:
            assert self.queue.wait(60)
            self.take()


def disk(**options: Any) -> Blk:
    return Blk(Store(size=SIZE), **options)


@pytest.mark.parametrize(
    "missing",
    [(), (PF.REPLY_ACK,), (PF.STATUS,), (PF.CONFIGURE_MEM_SLOTS,), (PF.RESET_DEVICE,), (PF.INFLIGHT_SHMFD,)],
    ids=lambda bits: " ".join(bit.name for bit in bits) or "none",
)
def test_a_back_end_may_lack_a_protocol_feature(
    serve: Serve, connect: Open, monkeypatch: pytest.MonkeyPatch, missing: tuple[PF, ...]
) -> None:
    monkeypatch.setattr("guestpv.transport.vhost_user_memory.ARENA", 4 << 20)
    server = serve(disk(), protocol_features=PROTOCOL_FEATURES & ~mask(missing))
    transport = connect("blk", server.path)
    for _ in range(2):
        (queue,) = live(transport)
        assert transport.status == Status(0b1111)
        transport.pool.allocate(8 << 20)
        writes = Writes(transport, queue, 8)
        queue.publish()
        writes.finish()
        transport.reset()
        assert transport.status == 0
    assert server.journal.findings == []


def test_a_block_device_needs_configuration(serve: Serve, connect: Open) -> None:
    server = serve(disk(), protocol_features=PROTOCOL_FEATURES & ~mask((PF.CONFIG,)))
    with pytest.raises(Refused, match="lacks the protocol feature CONFIG"):
        connect("blk", server.path)


def test_a_reset_keeps_the_connection_where_the_back_end_can_reset(serve: Serve, connect: Open) -> None:
    transport = connect("blk", serve(disk()).path)
    live(transport)
    session = transport.session
    transport.reset()
    assert transport.session is session
    limited = serve(disk(), protocol_features=PROTOCOL_FEATURES & ~mask((PF.RESET_DEVICE,)))
    transport = connect("blk", limited.path)
    live(transport)
    transport.reset()
    assert transport.session is None
    live(transport)


def test_a_refused_feature_set(serve: Serve, connect: Open) -> None:
    for features in (PROTOCOL_FEATURES, mask((PF.REPLY_ACK, PF.CONFIG))):
        server = serve(disk(), protocol_features=features)
        server.device.refuse_features_ok = True
        with pytest.raises(FeaturesRefused, match="did not keep FEATURES_OK"):
            live(connect("blk", server.path))


def test_configuration_changes_and_writes(serve: Serve, connect: Open) -> None:
    model = disk()
    transport = connect("blk", serve(model).path)
    live(transport)
    fd = transport.config_fd
    assert fd is not None
    before = transport.config_generation()
    assert select.select([fd], [], [], 0)[0] == []
    model.resize(2 * SIZE)
    assert select.select([fd], [], [], 60)[0] == [fd]
    assert transport.config(spec.CONFIG)["capacity"] == 2 * SIZE // 512
    assert transport.config_generation() != before
    transport.config_write(spec.CONFIG["writeback"], 0)
    assert model.config["writeback"] == 0
    assert transport.config(spec.CONFIG)["writeback"] == 0


def test_a_queue_is_reset_alone(serve: Serve, connect: Open) -> None:
    server = serve(disk(num_queues=2))
    transport = connect("blk", server.path)
    first, second = live(transport, 2)
    server.device.queues[0].hold = True
    writes = Writes(transport, first, 4)
    first.publish()
    tokens = transport.reset_queue(0)
    assert [writes.slot_of(token) for token in tokens] == [0, 1, 2, 3]
    server.device.queues[0].hold = False
    again = transport.make_queue(0, 64)
    for queue in (again, second):
        writes = Writes(transport, queue, 4)
        queue.publish()
        writes.finish()


@pytest.mark.provokes("a bad address")
def test_a_ring_that_breaks_the_device(serve: Serve, connect: Open) -> None:
    server = serve(disk())
    transport = connect("blk", server.path)
    (queue,) = live(transport)
    queue.desc[0] = (0xDEAD0000, 16, 0, 0)
    queue.driver["ring"][0] = 0
    queue.driver["idx"] = 1
    fd = transport.config_fd
    assert fd is not None
    queue.notify()
    assert select.select([fd], [], [], 60)[0] == [fd]
    assert transport.status & Status.NEEDS_RESET
    assert "0xdead0000" in str(server.journal.findings[0])
    transport.reset()
    (queue,) = live(transport)
    assert not transport.status & Status.NEEDS_RESET


def test_random_bytes(serve: Serve, connect: Open) -> None:
    with Rng(connect("rng", serve(RngModel(seed=1)).path)) as rng:
        assert len(set(rng.read(64))) > 16


@pytest.mark.parametrize("packed", [False, True])
def test_frames_come_back(serve: Serve, connect: Open, packed: bool) -> None:
    model = NetModel(b"\x52\x54\0\0\0\7", mtu=9000)
    echo(model)
    server = serve(model, offer=PACKED if packed else 0)
    with Net(connect("net", server.path)) as net:
        assert net.mac == b"\x52\x54\0\0\0\7"
        assert net.mtu == 9000
        assert net.link_up
        frames = [net.mac + b"\x02\0\0\0\0\1\x88\xb5" + bytes((n,)) * (50 + 200 * n) for n in range(40)]
        assert net.send(frames) == 40
        came: list[bytes] = []
        while len(came) < 40:
            more = net.receive_within(60)
            assert more
            came += more
        assert came == frames
        model.set_link(False)
        assert not net.link_up


def test_one_front_end_at_a_time(serve: Serve, connect: Open) -> None:
    server = serve(disk())
    first = connect("blk", server.path)
    with pytest.raises(DeviceGone):
        connect("blk", server.path)
    first.close()
    live(connect("blk", server.path))


def test_a_path_in_use_and_one_left_behind(serve: Serve, connect: Open, tmp_path: Path) -> None:
    server = serve(disk())
    with pytest.raises(UsageError, match="somebody listens"):
        VhostUserServer(disk(), server.path)
    with pytest.raises(UsageError, match="cannot listen"):
        VhostUserServer(disk(), str(tmp_path / "missing" / "sock"))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="cannot listen"):
        VhostUserServer(disk(), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


# A back end that is killed at a chosen moment.


@pytest.mark.parametrize(
    ("packed", "tracked", "kind", "late"),
    [
        (packed, tracked, kind, late)
        for packed in (False, True)
        for tracked in (False, True)
        for kind in ("pop", "push", "publish")
        for late in (False, True)
    ],
)
def test_no_request_is_lost(
    connect: Open, tmp_path: Path, packed: bool, tracked: bool, kind: str, late: bool
) -> None:
    """Killed before or after it wrote down what it did; requests complete out of order, three at a time."""
    file, log, sock = tmp_path / "disk", tmp_path / "log", tmp_path / "sock"
    file.write_bytes(bytes(SIZE))
    options = {
        "kind": kind,
        "late": late,
        "count": {"pop": 37, "push": 20, "publish": 6}[kind],
        "offer": PACKED if packed else 0,
        "protocol_features": PROTOCOL_FEATURES & ~(0 if tracked else mask((PF.INFLIGHT_SHMFD,))),
    }
    with mortal_disk(sock, file, log, **options) as backend:
        transport = connect("blk", sock)
        (queue,) = live(transport)
        writes = Writes(transport, queue, 60)
        queue.publish()
        with pytest.raises(DeviceGone):
            writes.finish()
        writes.take()
        seen = list(writes.done)
        assert len(seen) < 60
        executed = log.read_text().split()
        backend.kill()
        immortal(backend)
        backend.start()
        again = transport.reconnect()
        slots = [writes.slot_of(token) for token in again.get(0, [])]
        if tracked:
            # The back end goes on by itself: nothing to submit, every slot keeps its place in the ring.
            assert slots == []
        else:
            assert sorted(slots + seen) == list(range(60))
        for slot in slots:
            writes.add(slot)
        queue.publish()
        writes.finish()
        assert sorted(writes.done) == list(range(60))
        assert queue.outstanding == 0
        after = log.read_text().split()[len(executed) :]
        assert not set(map(str, seen)) & set(after), "a completed request was carried out again"
        assert set(executed) | set(after) == set(map(str, range(60)))
        transport.close()
    assert file.read_bytes()[: len(writes.content)] == writes.content


def test_a_change_before_the_driver_is_there_is_told_once_it_is(serve: Serve, connect: Open) -> None:
    """Whoever attaches the disk has read its size by then and keeps it."""
    model = disk()
    transport = connect("blk", serve(model).path)
    transport.negotiate(supported=0)
    assert transport.config(spec.CONFIG)["capacity"] == SIZE // 512
    transport.make_queue(0)
    model.resize(2 * SIZE)
    fd = transport.config_fd
    assert fd is not None
    assert select.select([fd], [], [], 0)[0] == []
    transport.driver_ok()
    assert select.select([fd], [], [], 60)[0] == [fd]
    assert transport.config(spec.CONFIG)["capacity"] == 2 * SIZE // 512


def test_nothing_to_reconnect(serve: Serve, connect: Open) -> None:
    transport = connect("blk", serve(disk()).path)
    with pytest.raises(UsageError, match="not live"):
        transport.reconnect()


def test_a_lesser_back_end_in_its_place_is_refused(serve: Serve, connect: Open) -> None:
    server = serve(disk())
    transport = connect("blk", server.path)
    live(transport)
    path = server.path
    server.close()
    with pytest.raises(GuestpvError, match="there is no such socket"):
        transport.reconnect(timeout=0.05)
    lesser = VhostUserServer(disk(), path)
    lesser.device.offered &= ~(1 << feat.F_EVENT_IDX)
    with lesser, pytest.raises(Refused, match="no longer offers EVENT_IDX"):
        transport.reconnect()


def test_nothing_is_left_open(serve: Serve, connect: Open) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    server = serve(disk())
    transport = connect("blk", server.path)
    (queue,) = live(transport)
    writes = Writes(transport, queue, 4)
    queue.publish()
    writes.finish()
    transport.close()
    server.close()
    assert len(os.listdir("/proc/self/fd")) == before


# Queue pairs of a network device: the protocol has no control queue, so the front end plays it.


def command(transport: VhostUserTransport, control: Virtqueue, *words: int) -> int:
    """Send a control command; what its status byte says."""
    memory = transport.pool.allocate(64)
    memory.write(bytes((*words, 0xFF)))
    control.add([memory[: len(words)]], [memory[len(words) : len(words) + 1]])
    control.publish()
    assert control.wait(60)
    assert [length for _, length in control.completions()] == [1]
    return int(memory.array[len(words)])


@pytest.mark.parametrize("packed", [False, True])
def test_queue_pairs_are_enabled_as_the_driver_asks(serve: Serve, connect: Open, packed: bool) -> None:
    model = NetModel(pairs=4)
    server = serve(model, offer=PACKED if packed else 0)
    transport = connect("net", server.path)
    transport.negotiate(supported=mask((net.F_MQ, net.F_CTRL_VQ, net.F_CTRL_RX)))
    assert transport.has(feat.F_RING_PACKED) == packed
    assert not transport.has(net.F_CTRL_RX), "a command that the back end never hears of"
    assert transport.config(net.CONFIG)["max_virtqueue_pairs"] == 4
    assert transport.num_queues == 9
    for index in range(6):
        transport.make_queue(index)
    control = transport.make_queue(8)
    transport.driver_ok()

    def enabled() -> list[bool]:
        assert server.connection is not None
        return [ring.enabled for ring in server.connection.rings]

    assert enabled() == [True, True] + 7 * [False]
    for wanted, answer, then in (
        (3, net.CTRL_OK, 3),
        (0, net.CTRL_ERR, 3),
        (4, net.CTRL_ERR, 3),  # its queues were not made
        (5, net.CTRL_ERR, 3),
        (2, net.CTRL_OK, 2),
        (3, net.CTRL_OK, 3),
    ):
        assert command(transport, control, net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, wanted, 0) == answer
        assert enabled() == 2 * then * [True] + (9 - 2 * then) * [False]
        assert model.control.pairs == then
    assert command(transport, control, net.CTRL_RX, 0, 1) == net.CTRL_ERR
    transport.reset()
    assert model.control.pairs == 1


def test_one_pair_needs_no_control_queue(serve: Serve, connect: Open) -> None:
    transport = connect("net", serve(NetModel()).path)
    assert not transport.offered & mask((net.F_MQ, net.F_CTRL_VQ))
    assert transport.num_queues == 2


def test_a_packed_ring_whose_front_end_names_the_available_position_only() -> None:
    """DPDK's virtio-user leaves the used position out of SET_VRING_BASE."""
    function = open_function("rng", {"packed": "on"})
    driver = ScriptedDriver(function)
    features = mask((F_VERSION_1, F_ACCESS_PLATFORM, F_RING_PACKED))
    queue = driver.start(features, {0: 4})[0]
    enable(function.device.queues[0], True, 1 << 15, None)
    head = queue.add([], [queue.buffer(8)])
    queue.kick()
    assert queue.used() == [(head, 8)]
    function.close()
