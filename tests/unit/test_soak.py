"""What a soak complains of."""

from __future__ import annotations

import pytest

from soak_suite import judge

HELD = {
    "pid": 7,
    "descriptors": 19,
    "threads": 4,
    "mappings": 360,
    "device_mappings": 2,
    "resident_kib": 55000,
    "pinned_kib": 6144,
}


@pytest.mark.parametrize("name", judge.GROWTH)
def test_one_more_than_may_be(name: str) -> None:
    most = judge.GROWTH[name]
    after = HELD | {name: HELD[name] + most}
    assert judge.grown({"net": HELD}, {"net": after}) == []
    after[name] += 1
    assert judge.grown({"net": HELD}, {"net": after}) == [
        f"net: {name} grew from {HELD[name]} to {after[name]}"
    ]


def test_a_process_that_was_lost() -> None:
    assert judge.grown({"blk": HELD}, {"blk": HELD | {"pid": 8}}) == ["blk is another process"]


def test_latency() -> None:
    same = [2.0, 3.0, 4.0] * 20
    assert judge.quarters(same) == [3.0] * 4
    assert judge.quarters([1.0, 2.0]) == [1.0, 2.0]
    assert judge.slower("talk", same) == []
    assert judge.slower("talk", [*same, *(value * 4 for value in same)]) == [
        "talk: latency went from 3.0 to 12.0 ms"
    ]
    assert judge.slower("talk", [1.0, 1.0, 1.0, 100.0]) == [], "too few to tell"


def test_breaks_that_are_seen_late() -> None:
    assert judge.late([]) == []
    assert judge.late([0.1, 1.0, 7.0]) == []
    assert judge.late([0.1, 1.5, 1.5]) == ["a break was seen after 1.50 s in the median"]
