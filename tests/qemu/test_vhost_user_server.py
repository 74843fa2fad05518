"""Our vhost-user back end under QEMU's front ends for blk and net, driven without a guest."""

from __future__ import annotations

import itertools
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guestpv.devices.model import Model
from guestpv.devices.models.blk import Blk
from guestpv.devices.models.blk_store import Store
from guestpv.devices.models.net import Net as NetModel
from guestpv.devices.models.wire import echo
from guestpv.drivers.net import Net
from guestpv.pci.qtest import QtestFunction
from guestpv.pci.qtest_machine import QtestMachine
from guestpv.serve.vhost_user import VhostUserServer
from guestpv.spec import blk as spec
from guestpv.spec.features import F_RING_PACKED, mask
from guestpv.transport.pci import PciTransport
from guestpv.virtqueue.queue import Virtqueue
from peers.mortal import immortal, mortal_disk

SIZE = 1 << 20
BLOCK = 4096
PACKED = 1 << F_RING_PACKED

Serve = Callable[..., VhostUserServer]
Attach = Callable[..., PciTransport]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Put a model on a socket, ``server.path``."""
    servers: list[VhostUserServer] = []

    def run(model: Model, **options: Any) -> VhostUserServer:
        servers.append(VhostUserServer(model, str(tmp_path / "vu.sock"), **options).start())
        return servers[-1]

    yield run
    for server in servers:
        server.close()


@pytest.fixture
def attach(serve: Serve) -> Iterator[Attach]:
    """A QEMU with one device behind ``-chardev socket,id=vu,path=...``."""
    transports: list[PciTransport] = []

    def run(path: object, device: str, *options: str, reconnect: bool = False) -> PciTransport:
        chardev = f"socket,id=vu,path={path}" + (",reconnect=1" if reconnect else "")
        machine = QtestMachine([device], ["-chardev", chardev, *options])
        transports.append(PciTransport(QtestFunction(machine, owns_machine=True)))
        return transports[-1]

    yield run
    for transport in transports:
        transport.close()


def live(transport: PciTransport, queues: int = 1) -> list[Virtqueue]:
    transport.negotiate(supported=mask((spec.F_FLUSH, spec.F_MQ)))
    made = [transport.make_queue(index, 128) for index in range(queues)]
    transport.driver_ok()
    return made


class Writes:
    """Writes of a block each, to blocks 0 to ``count - 1``."""

    def __init__(self, transport: PciTransport, queue: Virtqueue, count: int) -> None:
        self.queue = queue
        self.count = count
        self.content = np.random.default_rng(count).bytes(BLOCK * count)
        self.done: list[object] = []
        self.memory = transport.pool.allocate(2 * BLOCK * count, align=4096)
        for slot in range(count):
            part = self.memory[2 * BLOCK * slot : 2 * BLOCK * (slot + 1)]
            part[:16].array.view(spec.REQUEST_HEADER)[0] = (spec.T_OUT, 0, 8 * slot)
            part[BLOCK:].write(self.content[BLOCK * slot : BLOCK * (slot + 1)])
            part.array[16] = 0xFF
            queue.add([part[:16], part[BLOCK:]], [part[16:17]], cookie=slot)

    def finish(self) -> None:
        """Publish, and take all completions."""
        self.queue.publish()
        while len(self.done) < self.count:
            assert self.queue.wait(60)
            self.done += [self.queue.cookie(token) for token, _ in self.queue.completions()]
        assert sorted(self.done) == list(range(self.count))  # type: ignore[type-var]
        assert set(self.memory.array[16 :: 2 * BLOCK].tolist()) == {spec.S_OK}


@pytest.mark.parametrize(("packed", "queues"), list(itertools.product((False, True), (1, 3))))
def test_a_disk_under_qemu(serve: Serve, attach: Attach, packed: bool, queues: int) -> None:
    model = Blk(Store(size=SIZE), num_queues=queues)
    server = serve(model, offer=PACKED)
    device = f"vhost-user-blk-pci,chardev=vu,num-queues={queues},disable-legacy=on"
    transport = attach(server.path, device + (",packed=on" if packed else ""))
    for _ in range(2):
        made = live(transport, queues)
        assert transport.has(F_RING_PACKED) == packed
        assert transport.config(spec.CONFIG)["capacity"] == SIZE // 512
        for queue in made:
            writes = Writes(transport, queue, 40)
            writes.finish()
            block = bytearray(BLOCK * writes.count)
            model.store.read(0, [memoryview(block)])
            assert block == writes.content
        transport.reset()
    assert server.journal.findings == []


def test_a_disk_is_resized_under_qemu(serve: Serve, attach: Attach) -> None:
    model = Blk(Store(size=SIZE))
    transport = attach(serve(model).path, "vhost-user-blk-pci,chardev=vu,num-queues=1,disable-legacy=on")
    live(transport)
    fd = transport.config_fd
    assert fd is not None
    assert transport.config(spec.CONFIG)["capacity"] == SIZE // 512
    model.resize(2 * SIZE)
    assert select.select([fd], [], [], 60)[0] == [fd]
    assert transport.config(spec.CONFIG)["capacity"] == 2 * SIZE // 512


@pytest.mark.parametrize("packed", [False, True])
def test_a_network_card_under_qemu(serve: Serve, attach: Attach, packed: bool) -> None:
    model = NetModel(offloads=False)
    echo(model)
    server = serve(model, offer=PACKED)
    device = "virtio-net-pci,netdev=net,mac=52:54:00:00:00:09,disable-legacy=on"
    transport = attach(
        server.path, device + (",packed=on" if packed else ""), "-netdev", "vhost-user,id=net,chardev=vu"
    )
    # QEMU 7.2 dies in the MSI-X code of vhost_net_start when there is no KVM.
    transport.mode = "intx"
    net = Net(transport)
    assert transport.has(F_RING_PACKED) == packed
    frames = [net.mac + b"\x02\0\0\0\0\1\x88\xb5" + bytes((n,)) * (60 + 30 * n) for n in range(40)]
    assert net.send(frames) == 40
    came: list[bytes] = []
    while len(came) < 40:
        more = net.receive_within(60)
        assert more
        came += more
    assert came == frames
    assert server.journal.findings == []


@pytest.mark.parametrize(
    ("packed", "kind", "late"),
    list(itertools.product((False, True), ("pop", "push", "publish"), (False, True))),
)
def test_qemu_hands_on_what_was_in_flight(
    attach: Attach, tmp_path: Path, packed: bool, kind: str, late: bool
) -> None:
    """Killed at a chosen moment, started again, found by QEMU: the record is all that the new one has."""
    file, log, sock = tmp_path / "disk", tmp_path / "log", tmp_path / "sock"
    file.write_bytes(bytes(SIZE))
    count = {"pop": 37, "push": 20, "publish": 6}[kind]
    with mortal_disk(sock, file, log, kind=kind, late=late, count=count, offer=PACKED) as backend:
        device = "vhost-user-blk-pci,chardev=vu,num-queues=1,disable-legacy=on"
        transport = attach(sock, device + (",packed=on" if packed else ""), reconnect=True)
        (queue,) = live(transport)
        assert transport.has(F_RING_PACKED) == packed
        writes = Writes(transport, queue, 60)
        queue.publish()
        backend.wait(60)
        seen = [queue.cookie(token) for token, _ in queue.completions()]
        executed = log.read_text().split()
        assert len(seen) < 60
        immortal(backend)
        backend.start()
        writes.done = list(seen)
        writes.finish()
        after = log.read_text().split()[len(executed) :]
        assert not set(map(str, seen)) & set(after), "a completed request was carried out again"
        assert set(executed) | set(after) == set(map(str, range(60)))
        transport.close()
    assert file.read_bytes()[: len(writes.content)] == writes.content
