"""``vhost-user:blk`` against qemu-storage-daemon: bare rings on a real block layer."""

from __future__ import annotations

import gc
import itertools
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guestpv
from guestpv.drivers.blk import Blk
from guestpv.errors import DeviceGone, GuestpvError, Refused, TimeLimit, UsageError
from guestpv.memory import DmaBuffer
from guestpv.spec import blk as spec
from guestpv.spec.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1, mask
from guestpv.transport.vhost_user import VhostUserTransport
from guestpv.virtqueue.queue import Virtqueue
from guestpv.wire.stream import ProtocolError
from peers import tree
from peers.backend import Backend, storage_daemon

SIZE = 1 << 20
NULL = f"driver=null-co,size={SIZE},read-zeroes=on"
BLOCK = 4096
UNTOUCHED = 0xFF

Start = Callable[..., Backend]
Open = Callable[..., VhostUserTransport]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start qemu-storage-daemon on a block node; it ends with the case."""
    backends: list[Backend] = []

    def run(node: str, **options: Any) -> Backend:
        backends.append(storage_daemon(tmp_path / f"blk{len(backends)}.sock", node, **options).start())
        return backends[-1]

    yield run
    for backend in backends:
        backend.close()


@pytest.fixture
def connect() -> Iterator[Open]:
    """``guestpv.open`` on a back end."""
    transports: list[VhostUserTransport] = []

    def run(backend: Backend, parameters: str = "") -> VhostUserTransport:
        transport = guestpv.open(f"vhost-user:blk:{backend.socket}{parameters}")
        assert isinstance(transport, VhostUserTransport)
        transports.append(transport)
        return transport

    yield run
    for transport in transports:
        transport.close()


class Requests:
    """Block requests of up to one block, with memory of their own, on one queue."""

    def __init__(self, transport: VhostUserTransport, queue: Virtqueue, slots: int) -> None:
        self.queue = queue
        self.memory = transport.pool.allocate(2 * BLOCK * slots, align=4096)

    def _part(self, slot: int, start: int, length: int) -> DmaBuffer:
        return self.memory[2 * BLOCK * slot + start : 2 * BLOCK * slot + start + length]

    def add(self, slot: int, kind: int, sector: int, data: bytes | int = b"") -> int:
        """Add a request; ``data`` is what to write, or how many bytes to read. Returns the token."""
        header, status = self._part(slot, 0, 16), self._part(slot, 16, 1)
        header.array.view(spec.REQUEST_HEADER)[0] = (kind, 0, sector)
        status.array[0] = UNTOUCHED
        if isinstance(data, int):
            body = self._part(slot, BLOCK, data)
            body.array[:] = 0xEE
            return self.queue.add([header], [body, status], cookie=slot)
        body = self._part(slot, BLOCK, len(data))
        body.write(data)
        return self.queue.add([header, body] if data else [header], [status], cookie=slot)

    def again(self, slot: int, readable: bool) -> int:
        """Add the request in ``slot`` once more, as it is."""
        header, status = self._part(slot, 0, 16), self._part(slot, 16, 1)
        body = self._part(slot, BLOCK, BLOCK)
        if readable:
            return self.queue.add([header, body], [status], cookie=slot)
        return self.queue.add([header], [body, status], cookie=slot)

    def finish(self, count: int) -> dict[int, int]:
        """Publish and wait for ``count`` completions: slot to used length."""
        self.queue.publish()
        used: dict[int, int] = {}
        while len(used) < count:
            assert self.queue.wait(60)
            for token, length in self.queue.completions():
                slot = self.queue.cookie(token)
                assert isinstance(slot, int)
                assert slot not in used
                used[slot] = length
        return used

    def status(self, slot: int) -> int:
        """Status byte of the request in ``slot``."""
        return int(self._part(slot, 16, 1).array[0])

    def data(self, slot: int, length: int = BLOCK) -> bytes:
        """What a read has brought."""
        return self._part(slot, BLOCK, length).array.tobytes()


def live(transport: VhostUserTransport, queues: int = 1, size: int | None = None) -> list[Virtqueue]:
    """Negotiate, make queues, DRIVER_OK."""
    transport.negotiate(supported=mask((spec.F_FLUSH, spec.F_MQ, spec.F_BLK_SIZE, spec.F_CONFIG_WCE)))
    made = [transport.make_queue(index, size) for index in range(queues)]
    transport.driver_ok()
    return made


def qcow2(path: Path, size: int) -> None:
    """An empty qcow2 image (version 2): header, refcount table and block, L1 table; 64 KiB clusters."""
    cluster = 1 << 16
    image = bytearray(4 * cluster)
    struct.pack_into(
        ">4sIQIIQIIQQIIQ", image, 0, b"QFI\xfb", 2, 0, 0, 16, size, 0, 1, 3 * cluster, cluster, 1, 0, 0
    )
    struct.pack_into(">Q", image, cluster, 2 * cluster)
    struct.pack_into(">4H", image, 2 * cluster, 1, 1, 1, 1)
    path.write_bytes(image)


def test_what_was_written_to_the_configuration_is_read(start: Start, connect: Open) -> None:
    transport = connect(start(NULL))
    transport.negotiate(transport.offered & mask((spec.F_CONFIG_WCE, spec.F_FLUSH, F_VERSION_1)))
    field = spec.CONFIG["writeback"]
    for value in (1, 0, 1):
        transport.write_config(field.offset, field.width, value)
        assert transport.read_config(field.offset, field.width) == value


def test_what_the_back_end_is(start: Start, connect: Open) -> None:
    transport = connect(start(NULL, queues=3))
    assert transport.name.startswith("vhost-user:blk:/")
    assert transport.num_queues == 3
    assert transport.status == 0
    live(transport, 1)
    config = transport.config(spec.CONFIG)
    assert config["capacity"] == SIZE // 512
    assert config["num_queues"] == 3
    assert config["blk_size"] == 512


def test_descriptors_hold_neither_our_pointers_nor_offsets(start: Start, connect: Open) -> None:
    transport = connect(start(NULL))
    live(transport)
    buffer = transport.pool.allocate(64)
    assert buffer.address != buffer.pointer
    assert transport.space.user_address(buffer.address) == buffer.pointer
    with pytest.raises(UsageError, match="no region"):
        transport.space.user_address(buffer.pointer)


@pytest.mark.parametrize(
    ("image", "indirect", "event_idx"),
    list(itertools.product(("raw", "qcow2"), (False, True), (False, True))),
)
def test_what_is_written_is_kept(
    start: Start, connect: Open, tmp_path: Path, image: str, indirect: bool, event_idx: bool
) -> None:
    path = tmp_path / "disk"
    if image == "raw":
        path.write_bytes(bytes(SIZE))
        node = f"driver=file,filename={path},aio=threads"
    else:
        qcow2(path, SIZE)
        node = f"driver=qcow2,file.driver=file,file.filename={path}"
    backend = start(node)
    denied = [*([] if indirect else ["-indirect_desc"]), *([] if event_idx else ["-event_idx"])]
    transport = connect(backend, f"?features={','.join(denied)}")
    (queue,) = live(transport)
    assert (transport.has(F_INDIRECT_DESC), transport.has(F_EVENT_IDX)) == (indirect, event_idx)
    requests = Requests(transport, queue, 64)
    content = np.random.default_rng(1).bytes(64 * BLOCK)
    for slot in range(64):
        requests.add(slot, spec.T_OUT, 8 * slot, content[BLOCK * slot : BLOCK * (slot + 1)])
    assert requests.finish(64) == dict.fromkeys(range(64), 1)
    assert {requests.status(slot) for slot in range(64)} == {spec.S_OK}
    requests.add(0, spec.T_FLUSH, 0)
    requests.finish(1)
    assert requests.status(0) == spec.S_OK
    transport.close()
    backend.stop()
    if image == "raw":
        assert path.read_bytes()[: len(content)] == content
    transport = connect(start(node))
    (queue,) = live(transport)
    requests = Requests(transport, queue, 64)
    for slot in range(64):
        requests.add(slot, spec.T_IN, 8 * (63 - slot), BLOCK)
    assert requests.finish(64) == dict.fromkeys(range(64), BLOCK + 1)
    assert b"".join(requests.data(63 - slot) for slot in range(64)) == content


@pytest.mark.parametrize("depth", [1, 8, 32, 128])
@pytest.mark.parametrize("mode", ["msix", "poll"])
def test_random_reads(start: Start, connect: Open, tmp_path: Path, depth: int, mode: str) -> None:
    path = tmp_path / "disk"
    rng = np.random.default_rng(depth)
    content = rng.bytes(SIZE)
    path.write_bytes(content)
    transport = connect(start(f"driver=file,filename={path}"), f"?mode={mode}")
    (queue,) = live(transport, size=512)
    requests = Requests(transport, queue, depth)
    blocks = dict(enumerate(rng.integers(0, SIZE // BLOCK, depth).tolist()))
    for slot, block in blocks.items():
        requests.add(slot, spec.T_IN, 8 * block, BLOCK)
    left = 1000
    queue.publish()
    while blocks:
        assert queue.wait(60)
        for token, length in queue.completions():
            slot = queue.cookie(token)
            assert isinstance(slot, int)
            assert length == BLOCK + 1
            block = blocks.pop(slot)
            assert requests.status(slot) == spec.S_OK
            assert requests.data(slot) == content[BLOCK * block : BLOCK * (block + 1)]
            if left:
                left -= 1
                blocks[slot] = int(rng.integers(0, SIZE // BLOCK))
                requests.add(slot, spec.T_IN, 8 * blocks[slot], BLOCK)
        queue.publish()
    assert left == 0


def test_several_queues_have_an_interrupt_each(start: Start, connect: Open) -> None:
    transport = connect(start(NULL, queues=4))
    queues = live(transport, 4)
    assert len({queue.interrupt_fd for queue in queues}) == 4
    for queue in queues:
        requests = Requests(transport, queue, 2)
        requests.add(0, spec.T_GET_ID, 0, spec.ID_BYTES)
        requests.add(1, spec.T_IN, 0, BLOCK)
        requests.finish(2)
        assert requests.data(0, spec.ID_BYTES).startswith(b"vhost_user_blk\0")
        assert requests.data(1) == bytes(BLOCK)


def test_memory_of_a_live_device_may_grow(
    start: Start, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestpv.transport.vhost_user_memory.ARENA", 4 << 20)
    transport = connect(start(NULL))
    (queue,) = live(transport)
    far = [transport.pool.allocate(3 << 20) for _ in range(2)]
    assert len(transport.space.arenas) == 3
    header, status = far[0][0:16], far[1][-1:]
    header.array.view(spec.REQUEST_HEADER)[0] = (spec.T_IN, 0, 0)
    status.array[0] = UNTOUCHED
    queue.add([header], [far[1][0:512], status])
    queue.publish()
    assert queue.wait(60)
    assert [length for _, length in queue.completions()] == [513]
    assert status.array[0] == spec.S_OK


def test_a_reset_ends_what_was_in_flight(start: Start, connect: Open) -> None:
    """Requests that take a while: none of them may show up in the rings of the next life."""
    transport = connect(start(f"{NULL},latency-ns=200000000"))
    for _ in range(3):
        (queue,) = live(transport)
        requests = Requests(transport, queue, 8)
        for slot in range(8):
            requests.add(slot, spec.T_IN, 0, BLOCK)
        queue.publish()
        transport.reset()
    (queue,) = live(transport)
    requests = Requests(transport, queue, 1)
    requests.add(0, spec.T_IN, 0, BLOCK)
    assert requests.finish(1) == {0: BLOCK + 1}


class Qmp:
    """qemu-storage-daemon's monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it answers."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while "return" not in (answer := json.loads(self._file.readline())):
            assert "error" not in answer, answer
        return answer["return"]


def test_a_resized_disk_is_a_configuration_change(start: Start, connect: Open, tmp_path: Path) -> None:
    """Only the daemon of a newer QEMU (from 8.1 on) tells."""
    path, monitor = tmp_path / "disk", tmp_path / "qmp"
    path.write_bytes(bytes(SIZE))
    options = ["--chardev", f"socket,id=mon,path={monitor},server=on,wait=off", "--monitor", "mon"]
    transport = connect(start(f"driver=file,filename={path}", options=options, tree=tree.get("peers")))
    live(transport)
    assert transport.config(spec.CONFIG)["capacity"] == SIZE // 512
    fd = transport.config_fd
    assert fd is not None
    assert select.select([fd], [], [], 0)[0] == []
    Qmp(monitor).execute("block_resize", **{"node-name": "disk", "size": 2 * SIZE})
    assert select.select([fd], [], [], 60)[0] == [fd]
    assert transport.config(spec.CONFIG)["capacity"] == 2 * SIZE // 512


def test_a_field_of_the_configuration_is_written(start: Start, connect: Open) -> None:
    transport = connect(start(NULL))
    live(transport)
    field = spec.CONFIG["writeback"]
    for value in (0, 1, 0):
        transport.config_write(field, value)
        assert transport.config(spec.CONFIG)["writeback"] == value


# A back end that dies.


def slow(path: Path) -> dict[str, Any]:
    """A block node that carries out 50 requests a second."""
    return {
        "node": f"driver=throttle,throttle-group=slow,file.driver=file,file.filename={path}",
        "options": ["--object", "throttle-group,id=slow,x-iops-total=50"],
    }


def test_death_wakes_who_waits(start: Start, connect: Open) -> None:
    backend = start(f"{NULL},latency-ns=20000000000")
    transport = connect(backend)
    (queue,) = live(transport)
    requests = Requests(transport, queue, 1)
    requests.add(0, spec.T_IN, 0, BLOCK)
    queue.publish()
    killer = threading.Timer(0.1, backend.kill)
    killer.start()
    with pytest.raises(DeviceGone, match="back end closed the connection"):
        queue.wait(None)
    killer.join()
    fd = transport.config_fd
    assert fd is not None
    assert select.select([fd], [], [], 0)[0] == [fd]
    with pytest.raises(DeviceGone):
        transport.config(spec.CONFIG)
    with pytest.raises(DeviceGone):
        _ = transport.status


def test_requests_survive_the_death_of_the_back_end(start: Start, connect: Open, tmp_path: Path) -> None:
    """Killed in mid-burst and started again: every write is completed once, and none is lost."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    backend = start(**slow(path))
    transport = connect(backend)
    (queue,) = live(transport)
    requests = Requests(transport, queue, 64)
    content = np.random.default_rng(2).bytes(64 * BLOCK)
    for slot in range(64):
        requests.add(slot, spec.T_OUT, 8 * slot, content[BLOCK * slot : BLOCK * (slot + 1)])
    queue.publish()
    done: list[int] = []

    def take() -> None:
        for token, _ in queue.completions():
            slot = queue.cookie(token)
            assert isinstance(slot, int)
            done.append(slot)

    while len(done) < 10:
        assert queue.wait(60)
        take()
    backend.kill()
    while queue.pending():
        take()
    with pytest.raises(DeviceGone):
        queue.wait(60)
    assert 10 <= len(done) < 64
    with pytest.raises(GuestpvError, match="nobody listens"):
        transport.reconnect(timeout=0.1)
    backend.command = [word.replace("x-iops-total=50", "x-iops-total=5000") for word in backend.command]
    backend.start()
    again = transport.reconnect()
    slots = [queue.cookie(token) for token in again[0]]
    assert sorted([*done, *slots]) == list(range(64))  # type: ignore[type-var]
    assert slots == sorted(slots)  # type: ignore[type-var]
    for slot in slots:
        assert isinstance(slot, int)
        requests.again(slot, readable=True)
    assert set(requests.finish(len(slots))) == set(slots)
    assert {requests.status(slot) for slot in range(64)} == {spec.S_OK}
    assert path.read_bytes()[: len(content)] == content


def test_completions_come_before_a_reconnect(start: Start, connect: Open) -> None:
    backend = start(NULL)
    transport = connect(backend)
    (queue,) = live(transport)
    requests = Requests(transport, queue, 1)
    requests.add(0, spec.T_IN, 0, BLOCK)
    queue.publish()
    assert queue.wait(60)
    backend.kill()
    backend.start()
    with pytest.raises(UsageError, match="queue 0 has completions"):
        transport.reconnect()
    assert len(list(queue.completions())) == 1
    assert transport.reconnect() == {0: []}
    requests.add(0, spec.T_IN, 0, BLOCK)
    assert requests.finish(1) == {0: BLOCK + 1}


def test_another_back_end_in_its_place_is_refused(start: Start, connect: Open) -> None:
    backend = start(NULL, queues=2)
    transport = connect(backend)
    live(transport, 2)
    backend.command = [word.replace("num-queues=2", "num-queues=1") for word in backend.command]
    backend.kill()
    backend.start()
    with pytest.raises(Refused, match="has 1 queues now"):
        transport.reconnect()


def test_a_device_can_begin_anew_after_a_death(start: Start, connect: Open) -> None:
    backend = start(NULL)
    transport = connect(backend)
    live(transport)
    backend.kill()
    backend.start()
    transport.reset()
    (queue,) = live(transport)
    requests = Requests(transport, queue, 1)
    requests.add(0, spec.T_IN, 0, BLOCK)
    assert requests.finish(1) == {0: BLOCK + 1}


SLOW = ("--object", "throttle-group,id=slow,x-iops-total=50")
SLOW_NODE = "driver=throttle,throttle-group=slow,file.driver=null-co,file.size=16777216,file.read-zeroes=on"


@pytest.mark.parametrize("mode", ["msix", "poll"])
def test_a_burst_whose_back_end_dies_ends_at_once(tmp_path: Path, mode: str) -> None:
    """Not by its time limit, and what is in flight is never taken for done; a restart begins anew."""
    with storage_daemon(tmp_path / "slow.sock", SLOW_NODE, options=SLOW) as backend:
        transport = guestpv.open(f"vhost-user:blk:{backend.socket}?mode={mode}")
        with Blk(transport, timeout=3600) as disk:
            rows = disk.allocate(4096 * 32)
            death = threading.Timer(0.3, backend.kill)
            death.start()
            with pytest.raises(DeviceGone, match="the back end closed the connection"):
                disk.read_many(np.zeros(100_000, np.uint64), rows, 4096, depth=32)
            with pytest.raises(DeviceGone):
                disk.read(0, 512)
            death.join()
            backend.start()
            with pytest.raises(UsageError, match=r"queue 0 cannot go on(.|\n)*restart\(\)"):
                disk.reconnect()
            disk.restart()
            assert not disk.read(0, 4096).any()


# What is no back end at all.


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(GuestpvError, match="there is no such socket"):
        guestpv.open(f"vhost-user:blk:{tmp_path / 'none'}")
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "old"))
    with pytest.raises(GuestpvError, match="nobody listens"):
        guestpv.open(f"vhost-user:blk:{tmp_path / 'old'}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(tmp_path / "datagrams"))
        with pytest.raises(GuestpvError, match="not a stream socket"):
            guestpv.open(f"vhost-user:blk:{tmp_path / 'datagrams'}")
    with pytest.raises(UsageError, match="107 bytes"):
        guestpv.open(f"vhost-user:blk:/{'x' * 200}")


@pytest.mark.parametrize("body", ["blk", "blk:", "disk:/run/x", "/run/x"])
def test_what_a_specification_looks_like(body: str) -> None:
    with pytest.raises(UsageError, match="TYPE:PATH"):
        guestpv.open(f"vhost-user:{body}")


@pytest.mark.parametrize("query", ["queue-size=0", "queue-size=many", "queues=2"])
def test_unknown_parameters(query: str) -> None:
    with pytest.raises(UsageError, match="queue"):
        guestpv.open(f"vhost-user:blk:/run/x?{query}")


def test_a_qmp_monitor_is_no_back_end(start: Start, tmp_path: Path) -> None:
    monitor = tmp_path / "qmp"
    start(NULL, options=["--chardev", f"socket,id=m,path={monitor},server=on,wait=off", "--monitor", "m"])
    with pytest.raises(ProtocolError, match="does not speak vhost-user") as caught:
        guestpv.open(f"vhost-user:blk:{monitor}")
    assert f"ss -xlp | grep {monitor}" in caught.value.hint


@pytest.mark.parametrize("silent", [True, False])
def test_a_peer_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    if silent:
        monkeypatch.setattr("guestpv.transport.vhost_user_session.ANSWER_LIMIT", 0.2)
    path = tmp_path / "silent"
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        if silent:
            with pytest.raises(TimeLimit, match="GET_FEATURES"):
                guestpv.open(f"vhost-user:blk:{path}")
        else:
            closer = threading.Thread(target=lambda: server.accept()[0].close())
            closer.start()
            with pytest.raises(DeviceGone, match="closed the connection"):
                guestpv.open(f"vhost-user:blk:{path}")
            closer.join()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_feature_that_the_back_end_lacks(start: Start, connect: Open) -> None:
    transport = connect(start(NULL), "?features=%2Bring_packed")
    with pytest.raises(Refused, match="does not offer RING_PACKED"):
        live(transport)
    assert not transport.offered >> F_RING_PACKED & 1


def test_nothing_is_left_open(start: Start, connect: Open) -> None:
    backend = start(NULL)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        transport = connect(backend)
        live(transport)
        transport.close()
    assert len(os.listdir("/proc/self/fd")) == before
