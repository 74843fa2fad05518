"""The client's memory: mapped, shared, taken away while queues use it, given back."""

from __future__ import annotations

import mmap
import os
import random
from errno import EEXIST, EINVAL
from pathlib import Path

import numpy as np
import pytest

from guestpv.devices.models.net import Net as NetModel
from guestpv.drivers.net import Net
from guestpv.drivers.rng import Rng
from guestpv.memory import DmaRegion, Segment
from guestpv.pci.vfio_user import CommandRefused, Session, VfioUserFunction
from guestpv.serve.vfio_user import VfioUserServer
from guestpv.transport.pci import PciTransport
from guestpv.wire import vfio_user as wire
from guestpv.wire.vfio_user import (
    DmaMap,
    DmaUnmap,
)

from .kit import BUS, PAGE, RW, Serve, dma, mappings, refused, until


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
