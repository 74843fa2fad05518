"""The entropy model, driven by hand (5.4)."""

from __future__ import annotations

import pytest

from guestpv.devices.models.rng import Rng

from .kit import V1


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
