"""The balloon's policy: it follows the host as fast as it may, and the guest comes first."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guestpv.devices.loopback import open_function
from guestpv.devices.models.balloon import Balloon as Model
from guestpv.drivers.balloon_pages import Chunk, PageSource
from guestpv.errors import DeviceViolation, GuestpvError, TimeLimit
from guestpv.services import balloon as module
from guestpv.services.balloon import BalloonService, chunk_bytes, default_keep_free
from guestpv.spec.features import BALLOON
from guestpv.system import System
from guestpv.transport.base import FeatureFilter
from guestpv.transport.pci import PciTransport

MIB = 256
"""Pages."""
KEEP = 64 * MIB
FAST = 1 << 40


class Guest(System):
    """A guest whose memory is what the test says, less what is in the balloon.

    Attributes:
        available: pages that are available with an empty balloon.
        total: pages that there are, which the size of chunks depends on.
        stall: percentage of time that tasks wait for memory.
    """

    def __init__(self, available: int = 1024 * MIB, total: int = 512 * MIB) -> None:
        self.available = available
        self.total = total
        self.stall = 0.0
        self.balloon: Callable[[], int] = lambda: 0

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
        raise FileNotFoundError(path)  # the pressure and the cgroups of the machine that runs the test

    def read_text(self, path: str) -> str:
        if path == "/proc/meminfo":
            kib = (self.available - self.balloon()) * 4
            return f"MemTotal: {self.total * 4} kB\nMemFree: 1024 kB\nMemAvailable: {kib} kB"
        if path == "/proc/pressure/memory":
            return f"some avg10={self.stall} avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00"
        return super().read_text(path)


class Bench:
    """A service, its device and its guest."""

    def __init__(
        self,
        params: dict[str, str] | None = None,
        guest: Guest | None = None,
        features: str = "",
        **options: Any,
    ) -> None:
        self.guest = guest or Guest()
        self.function = open_function("balloon", {"threaded": "on", **(params or {})})
        assert isinstance(self.function.model, Model)
        self.model = self.function.model
        transport = PciTransport(self.function)
        transport.feature_filter = FeatureFilter.parse(features, BALLOON)
        self.service = BalloonService(
            transport, system=self.guest, **{"keep_free": KEEP * 4096, "rate": FAST} | options
        )
        self.guest.balloon = lambda: self.service.balloon.pages
        self.events: list[str] = []

    @property
    def pages(self) -> int:
        return self.service.balloon.pages

    def run(self, seconds: float) -> list[str]:
        """Events of so many seconds: for what must not happen meanwhile."""
        deadline = time.monotonic() + seconds
        events: list[str] = []
        while (left := deadline - time.monotonic()) > 0:
            events += self.service.watch(left)
        return events

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> list[str]:
        """Events until the condition holds, which it has to in time."""
        deadline = time.monotonic() + seconds
        events: list[str] = []
        while not condition():
            assert time.monotonic() < deadline, (events, self.service.stats())
            events += self.service.watch(0.05)
        return events

    def settle(self) -> list[str]:
        """Events until the balloon is at its target."""
        return self.until(lambda: self.pages == self.model.config["num_pages"] == self.service.target)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def start(*args: Any, **options: Any) -> Bench:
        benches.append(Bench(*args, **options))
        return benches[-1]

    yield start
    for one in benches:
        one.service.close()
        assert one.model.pages == set()
        assert [str(finding) for finding in one.function.findings] == []


@pytest.mark.requirement("DRV-BALLOON-04", "DRV-BALLOON-05")
def test_the_target_is_followed_up_and_down(bench: Callable[..., Bench]) -> None:
    it = bench({"target": str(100 * MIB)})
    assert it.settle() == ["balloon at its target, 100 MiB"]
    it.model.set_target(10 * MIB + 1)
    assert it.settle() == ["target 10.00 MiB", "balloon at its target, 10.00 MiB"]
    it.model.set_target(0)
    assert it.settle()[-1] == "balloon at its target, 0 MiB"
    stats = it.service.stats()
    assert (stats["pages"], stats["actual_pages"], stats["target_pages"], stats["free_pages"]) == (0, 0, 0, 0)
    assert stats["counters"]["inflated"] == stats["counters"]["deflated"] == 100 * MIB


def test_a_thousand_targets_in_a_row_end_with_every_page_accounted_for(bench: Callable[..., Bench]) -> None:
    it = bench({"target": "5"})
    choose = random.Random(5)
    for number in range(1000):
        it.model.set_target(choose.randrange(20 * MIB))
        if number % 10:
            it.service.watch(0.001)
        else:
            it.settle()
        assert it.pages + it.service.balloon.free_pages == len(it.service.balloon._chunks) * 512
    it.settle()
    balloon = it.service.balloon
    assert set(balloon.page_numbers().tolist()) == it.model.pages
    assert len(it.model.pages) == balloon.pages == balloon.inflated - balloon.deflated
    assert balloon.free_pages < 512


def test_it_grows_no_faster_than_it_may_and_shrinks_at_once(bench: Callable[..., Bench]) -> None:
    rate = 40
    started = time.monotonic()
    it = bench({"target": str(200 * MIB)}, rate=rate << 20)
    it.until(lambda: it.pages >= 30 * MIB)
    assert it.pages / MIB <= rate * (time.monotonic() - started) + 16
    # At this rate it would take an hour.
    it.service._rate = 2
    it.model.set_target(0)
    it.settle()


def test_a_slow_rate_still_moves(bench: Callable[..., Bench]) -> None:
    it = bench({"target": "600"}, rate=1200 * 4096)
    it.settle()
    assert it.service.balloon.requests <= 4


def test_the_floor_is_kept(bench: Callable[..., Bench]) -> None:
    it = bench({"target": str(1024 * MIB)}, Guest(available=200 * MIB))
    events = it.until(lambda: it.pages >= 200 * MIB - KEEP - 512 and it.service.stats()["held"] != "")
    events += it.run(0.3)
    assert 200 * MIB - KEEP - 512 <= it.pages <= 200 * MIB - KEEP
    assert [event for event in events if "64 MiB stay free for the guest" in event] == events
    assert len(events) == 1
    it.guest.available = 300 * MIB
    it.until(lambda: it.pages > 230 * MIB)


def test_the_floor_is_kept_where_memory_comes_in_large_chunks(bench: Callable[..., Bench]) -> None:
    it = bench({"target": str(200 * MIB)}, Guest(available=199 * MIB, total=2048 * MIB))
    it.guest.balloon = lambda: it.pages + it.service.balloon.free_pages
    events = it.until(lambda: it.service.stats()["held"] != "")
    events += it.run(0.3)
    # The next 8 MiB would have to come from below the floor.
    assert it.pages == 128 * MIB
    assert it.service.stats()["counters"]["given_back"] == 0
    it.model.set_target(127 * MIB)
    it.settle()
    it.model.set_target(128 * MIB)
    it.settle()


def test_relief_comes_in_whole_chunks(bench: Callable[..., Bench]) -> None:
    it = bench({"target": str(100 * MIB)}, Guest(available=400 * MIB, total=2048 * MIB))
    it.guest.balloon = lambda: it.pages + it.service.balloon.free_pages
    it.settle()
    assert it.service.balloon.free_pages == 4 * MIB
    # 104 MiB in the pool: one is missing above the floor, which the last 8 MiB of the pool make up for.
    it.guest.available = KEEP + 103 * MIB
    it.until(lambda: it.pages != 100 * MIB)
    assert (it.pages, it.service.balloon.free_pages) == (96 * MIB, 0)
    it.run(0.2)
    assert it.pages == 96 * MIB


@pytest.mark.requirement("DRV-BALLOON-08")
def test_a_hungry_guest_gets_memory_back(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALM", 0.5)
    it = bench({"target": str(200 * MIB)}, Guest(available=400 * MIB))
    it.settle()
    it.guest.available = 200 * MIB
    events = it.until(lambda: it.pages <= 200 * MIB - KEEP)
    assert any("giving some back to the guest" in event for event in events)
    assert it.model.config["actual"] == it.pages
    given = it.service.stats()["counters"]["given_back"]
    assert given >= KEEP
    assert it.service.balloon.deflated == given
    # It stays as it is while memory is short, and grows again when it is not.
    it.run(0.3)
    assert it.pages <= 200 * MIB - KEEP
    it.guest.available = 400 * MIB
    it.settle()


@pytest.mark.requirement("DRV-BALLOON-07")
def test_without_leave_nothing_is_taken_from_the_host(bench: Callable[..., Bench]) -> None:
    it = bench({"target": str(100 * MIB), "offer": "-deflate_on_oom"}, Guest(available=400 * MIB))
    it.settle()
    it.guest.available = 120 * MIB
    events: list[str] = []
    while not events:
        events += it.service.watch(0.05)
    events += it.run(0.2)
    assert it.pages == 100 * MIB
    assert len([event for event in events if "no DEFLATE_ON_OOM" in event]) == 1


def test_the_kernels_alarm_gives_memory_back(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench({"target": str(200 * MIB)})
    it.settle()
    alarms = iter([True])
    monkeypatch.setattr(it.service.pressure, "alarmed", lambda: next(alarms, False))
    it.until(lambda: it.pages != 200 * MIB)
    assert it.pages == 200 * MIB - 16 * MIB
    assert it.service.stats()["memory"]["alarms"] == 1
    monkeypatch.undo()


def test_when_nothing_can_be_pinned_it_waits_and_says_so(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALM", 0.3)
    it = bench({"target": str(10 * MIB)})

    def refuse(source: PageSource) -> Chunk:
        raise GuestpvError("no memory to pin 2.0 MiB for the device")

    with monkeypatch.context() as patch:
        patch.setattr(PageSource, "take", refuse)
        events: list[str] = []
        while not events:
            events += it.service.watch(0.05)
        assert it.pages == 0
        assert events[0] == ("balloon held at 0 MiB of 10 MiB: no memory to pin 2.0 MiB for the device")
    it.settle()


def test_a_device_that_wants_more_than_there_is_gets_what_can_be_spared(bench: Callable[..., Bench]) -> None:
    it = bench({"target": str(0xFFFFFFFF)}, Guest(available=100 * MIB))
    it.until(lambda: "64 MiB stay free" in it.service.stats()["held"])
    it.run(0.2)
    assert 100 * MIB - KEEP - 512 <= it.pages <= 100 * MIB - KEEP


def test_a_device_that_never_answers_is_given_up() -> None:
    it = Bench({"target": str(10 * MIB)})
    it.service.balloon._requests._answer_limit = 0.2
    it.function.device.hold = True
    with pytest.raises(TimeLimit, match="acknowledged nothing"):
        it.run(60)
    it.service.close()


def test_a_device_that_needs_a_reset_is_given_up() -> None:
    it = Bench()
    it.function.device.need_reset()
    with pytest.raises(DeviceViolation, match="NEEDS_RESET"):
        it.run(60)
    it.service.close()


def test_statistics_are_answered_while_nothing_else_happens(bench: Callable[..., Bench]) -> None:
    it = bench()
    it.until(lambda: it.model.ask_statistics())
    seen: list[object] = []
    it.model.statistics_seen = seen.append
    it.until(lambda: bool(seen))
    assert it.service.stats()["counters"]["statistics"] == 1


def test_what_is_free_in_the_pool_is_reported_once_the_balloon_rests(bench: Callable[..., Bench]) -> None:
    it = bench({"target": "100"})
    it.settle()
    it.until(lambda: it.service.stats()["counters"]["reported"] > 0)
    assert sum(length for _, length in it.model.reported) == 412 * 4096
    assert it.service.stats()["counters"]["reported"] == 412


def test_hints_are_given_when_asked_for(bench: Callable[..., Bench]) -> None:
    it = bench({"target": "100", "offer": "+free_page_hint"})
    it.settle()
    it.model.hint(9)
    it.until(lambda: it.service.balloon.hinted == 412)
    it.model.set_target(0)
    it.settle()
    it.until(lambda: it.service.balloon.free_pages == 0)


def test_poison_is_used_only_when_insisted_on(bench: Callable[..., Bench]) -> None:
    assert not bench({"offer": "+page_poison"}).service.features >> 4 & 1
    assert bench({"offer": "+page_poison"}, features="+page_poison").service.features >> 4 & 1


def test_the_owner_is_asked_to_let_go_or_told_of_a_bus_error(bench: Callable[..., Bench]) -> None:
    it = bench()
    it.service.transport.release_fds()
    it.function.request_removal()
    assert it.service.watch(60) == ["release requested"]
    it.function.report_error()
    assert it.service.watch(60) == ["bus error"]


@pytest.mark.parametrize("mode", ["msix", "intx", "poll"])
def test_every_way_to_be_notified(mode: str) -> None:
    function = open_function("balloon", {"threaded": "on", "target": "1000"})
    transport = PciTransport(function)
    transport.mode = mode  # type: ignore[assignment]
    guest = Guest()
    service = BalloonService(transport, system=guest, keep_free=KEEP * 4096, rate=FAST)
    model = function.model
    assert isinstance(model, Model)
    for target in (1000, 10, 2000):
        model.set_target(target)
        deadline = time.monotonic() + 60
        while service.balloon.pages != target:
            assert time.monotonic() < deadline
            service.watch(0.2)
    assert model.ask_statistics()
    deadline = time.monotonic() + 60
    while not service.balloon.answered:
        assert time.monotonic() < deadline
        service.watch(0.2)
    service.close()


def test_sizes() -> None:
    assert default_keep_free(1 << 30) == 64 << 20
    assert default_keep_free(100 << 30) == 5 << 30
    assert chunk_bytes(256 << 20) == chunk_bytes(512 << 20) == 2 << 20
    assert chunk_bytes(1 << 30) == 4 << 20
    assert chunk_bytes(2 << 30) == chunk_bytes(32 << 30) == 8 << 20
    assert chunk_bytes((32 << 30) + 4096) == 16 << 20
    assert chunk_bytes(1 << 40) == 256 << 20
