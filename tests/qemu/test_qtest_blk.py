"""QEMU's block device under bare rings: several queues, errors, growth, and rings it cannot stand."""

from __future__ import annotations

import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guestpv.errors import TimeLimit
from guestpv.memory import DmaBuffer
from guestpv.pci.qtest import QtestFunction
from guestpv.spec import blk as spec
from guestpv.spec.features import mask
from guestpv.spec.ring import DESC_F_WRITE, PACKED_DESC_F_AVAIL
from guestpv.spec.status import Status
from guestpv.transport.pci import PciTransport
from guestpv.virtqueue.queue import Virtqueue

Device = Callable[..., PciTransport]

SIZE = 1 << 20
NULL = f"driver=null-co,size={SIZE},read-zeroes=on"
STATUS_UNTOUCHED = 0xFF


class Requests:
    """Block requests with memory of their own, on one queue."""

    def __init__(self, transport: PciTransport, queue: Virtqueue, slots: int) -> None:
        self.queue = queue
        self.memory = transport.pool.allocate(8192 * slots, align=4096)

    def _part(self, slot: int, start: int, length: int) -> DmaBuffer:
        return self.memory[8192 * slot + start : 8192 * slot + start + length]

    def add(self, slot: int, kind: int, sector: int, data: bytes | int) -> int:
        """Add a request; ``data`` is what to write, or how many bytes to read. Returns the token."""
        header = self._part(slot, 0, 16)
        header.array.view(spec.REQUEST_HEADER)[0] = (kind, 0, sector)
        status = self._part(slot, 16, 1)
        status.array[0] = STATUS_UNTOUCHED
        if isinstance(data, int):
            body = self._part(slot, 4096, data)
            body.array[:] = 0xEE
            return self.queue.add(readable=[header], writable=[body, status])
        body = self._part(slot, 4096, len(data))
        body.write(data)
        return self.queue.add(readable=[header, body] if data else [header], writable=[status])

    def result(self, slot: int, length: int) -> tuple[int, bytes]:
        """Status and data of a finished request."""
        return int(self._part(slot, 16, 1).array[0]), self._part(slot, 4096, length).array.tobytes()

    def finish(self, count: int) -> dict[int, int]:
        """Publish and wait for ``count`` completions: token to used length."""
        self.queue.publish()
        used: dict[int, int] = {}
        while len(used) < count:
            assert self.queue.wait(60)
            used.update(self.queue.completions())
        return used


def live(transport: PciTransport, queues: int = 1) -> list[Virtqueue]:
    transport.negotiate(supported=mask((spec.F_FLUSH, spec.F_MQ)))
    made = [transport.make_queue(index) for index in range(queues)]
    transport.driver_ok()
    return made


def test_several_queues_each_with_an_interrupt(device: Device, oracle: Any) -> None:
    transport = device("virtio-blk-pci,num-queues=4", blockdev=NULL)
    queues = live(transport, 4)
    assert len({queue.interrupt_fd for queue in queues}) == 4
    for index, queue in enumerate(queues):
        requests = Requests(transport, queue, 1)
        for _ in range(index + 1):
            token = requests.add(0, spec.T_IN, 0, 512)
            assert requests.finish(1) == {token: 513}
            assert requests.result(0, 512) == (spec.S_OK, bytes(512))
    assert [oracle(transport).queue(index)["used-idx"] for index in range(4)] == [1, 2, 3, 4]


def test_vectors_are_shared_when_there_are_too_few(device: Device) -> None:
    transport = device("virtio-blk-pci,num-queues=4,vectors=2", blockdev=NULL)
    for queue in live(transport, 4):
        requests = Requests(transport, queue, 1)
        token = requests.add(0, spec.T_IN, 0, 512)
        assert requests.finish(1) == {token: 513}


def test_a_request_beyond_the_end_is_an_error_of_its_own(device: Device) -> None:
    transport = device("virtio-blk-pci", blockdev=NULL)
    (queue,) = live(transport)
    requests = Requests(transport, queue, 2)
    requests.add(0, spec.T_IN, SIZE // 512, 512)
    requests.add(1, spec.T_IN, SIZE // 512 - 1, 512)
    requests.finish(2)
    assert requests.result(0, 0)[0] == spec.S_IOERR
    assert requests.result(1, 512) == (spec.S_OK, bytes(512))


@pytest.mark.parametrize("mode", ["msix", "intx"])
def test_a_resized_disk_raises_a_configuration_interrupt(device: Device, tmp_path: Path, mode: str) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(SIZE))
    transport = device("virtio-blk-pci", blockdev=f"driver=file,filename={image},node-name=disk", mode=mode)
    live(transport)
    assert transport.config(spec.CONFIG)["capacity"] == SIZE // 512
    fd = transport.config_fd
    assert fd is not None
    function = transport.function
    assert isinstance(function, QtestFunction)
    function.machine.qemu.qmp.execute("block_resize", {"node-name": "disk", "size": 2 * SIZE})
    assert select.select([fd], [], [], 60)[0] == [fd]
    assert transport.config(spec.CONFIG)["capacity"] == 2 * SIZE // 512


def test_a_ring_that_hangs_old_qemu_is_reported_as_such(device: Device) -> None:
    """A packed descriptor of length 0: QEMU 7.2 spins for ever, 10.0.13 sets NEEDS_RESET and lives."""
    transport = device("virtio-blk-pci,packed=on", blockdev=NULL, mode="poll")
    (queue,) = live(transport)
    memory = transport.pool.allocate(64)
    queue.desc[0] = (memory.address, 0, 0, PACKED_DESC_F_AVAIL | DESC_F_WRITE)
    function = transport.function
    assert isinstance(function, QtestFunction)
    assert transport.status & Status.DRIVER_OK
    function.machine.qemu._limit_answers(3.0)
    queue.notify()
    if function.machine.qemu.version >= (10, 0, 13):
        wait_for_the_end(transport)
        assert transport.status & Status.NEEDS_RESET
        return
    with pytest.raises(TimeLimit, match=r"spins: .* killed"):
        wait_for_the_end(transport)


def wait_for_the_end(transport: PciTransport) -> None:
    for _ in range(1000):
        transport.read_status()


def test_the_same_ring_split_is_survived(device: Device, oracle: Any) -> None:
    transport = device("virtio-blk-pci", blockdev=NULL, mode="poll")
    (queue,) = live(transport)
    memory = transport.pool.allocate(64)
    queue.desc[0] = (memory.address, 0, DESC_F_WRITE, 0)
    queue.driver["ring"][0] = 0
    queue.driver["idx"] = 1
    queue.notify()
    while not transport.status & Status.NEEDS_RESET:
        pass
    # QEMU 11.1 ends by an assertion of its own when it is asked about a device with NEEDS_RESET or none.
    assert isinstance(transport.function, QtestFunction)
    answers = transport.function.machine.qemu.version < (11,)
    if answers:
        assert oracle(transport).broken
    transport.reset()
    if answers:
        assert not oracle(transport).broken
    (queue,) = live(transport)
    requests = Requests(transport, queue, 1)
    token = requests.add(0, spec.T_IN, 0, 512)
    assert requests.finish(1) == {token: 513}
