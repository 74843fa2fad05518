"""The balloon's view of the guest's memory: statistics and pressure, from a kernel's own text."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from guestpv.drivers.balloon_statistics import Statistics, read_counters, read_statistics
from guestpv.services.memory_cgroup import MemoryCgroups
from guestpv.services.pressure import Pressure
from guestpv.spec.balloon import STAT, Stat
from guestpv.system import System

MEMINFO = """MemTotal:        2014152 kB
MemFree:          787452 kB
MemAvailable:     754908 kB
Buffers:            1000 kB
Cached:            40000 kB
SwapCached:          500 kB
HugePages_Total:       3
Active(anon):         12 kB
"""
VMSTAT = """nr_free_pages 196863
pswpin 7
pswpout 9
pgfault 1000
pgmajfault 40
htlb_buddy_alloc_success 5
htlb_buddy_alloc_fail 6
"""


class Texts(System):
    """A kernel with these files in /proc."""

    def __init__(self, **texts: str) -> None:
        self.texts = {"meminfo": MEMINFO, "vmstat": VMSTAT} | texts

    def read_text(self, path: str) -> str:
        try:
            return self.texts[path.removeprefix("/proc/")]
        except KeyError:
            raise FileNotFoundError(path) from None

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
        raise FileNotFoundError(path)


@pytest.mark.requirement("DRV-BALLOON-50")
def test_every_tag_of_the_standard_has_its_value() -> None:
    assert read_statistics(Texts()) == {
        Stat.SWAP_IN: 7 * 4096,
        Stat.SWAP_OUT: 9 * 4096,
        Stat.MAJFLT: 40,
        Stat.MINFLT: 960,
        Stat.MEMFREE: 787452 << 10,
        Stat.MEMTOT: 2014152 << 10,
        Stat.AVAIL: 754908 << 10,
        Stat.CACHES: 41500 << 10,
        Stat.HTLB_PGALLOC: 5,
        Stat.HTLB_PGFAIL: 6,
    }
    assert len(Stat) == len(read_statistics(Texts()))


@pytest.mark.requirement("DRV-BALLOON-20", "DRV-BALLOON-23")
def test_a_buffer_has_the_same_tags_whatever_the_kernel_says_later() -> None:
    system = Texts(vmstat="pgmajfault 1")
    statistics = Statistics(system)
    assert Stat.HTLB_PGALLOC not in statistics.tags
    first = np.frombuffer(statistics.fill(), STAT)
    system.texts = {"meminfo": "MemTotal: 1 kB", "vmstat": VMSTAT}
    second = np.frombuffer(statistics.fill(), STAT)
    assert first["tag"].tolist() == second["tag"].tolist() == list(statistics.tags)
    assert len(statistics.fill()) == statistics.size == 10 * len(statistics.tags)
    assert dict(second.tolist())[Stat.MAJFLT] == 40


def test_units() -> None:
    counters = read_counters("/proc/meminfo", Texts())
    assert counters["HugePages_Total"] == 3
    assert counters["Buffers"] == 1000 * 1024


def test_this_kernel_knows_most_of_them() -> None:
    values = read_statistics()
    assert values.keys() >= {Stat.MAJFLT, Stat.MINFLT, Stat.MEMFREE, Stat.MEMTOT, Stat.AVAIL, Stat.CACHES}
    assert values[Stat.MEMFREE] <= values[Stat.MEMTOT]


def test_without_psi_there_is_no_alarm_and_no_average() -> None:
    system = Texts()
    pressure = Pressure(system)
    assert not pressure.alarmed()
    assert (pressure.available, pressure.limited_by) == (754908 << 10, "")
    assert pressure.total == 2014152 << 10
    pressure.close()


def test_an_alarm_of_this_kernel_can_be_set_and_taken_away() -> None:
    if not Path("/proc/pressure/memory").exists():
        pytest.skip("this kernel has no PSI: boot it with psi=1")
    before = len(os.listdir("/proc/self/fd"))
    pressure = Pressure()
    average = pressure.average()
    assert average is not None
    assert 0 <= average <= 100
    pressure.close()
    pressure.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_kernel_that_refuses_the_alarm_costs_nothing() -> None:
    class Refusing(System):
        def write(self, fd: int, data: bytes) -> int:
            raise OSError(22, "Invalid argument")

        def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
            return os.open(os.devnull, flags)

    before = len(os.listdir("/proc/self/fd"))
    pressure = Pressure(Refusing())
    assert not pressure.alarmed()
    pressure.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_average_is_the_kernels() -> None:
    text = "some avg10=12.34 avg60=1.00 avg300=0.10 total=55\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"
    assert Pressure(Texts(**{"pressure/memory": text})).average() == 12.34


class Cgroups(Texts):
    """A system whose cgroups are directories of the test."""

    def __init__(self, top: Path, path: str) -> None:
        super().__init__(
            **{
                "self/mounts": f"proc /proc proc rw 0 0\ncgroup2 {top} cgroup2 rw 0 0",
                "self/cgroup": f"0::{path}",
            }
        )
        self._top = str(top)

    def read_text(self, path: str) -> str:
        return System.read_text(self, path) if path.startswith(self._top) else super().read_text(path)

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
        assert path.startswith(self._top)
        return os.open(path, flags)


def cgroup(path: Path, **files: object) -> None:
    path.mkdir(exist_ok=True)
    texts = {"max": "max", "high": "max", "current": 0, "stat": "active_file 0\ninactive_file 0"} | files
    for name, text in texts.items():
        (path / f"memory.{name}").write_text(f"{text}\n")


def test_the_tightest_limit_of_a_cgroup_and_those_above_counts(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    top.mkdir()
    for inner in ("a", "a/b"):
        cgroup(top / inner, events="high 0")
    groups = MemoryCgroups(Cgroups(top, "/a/b"))
    assert len(groups.fds) == 2
    assert groups.room() is None
    cgroup(top / "a", max=1000 << 20, current=300 << 20, stat="active_file 7\nanon 9\ninactive_file 3")
    assert groups.room() == ((700 << 20) + 10, f"{top}/a")
    cgroup(top / "a" / "b", max=900 << 20, high=200 << 20, current=250 << 20)
    assert groups.room() == (-50 << 20, f"{top}/a/b")
    groups.settle()
    for file in (top / "a" / "b").iterdir():
        file.unlink()
    assert groups.room() == ((700 << 20) + 10, f"{top}/a")
    groups.close()
    assert groups.fds == ()


@pytest.mark.parametrize("path", ["/", "/elsewhere"])
def test_without_a_memory_cgroup_there_is_no_limit(tmp_path: Path, path: str) -> None:
    groups = MemoryCgroups(Cgroups(tmp_path, path))
    assert (groups.fds, groups.room()) == ((), None)


@pytest.mark.parametrize(
    ("room", "available", "limited_by"),
    [
        ((5, "/x"), 5, "/x"),
        ((-5, "/x"), -5, "/x"),
        ((1 << 40, "/x"), 754908 << 10, ""),
        (None, 754908 << 10, ""),
    ],
)
def test_what_a_cgroup_leaves_is_all_that_is_available(
    monkeypatch: pytest.MonkeyPatch, room: tuple[int, str] | None, available: int, limited_by: str
) -> None:
    monkeypatch.setattr(MemoryCgroups, "room", lambda self: room)
    pressure = Pressure(Texts())
    assert (pressure.available, pressure.limited_by) == (available, limited_by)
    pressure.close()
