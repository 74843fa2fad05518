"""``--restart``: what a reset may mend, how often, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestpv.cli import restarts as module
from guestpv.cli.restarts import MOST, PERIOD, Restarts, row
from guestpv.errors import DeviceGone, DeviceViolation, FeaturesRefused, GuestpvError, Refused, TimeLimit

BROKEN = DeviceViolation("the device set DEVICE_NEEDS_RESET", where="0000:01:00.0")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Device:
    """Restarts it as many times as it takes; ``failures`` come first."""

    def __init__(self, *failures: GuestpvError) -> None:
        self.failures = list(failures)
        self.restarts = 0
        self.said: list[str] = []
        self.pauses: list[float] = []

    def restart(self) -> None:
        self.restarts += 1
        if self.failures:
            raise self.failures.pop(0)

    def wait(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        return False

    def mend(
        self, restarts: Restarts, trouble: GuestpvError, wait: Callable[[float], bool] | None = None
    ) -> None:
        restarts.mend(trouble, self.restart, self.said.append, wait or self.wait)


def test_a_device_is_restarted_and_it_is_said(clock: Clock) -> None:
    restarts, device = Restarts(True), Device()
    device.mend(restarts, BROKEN)
    assert device.restarts == 1
    assert device.said == [
        "restart 1: 0000:01:00.0: the device set DEVICE_NEEDS_RESET",
        "the device was reset and goes on",
    ]
    assert restarts.report() == {
        "wanted": True,
        "count": 1,
        "reason": "0000:01:00.0: the device set DEVICE_NEEDS_RESET",
    }
    assert row({"restarts": restarts.report()})[0][1].startswith("1, the last: 0000:01:00.0")
    assert row({"restarts": Restarts(True).report()}) == row({}) == []


def test_nobody_wanted_it() -> None:
    device = Device()
    with pytest.raises(DeviceViolation):
        device.mend(Restarts(False), BROKEN)
    assert device.restarts == 0


@pytest.mark.parametrize("error", [DeviceGone("gone"), Refused("no"), GuestpvError("the TAP link failed")])
def test_what_a_reset_does_not_mend(clock: Clock, error: GuestpvError) -> None:
    device = Device()
    with pytest.raises(type(error)):
        device.mend(Restarts(True), error)
    assert device.restarts == 0
    device = Device(error)
    with pytest.raises(type(error)):
        device.mend(Restarts(True), BROKEN)
    assert device.restarts == 1


def test_it_is_tried_again_with_growing_pauses_while_the_device_comes_up(clock: Clock) -> None:
    restarts, device = Restarts(True), Device(TimeLimit("still in reset"), FeaturesRefused("not yet"))
    device.mend(restarts, BROKEN)
    assert device.restarts == 3
    assert device.pauses == [0.1, 0.2]
    assert restarts.report()["reason"] == "not yet"


def test_what_breaks_again_and_again_is_given_up(clock: Clock) -> None:
    restarts, device = Restarts(True), Device()
    for _ in range(MOST):
        device.mend(restarts, BROKEN)
        clock.now += PERIOD / MOST - 1
    with pytest.raises(DeviceViolation):
        device.mend(restarts, BROKEN)
    assert device.said[-1] == "5 restarts in 10 minutes: no more of them"
    clock.now += PERIOD / MOST
    device.mend(restarts, BROKEN)
    assert restarts.report()["count"] == MOST + 1


def test_whoever_wants_an_end_gets_it_between_two_tries(clock: Clock) -> None:
    device = Device(*[TimeLimit("still in reset")] * 9)
    with pytest.raises(TimeLimit):
        device.mend(Restarts(True), BROKEN, lambda seconds: True)
    assert device.restarts == 1
