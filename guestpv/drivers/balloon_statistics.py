"""The guest's memory statistics (5.5.6.3, 5.5.6.4), from ``/proc/meminfo`` and ``/proc/vmstat``."""

from __future__ import annotations

import re

import numpy as np

from ..spec.balloon import STAT, Stat
from ..system import PAGE_SIZE, SYSTEM, System

_LINE = re.compile(r"^(\w+):?\s+(\d+)( kB)?$", re.MULTILINE)


def read_counters(path: str, system: System = SYSTEM) -> dict[str, int]:
    """Names and values of ``/proc/meminfo`` (in bytes) or ``/proc/vmstat`` (in its own units)."""
    text = system.read_text(path)
    return {name: int(value) * (1024 if kilo else 1) for name, value, kilo in _LINE.findall(text)}


def read_statistics(system: System = SYSTEM) -> dict[Stat, int]:
    """Every statistic that this kernel knows, in bytes or counts.

    The figures are those of Linux's own driver, but for MINFLT: the standard asks for minor faults, so that
    the major ones are taken out of the kernel's sum.
    """
    info, events = (read_counters(f"/proc/{name}", system) for name in ("meminfo", "vmstat"))
    values: dict[Stat, int | None] = {
        Stat.SWAP_IN: events["pswpin"] * PAGE_SIZE if "pswpin" in events else None,
        Stat.SWAP_OUT: events["pswpout"] * PAGE_SIZE if "pswpout" in events else None,
        Stat.MAJFLT: events.get("pgmajfault"),
        Stat.MINFLT: events["pgfault"] - events.get("pgmajfault", 0) if "pgfault" in events else None,
        Stat.MEMFREE: info.get("MemFree"),
        Stat.MEMTOT: info.get("MemTotal"),
        Stat.AVAIL: info.get("MemAvailable"),
        Stat.CACHES: sum(info.get(name, 0) for name in ("Buffers", "Cached", "SwapCached")),
        Stat.HTLB_PGALLOC: events.get("htlb_buddy_alloc_success"),
        Stat.HTLB_PGFAIL: events.get("htlb_buddy_alloc_fail"),
    }
    return {stat: value for stat, value in values.items() if value is not None}


class Statistics:
    """Fills statistics buffers, each with the same tags (DRV-BALLOON-23).

    Attributes:
        tags: what this kernel knows.
        size: bytes of a buffer.
    """

    def __init__(self, system: System = SYSTEM) -> None:
        self._system = system
        self.tags = tuple(read_statistics(system))
        self.size = STAT.itemsize * len(self.tags)

    def fill(self) -> bytes:
        """The statistics of now as ``size`` bytes of ``spec.STAT`` entries."""
        values = read_statistics(self._system)
        entries = [(tag, values.get(tag, 0)) for tag in self.tags]
        return np.array(entries, dtype=STAT).tobytes()
