"""Software functions, one for each kind of test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.blk import Blk
from guestpv.devices.models.blk_store import Store
from guestpv.devices.models.net import Net
from guestpv.devices.models.rng import Rng

from .kit import Bench


@pytest.fixture
def rng() -> Iterator[Bench]:
    function = SoftwareFunction(Rng(seed=1, depth=16), name="rng")
    yield Bench(function)
    function.close()


@pytest.fixture
def nic() -> Iterator[Bench]:
    function = SoftwareFunction(Net(pairs=2, mtu=1500, depth=16), name="net")
    yield Bench(function)
    function.close()


@pytest.fixture
def disk() -> Iterator[Bench]:
    function = SoftwareFunction(Blk(Store(size=1 << 20), depth=16), name="blk")
    yield Bench(function)
    function.close()
