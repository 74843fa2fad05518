"""A model behind raw registers and rings, driven by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestpv.devices.model import Model

from .kit import Bench


@pytest.fixture
def open_bench() -> Iterator[object]:
    opened: list[Bench] = []

    def make(model: Model, **options: bool) -> Bench:
        opened.append(Bench(model, **options))
        return opened[-1]

    yield make
    for bench in opened:
        bench.function.close()
