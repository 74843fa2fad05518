"""Hostile devices, a short run of each kind; ``tools/hostile`` does the long ones."""

from __future__ import annotations

import pytest

from hostile_suite import rings, services

pytestmark = pytest.mark.provokes("a device that lies makes its driver look wrong to it")


def test_rings() -> None:
    outcome = rings.run(3000, 1, lambda text: None)
    assert outcome["faults"] >= 3000
    assert len(outcome["kinds"]) == 16
    assert {"DEV-SPLIT-36", "DEV-PACKED-20", "2.1.2"} <= set(outcome["broke the queue"])


@pytest.mark.parametrize("over", ["loopback", "vfio-user"])
def test_services(over: str) -> None:
    outcome = services.run(150, 7, over, lambda text: None)
    assert outcome["faults"] >= 150
    assert outcome["net"]["frames that came out"]
    assert outcome["blk"]["requests done"]
    assert outcome["balloon"]["targets"]
