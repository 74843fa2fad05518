"""Doorbells, and what is kept of what happened (4.1.4.4, 4.1.5.2)."""

from __future__ import annotations

import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.net import Net
from guestpv.devices.models.rng import Rng
from guestpv.errors import UsageError
from guestpv.spec import blk
from guestpv.spec import features as ft

from .kit import V1, Bench, fired


@pytest.mark.requirement(
    "DRV-PCI-47", "DRV-PCI-48", "DRV-PCI-49", "DRV-PCI-68", "DRV-INIT-13", "DEV-SPLIT-22"
)
def test_kick_mistakes(nic: Bench) -> None:
    nic.driver.negotiate(V1)
    queue = nic.driver.queue(0, 8)
    queue.kick()
    nic.driver.driver_ok()
    queue.kick(width=4)
    queue.kick(77)
    queue.kick(1)
    assert nic.rules == ["DRV-INIT-13", "DRV-PCI-47", "DRV-PCI-68", "DRV-PCI-49", "DRV-PCI-68"]
    nic.device.offered |= 1 << ft.F_NOTIFICATION_DATA
    nic.driver.start(V1 | 1 << ft.F_NOTIFICATION_DATA, {0: 8})[0].kick(0, width=2)
    assert nic.rules[5:] == ["DRV-PCI-48"]


@pytest.mark.requirement("DEV-PCI-93", "DEV-PCI-35")
def test_one_doorbell_for_all_queues() -> None:
    function = SoftwareFunction(Net(), name="net", multiplier=0)
    bench = Bench(function)
    rx, tx = bench.driver.start(V1, {0: 8, 1: 8})
    tx.add([tx.buffer(80)], [])
    tx.kick()
    assert tx.used() == [(0, 0)]
    assert rx.used() == []
    assert bench.rules == []
    function.close()


@pytest.mark.parametrize("multiplier", [2, 3, 6, 8192])
def test_bad_multiplier_is_refused(multiplier: int) -> None:
    with pytest.raises(UsageError, match="notify_off_multiplier"):
        SoftwareFunction(Rng(), name="rng", multiplier=multiplier)


def test_events_and_observers(rng: Bench) -> None:
    seen: list[tuple[str, str, object]] = []
    stop = rng.function.observe(lambda event, subject: seen.append((event.kind, event.name, subject)))
    queue = rng.driver.start(V1, {0: 8})[0]
    queue.add([], [queue.buffer(4)])
    queue.kick()
    stop()
    count = len(seen)
    rng.driver.read("device_status")
    assert len(seen) == count
    kinds = [kind for kind, _, _ in seen]
    assert kinds[-5:] == ["write", "kick", "pop", "push", "publish"] or "interrupt" in kinds[-1:]
    names = [event.name for event in rng.function.journal.events]
    assert "queue_enable" in names
    assert any(kind == "pop" and subject is not None for kind, _, subject in seen)
    assert "device_status" in str(next(e for e in rng.function.journal.events if e.name == "device_status"))


def test_findings_are_bounded(rng: Bench) -> None:
    for _ in range(1500):
        rng.driver.write("num_queues", 1)
    assert len(rng.function.findings) == 1000
    assert rng.function.journal.findings_dropped == 500


def test_removal_and_error_fds(rng: Bench) -> None:
    request, error = rng.function.request_fd(), rng.function.error_fd()
    assert request is not None
    assert error is not None
    rng.function.request_removal()
    assert (fired(request), fired(error)) == (1, 0)
    rng.function.report_error()
    assert fired(error) == 1


def test_without_flush_the_cache_is_written_through(disk: Bench) -> None:
    assert disk.driver.negotiate(V1 | 1 << blk.F_CONFIG_WCE)
    assert disk.device.model.config["writeback"] == 0
    assert disk.rules == []
