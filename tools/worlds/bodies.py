"""What the drivers must do in every world. It imports guestpv and numpy only, so it runs in a guest, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from guestpv.drivers.blk import Blk
from guestpv.drivers.net import Net
from guestpv.drivers.rng import Rng
from guestpv.errors import QueueFull, UsageError
from guestpv.memory import DmaBuffer
from guestpv.spec import net as net_spec
from guestpv.spec.features import mask
from guestpv.spec.status import Status
from guestpv.transport.base import Transport
from guestpv.virtqueue.queue import Virtqueue

LIVE = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
PATIENCE = 60.0
CABLE = 8
"""Frames in flight: the shortest cable of all worlds drops or blocks beyond that."""
LENGTHS = (14, 60, 64, 1000, 1514, 1518)
BLOCK = 4096


@dataclass
class Place:
    """Where a body runs.

    Attributes:
        open: opens the device, reset and not negotiated.
        live: looks at a device that has just come to life from its own side, where that can be done.
        returned: what comes back for a frame that was sent.
        stored: what is behind the disk, or None where nobody can look.
        queues: of the disk.
        pairs: queue pairs of the network device.
        small_rings: queue sizes worth a try.
    """

    open: Callable[[], Transport]
    live: Callable[[Transport], None] = lambda transport: None
    returned: Callable[[bytes], bytes] = lambda frame: frame
    stored: Callable[[], bytes] | None = None
    queues: int = 1
    pairs: int = 1
    small_rings: Sequence[int] = (1, 4)


# The entropy device.


def rng_reads(place: Place) -> None:
    """More buffers than the ring has entries, several times round, no two the same."""
    with place.open() as transport, Rng(transport) as rng:
        assert transport.status == LIVE
        place.live(transport)
        pieces = [rng.read(64) for _ in range(min(3 * rng.queue.size, 1000))]
        assert len(set(pieces)) == len(pieces)
        assert {len(piece) for piece in pieces} == {64}
        assert len(set(rng.read(10_000))) == 256
        assert rng.queue.outstanding == 0


def rng_is_negotiated_again(place: Place) -> None:
    """A reset ends a life, and the next one begins as the first."""
    with place.open() as transport:
        for _ in range(3):
            assert len(Rng(transport).read(100)) == 100
            transport.reset()
            assert transport.status == Status.RESET


def ring_of(transport: Transport, size: int | None = None) -> Virtqueue:
    """The entropy device's queue without its driver."""
    transport.negotiate(supported=0)
    queue = transport.make_queue(0, size)
    transport.driver_ok()
    return queue


def buffers_of_several_elements(place: Place) -> None:
    """Every element is used, and nothing beside it."""
    with place.open() as transport:
        queue = ring_of(transport)
        memory = transport.pool.allocate(4096)
        for elements in (1, 2, 3, 8, 5):
            memory.array[:] = 0
            parts = [memory[128 * n : 128 * n + 100] for n in range(elements)]
            token = queue.add(writable=parts)
            queue.publish()
            assert queue.wait(PATIENCE)
            assert list(queue.completions()) == [(token, 100 * elements)]
            assert all(part.array.any() for part in parts)
            assert not memory.array[100:128].any()


def a_full_ring_comes_back_whole(place: Place) -> None:
    """As many buffers as entries, not one more, again and again."""
    with place.open() as transport:
        queue = ring_of(transport)
        memory = transport.pool.allocate(64 * queue.size)
        for _ in range(5):
            tokens = {queue.add(writable=[memory[64 * n : 64 * n + 64]]) for n in range(queue.size)}
            try:
                queue.add(writable=[memory[:64]])
            except QueueFull:
                pass
            else:
                raise AssertionError("a full ring took one more")
            queue.publish()
            used: dict[int, int] = {}
            while len(used) < len(tokens):
                assert queue.wait(PATIENCE)
                used.update(queue.completions())
            assert used == dict.fromkeys(tokens, 64)


def small_rings(place: Place) -> None:
    """Rings of a few entries, packed ones of odd sizes too."""
    for size in place.small_rings:
        with place.open() as transport:
            queue = ring_of(transport, size)
            assert queue.size == size
            memory = transport.pool.allocate(64)
            for _ in range(4 * size):
                token = queue.add(writable=[memory])
                queue.publish()
                assert queue.wait(PATIENCE)
                assert list(queue.completions()) == [(token, 64)]


# The network device, with somebody at the other end who returns each frame.


def frames(count: int, seed: int) -> list[bytes]:
    """Ethernet frames, each with its number and random content, of all sorts of lengths."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = LENGTHS[number % len(LENGTHS)]
        head = b"\x02\0\0\0\0\2" + b"\x02\0\0\0\0\1" + (number & 0xFFFF).to_bytes(2, "big")
        made.append(head + random.bytes(length - len(head)))
    return made


def exchange(place: Place, net: Net, wanted: list[bytes]) -> None:
    """Send all frames, a few at a time; each comes back, in order."""
    for start in range(0, len(wanted), CABLE):
        burst = wanted[start : start + CABLE]
        assert net.send(burst) == len(burst)
        got: list[bytes] = []
        while len(got) < len(burst):
            more = net.receive_within(PATIENCE)
            assert more, f"{len(got)} of {len(burst)} frames came back"
            got += more
        assert got == [place.returned(frame) for frame in burst]


def net_frames_come_back(place: Place) -> None:
    """More than the 256 entries that most devices' rings have."""
    with place.open() as transport, Net(transport) as net:
        assert transport.status == LIVE
        place.live(transport)
        assert net.link_up
        exchange(place, net, frames(300, 1))
        assert net.receive() == []


def net_goes_on_after_a_reset(place: Place) -> None:
    """Each life begins with empty rings."""
    with place.open() as transport:
        for life in range(3):
            exchange(place, Net(transport), frames(20, life))
            transport.reset()
            assert transport.status == Status.RESET


def net_refuses_frames_it_cannot_send(place: Place) -> None:
    """Too short or too long; what was right before them is on its way."""
    with place.open() as transport, Net(transport) as net:
        for wrong in (b"", bytes(13), bytes(net.mtu + 19)):
            try:
                net.send([wrong])
            except UsageError:
                continue
            raise AssertionError(f"{len(wrong)} bytes were sent")
        exchange(place, net, frames(3, 7))


def net_every_pair(place: Place) -> None:
    """The driver asks for all queue pairs, and each carries frames; the queues alone, without the driver."""
    with place.open() as transport:
        several = place.pairs > 1
        queue_features = (net_spec.F_MQ, net_spec.F_CTRL_VQ) if several else ()
        transport.negotiate(supported=mask((net_spec.F_MRG_RXBUF, *queue_features)))
        queues = [transport.make_queue(index) for index in range(2 * place.pairs)]
        memory = transport.pool.allocate(64)
        control = None
        if several:
            most = transport.config(net_spec.CONFIG)["max_virtqueue_pairs"]
            assert isinstance(most, int)
            control = transport.make_queue(2 * most)
        transport.driver_ok()
        if control is not None:
            command = (net_spec.CTRL_MQ, net_spec.CTRL_MQ_VQ_PAIRS_SET, place.pairs, 0, 0xFF)
            memory.write(bytes(command))
            control.add([memory[:4]], [memory[4:5]])
            control.publish()
            assert control.wait(PATIENCE)
            assert [length for _, length in control.completions()] == [1]
            assert memory.array[4] == net_spec.CTRL_OK
        header = net_spec.header_dtype(transport.features).itemsize
        sent = frames(place.pairs, 5)
        for pair in range(place.pairs):
            # A device may choose one receive queue for all.
            for _ in sent:
                room = transport.pool.allocate(2048)
                queues[2 * pair].add(writable=[room], cookie=room)
            queues[2 * pair].publish()
        for pair, frame in enumerate(sent):
            room = transport.pool.allocate(2048)
            room.write(bytes(header) + frame)
            queues[2 * pair + 1].add(readable=[room[: header + len(frame)]])
            queues[2 * pair + 1].publish()
        waiting = {place.returned(frame) for frame in sent}
        deadline = time.monotonic() + PATIENCE
        while waiting:
            assert time.monotonic() < deadline, f"{len(waiting)} of {place.pairs} frames did not come back"
            for queue in queues[::2]:
                if queue.wait(0.02):
                    for token, length in queue.completions():
                        room = queue.cookie(token)
                        assert isinstance(room, DmaBuffer)
                        waiting.remove(room.array[header:length].tobytes())


# The block device.


def blk_keeps_what_is_written(place: Place) -> None:
    """Content at all sorts of places, found by this life and by the next one."""
    random = np.random.default_rng(3)
    with place.open() as transport, Blk(transport) as disk:
        assert transport.status == LIVE
        place.live(transport)
        content = random.integers(0, 256, disk.capacity, np.uint8)
        disk.write(0, content, fua=True)
        for _ in range(40):
            start = int(random.integers(0, disk.capacity // 512 - 64)) * 512
            length = int(random.integers(1, 64)) * 512
            assert np.array_equal(disk.read(start, length), content[start : start + length])
        content[BLOCK : 2 * BLOCK] = 0x5A
        disk.write(BLOCK, content[BLOCK : 2 * BLOCK].tobytes())
        disk.flush()
    if place.stored is not None:
        assert place.stored() == content.tobytes()
    with place.open() as transport, Blk(transport) as disk:
        assert np.array_equal(disk.read(0, disk.capacity), content)


def blk_many_requests_at_once(place: Place) -> None:
    """As deep as the queue lets it, each block to its own place."""
    random = np.random.default_rng(4)
    with place.open() as transport, Blk(transport) as disk:
        blocks = disk.capacity // BLOCK
        places = random.permutation(blocks)[:128] * BLOCK
        rows = disk.allocate(places.size * BLOCK)
        rows.array[:] = random.integers(0, 256, rows.nbytes, np.uint8)
        back = disk.allocate(places.size * BLOCK)
        for depth in (1, 8, 128):
            disk.write_many(places, rows, BLOCK, depth=depth).check()
            back.array[:] = 0
            disk.read_many(places, back, BLOCK, depth=depth).check()
            assert np.array_equal(back.array, rows.array)


def blk_every_queue(place: Place) -> None:
    """What one queue wrote, all the others read."""
    with place.open() as transport, Blk(transport, queues=place.queues) as disk:
        for queue in range(place.queues):
            data = bytes([queue + 1]) * BLOCK
            disk.write(queue * BLOCK, data, queue=queue, fua=True)
            for other in range(place.queues):
                assert bytes(disk.read(queue * BLOCK, BLOCK, queue=other)) == data


def blk_ends_where_it_ends(place: Place) -> None:
    """The last sector is there, the one behind it is refused, and the disk is none the worse for it."""
    with place.open() as transport, Blk(transport) as disk:
        disk.write(disk.capacity - 512, b"z" * 512)
        try:
            disk.read(disk.capacity, 512)
        except UsageError:
            pass
        else:
            raise AssertionError("a sector beyond the end was read")
        assert bytes(disk.read(disk.capacity - 512, 512)) == b"z" * 512


BODIES: dict[str, tuple[Callable[[Place], None], ...]] = {
    "rng": (
        rng_reads,
        rng_is_negotiated_again,
        buffers_of_several_elements,
        a_full_ring_comes_back_whole,
        small_rings,
    ),
    "net": (
        net_every_pair,
        net_frames_come_back,
        net_goes_on_after_a_reset,
        net_refuses_frames_it_cannot_send,
    ),
    "blk": (
        blk_keeps_what_is_written,
        blk_many_requests_at_once,
        blk_every_queue,
        blk_ends_where_it_ends,
    ),
}
"""Device type -> what must hold."""

SMALL_RINGS = {False: (1, 4), True: (1, 3, 7)}
"""Whether packed -> sizes worth a try."""
