"""The balloon model, driven by hand: pages, statistics, reporting, hinting (5.5)."""

from __future__ import annotations

import struct

import pytest

from guestpv.devices.models.balloon import Balloon
from guestpv.devices.scripted import RawQueue
from guestpv.spec import balloon
from guestpv.spec import features as ft
from guestpv.spec.pci import CfgType

from .kit import V1, Bench


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
