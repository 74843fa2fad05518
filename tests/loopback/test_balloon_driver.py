"""The balloon driver against the balloon's model, which holds every broken rule against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import guestpv
from guestpv.devices.loopback import open_function
from guestpv.devices.models.balloon import Balloon as Model
from guestpv.devices.queue import DeviceQueue
from guestpv.drivers.balloon import Balloon
from guestpv.drivers.balloon_pages import HUGE_BYTES, Chunk, PageSource
from guestpv.errors import DeviceViolation, GuestpvError, Refused, TimeLimit, UsageError
from guestpv.spec import balloon as spec
from guestpv.spec.features import mask
from guestpv.system import System
from guestpv.transport.pci import PciTransport

CHUNK = HUGE_BYTES >> spec.PAGE_SHIFT


class World:
    """A driver and its device."""

    def __init__(self, params: dict[str, str] | None = None, **options: Any) -> None:
        self.function = open_function("balloon", params or {})
        assert isinstance(self.function.model, Model)
        self.model = self.function.model
        self.device = self.function.device
        self.balloon = Balloon(PciTransport(self.function), **options)

    @property
    def findings(self) -> list[str]:
        return [str(finding) for finding in self.function.findings]

    def agrees(self) -> bool:
        """Whether both sides think of the same pages, and nothing was held against the driver."""
        assert self.findings == []
        assert set(self.balloon.page_numbers().tolist()) == self.model.pages
        assert self.balloon.actual == self.balloon.pages == len(self.model.pages)
        return True


@pytest.fixture
def world() -> Callable[..., World]:
    return World


RINGS = [
    {},
    {"packed": "on"},
    {"packed": "on", "in_order": "on"},
    {"indirect_desc": "off", "event_idx": "off"},
    {"msix": "off"},
    {"msix": "1"},
    {"threaded": "on"},
    {"queue_size": "2"},
    {"segment": "16384", "indirect_desc": "off"},
    {"segment": "65536"},
    {"offer": "-must_tell_host,-stats_vq,-deflate_on_oom,-page_reporting"},
    {"offer": "+free_page_hint"},
]


@pytest.mark.requirement("DRV-BALLOON-01", "DRV-BALLOON-09", "DRV-BALLOON-14", "DRV-BALLOON-47")
@pytest.mark.parametrize("params", RINGS, ids=str)
def test_pages_go_in_and_come_out(params: dict[str, str]) -> None:
    world = World(params)
    with world.balloon as balloon:
        for pages in (1, 1000, CHUNK, 3 * CHUNK + 7):
            balloon.inflate(pages)
            assert world.agrees()
        assert balloon.pages == 1001 + 4 * CHUNK + 7
        assert balloon.free_pages == -balloon.pages % CHUNK
        for pages in (1, 2 * CHUNK, 700):
            assert balloon.deflate(pages) == pages
            assert world.agrees()
            assert balloon.free_pages < CHUNK
        assert balloon.deflate(1 << 30) == 4 * CHUNK + 1008 - 2 * CHUNK - 701
        assert (balloon.pages, balloon.free_pages, world.model.pages) == (0, 0, set())
    assert world.findings == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=20))
def test_whatever_the_targets_every_page_is_accounted_for(targets: list[int]) -> None:
    world = World()
    with world.balloon as balloon:
        for target in targets:
            if target > balloon.pages:
                balloon.inflate(target - balloon.pages)
            else:
                balloon.deflate(balloon.pages - target)
            assert balloon.pages == target
            assert world.agrees()
            assert (balloon.pages + balloon.free_pages) % CHUNK == 0
            assert balloon.free_pages < CHUNK
        assert balloon.inflated - balloon.deflated == balloon.pages


def test_opened_by_its_name() -> None:
    driver = guestpv.open_driver("loopback:balloon?target=77")
    assert isinstance(driver, Balloon)
    with driver as balloon:
        assert balloon.target == 77
        balloon.inflate(balloon.target)
        assert balloon.actual == 77


def test_memory_goes_back_to_where_it_came_from(world: Callable[..., World]) -> None:
    it = world()
    dma = it.function.dma
    before = len(dma.windows())
    it.balloon.inflate(4 * CHUNK)
    assert len(dma.windows()) == before + 4
    it.balloon.deflate(2 * CHUNK + 1)
    assert len(dma.windows()) == before + 2
    it.balloon.deflate(2 * CHUNK)
    assert len(dma.windows()) == before
    it.balloon.close()
    it.balloon.close()
    assert it.model.pages == set()


# The numbers of pages.


class Frames(System):
    """A kernel that tells the page numbers it is told to tell."""

    def __init__(self, frames: Callable[[int, int], list[int]]) -> None:
        self._frames = frames

    def page_frames(self, pointer: int, count: int) -> NDArray[np.uint64]:
        return np.array(self._frames(pointer, count), np.uint64)


def test_behind_an_iommu_numbers_come_from_the_kernel_and_not_from_the_bus() -> None:
    calls: list[tuple[int, int]] = []

    def frames(pointer: int, count: int) -> list[int]:
        calls.append((pointer, count))
        return list(range(1000 * len(calls), 1000 * len(calls) + count))

    world = World({"translated": "on"}, system=Frames(frames))
    with world.balloon as balloon:
        balloon.inflate(CHUNK + 1)
        assert world.model.pages == {*range(2000, 2000 + CHUNK), 3000}
        assert [count for _, count in calls] == [CHUNK] * 3


def test_page_number_0_is_refused_and_explained() -> None:
    for frames in ([0] * CHUNK, [*range(1, CHUNK), 0]):
        with pytest.raises(Refused, match="page number 0") as caught:
            World({"translated": "on"}, system=Frames(lambda pointer, count, frames=frames: frames))
        assert "CAP_SYS_ADMIN" in caught.value.hint


def test_numbers_of_more_than_32_bits_are_refused() -> None:
    with pytest.raises(Refused, match="32 bits"):
        World({"translated": "on"}, system=Frames(lambda pointer, count: [1 << 32] * count))


@pytest.mark.provokes("page numbers are made up")
def test_huge_pages_are_told_from_single_ones() -> None:
    layouts = iter(
        [
            list(range(CHUNK, 2 * CHUNK)),
            list(range(CHUNK, 2 * CHUNK)),
            list(range(CHUNK + 1, 2 * CHUNK + 1)),
            [5 * CHUNK, *range(9 * CHUNK + 1, 10 * CHUNK)],
        ]
    )
    world = World({"translated": "on"}, system=Frames(lambda pointer, count: next(layouts)))
    world.balloon.inflate(3 * CHUNK)
    assert world.balloon.huge_bytes == HUGE_BYTES
    world.balloon.close()


# Trouble.


@pytest.mark.requirement("DRV-BALLOON-10", "DRV-BALLOON-12", "DRV-BALLOON-13")
def test_nothing_is_touched_before_the_device_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World({"threaded": "on"}, answer_limit=0.2)
    balloon = world.balloon
    balloon.inflate(100)
    returned: list[Chunk] = []
    monkeypatch.setattr(PageSource, "give_back", lambda source, chunk: returned.append(chunk))
    world.device.hold = True
    with pytest.raises(TimeLimit, match="acknowledged nothing"):
        balloon.deflate(100)
    assert (balloon.pages, returned) == (100, [])
    assert world.model.config["actual"] == 100
    for attempt in (lambda: balloon.inflate(1), lambda: balloon.deflate(1), balloon.report_free):
        with pytest.raises(Refused, match="cannot go on"):
            attempt()
    world.device.hold = False
    balloon.close()
    assert world.model.pages == set()


def test_an_inflate_that_is_never_acknowledged_is_bounded() -> None:
    world = World({"threaded": "on"}, answer_limit=0.2)
    world.device.hold = True
    with pytest.raises(TimeLimit) as caught:
        world.balloon.inflate(100 * CHUNK)
    assert "until it is reset" in caught.value.message
    world.balloon.close()
    with pytest.raises(UsageError, match="closed"):
        world.balloon.inflate(1)


def test_when_memory_runs_out_what_was_possible_is_in_the_balloon(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    take, left = PageSource.take, [2]

    def scarce(source: PageSource) -> Chunk:
        if not left[0]:
            raise GuestpvError("no memory to pin")
        left[0] -= 1
        return take(source)

    monkeypatch.setattr(PageSource, "take", scarce)
    with pytest.raises(GuestpvError, match="no memory to pin"):
        world.balloon.inflate(5 * CHUNK)
    assert world.balloon.pages == world.balloon.inflated == 2 * CHUNK
    assert world.agrees()
    world.balloon.deflate(CHUNK)
    assert world.agrees()
    world.balloon.close()


def test_a_device_that_lies_breaks_the_balloon_and_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    complete = DeviceQueue.complete
    monkeypatch.setattr(DeviceQueue, "complete", lambda queue, chain, length=0: complete(queue, chain, 4096))
    with pytest.raises(DeviceViolation, match="4096"):
        world.balloon.inflate(10)
    with pytest.raises(Refused, match="cannot go on"):
        world.balloon.inflate(1)
    world.balloon.close()


def test_it_is_a_pci_driver_with_whole_chunks() -> None:
    transport = PciTransport(open_function("balloon", {}))
    for size in (0, 4096, HUGE_BYTES + 4096):
        with pytest.raises(UsageError, match="multiple of 2 MiB"):
            Balloon(transport, chunk_bytes=size)
    transport.close()


# Statistics.


@pytest.mark.requirement(
    "DRV-BALLOON-16", "DRV-BALLOON-17", "DRV-BALLOON-18", "DRV-BALLOON-19", "DRV-BALLOON-23", "DRV-BALLOON-51"
)
def test_statistics_are_there_from_the_start_and_fresh_for_every_request() -> None:
    class Clock(System):
        """A kernel in which every look at the events finds one major fault more."""

        looks = 0

        def read_text(self, path: str) -> str:
            if path != "/proc/vmstat":
                return super().read_text(path)
            self.looks += 1
            return f"pgmajfault {self.looks}\npgfault 100\npswpin 3"

    world = World(system=Clock())
    known = {"swap_in", "majflt", "minflt", "memfree", "memtot", "avail", "caches"}
    assert world.model.statistics.keys() == known
    assert not world.balloon.answer_statistics()
    seen = [world.model.statistics]
    for _ in range(3):
        assert world.model.ask_statistics()
        assert not world.model.ask_statistics()
        assert world.balloon.answer_statistics()
        seen.append(world.model.statistics)
    assert world.balloon.answered == 3
    assert [one["majflt"] for one in seen] == [2, 3, 4, 5]
    assert [one["minflt"] for one in seen] == [98, 97, 96, 95]
    assert {(one["swap_in"], one["memtot"] > 1 << 20) for one in seen} == {(3 * 4096, True)}
    world.balloon.close()
    assert world.findings == []


def test_without_the_statistics_queue_there_is_nothing_to_answer() -> None:
    world = World({"offer": "-stats_vq"})
    assert world.balloon.statsq is None
    assert not world.balloon.answer_statistics()
    world.balloon.close()


# Reporting, hinting, poison.


@pytest.mark.requirement("DRV-BALLOON-40", "DRV-BALLOON-41", "DRV-BALLOON-55")
def test_free_pages_of_the_pool_are_reported_once() -> None:
    world = World()
    balloon = world.balloon
    assert balloon.report_free() == 0
    balloon.inflate(CHUNK + 100)
    first = balloon.report_free()
    assert (first, balloon.report_free()) == (CHUNK - 100, 0)
    (report,) = world.model.reported
    assert report[1] == (CHUNK - 100) * spec.PAGE_BYTES
    reported = set(range(report[0] >> 12, (report[0] + report[1]) >> 12))
    assert reported.isdisjoint(world.model.pages)
    balloon.inflate(50)
    balloon.deflate(20)
    # 50 reported pages went into the balloon; the 20 that came out are new to the host.
    assert balloon.report_free() == 20
    assert balloon.reported == CHUNK - 100 + 20
    assert world.agrees()
    balloon.close()


def test_reports_are_huge_pages_where_chunks_are_larger() -> None:
    world = World(chunk_bytes=4 * HUGE_BYTES)
    world.balloon.inflate(100)
    assert world.balloon.report_free() == 4 * CHUNK - 100
    assert [length for _, length in world.model.reported] == [
        (CHUNK - 100) * spec.PAGE_BYTES,
        *[HUGE_BYTES] * 3,
    ]
    world.balloon.close()


@pytest.mark.requirement("DRV-BALLOON-39")
def test_a_report_that_is_not_acknowledged_is_bounded() -> None:
    world = World({"threaded": "on"}, answer_limit=0.2)
    world.balloon.inflate(1)
    world.device.hold = True
    with pytest.raises(TimeLimit, match="report"):
        world.balloon.report_free()
    world.balloon.close()


@pytest.mark.requirement("DRV-BALLOON-24", "DRV-BALLOON-25", "DRV-BALLOON-26", "DRV-BALLOON-29")
def test_hints_follow_the_command_id() -> None:
    world = World({"offer": "+free_page_hint"})
    balloon, model = world.balloon, world.model
    balloon.inflate(CHUNK - 10)
    assert balloon.follow_hints() == 0
    model.hint(7)
    assert balloon.follow_hints() == 10
    assert sum(length for _, length in model.hinted) == 10 * spec.PAGE_BYTES
    assert balloon.follow_hints() == 0
    assert balloon.lent == 0
    model.hint(spec.CMD_ID_STOP)
    assert balloon.follow_hints() == 0
    model.hint(8)
    assert balloon.follow_hints() == 10
    model.hint(spec.CMD_ID_DONE)
    assert balloon.follow_hints() == 0
    assert balloon.hinted == 20
    assert world.agrees()
    balloon.close()
    assert world.findings == []


@pytest.mark.requirement("DRV-BALLOON-32")
@pytest.mark.parametrize("done", [False, True])
def test_hinted_pages_are_written_to_before_they_leave_unless_the_round_is_done(
    done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World({"offer": "+free_page_hint"})
    balloon = world.balloon
    balloon.inflate(CHUNK - 10)
    world.model.hint(7)
    balloon.follow_hints()
    if done:
        world.model.hint(spec.CMD_ID_DONE)
        balloon.follow_hints()
    (chunk,) = balloon._chunks
    chunk.buffer.array[:] = 0xA5
    returned: list[Any] = []
    monkeypatch.setattr(PageSource, "give_back", lambda source, chunk: returned.append(chunk.buffer.array))
    balloon.deflate(balloon.pages)
    balloon.follow_hints()
    (memory,) = returned
    assert memory[: -10 * spec.PAGE_BYTES].all()
    assert memory[-10 * spec.PAGE_BYTES :].any() == done
    balloon.close()


def test_memory_that_the_device_may_still_be_told_about_stays() -> None:
    world = World({"offer": "+free_page_hint", "threaded": "on"})
    balloon = world.balloon
    balloon.inflate(CHUNK - 10)
    queue = balloon.queues[spec.FREE_PAGE_VQ]
    device_queue = world.device.queues[spec.FREE_PAGE_VQ]
    held: list[Any] = []
    serve = world.model.serve
    world.model.serve = lambda q: held.append(q) if q is device_queue else serve(q)  # type: ignore[method-assign]
    world.model.hint(7)
    balloon.follow_hints()
    balloon.deflate(CHUNK)
    assert (balloon.lent, balloon.pages, balloon.free_pages) == (1, 0, CHUNK)
    world.model.hint(8)
    assert balloon.follow_hints() == 0  # the last round is not over
    assert queue.outstanding == 3
    world.model.serve = serve  # type: ignore[method-assign]
    world.device.poll()
    assert queue.wait(60)
    while balloon.lent:
        balloon.follow_hints()
    assert balloon.free_pages == 0
    balloon.close()


@pytest.mark.requirement("DRV-BALLOON-02")
def test_poison_is_left_alone_unless_asked_for() -> None:
    world = World({"offer": "+page_poison"})
    assert not world.balloon.transport.has(spec.F_PAGE_POISON)
    world.balloon.close()


@pytest.mark.requirement("DRV-BALLOON-34", "DRV-BALLOON-35", "DRV-BALLOON-36", "DRV-BALLOON-38")
def test_poison_fills_what_comes_back_and_what_is_reported() -> None:
    world = World({"offer": "+page_poison"}, poison=0xDEADBEEF)
    balloon = world.balloon
    assert world.model.config["poison_val"] == 0xDEADBEEF
    balloon.inflate(CHUNK)
    (chunk,) = balloon._chunks
    assert not chunk.buffer.array.any()
    balloon.deflate(10)
    words = chunk.buffer.array.view(np.uint32)
    assert (words[-10 * 1024 :] == 0xDEADBEEF).all()
    assert not words[: -10 * 1024].any()
    words[-1024:] = 1
    assert balloon.report_free() == 10
    assert (words[-10 * 1024 :] == 0xDEADBEEF).all()
    assert world.agrees()
    balloon.close()
    assert world.findings == []


# Queue numbers.


class DenseModel(Model):
    """Numbers its queues as QEMU does: no gap for what it does not offer."""

    def order(self) -> list[int]:
        return [0, 1, *(q for q, bit in spec.OPTIONAL_QUEUES.items() if self.device.offered >> bit & 1)]

    def queue_size(self, index: int, features: int) -> int:
        return self.depth if index < len(self.order()) else 0

    def handle(self, queue: Any, chain: Any) -> None:
        real = queue.index
        queue.index = self.order()[real]
        try:
            super().handle(queue, chain)
        finally:
            queue.index = real


OPTIONAL = ("stats_vq", "free_page_hint", "page_reporting")
SETS = [tuple(name for place, name in enumerate(OPTIONAL) if bits >> place & 1) for bits in range(8)]


@pytest.mark.requirement("DRV-BALLOON-43", "DRV-BALLOON-44")
@pytest.mark.parametrize("offered", SETS, ids="+".join)
@pytest.mark.parametrize("dense", [False, True], ids=["standard", "dense"])
def test_both_ways_to_number_queues_are_found_out(
    offered: tuple[str, ...], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestpv.devices.loopback.Balloon", DenseModel if dense else Model)
    world = World({"offer": ",".join(f"{'+' if name in offered else '-'}{name}" for name in OPTIONAL)})
    balloon = world.balloon
    gap = [name in offered for name in OPTIONAL] not in [[True] * n + [False] * (3 - n) for n in range(4)]
    assert balloon.numbering == ("dense" if dense and gap else "standard")
    balloon.inflate(10)
    assert balloon.report_free() == (CHUNK - 10 if "page_reporting" in offered else 0)
    assert len(world.model.reported) == ("page_reporting" in offered)
    assert bool(world.model.statistics) == ("stats_vq" in offered)
    world.model.hint(2)
    assert balloon.follow_hints() == (CHUNK - 10 if "free_page_hint" in offered else 0)
    assert world.agrees()
    balloon.close()


def test_a_feature_left_out_does_not_move_the_queues_of_a_dense_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("guestpv.devices.loopback.Balloon", DenseModel)
    with guestpv.open("loopback:balloon?features=-stats_vq") as transport, Balloon(transport) as balloon:
        assert {which: queue.index for which, queue in balloon.queues.items()} == {0: 0, 1: 1, 4: 3}
        assert balloon.numbering == "dense"


@pytest.mark.requirement("DEV-BALLOON-15", "DEV-BALLOON-16")
def test_a_queue_that_is_nowhere_is_the_devices_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "queue_size", lambda model, index, features: 8 if index < 3 else 0)
    with pytest.raises(DeviceViolation, match="reporting_vq at 4"):
        World()


def test_what_is_negotiated() -> None:
    world = World({"offer": "+free_page_hint,+page_poison"})
    own = mask(
        (
            spec.F_MUST_TELL_HOST,
            spec.F_STATS_VQ,
            spec.F_DEFLATE_ON_OOM,
            spec.F_FREE_PAGE_HINT,
            spec.F_PAGE_REPORTING,
        )
    )
    assert world.balloon.features & 0x3F == own
    world.balloon.close()
