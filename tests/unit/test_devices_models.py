"""The device types behind the software function, driven by hand (5.1, 5.2, 5.4, 5.5)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.model import Model
from guestpv.devices.models.balloon import Balloon
from guestpv.devices.models.blk import Blk
from guestpv.devices.models.blk_store import Store
from guestpv.devices.models.net import Net
from guestpv.devices.models.packet import Packet, checksum, segments
from guestpv.devices.models.rng import Rng
from guestpv.devices.models.wire import Wire, echo, tap
from guestpv.devices.scripted import RawQueue, ScriptedDriver
from guestpv.errors import UsageError
from guestpv.spec import balloon, blk, net
from guestpv.spec import features as ft
from guestpv.spec.pci import CfgType
from guestpv.spec.status import Status

V1 = ft.mask((ft.F_VERSION_1, ft.F_ACCESS_PLATFORM))
NET_HEADER = struct.Struct("<BBHHHHH")
MAC = bytes.fromhex("525400000001")
PEER = bytes.fromhex("525400000002")


class Bench:
    def __init__(self, model: Model, **options: bool) -> None:
        self.function = SoftwareFunction(model, name="test", **options)
        self.driver = ScriptedDriver(self.function)

    @property
    def rules(self) -> list[str]:
        return [finding.requirement for finding in self.function.findings]

    @property
    def broken(self) -> bool:
        return bool(self.function.device.status & Status.NEEDS_RESET)


@pytest.fixture
def open_bench() -> Iterator[object]:
    opened: list[Bench] = []

    def make(model: Model, **options: bool) -> Bench:
        opened.append(Bench(model, **options))
        return opened[-1]

    yield make
    for bench in opened:
        bench.function.close()


def frame(target: bytes = MAC, source: bytes = PEER, size: int = 64, tag: int | None = None) -> bytes:
    vlan = b"" if tag is None else b"\x81\x00" + tag.to_bytes(2, "big")
    return (target + source + vlan + b"\x88\xb5").ljust(size, b"\x5a")


def tcp_frame(payload: bytes, v6: bool = False) -> tuple[bytes, int]:
    """A TCP frame with the pseudo header sum in its checksum field, and where TCP starts."""
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 7, 0, 5 << 4, 0x98 | 0x01, 100, 0, 0)
    length = len(tcp) + len(payload)
    if v6:
        ip = struct.pack(">IHBB", 6 << 28, length, 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
        addresses, kind = ip[8:], b"\x86\xdd"
    else:
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 5, 0, 64, 6, 0) + b"\x0a\0\0\1\x0a\0\0\2"
        ip = ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
        addresses, kind = ip[12:], b"\x08\x00"
    pseudo = ~checksum(addresses + struct.pack(">IHH", length, 0, 6)) & 0xFFFF
    tcp = tcp[:16] + pseudo.to_bytes(2, "big") + tcp[18:]
    return MAC + PEER + kind + ip + tcp + payload, 14 + len(ip)


def tcp_sum_is_right(data: bytes, transport: int, v6: bool = False) -> bool:
    addresses = data[14 + 8 : 14 + 40] if v6 else data[14 + 12 : 14 + 20]
    body = data[transport:]
    return checksum(addresses + struct.pack(">IHH", len(body), 0, 6) + body) == 0


# Entropy


@pytest.mark.requirement("DEV-SPLIT-16")
def test_rng_fills_what_it_says(open_bench) -> None:
    bench = open_bench(Rng(seed=1, most=5))
    (queue,) = bench.driver.start(V1, {0: 8})
    into = queue.buffer(8)
    queue.add([], [into])
    queue.kick()
    assert queue.used() == [(0, 5)]
    assert any(into.array[:5])
    assert not any(into.array[5:])
    queue.add([queue.buffer(1)], [queue.buffer(1)])
    queue.kick()
    assert len(bench.function.findings) == 1


# Block


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


# Balloon


def balloon_bench(open_bench, *extra: int) -> tuple[Bench, list[RawQueue]]:
    bench = open_bench(Balloon(depth=8))
    bench.function.device.offered |= ft.mask(extra)
    features = ft.mask((balloon.F_STATS_VQ, balloon.F_PAGE_REPORTING, *extra))
    indexes = {0: 8, 1: 8, 2: 8, 4: 8} | ({3: 8} if balloon.F_FREE_PAGE_HINT in extra else {})
    queues = bench.driver.start(V1 | features, dict(sorted(indexes.items())))
    return bench, queues


def send(queue: RawQueue, data: bytes) -> list[tuple[int, int]]:
    queue.add([queue.buffer(len(data), data)], [])
    queue.kick()
    return queue.used()


@pytest.mark.requirement(
    "DEV-BALLOON-17", "DEV-BALLOON-18", "DEV-BALLOON-20", "DEV-BALLOON-21", "DRV-BALLOON-49", "DRV-BALLOON-47"
)
def test_balloon_inflate_and_deflate(open_bench) -> None:
    bench, (inflate, deflate, *_) = balloon_bench(open_bench)
    model = bench.function.model
    model.set_target(3)
    assert bench.driver.read_at(CfgType.DEVICE, 0, 4) == 3
    assert send(inflate, struct.pack("<3I", 5, 6, 7)) == [(0, 0)]
    assert model.pages == {5, 6, 7}
    bench.driver.write_at(CfgType.DEVICE, 4, 4, 3)
    assert model.config["actual"] == 3
    assert send(deflate, struct.pack("<2I", 5, 7)) == [(0, 0)]
    assert model.pages == {6}
    assert bench.rules == []
    send(deflate, struct.pack("<I", 5))
    send(inflate, b"\1\2\3")
    assert bench.rules == ["DRV-BALLOON-49", "DRV-BALLOON-47"]


@pytest.mark.requirement(
    "DEV-BALLOON-04",
    "DEV-BALLOON-05",
    "DEV-BALLOON-22",
    "DEV-BALLOON-23",
    "DRV-BALLOON-16",
    "DRV-BALLOON-20",
    "DRV-BALLOON-23",
)
def test_balloon_statistics(open_bench) -> None:
    bench, (_, _, stats, _) = balloon_bench(open_bench)
    model = bench.function.model
    seen: list[dict[str, int]] = []
    model.statistics_seen = seen.append
    assert not model.ask_statistics()
    values = struct.pack("<HQHQHQ", 77, 1, 5, 1 << 40, 4, 1 << 30)
    assert send(stats, values) == []
    assert seen == [{"memtot": 1 << 40, "memfree": 1 << 30}]
    assert model.ask_statistics()
    assert stats.used() == [(0, 0)]
    assert send(stats, values) == []
    assert bench.rules == []
    assert send(stats, struct.pack("<HQ", 4, 2)) == [(1, 0)]
    assert bench.rules == ["DRV-BALLOON-16", "DRV-BALLOON-23"]
    model.ask_statistics()
    stats.used()
    send(stats, struct.pack("<HQ", 4, 2) + bytes(6))
    assert bench.rules[2:] == ["DRV-BALLOON-20"]


@pytest.mark.requirement("DEV-BALLOON-16", "DRV-BALLOON-55")
def test_balloon_reporting(open_bench) -> None:
    bench, (*_, reporting) = balloon_bench(open_bench)
    pages = reporting.buffer(8192)
    reporting.add([], [pages])
    reporting.kick()
    assert reporting.used() == [(0, 0)]
    assert bench.function.model.reported == [(pages.address, 8192)]
    bench.driver.write("queue_select", 3)
    assert bench.driver.read("queue_size") == 0


@pytest.mark.requirement(
    "DEV-BALLOON-08", "DEV-BALLOON-24", "DRV-BALLOON-24", "DRV-BALLOON-25", "DRV-BALLOON-26"
)
def test_balloon_hinting(open_bench) -> None:
    bench, (_, _, _, hinting, _) = balloon_bench(open_bench, balloon.F_FREE_PAGE_HINT)
    model = bench.function.model
    page = hinting.buffer(4096)

    def hint() -> None:
        hinting.add([], [page])
        hinting.kick()
        hinting.used()

    hint()
    assert bench.rules == ["DRV-BALLOON-25"]
    model.hint(2)
    send(hinting, struct.pack("<I", 2))
    hint()
    assert model.hinted == [(page.address, 4096)]
    model.hint(3)
    hint()
    assert len(model.hinted) == 1
    send(hinting, struct.pack("<I", 2))
    send(hinting, b"\3\0")
    assert bench.rules[1:] == ["DRV-BALLOON-26", "DRV-BALLOON-24"]


@pytest.mark.requirement("DRV-BALLOON-36")
def test_balloon_poison_is_settled_before_driver_ok(open_bench) -> None:
    bench = open_bench(Balloon())
    bench.function.device.offered |= 1 << balloon.F_PAGE_POISON
    bench.driver.negotiate(V1 | 1 << balloon.F_PAGE_POISON)
    bench.driver.write_at(CfgType.DEVICE, 12, 4, 9)
    bench.driver.driver_ok()
    bench.driver.write_at(CfgType.DEVICE, 12, 4, 10)
    assert bench.driver.read_at(CfgType.DEVICE, 12, 4) == 9
    assert bench.rules == ["DRV-BALLOON-36"]


# Net


def nic(
    open_bench, features: tuple[int, ...] = (), sizes: int = 2, **options: int
) -> tuple[Bench, list[RawQueue]]:
    threaded = bool(options.pop("threaded", 0))
    bench = open_bench(Net(depth=16, **options), threaded=threaded)
    return bench, bench.driver.start(V1 | ft.mask(features), dict.fromkeys(range(sizes), 16))


def transmit(queue: RawQueue, data: bytes, header: bytes = bytes(12)) -> None:
    queue.add([queue.buffer(len(header) + len(data), header + data)], [])
    queue.kick()


def received(queue: RawQueue, into: list) -> list[tuple[tuple[int, ...], bytes]]:
    """Header and frame of every packet; ``into`` holds the buffers by head, in order."""
    found = []
    for id, length in queue.used():
        raw = into[id].array[:length].tobytes()
        found.append((NET_HEADER.unpack(raw[:12]), raw[12:]))
    return found


def supply(queue: RawQueue, count: int, size: int) -> list:
    buffers = [queue.buffer(size) for _ in range(count)]
    for buffer in buffers:
        queue.add([], [buffer])
    queue.kick()
    return buffers


@pytest.mark.requirement(
    "DEV-NET-36", "DEV-NET-211", "DEV-NET-216", "DEV-NET-217", "DEV-NET-219", "DEV-NET-61"
)
def test_net_over_a_wire(open_bench) -> None:
    (one, (_, tx)), (other, (rx, _)) = nic(open_bench), nic(open_bench)
    Wire(one.function.model, other.function.model)
    buffers = supply(rx, 2, 1600)
    data = frame(size=100)
    tx.add([tx.buffer(12), tx.buffer(40, data[:40]), tx.buffer(60, data[40:])], [])
    tx.kick()
    assert tx.used() == [(0, 0)]
    assert received(rx, buffers) == [((0, 0, 0, 0, 0, 0, 1), data)]
    assert one.rules == other.rules == []


@pytest.mark.requirement("DEV-NET-37", "DEV-NET-38", "DEV-NET-39", "DEV-NET-218")
@pytest.mark.parametrize("packed", [0, ft.F_RING_PACKED])
def test_net_merged_buffers(open_bench, packed: int) -> None:
    bench = open_bench(Net(depth=16))
    bench.function.device.offered |= 1 << ft.F_RING_PACKED
    rx, _ = bench.driver.start(V1 | ft.mask((net.F_MRG_RXBUF, *([packed] if packed else []))), {0: 16, 1: 16})
    buffers = supply(rx, 4, 64)
    data = bytes(range(150))
    bench.function.model.deliver(data)
    used = rx.used()
    assert used == [(0, 64), (1, 64), (2, 34)]
    whole = b"".join(buffers[id].array[:length].tobytes() for id, length in used)
    assert NET_HEADER.unpack(whole[:12])[-1] == 3
    assert whole[12:] == data
    assert bench.function.device.queues[0].interrupts == 1


def test_net_waits_for_buffers(open_bench) -> None:
    bench, (rx, _) = nic(open_bench, backlog=2)
    for number in range(3):
        bench.function.model.deliver(frame(size=60 + number))
    buffers = supply(rx, 3, 1600)
    assert [len(data) for _, data in received(rx, buffers)] == [60, 61]
    assert bench.function.model.dropped == 1


@pytest.mark.requirement("DEV-NET-32")
def test_net_drops_what_does_not_fit_one_buffer(open_bench) -> None:
    bench, (rx, _) = nic(open_bench)
    buffers = supply(rx, 1, 80)
    bench.function.model.deliver(frame(size=100))
    bench.function.model.deliver(frame(size=60))
    assert [len(data) for _, data in received(rx, buffers)] == [60]
    assert bench.function.model.dropped == 1


@pytest.mark.requirement("DRV-NET-71", "DRV-NET-185")
def test_net_bad_receive_buffers(open_bench) -> None:
    bench, (rx, _) = nic(open_bench, (net.F_MRG_RXBUF,))
    rx.add([rx.buffer(4)], [rx.buffer(100)])
    rx.add([], [rx.buffer(11)])
    rx.kick()
    bench.function.model.deliver(frame(size=200))
    assert bench.rules == ["DRV-NET-185", "DRV-NET-71"]
    assert bench.broken


NET_MISTAKES = {
    "DRV-NET-09": (bytes(12), 1600, (net.F_MTU,)),
    "DRV-NET-19": (NET_HEADER.pack(0, 0, 0, 0, 0, 0, 1), 64, ()),
    "DRV-NET-20": (NET_HEADER.pack(1, 0, 0, 0, 14, 2, 0), 64, ()),
    "DRV-NET-24": (NET_HEADER.pack(1, 1, 54, 100, 34, 16, 0), 200, (net.F_CSUM,)),
    "DRV-NET-31": (NET_HEADER.pack(1, 0x81, 54, 100, 34, 16, 0), 200, (net.F_CSUM, net.F_HOST_TSO4)),
    "DRV-NET-48": (NET_HEADER.pack(1, 0, 0, 0, 60, 16, 0), 64, (net.F_CSUM,)),
    "DRV-NET-50": (NET_HEADER.pack(0, 1, 54, 100, 34, 16, 0), 200, (net.F_CSUM, net.F_HOST_TSO4)),
    "DRV-NET-51": (NET_HEADER.pack(1, 1, 54, 0, 34, 16, 0), 200, (net.F_CSUM, net.F_HOST_TSO4)),
    "DRV-NET-64": (NET_HEADER.pack(2, 0, 0, 0, 0, 0, 0), 64, (net.F_CSUM,)),
    "DRV-NET-182": (NET_HEADER.pack(1, 9, 54, 100, 34, 16, 0), 200, (net.F_CSUM,)),
}


@pytest.mark.parametrize("rule", NET_MISTAKES)
@pytest.mark.requirement(*NET_MISTAKES)
def test_net_transmit_mistakes(open_bench, rule: str) -> None:
    header, size, features = NET_MISTAKES[rule]
    bench, (_, tx) = nic(open_bench, features, mtu=1500)
    transmit(tx, frame(size=size), header)
    assert bench.rules == [rule]
    assert tx.used() == [(0, 0)]


@pytest.mark.requirement("DRV-NET-178", "DRV-NET-183")
def test_net_transmit_shapes(open_bench) -> None:
    bench, (_, tx) = nic(open_bench)
    tx.add([tx.buffer(80)], [tx.buffer(4)])
    tx.kick()
    transmit(tx, b"", bytes(11))
    assert bench.rules == ["DRV-NET-183", "DRV-NET-178"]


@pytest.mark.requirement("DEV-NET-40", "DEV-NET-41", "DEV-NET-52", "DEV-NET-55")
def test_net_checksum_is_done_for_those_who_cannot(open_bench) -> None:
    data, transport = tcp_frame(b"payload!")
    header = NET_HEADER.pack(1, 0, 0, 0, transport, 16, 0)
    one, (_, tx) = nic(open_bench, (net.F_CSUM,))
    plain, (rx, _) = nic(open_bench)
    Wire(one.function.model, plain.function.model)
    buffers = supply(rx, 1, 1600)
    transmit(tx, data, header)
    ((head, got),) = received(rx, buffers)
    assert head == (0, 0, 0, 0, 0, 0, 1)
    assert tcp_sum_is_right(got, transport)
    able, (rx, _) = nic(open_bench, (net.F_GUEST_CSUM,))
    Wire(one.function.model, able.function.model)
    buffers = supply(rx, 1, 1600)
    transmit(tx, data, header)
    assert received(rx, buffers) == [((1, 0, 0, 0, transport, 16, 1), data)]


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.requirement("DEV-NET-42", "DEV-NET-44", "DEV-NET-62", "DEV-NET-63", "DEV-NET-68")
def test_net_segmentation(open_bench, v6: bool) -> None:
    payload = bytes(range(250))
    data, transport = tcp_frame(payload, v6)
    kind = net.GSO_TCPV6 if v6 else net.GSO_TCPV4
    host, guest = (net.F_HOST_TSO6, net.F_GUEST_TSO6) if v6 else (net.F_HOST_TSO4, net.F_GUEST_TSO4)
    header = NET_HEADER.pack(1, kind, transport + 20, 100, transport, 16, 0)
    one, (_, tx) = nic(open_bench, (net.F_CSUM, host))
    plain, (rx, _) = nic(open_bench)
    Wire(one.function.model, plain.function.model)
    buffers = supply(rx, 4, 1600)
    transmit(tx, data, header)
    frames = received(rx, buffers)
    assert [len(got) - transport - 20 for _, got in frames] == [100, 100, 50]
    assert b"".join(got[transport + 20 :] for _, got in frames) == payload
    for number, (head, got) in enumerate(frames):
        assert head == (0, 0, 0, 0, 0, 0, 1)
        assert tcp_sum_is_right(got, transport, v6)
        assert int.from_bytes(got[transport + 4 : transport + 8], "big") == 7 + 100 * number
        assert bool(got[transport + 13] & 1) == (number == 2)
        assert bool(got[transport + 13] & 0x80) == (number == 0)
        if not v6:
            assert checksum(got[14:34]) == 0
            assert int.from_bytes(got[16:18], "big") == len(got) - 14
    able, (rx, _) = nic(open_bench, (net.F_GUEST_CSUM, guest))
    Wire(one.function.model, able.function.model)
    buffers = supply(rx, 1, 1600)
    transmit(tx, data, header)
    assert received(rx, buffers) == [((1, kind, transport + 20, 100, transport, 16, 1), data)]
    assert one.rules == plain.rules == able.rules == []


def test_udp_segmentation() -> None:
    data, transport = tcp_frame(b"")
    udp = data[:23] + b"\x11" + data[24:transport] + struct.pack(">HHHH", 1, 2, 8 + 300, 0) + bytes(300)
    parts = list(segments(Packet(udp, True, transport, 6, net.GSO_UDP_L4, False, 128)))
    assert [int.from_bytes(part.data[transport + 4 : transport + 6], "big") for part in parts] == [
        136,
        136,
        52,
    ]


@pytest.mark.requirement("DEV-NET-209", "DEV-CONFIG-03", "DEV-NET-109")
def test_net_link_and_announce(open_bench) -> None:
    bench, (_, tx, control) = nic(open_bench, (net.F_STATUS, net.F_CTRL_VQ, net.F_GUEST_ANNOUNCE), sizes=3)
    model = bench.function.model
    echo(model)
    model.set_link(False)
    assert bench.driver.read_at(CfgType.DEVICE, 6, 2) == 0
    transmit(tx, frame())
    assert model.sent == 1
    assert model.received + model.dropped == 0
    model.set_link(True)
    model.announce()
    assert bench.driver.read_at(CfgType.DEVICE, 6, 2) == 3
    assert command(control, 3, 0) == 0
    assert bench.driver.read_at(CfgType.DEVICE, 6, 2) == 1


def command(queue: RawQueue, kind: int, number: int, data: bytes = b"") -> int:
    """Ack of a control command."""
    ack = queue.buffer(1, b"\xee")
    queue.add([queue.buffer(2 + len(data), bytes([kind, number]) + data)], [ack])
    queue.kick()
    assert [length for _, length in queue.used()] == [1]
    return int(ack.array[0])


@pytest.mark.requirement(
    "DEV-NET-88",
    "DEV-NET-93",
    "DEV-NET-99",
    "DEV-NET-102",
    "DEV-NET-105",
    "DEV-NET-107",
    "DEV-NET-108",
    "DEV-NET-225",
    "DEV-NET-226",
    "DEV-NET-227",
)
def test_net_receive_filter(open_bench) -> None:
    features = (
        net.F_CTRL_VQ,
        net.F_CTRL_RX,
        net.F_CTRL_RX_EXTRA,
        net.F_CTRL_VLAN,
        net.F_CTRL_MAC_ADDR,
        net.F_MAC,
    )
    bench, (_, _, control) = nic(open_bench, features, sizes=3)
    model = bench.function.model
    other, group, everyone = b"\x02" * 6, b"\x03" * 6, b"\xff" * 6

    def passes(target: bytes, tag: int | None = None) -> bool:
        return model.control.accepts(frame(target, tag=tag))

    assert passes(MAC)
    assert not passes(other)
    assert not passes(group)
    assert passes(everyone)
    table = b"\1\0\0\0" + other + b"\1\0\0\0" + group
    assert command(control, 1, 0, table) == 0
    assert passes(other)
    assert passes(group)
    assert command(control, 0, 3, b"\1") == 0
    assert not passes(group)
    assert passes(everyone)
    assert command(control, 0, 5, b"\1") == 0
    assert not passes(everyone)
    assert command(control, 0, 2, b"\1") == 0
    assert passes(b"\x06" * 6)
    assert command(control, 0, 4, b"\1") == 0
    assert not passes(MAC)
    assert command(control, 0, 0, b"\1") == 0
    assert passes(b"\x06" * 6)
    assert not passes(MAC, tag=7)
    assert command(control, 2, 0, b"\7\0") == 0
    assert passes(MAC, tag=7)
    assert command(control, 2, 1, b"\7\0") == 0
    assert not passes(MAC, tag=7)
    assert command(control, 1, 1, other) == 0
    assert bytes(bench.driver.read_at(CfgType.DEVICE, place, 1) for place in range(6)) == other
    assert bench.rules == []
    bench.driver.reset()
    assert model.config["mac"] == MAC


@pytest.mark.parametrize(
    ("kind", "number", "data", "rule"),
    [
        (0, 0, b"\1", "DRV-NET-90"),
        (0, 5, b"\1", "DRV-NET-91"),
        (1, 0, b"", "DRV-NET-92"),
        (4, 0, b"\1\0", "DRV-NET-192"),
        (5, 0, bytes(8), "DRV-NET-199"),
        (3, 0, b"", "DRV-NET-191"),
        (200, 0, b"", None),
    ],
)
@pytest.mark.requirement("DEV-NET-223", "DEV-NET-224", "DRV-NET-90", "DRV-NET-91", "DRV-NET-92")
def test_net_commands_without_their_feature(
    open_bench, kind: int, number: int, data: bytes, rule: str | None
) -> None:
    bench, (_, _, control) = nic(open_bench, (net.F_CTRL_VQ,), sizes=3)
    assert command(control, kind, number, data) == net.CTRL_ERR
    assert bench.rules == ([rule] if rule else [])


@pytest.mark.requirement("DRV-NET-114", "DEV-NET-234")
def test_net_offloads_can_be_turned_off(open_bench) -> None:
    features = (net.F_CTRL_VQ, net.F_CTRL_GUEST_OFFLOADS, net.F_GUEST_CSUM)
    bench, (_, _, control) = nic(open_bench, features, sizes=3)
    assert bench.function.model.control.offloads == 1 << net.F_GUEST_CSUM
    assert command(control, 5, 0, bytes(8)) == 0
    assert bench.function.model.control.offloads == 0
    assert command(control, 5, 0, (1 << net.F_GUEST_TSO4).to_bytes(8, "little")) == 1
    assert bench.rules == ["DRV-NET-114"]


@pytest.mark.requirement(
    "DEV-NET-112", "DEV-NET-113", "DEV-NET-115", "DEV-NET-116", "DRV-NET-102", "DRV-NET-103", "DRV-NET-101"
)
def test_net_multiqueue(open_bench) -> None:
    features = (net.F_CTRL_VQ, net.F_MQ)
    bench, queues = nic(open_bench, features, sizes=5, pairs=2)
    model, control = bench.function.model, queues[4]
    buffers = {index: supply(queues[index], 4, 1600) for index in (0, 2)}
    data, _ = tcp_frame(b"x")
    back = data[:26] + data[30:34] + data[26:30] + data[36:38] + data[34:36] + data[38:]
    model.deliver(back)
    assert len(received(queues[0], buffers[0])) == 1
    transmit(queues[3], data)
    assert bench.rules == ["DRV-NET-103"]
    assert command(control, 4, 0, b"\2\0") == 0
    for pair in (1, 0):
        transmit(queues[2 * pair + 1], data)
        model.deliver(back)
        assert len(received(queues[2 * pair], buffers[2 * pair])) == 1
    assert command(control, 4, 0, b"\3\0") == 1
    assert command(control, 4, 0, b"\0\0") == 1
    assert bench.rules[1:] == ["DRV-NET-102", "DRV-NET-102"]
    other, queues = nic(open_bench, features, sizes=2, pairs=2)
    control = other.driver.queue(4, 8)
    assert command(control, 4, 0, b"\2\0") == 1
    assert other.rules == ["DRV-NET-101"]


def test_net_tap_gives_whole_frames(open_bench) -> None:
    bench, (rx, tx) = nic(open_bench, (net.F_CSUM,))
    seen: list[bytes] = []
    tap(bench.function.model, seen.append)
    data, transport = tcp_frame(b"abc")
    transmit(tx, data, NET_HEADER.pack(1, 0, 0, 0, transport, 16, 0))
    assert tcp_sum_is_right(seen[0], transport)
    assert rx.used() == []


def test_two_functions_echo_without_recursion(open_bench) -> None:
    (one, (rx1, tx1)), (other, (rx2, tx2)) = nic(open_bench), nic(open_bench)
    Wire(one.function.model, other.function.model)
    bounced = other.function.model
    echo_peer = one.function.model.deliver
    bounced.peer = echo_peer
    buffers = supply(rx2, 3, 1600)
    supply(rx1, 3, 1600)
    transmit(tx1, frame(size=70))
    transmit(tx2, frame(size=80))
    assert [len(data) for _, data in received(rx2, buffers)] == [70]
    assert one.function.model.received == 1


def test_threaded_device_moves_by_itself(open_bench) -> None:
    one, (_, tx) = nic(open_bench, threaded=1)
    other, (rx, _) = nic(open_bench, threaded=1)
    Wire(one.function.model, other.function.model)
    buffers = supply(rx, 8, 1600)
    for number in range(8):
        transmit(tx, frame(size=60 + number))
    got: list[int] = []
    while len(got) < 8:
        got += [len(data) for _, data in received(rx, buffers)]
    assert got == list(range(60, 68))
    assert one.rules == other.rules == []
