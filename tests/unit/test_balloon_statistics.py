"""The balloon's view of the guest's memory: statistics and pressure, from a kernel's own text."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from guestpv.drivers.balloon_statistics import Statistics, read_counters, read_statistics
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
        return self.texts[path.removeprefix("/proc/")]

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
    assert pressure.fd is None
    assert not pressure.alarmed()
    assert pressure.available == 754908 << 10
    assert pressure.total == 2014152 << 10
    pressure.close()


def test_an_alarm_of_this_kernel_can_be_set_and_taken_away() -> None:
    if not Path("/proc/pressure/memory").exists():
        pytest.skip("this kernel has no PSI: boot it with psi=1")
    before = len(os.listdir("/proc/self/fd"))
    pressure = Pressure()
    assert pressure.fd is not None
    assert not pressure.alarmed()
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
    assert pressure.fd is None
    pressure.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_average_is_the_kernels() -> None:
    text = "some avg10=12.34 avg60=1.00 avg300=0.10 total=55\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"
    assert Pressure(Texts(**{"pressure/memory": text})).average() == 12.34
