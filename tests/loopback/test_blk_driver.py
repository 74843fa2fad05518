"""The block driver over our own disk: content, splitting, limits, errors, and the end of every request."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from guestpv.devices.loopback import open_function
from guestpv.devices.models.blk import Blk as Model
from guestpv.devices.ring import Chain
from guestpv.drivers.blk import Blk
from guestpv.drivers.blk_aio import AioBlk
from guestpv.drivers.blk_errors import BlkIoError, BlkUnsupported, OutcomeUnknown
from guestpv.drivers.blk_queue import Outcome, Request
from guestpv.errors import DeviceViolation, Refused, TimeLimit, UsageError
from guestpv.spec import blk as spec
from guestpv.transport.base import FeatureFilter
from guestpv.transport.pci import PciTransport

RANDOM = np.random.default_rng(5)
SIZE = 64 << 20


class Disk:
    """The driver and, at the other end, the model."""

    def __init__(self, **params: Any) -> None:
        options = {name: params.pop(name) for name in ("queues", "timeout", "staging") if name in params}
        self.function = open_function("blk", {name: str(value) for name, value in params.items()})
        assert isinstance(self.function.model, Model)
        self.model = self.function.model
        self.transport = PciTransport(self.function)
        self.blk = Blk(self.transport, **options)

    def hold(self) -> list[tuple[Any, Chain]]:
        """From now on the model keeps what it gets; returns the list where it does."""
        kept: list[tuple[Any, Chain]] = []
        self.answer = self.model.handle
        self.model.handle = lambda queue, chain: kept.append((queue, chain))  # type: ignore[method-assign]
        return kept


Make = Callable[..., Disk]


@pytest.fixture
def make() -> Iterator[Make]:
    disks: list[Disk] = []
    clean: list[bool] = []

    def start(*, findings: bool = False, **params: Any) -> Disk:
        disks.append(Disk(**params))
        clean.append(not findings)
        return disks[-1]

    yield start
    for disk, is_clean in zip(disks, clean, strict=True):
        disk.blk.close()
        if is_clean:
            assert [str(finding) for finding in disk.function.findings] == []


def noise(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return RANDOM.integers(0, 256, nbytes, dtype=np.uint8)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"packed": "on"},
    {"indirect_desc": "off", "event_idx": "off", "queue_size": 4},
    {"packed": "on", "in_order": "on", "notification_data": "on", "queue_size": 7},
    {"seg_max": 1, "size_max": 512},
    {"seg_max": 3, "size_max": 5000},
    {"offer": "-seg_max"},
    {"block_size": 4096, "seg_max": 2},
    {"segment": 65536, "staging": 1 << 20},
    {"threaded": "on", "msix": "off"},
    {"threaded": "on", "msix": "1"},
]


@pytest.mark.requirement("DRV-BLK-17", "DRV-BLK-47", "DRV-BLK-48", "DRV-BLK-57", "DRV-BLK-58")
@pytest.mark.parametrize(
    "params", VARIANTS, ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "plain"
)
def test_what_was_written_is_read(make: Make, params: dict[str, Any]) -> None:
    disk = make(**params)
    data = noise(1 << 20)
    for offset, start, length in ((0, 0, 4096), (8192, 4096, 77 * 4096), (1 << 20, 0, 1 << 20)):
        part = data[start : start + length]
        disk.blk.write(offset, part)
        assert np.array_equal(disk.blk.read(offset, length), part)
    disk.blk.write(0, bytes(disk.blk.block_size), fua=True)
    assert disk.model.flushes == 1
    assert disk.blk.read(0, disk.blk.block_size).sum() == 0
    assert disk.blk.queues[0].in_flight == 0
    assert len(disk.blk.queues[0].free) == disk.blk.queues[0].queue.size


@pytest.mark.parametrize("size_max", [512, 1536, 0])
def test_scatter_lists(make: Make, size_max: int) -> None:
    disk = make(seg_max=4, size_max=size_max)
    memory = disk.blk.allocate(64 << 10)
    memory.array[:] = noise(memory.nbytes)
    cuts = [0, 16, 100, 512, 1024, 5000, 5120, 20000, 64 << 10]
    pieces = [memory[a:b] for a, b in itertools.pairwise(cuts)]
    disk.blk.write_from(4096, pieces)
    before = memory.array.copy()
    memory.array[:] = 0
    disk.blk.read_into(4096, pieces)
    assert np.array_equal(memory.array, before)
    crumbs = [memory[8 * i : 8 * i + 8] for i in range(64)]
    with pytest.raises(
        UsageError, match=r"4 scatter elements hold 32 bytes, no block of 512, .* seg_max = 4"
    ):
        disk.blk.read_into(0, crumbs)


@pytest.mark.requirement("DRV-BLK-18", "DRV-BLK-20", "DRV-BLK-22", "DRV-BLK-25", "DRV-BLK-55", "DRV-BLK-56")
def test_ranges_are_split(make: Make) -> None:
    disk = make()
    disk.model.config |= {"max_discard_sectors": 100, "max_discard_seg": 3, "discard_sector_alignment": 8}
    disk.model.config |= {"max_write_zeroes_sectors": 64, "max_write_zeroes_seg": 2}
    disk.blk.restart()
    disk.blk.write(0, noise(1 << 20))
    keep = disk.blk.read(512 * 1003, 512).copy()
    disk.blk.discard(512 * 3, 512 * 1000)
    assert sum(count for _, count in disk.model.discarded) == 1000
    assert disk.model.discarded[0] == (3, 93)
    assert all(sector % 8 == 0 and count <= 100 for sector, count in disk.model.discarded[1:])
    requests = disk.model.requests
    disk.blk.write_zeroes(512 * 3, 512 * 1000, unmap=True)
    assert disk.model.requests - requests == 8
    assert disk.blk.read(512 * 3, 512 * 1000).sum() == 0
    assert np.array_equal(disk.blk.read(512 * 1003, 512), keep)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"blk_size": 0}, "blk_size is 0"),
        ({"blk_size": 513}, "blk_size is 513"),
        ({"blk_size": 1 << 31}, "blk_size is 2147483648"),
        ({"seg_max": 0}, "seg_max is 0"),
        ({"size_max": 0}, "size_max is 0"),
        ({"size_max": 511}, "size_max is 511"),
        ({"size_max": 1024, "seg_max": 2, "blk_size": 4096}, "size_max is 1024: 2 segments"),
        ({"capacity": (1 << 64) - 1}, "capacity is 18446744073709551615"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(make: Make, config: dict[str, int], says: str) -> None:
    disk = make(size_max=4096)
    disk.model.config |= config
    disk.transport.feature_filter = FeatureFilter(required=1 << spec.F_SIZE_MAX)
    with pytest.raises(Refused, match=says):
        disk.blk.restart()


def test_a_size_max_of_zero_is_not_accepted_and_so_does_not_apply(make: Make) -> None:
    disk = make(size_max=4096)
    disk.model.config["size_max"] = 0
    disk.blk.restart()
    assert not disk.transport.has(spec.F_SIZE_MAX)
    assert disk.blk.limits.size_max == 1 << 20
    disk.blk.write(0, noise(65536))


@pytest.mark.parametrize("field", ["max_discard_sectors", "max_discard_seg"])
def test_a_zero_limit_of_discard_costs_discard_only(make: Make, field: str) -> None:
    disk = make()
    disk.model.config[field] = 0
    disk.blk.restart()
    disk.blk.write(0, bytes(512))
    with pytest.raises(Refused, match=f"discard: {field} is 0"):
        disk.blk.discard(0, 512)


def test_a_zero_alignment_is_advice(make: Make) -> None:
    disk = make(block_size=4096)
    disk.model.config["discard_sector_alignment"] = 0
    disk.blk.restart()
    assert disk.blk.limits.discard.alignment == 8


@pytest.mark.requirement("DRV-BLK-51")
def test_requests_without_their_feature_are_not_sent(make: Make) -> None:
    disk = make(offer="-discard,-flush,-config_wce")
    before = disk.model.requests
    with pytest.raises(Refused, match="discard: DISCARD was not negotiated"):
        disk.blk.discard(0, 512)
    with pytest.raises(Refused, match="secure_erase: SECURE_ERASE was not negotiated"):
        disk.blk.secure_erase(0, 512)
    with pytest.raises(Refused, match="LIFETIME was not negotiated"):
        disk.blk.get_lifetime()
    assert not disk.blk.volatile_cache
    disk.blk.flush()
    with pytest.raises(UsageError, match="no CONFIG_WCE"):
        disk.blk.set_writeback(False)
    assert disk.model.requests == before


@pytest.mark.requirement("DRV-BLK-13")
def test_ranges_that_make_no_sense(make: Make) -> None:
    disk = make(block_size=4096)
    for offset, length in ((512, 4096), (0, 512), (-4096, 4096)):
        with pytest.raises(UsageError, match="not whole blocks of 4096 bytes"):
            disk.blk.read(offset, length)
    with pytest.raises(UsageError, match="beyond the end, 67108864 bytes"):
        disk.blk.write(SIZE - 4096, bytes(8192))
    with pytest.raises(UsageError, match="beyond the end"):
        disk.blk.read_many(np.array([0, SIZE]), disk.blk.allocate(8192), 4096)
    with pytest.raises(UsageError, match="no multiple of 4096"):
        disk.blk.read_many(np.array([512, 4096]), disk.blk.allocate(8192), 4096)


@pytest.mark.requirement("DRV-BLK-14", "DRV-BLK-23", "DRV-BLK-24", "DRV-BLK-60")
def test_read_only_and_cache_modes(make: Make) -> None:
    with pytest.raises(Refused, match="read-only"):
        make(ro="on").blk.write(0, bytes(512))
    disk = make()
    assert disk.blk.volatile_cache
    disk.blk.write(0, bytes(512))
    disk.blk.set_writeback(False)
    assert disk.model.flushes == 1
    assert not disk.blk.volatile_cache
    disk.blk.write(0, bytes(512), fua=True)
    assert disk.model.flushes == 1
    disk.blk.set_writeback(True)
    disk.blk.flush()
    assert disk.model.flushes == 2


def test_id_and_lifetime(make: Make) -> None:
    disk = make(serial="x" * 20, offer="+lifetime")
    assert disk.blk.get_id() == "x" * 20
    with pytest.raises(BlkUnsupported) as caught:
        disk.blk.get_lifetime()
    assert caught.value.status == spec.S_UNSUPP
    assert make(serial="abc").blk.get_id() == "abc"

    def lifetime(queue: Any, chain: Chain) -> None:
        chain.write(bytes([1, 0, 2, 0, 3, 0]), 0)
        chain.write(bytes([spec.S_OK]), 6)
        queue.complete(chain, 7)

    disk.model.handle = lifetime  # type: ignore[method-assign]
    life = disk.blk.get_lifetime()
    assert (life.pre_eol_info, life.type_a, life.type_b) == (1, 2, 3)


@pytest.mark.requirement("DRV-BLK-52")
def test_errors_say_sector_and_length_and_concern_one_request(make: Make) -> None:
    disk = make()
    disk.model.fail_next = [spec.S_IOERR]
    with pytest.raises(
        BlkIoError, match="read of 4096 bytes at sector 16 failed: the device says IOERR"
    ) as e:
        disk.blk.read(8192, 4096)
    assert (e.value.sector, e.value.nbytes, e.value.status) == (16, 4096, spec.S_IOERR)
    disk.model.fail_next = [spec.S_UNSUPP]
    with pytest.raises(BlkUnsupported):
        disk.blk.flush()
    disk.model.fail_next = [77]
    with pytest.raises(DeviceViolation, match=r"write of 512 bytes at sector 0: .* status 77"):
        disk.blk.write(0, bytes(512))
    disk.blk.write(0, bytes(512))
    buffers = [disk.blk.allocate(512) for _ in range(3)]
    sent = [disk.blk.submit(spec.T_IN, 512 * i, [b])[0] for i, b in enumerate(buffers)]
    disk.model.fail_next = [spec.S_IOERR]
    disk.blk.queues[0].wait(sent, 60)
    assert [request.outcome for request in sent] == [Outcome.FAILED, Outcome.DONE, Outcome.DONE]


def test_an_error_in_a_burst_concerns_that_request_only(make: Make) -> None:
    disk = make()
    honest = disk.model.handle

    def bad_sectors(queue: Any, chain: Chain) -> None:
        sector = int.from_bytes(chain.read(16)[8:16], "little")
        disk.model.fail_next = [spec.S_IOERR] if sector in (8 * 3, 8 * 400) else []
        honest(queue, chain)

    disk.model.handle = bad_sectors  # type: ignore[method-assign]
    out = disk.blk.allocate(500 * 4096)
    result = disk.blk.read_many(np.arange(500) * 4096, out, 4096, depth=16)
    assert np.flatnonzero(~result.done).tolist() == [3, 400]
    with pytest.raises(BlkIoError, match="sector 24"):
        result.check()


@pytest.mark.parametrize("packed", ["on", "off"])
@pytest.mark.parametrize("depth", [1, 7, 256])
def test_bursts(make: Make, packed: str, depth: int) -> None:
    disk = make(packed=packed)
    count = 1000
    data = disk.blk.allocate(count * 512)
    data.array[:] = noise(data.nbytes)
    places = RANDOM.permutation(count) * 1024
    disk.blk.write_many(places, data, 512, depth=depth).check()
    assert np.array_equal(disk.blk.read(int(places[17]), 512), data.array[17 * 512 : 18 * 512])
    back = disk.blk.allocate(count * 512)
    result = disk.blk.read_many(places, back, 512, depth=depth, latencies=True)
    result.check()
    assert np.array_equal(back.array, data.array)
    assert result.latencies.shape == (count,)
    assert (result.latencies > 0).all()


def test_short_and_unwritten_completions_are_found(make: Make) -> None:
    disk = make()

    def short(queue: Any, chain: Chain) -> None:
        chain.write(bytes([spec.S_OK]), chain.writable_bytes - 1)
        queue.complete(chain, 1)

    disk.model.handle = short  # type: ignore[method-assign]
    with pytest.raises(DeviceViolation, match=r"status OK, but its used length is 1, not 513"):
        disk.blk.read(0, 512)
    result = disk.blk.read_many(np.zeros(2), disk.blk.allocate(1024), 512)
    with pytest.raises(DeviceViolation, match="used length is too short"):
        result.check()
    disk.blk.write(0, bytes(512))
    disk.model.handle = lambda queue, chain: queue.complete(chain, chain.writable_bytes)  # type: ignore[method-assign]
    with pytest.raises(DeviceViolation, match="left the status byte alone"):
        disk.blk.write(0, bytes(512))


def ends(requests: list[Request]) -> list[str | None]:
    return [request.outcome.value if request.outcome else None for request in requests]


@pytest.mark.parametrize(
    ("packed", "lie", "says"),
    [
        ("off", (0, 1), "came back before"),
        ("off", (1, 4096), "used length"),
        ("on", (1, 4096), "used length"),
    ],
)
def test_a_device_that_lies_breaks_the_queue_and_leaves_nothing_open(
    make: Make, packed: str, lie: tuple[int, int], says: str
) -> None:
    disk = make(packed=packed, findings=True)
    kept = disk.hold()
    buffer = disk.blk.allocate(4096)
    sent = [disk.blk.submit(spec.T_OUT, 512 * i, [buffer[512 * i : 512 * i + 512]])[0] for i in range(8)]
    calls: list[Request] = []
    for request in sent:
        request.on_end = calls.append
    disk.blk.queues[0].publish()
    queue, chain = kept[0]
    disk.answer(queue, chain)
    if lie[0]:
        queue.push(kept[lie[0]][1], lie[1])
        queue.publish()
    else:
        ring = disk.blk.queues[0].queue.device
        ring["ring"][1] = ring["ring"][0]
        ring["idx"] = 2
    with pytest.raises(DeviceViolation, match=says):
        disk.blk.queues[0].wait(sent, 60)
    assert ends(sent) == ["done"] + ["unknown"] * 7
    with pytest.raises(DeviceViolation):
        disk.blk.read(0, 512)
    with pytest.raises(OutcomeUnknown, match="may be done or not"):
        sent[3].check()
    disk.model.handle = disk.answer  # type: ignore[method-assign]
    disk.blk.restart()
    assert len(calls) == 8
    disk.blk.write(0, bytes(512))


def test_a_request_that_is_late_ends_as_unknown_and_its_memory_comes_back_later(make: Make) -> None:
    disk = make()
    disk.blk.timeout = 0.05
    kept = disk.hold()
    with pytest.raises(OutcomeUnknown, match=r"write of 512 bytes at sector 2: not back within 0.05 s"):
        disk.blk.write(1024, bytes(512))
    requests = disk.blk.queues[0]
    assert requests.in_flight == 1
    assert len(requests.stages) == 7
    disk.answer(*kept[0])
    assert requests.reap() == 1
    assert (requests.late, requests.in_flight, len(requests.stages)) == (1, 0, 8)
    disk.model.handle = disk.answer  # type: ignore[method-assign]
    disk.blk.timeout = 60
    assert disk.blk.read(1024, 512).sum() == 0


def test_a_reset_ends_what_is_in_flight(make: Make) -> None:
    disk = make()
    kept = disk.hold()
    buffer = disk.blk.allocate(4096)
    sent = [disk.blk.submit(spec.T_OUT, 512 * i, [buffer[512 * i : 512 * i + 512]])[0] for i in range(8)]
    disk.blk.queues[0].publish()
    for number in (5, 2):
        disk.answer(*kept[number])
    disk.model.handle = disk.answer  # type: ignore[method-assign]
    disk.blk.restart()
    assert ends(sent) == ["done" if n in (2, 5) else "unknown" for n in range(8)]
    disk.blk.write(0, bytes(512))


def test_a_burst_that_hangs_is_over_in_time_and_needs_a_restart(make: Make) -> None:
    disk = make()
    kept = disk.hold()
    with pytest.raises(TimeLimit, match=r"8 of 8 requests are not back after 0\.05 s"):
        disk.blk.read_many(np.arange(8) * 512, disk.blk.allocate(4096), 512, timeout=0.05)
    assert len(kept) == 8
    with pytest.raises(TimeLimit):
        disk.blk.read(0, 512)
    disk.model.handle = disk.answer  # type: ignore[method-assign]
    disk.blk.restart()
    disk.blk.read(0, 512)


@pytest.mark.requirement("DRV-BLK-12")
def test_a_disk_that_grows_while_it_is_read(make: Make) -> None:
    disk = make(threaded="on")
    with pytest.raises(UsageError, match="beyond the end"):
        disk.blk.read(SIZE, 512)
    assert not disk.blk.changed()
    disk.model.resize(2 * SIZE)
    assert disk.blk.changed(60)
    assert disk.blk.capacity == 2 * SIZE
    disk.model.resize(3 * SIZE)
    disk.blk.write(3 * SIZE - 512, b"e" * 512)
    assert bytes(disk.blk.read(3 * SIZE - 512, 512)) == b"e" * 512


def test_a_worker_for_each_queue(make: Make) -> None:
    disk = make(num_queues=4, queues=4, threaded="on")
    failures: list[BaseException] = []

    def work(queue: int) -> None:
        try:
            disk.blk.own(queue)
            data = np.full(1 << 20, queue + 1, np.uint8)
            disk.blk.write(queue << 20, data, queue=queue)
            disk.blk.flush(queue=queue)
            assert np.array_equal(disk.blk.read(queue << 20, 1 << 20, queue=queue), data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with pytest.raises(UsageError, match="belongs to another thread"):
        disk.blk.read(0, 512, queue=2)
    disk.blk.own(2)
    assert (disk.blk.read(2 << 20, 512, queue=2) == 3).all()
    with pytest.raises(UsageError, match="5 queues asked for, the device has 4"):
        make(num_queues=4, queues=5)


@pytest.mark.parametrize("params", [{}, {"threaded": "on"}, {"queue_size": 8}], ids=str)
@pytest.mark.parametrize("mode", ["msix", "poll"])
def test_coroutines(make: Make, params: dict[str, Any], mode: str) -> None:
    disk = make(**params)
    disk.transport.mode = mode  # type: ignore[assignment]
    disk.blk.restart()

    async def main() -> None:
        with AioBlk(disk.blk) as aio:
            parts = [noise(8192 if n % 8 else 300 << 10) for n in range(48)]
            await asyncio.gather(*(aio.write(n << 20, part) for n, part in enumerate(parts)))
            await aio.flush()
            back = await asyncio.gather(*(aio.read(n << 20, part.nbytes) for n, part in enumerate(parts)))
            for one, other in zip(parts, back, strict=True):
                assert np.array_equal(one, other)
            if disk.function.executor.threaded:
                return
            disk.model.fail_next = [spec.S_IOERR]
            with pytest.raises(BlkIoError):
                await aio.read(0, 512)
            disk.blk.timeout = 0.05
            disk.hold()
            with pytest.raises(OutcomeUnknown, match="not back within"):
                await aio.read(0, 512)

    asyncio.run(main())
    if not disk.function.executor.threaded:
        disk.model.handle = disk.answer  # type: ignore[method-assign]
        disk.blk.restart()


@pytest.mark.parametrize("packed", ["on", "off"])
def test_a_lone_request_costs_one_notification(make: Make, packed: str) -> None:
    disk = make(packed=packed)
    queue = disk.blk.queues[0].queue
    before = queue.kicks
    for _ in range(10):
        disk.blk.read(0, 4096)
    assert queue.kicks - before == 10
    before = queue.kicks
    disk.blk.read_many(np.zeros(320), disk.blk.allocate(512), 512, depth=32).check()
    assert queue.kicks - before == 10


def test_the_driver_gives_all_its_memory_back(make: Make) -> None:
    disk = make()
    disk.blk.write(0, noise(1 << 20))
    used = disk.transport.pool.in_use
    for _ in range(3):
        disk.blk.restart()
        assert disk.transport.pool.in_use == used
