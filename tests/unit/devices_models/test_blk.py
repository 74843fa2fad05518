"""The block model, driven by hand: requests, limits, refusals (5.2)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from guestpv.devices.models.blk import Blk
from guestpv.devices.models.blk_store import Store
from guestpv.devices.scripted import RawQueue
from guestpv.errors import UsageError
from guestpv.spec import blk
from guestpv.spec import features as ft
from guestpv.spec.pci import CfgType

from .kit import V1, Bench


def blk_bench(open_bench, features: int = 0, **options: int) -> tuple[Bench, RawQueue]:
    bench = open_bench(Blk(Store(size=1 << 20), depth=16, **options))
    wanted = V1 | ft.mask((blk.F_FLUSH, blk.F_CONFIG_WCE)) | features
    return bench, bench.driver.start(wanted, {0: 16})[0]


def request(
    queue: RawQueue, kind: int, sector: int = 0, out: bytes = b"", room: int = 0
) -> tuple[int, bytes, int]:
    """Status, data and used length of one request."""
    head = queue.buffer(16 + len(out), struct.pack("<IIQ", kind, 0, sector) + out)
    tail = queue.buffer(room + 1, b"\xee" * (room + 1))
    id = queue.add([head], [tail])
    queue.kick()
    used = queue.used()
    assert [entry[0] for entry in used] == [id]
    data = tail.array.tobytes()
    return data[-1], data[:-1], used[0][1]


@pytest.mark.requirement("DEV-BLK-62", "DEV-BLK-68", "DEV-BLK-69", "DEV-BLK-70", "DEV-BLK-72", "DEV-BLK-73")
def test_blk_write_read_flush(open_bench) -> None:
    bench, queue = blk_bench(open_bench)
    data = bytes(range(256)) * 4
    assert request(queue, blk.T_OUT, 3, data) == (blk.S_OK, b"", 1)
    assert request(queue, blk.T_IN, 3, room=1024) == (blk.S_OK, data, 1025)
    assert request(queue, blk.T_IN, 4, room=512)[1] == data[512:]
    assert request(queue, blk.T_FLUSH)[0] == blk.S_OK
    assert bench.function.model.flushes == 1
    assert bench.rules == []


@pytest.mark.requirement("DEV-BLK-69", "DEV-BLK-75", "DEV-SPLIT-01")
def test_blk_framing_does_not_matter(open_bench) -> None:
    _, queue = blk_bench(open_bench, 1 << blk.F_SEG_MAX)
    head = struct.pack("<IIQ", blk.T_OUT, 0, 0)
    data = bytes(range(256)) * 2
    parts = [queue.buffer(7, head[:7]), queue.buffer(20, head[7:] + data[:11]), queue.buffer(501, data[11:])]
    queue.add(parts, [queue.buffer(1)])
    queue.kick()
    assert queue.used()[0][1] == 1
    into = [queue.buffer(100), queue.buffer(413)]
    queue.add([queue.buffer(16, struct.pack("<IIQ", blk.T_IN, 0, 0))], into)
    queue.kick()
    assert queue.used()[0][1] == 513
    assert into[0].array.tobytes() + into[1].array.tobytes() == data + b"\0"


@pytest.mark.requirement("DEV-BLK-76", "DRV-BLK-19")
def test_blk_id(open_bench) -> None:
    bench, queue = blk_bench(open_bench, serial=b"disk-1")
    assert request(queue, blk.T_GET_ID, room=20) == (blk.S_OK, b"disk-1".ljust(20, b"\0"), 21)
    request(queue, blk.T_GET_ID, room=8)
    assert bench.rules == ["DRV-BLK-19"]


BLK_MISTAKES = {
    "DRV-BLK-13": (blk.T_IN, 2047, b"", 1024, blk.S_IOERR),
    "DRV-BLK-15": (blk.T_FLUSH, 1, b"", 0, blk.S_OK),
    "DRV-BLK-17": (blk.T_OUT, 0, bytes(500), 0, blk.S_IOERR),
    "DRV-BLK-18": (blk.T_DISCARD, 0, bytes(15), 0, blk.S_IOERR),
    "DRV-BLK-20": (blk.T_DISCARD, 0, bytes(16 * 17), 0, blk.S_IOERR),
    "DRV-BLK-22": (blk.T_WRITE_ZEROES, 0, bytes(16 * 17), 0, blk.S_IOERR),
    "DRV-BLK-25": (blk.T_DISCARD, 0, struct.pack("<QII", 0, 1, 1), 0, blk.S_UNSUPP),
    "DRV-BLK-51": (blk.T_SECURE_ERASE, 0, bytes(16), 0, blk.S_UNSUPP),
    "DRV-BLK-53": (blk.T_GET_ID, 1, b"", 20, blk.S_OK),
    "DRV-BLK-54": (blk.T_WRITE_ZEROES, 0, struct.pack("<QII", 0, 1, 2), 0, blk.S_UNSUPP),
    "DRV-BLK-55": (blk.T_DISCARD, 0, struct.pack("<QII", 0, 1 << 17, 0), 0, blk.S_IOERR),
    "DRV-BLK-56": (blk.T_WRITE_ZEROES, 0, struct.pack("<QII", 0, 1 << 17, 0), 0, blk.S_IOERR),
}


@pytest.mark.parametrize("rule", BLK_MISTAKES)
@pytest.mark.requirement(*BLK_MISTAKES, "DEV-BLK-25", "DEV-BLK-26", "DEV-BLK-71")
def test_blk_mistakes(open_bench, rule: str) -> None:
    bench, queue = blk_bench(open_bench, ft.mask((blk.F_DISCARD, blk.F_WRITE_ZEROES)))
    kind, sector, out, room, status = BLK_MISTAKES[rule]
    got, data, length = request(queue, kind, sector, out, room)
    assert (got, length) == (status, room + 1)
    assert status == blk.S_OK or data == bytes(room)
    assert bench.rules == [rule]
    assert not bench.broken


@pytest.mark.parametrize(("limit", "rule"), [("seg_max", "DRV-BLK-58"), ("size_max", "DRV-BLK-57")])
@pytest.mark.requirement("DRV-BLK-57", "DRV-BLK-58")
def test_blk_limits(open_bench, limit: str, rule: str) -> None:
    options = {"seg_max": 1} if limit == "seg_max" else {"size_max": 512}
    bench, queue = blk_bench(
        open_bench, ft.mask((blk.F_SEG_MAX,)) | (1 << blk.F_SIZE_MAX if limit == "size_max" else 0), **options
    )
    head = queue.buffer(16, struct.pack("<IIQ", blk.T_OUT, 0, 0))
    sizes = (512, 512, 512) if limit == "seg_max" else (1024,)
    queue.add([head, *(queue.buffer(size) for size in sizes)], [queue.buffer(1)])
    queue.kick()
    assert bench.rules == [rule]


@pytest.mark.requirement("DRV-BLK-47", "DRV-BLK-48")
def test_blk_requests_without_head_or_tail_break_the_device(open_bench) -> None:
    bench, queue = blk_bench(open_bench)
    queue.add([queue.buffer(8)], [queue.buffer(1)])
    queue.kick()
    assert bench.rules == ["DRV-BLK-47"]
    assert bench.broken
    queue = bench.driver.start(V1, {0: 8})[0]
    queue.add([queue.buffer(16)], [])
    queue.kick()
    assert bench.rules == ["DRV-BLK-47", "DRV-BLK-48"]


@pytest.mark.requirement("DEV-BLK-29")
def test_blk_write_zeroes_and_discard(open_bench) -> None:
    bench, queue = blk_bench(open_bench, ft.mask((blk.F_DISCARD, blk.F_WRITE_ZEROES)))
    request(queue, blk.T_OUT, 0, b"\xff" * 2048)
    ranges = struct.pack("<QIIQII", 0, 1, 0, 2, 1, 1)
    assert request(queue, blk.T_WRITE_ZEROES, 0, ranges)[0] == blk.S_OK
    data = request(queue, blk.T_IN, 0, room=2048)[1]
    assert data == (bytes(512) + b"\xff" * 512) * 2
    assert request(queue, blk.T_DISCARD, 0, struct.pack("<QII", 1, 1, 0))[0] == blk.S_OK
    assert bench.function.model.discarded == [(1, 1)]


@pytest.mark.requirement("DEV-BLK-23", "DEV-BLK-24")
def test_blk_read_only(open_bench) -> None:
    bench, queue = blk_bench(open_bench, read_only=True)
    assert request(queue, blk.T_OUT, 0, b"\xff" * 512)[0] == blk.S_IOERR
    assert request(queue, blk.T_IN, 0, room=512)[1] == bytes(512)
    assert bench.rules == []


@pytest.mark.requirement("DEV-BLK-03", "DEV-BLK-77", "DRV-BLK-60")
def test_blk_cache_mode(open_bench) -> None:
    bench, _ = blk_bench(open_bench)
    assert bench.driver.read_at(CfgType.DEVICE, 32, 1) == 1
    bench.driver.write_at(CfgType.DEVICE, 32, 1, 0)
    assert bench.driver.read_at(CfgType.DEVICE, 32, 1) == 0
    bench.driver.write_at(CfgType.DEVICE, 32, 1, 2)
    assert bench.rules == ["DRV-BLK-60"]
    bench.driver.start(V1, {})
    assert bench.driver.read_at(CfgType.DEVICE, 32, 1) == 0


def test_blk_injected_failure(open_bench) -> None:
    bench, queue = blk_bench(open_bench)
    bench.function.model.fail_next = [blk.S_IOERR]
    assert request(queue, blk.T_IN, 0, room=512) == (blk.S_IOERR, bytes(512), 513)
    assert request(queue, blk.T_IN, 0, room=512)[0] == blk.S_OK


@pytest.mark.requirement("DEV-BLK-62", "DEV-VQRESET-05")
def test_blk_queues(open_bench) -> None:
    bench = open_bench(Blk(Store(size=1 << 20), num_queues=3, depth=16))
    queues = bench.driver.start(V1 | 1 << blk.F_MQ, {0: 8, 1: 8, 2: 8})
    request(queues[2], blk.T_OUT, 0, b"x" * 512)
    assert request(queues[0], blk.T_IN, 0, room=512)[1] == b"x" * 512


def test_blk_file(open_bench, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"a" * 1024)
    bench = open_bench(Blk(Store(str(path))))
    (queue,) = bench.driver.start(V1, {0: 8})
    assert request(queue, blk.T_IN, 1, room=512)[1] == b"a" * 512
    request(queue, blk.T_OUT, 1, b"b" * 512)
    assert path.read_bytes() == b"a" * 512 + b"b" * 512
    with pytest.raises(UsageError, match="multiple of 512"):
        Store(str(path), size=700)
