"""QEMU's entropy device under the driver and under bare rings, in every combination of ring features."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceGone, QueueFull, TimeLimit
from guestpv.pci.qtest import QtestFunction
from guestpv.spec.features import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, mask
from guestpv.spec.status import Status
from guestpv.transport.pci import PciTransport

Device = Callable[..., PciTransport]

LIVE = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
WORLDS = [
    pytest.param(
        machine,
        packed,
        indirect,
        event_idx,
        mode,
        id="-".join(
            (
                machine,
                "packed" if packed else "split",
                *(["indirect"] if indirect else []),
                *(["event_idx"] if event_idx else []),
                mode,
            )
        ),
    )
    for machine, packed, indirect, event_idx, mode in itertools.product(
        ("q35", "pc"), (False, True), (False, True), (False, True), ("msix", "intx", "poll")
    )
]


def spec(machine: str, packed: bool, indirect: bool, event_idx: bool, mode: str) -> dict[str, str]:
    """Arguments of ``device`` for one world."""
    denied = [*([] if indirect else ["-indirect_desc"]), *([] if event_idx else ["-event_idx"])]
    return {
        "body": "virtio-rng-pci,disable-legacy=on" + (",packed=on" if packed else ""),
        "machine": machine,
        "mode": mode,
        "features": ",".join(denied),
    }


@pytest.mark.parametrize(("machine", "packed", "indirect", "event_idx", "mode"), WORLDS)
def test_entropy(
    device: Device, oracle: Any, machine: str, packed: bool, indirect: bool, event_idx: bool, mode: str
) -> None:
    transport = device(**spec(machine, packed, indirect, event_idx, mode))
    with Rng(transport) as rng:
        seen = oracle(transport)
        assert seen.status == transport.status == LIVE
        assert seen.features == transport.features
        ring = mask((F_RING_PACKED, F_INDIRECT_DESC, F_EVENT_IDX))
        assert transport.features & ring == (
            packed << F_RING_PACKED | indirect << F_INDIRECT_DESC | event_idx << F_EVENT_IDX
        )
        queue = seen.queue(0)
        addresses = rng.queue.addresses
        assert queue["vring-num"] == rng.queue.size
        assert (queue["vring-desc"], queue["vring-avail"], queue["vring-used"]) == (
            addresses.desc,
            addresses.driver,
            addresses.device,
        )
        # More buffers than the ring has entries, several times round.
        pieces = [rng.read(64) for _ in range(5 * rng.queue.size)]
        assert len(set(pieces)) == len(pieces)
        assert {len(piece) for piece in pieces} == {64}
        after = seen.queue(0)
        assert after["inuse"] == 0
        if not packed:
            assert after["used-idx"] == after["last-avail-idx"] >= len(pieces)
        assert not seen.broken


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_buffers_of_several_elements(device: Device, packed: bool, indirect: bool) -> None:
    transport = device(**spec("q35", packed, indirect, True, "msix"))
    transport.negotiate(supported=0)
    queue = transport.make_queue(0)
    transport.driver_ok()
    memory = transport.pool.allocate(4096)
    for elements in (1, 2, 3, 8, 5):
        memory.array[:] = 0
        parts = [memory[128 * n : 128 * n + 100] for n in range(elements)]
        token = queue.add(writable=parts)
        queue.publish()
        assert queue.wait(5)
        assert list(queue.completions()) == [(token, 100 * elements)]
        for part in parts:
            assert part.array.any()
        assert not memory.array[100:128].any()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_full_ring_comes_back_whole(device: Device, packed: bool) -> None:
    transport = device(**spec("q35", packed, False, True, "msix"))
    transport.negotiate(supported=0)
    queue = transport.make_queue(0)
    transport.driver_ok()
    memory = transport.pool.allocate(64 * queue.size)
    for _ in range(10):
        tokens = {queue.add(writable=[memory[64 * n : 64 * n + 64]]) for n in range(queue.size)}
        with pytest.raises(QueueFull):
            queue.add(writable=[memory[:64]])
        queue.publish()
        used: dict[int, int] = {}
        while len(used) < len(tokens):
            assert queue.wait(5)
            used.update(queue.completions())
        assert used == dict.fromkeys(tokens, 64)


def test_small_rings(device: Device) -> None:
    for packed, size in ((False, 1), (False, 4), (True, 1), (True, 3), (True, 7)):
        transport = device(**spec("q35", packed, True, True, "poll"))
        transport.negotiate(supported=0)
        queue = transport.make_queue(0, size)
        transport.driver_ok()
        memory = transport.pool.allocate(64)
        for _ in range(4 * size):
            token = queue.add(writable=[memory])
            queue.publish()
            assert queue.wait(5)
            assert list(queue.completions()) == [(token, 64)]
        transport.close()


def test_a_device_is_negotiated_again_and_again(device: Device, oracle: Any) -> None:
    transport = device("virtio-rng-pci,packed=on,disable-legacy=on")
    for _ in range(3):
        rng = Rng(transport)
        assert len(rng.read(100)) == 100
        transport.reset()
        assert oracle(transport).status == Status(0)


def test_what_the_rate_limit_holds_back_is_drained_after_reset(device: Device) -> None:
    transport = device("virtio-rng-pci,max-bytes=1,period=3600000")
    transport.negotiate(supported=0)
    queue = transport.make_queue(0)
    transport.driver_ok()
    memory = transport.pool.allocate(4096)
    tokens = [queue.add(writable=[memory[64 * n : 64 * n + 64]]) for n in range(4)]
    queue.publish()
    assert queue.wait(5)
    ((first, length),) = queue.completions()
    assert (first, length) == (tokens[0], 1)
    assert not queue.wait(0.05)
    transport.write_status(0)
    assert transport.read_status() == 0
    assert queue.drain() == tokens[1:]


def test_a_device_behind_a_root_port_survives_a_function_level_reset(device: Device) -> None:
    transport = device("virtio-rng-pci", root_port="1")
    assert len(Rng(transport).read(100)) == 100
    assert transport.function.reset()
    assert transport.status == Status(0)
    assert len(Rng(transport).read(100)) == 100


def test_a_dead_qemu_ends_waiting_and_closing(device: Device) -> None:
    transport = device("virtio-rng-pci")
    rng = Rng(transport)
    assert isinstance(transport.function, QtestFunction)
    os.kill(transport.function.machine.qemu.pid, signal.SIGKILL)
    with pytest.raises((DeviceGone, TimeLimit)):
        rng.read(16, timeout=0.5)
    rng.close()
