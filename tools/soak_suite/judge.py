"""What must not be after a soak, by what was measured in it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

GROWTH: Final = {
    "descriptors": 0,
    "threads": 0,
    # Python's own memory comes and goes in mappings; those of a device's registers do not.
    "mappings": 16,
    "device_mappings": 0,
    "resident_kib": 2048,
    "pinned_kib": 0,
}
"""How much more than after warming up a process may hold at the end."""
SLOWER: Final = 3.0
"""The last quarter's median latency over that of the first, at most: the host has other work, too."""
SEEN: Final = 1.0
"""Seconds within which a break is to be seen, in the median: a host may be busy with something else once."""
ENOUGH: Final = 40
"""So many values make quarters that can be compared."""


def grown(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What each service's process holds at the end and should not.

    Args:
        before: by service, what its process (``pid``) held after warming up; the keys of ``GROWTH``.
        after: the same at the end.
    """
    problems = []
    for service, was in before.items():
        now = after[service]
        if was["pid"] != now["pid"]:
            problems.append(f"{service} is another process")
        problems += [
            f"{service}: {name} grew from {was[name]} to {now[name]}"
            for name, most in GROWTH.items()
            if now[name] - was[name] > most
        ]
    return problems


def quarters(values: Sequence[float]) -> list[float]:
    """The median of each quarter of the values, in their order; fewer where there are fewer than four."""
    length = max(1, len(values) // 4)
    parts = [values[at : at + length] for at in range(0, 4 * length, length)]
    return [round(statistics.median(part), 3) for part in parts if part]


def slower(name: str, values: Sequence[float]) -> list[str]:
    """Whether latencies, in ms and in their order, grew."""
    medians = quarters(values)
    if len(values) < ENOUGH or medians[-1] <= SLOWER * medians[0]:
        return []
    return [f"{name}: latency went from {medians[0]} to {medians[-1]} ms"]


def late(seconds: Sequence[float]) -> list[str]:
    """Whether breaks of a device, each seen after so many seconds, were seen too late."""
    if not seconds or (median := statistics.median(seconds)) <= SEEN:
        return []
    return [f"a break was seen after {median:.2f} s in the median"]
