"""Features and status, register by register (2.1, 2.2, 4.1.4.3)."""

from __future__ import annotations

import pytest

from guestpv.spec import features as ft
from guestpv.spec import net, pci
from guestpv.spec.status import Status

from .kit import V1, Bench, fired

SETUP = Status.ACKNOWLEDGE | Status.DRIVER


@pytest.mark.requirement("DEV-PCI-18", "DEV-PCI-86", "DEV-FEAT-06", "DEV-FEAT-08")
def test_feature_words(rng: Bench) -> None:
    rng.device.offered |= 1 << 100
    assert rng.driver.offered() == rng.device.offered
    rng.driver.write("device_feature_select", 1)
    rng.driver.write("driver_feature_select", 7)
    assert rng.driver.read("device_feature") & 1
    assert rng.driver.read("device_feature_select") == 1
    rng.driver.write("device_feature_select", 0xFFFFFFFF)
    assert rng.driver.read("device_feature") == 0


@pytest.mark.requirement("DEV-PCI-19", "DEV-FEAT-02")
def test_driver_features_read_back(rng: Bench) -> None:
    assert rng.driver.negotiate(V1)
    rng.driver.write("driver_feature_select", 1)
    assert rng.driver.read("driver_feature") == V1 >> 32
    assert rng.rules == []


@pytest.mark.parametrize(
    ("offered", "accepted", "rule"),
    [
        (0, 1 << ft.F_RING_PACKED, "DRV-FEAT-01"),
        (1 << net.F_GUEST_TSO4, 1 << net.F_GUEST_TSO4, "DRV-FEAT-02"),
        (1 << 44, 1 << 44, "DRV-FEAT-09"),
        (1 << 4, 1 << 4, "DRV-FEAT-11"),
    ],
)
@pytest.mark.requirement("DEV-FEAT-03", "DRV-FEAT-01", "DRV-FEAT-02", "DRV-FEAT-09", "DRV-FEAT-11")
def test_bad_feature_sets_are_refused(nic: Bench, offered: int, accepted: int, rule: str) -> None:
    nic.device.offered |= offered
    assert not nic.driver.negotiate(V1 | accepted)
    assert nic.rules == [rule]
    assert nic.driver.negotiate(V1)


@pytest.mark.requirement("DEV-FEAT-03", "DEV-FEAT-07", "DEV-FEAT-09", "DRV-FEAT-15")
def test_what_the_device_needs(rng: Bench) -> None:
    assert not rng.driver.negotiate(1 << ft.F_VERSION_1)
    assert rng.rules == []
    assert not rng.driver.negotiate(1 << ft.F_ACCESS_PLATFORM)
    assert rng.rules == ["DRV-FEAT-15"]
    rng.device.refuse_features_ok = True
    assert not rng.driver.negotiate(V1)


@pytest.mark.requirement("DRV-INIT-07")
def test_features_are_settled_by_features_ok(rng: Bench) -> None:
    rng.driver.negotiate(V1)
    rng.driver.write("driver_feature", 0)
    assert rng.rules == ["DRV-INIT-07"]
    assert rng.device.features == V1


STATUS_SEQUENCES = {
    "DRV-INIT-01": [Status.ACKNOWLEDGE],
    "DRV-INIT-02": [0, None, Status.DRIVER],
    "DRV-STATUS-02": [0, None, Status.ACKNOWLEDGE, Status.DRIVER],
    "DRV-STATUS-03": [0, None, Status.FAILED, Status.FAILED | Status.ACKNOWLEDGE],
    "DRV-STATUS-05": [0, None, Status.ACKNOWLEDGE | 32],
    "DRV-PCI-26": [0, Status.ACKNOWLEDGE],
    "DRV-INIT-08": [0, None, Status.ACKNOWLEDGE, SETUP, SETUP | Status.DRIVER_OK],
}


@pytest.mark.parametrize("rule", STATUS_SEQUENCES)
@pytest.mark.requirement(*STATUS_SEQUENCES)
def test_status_order(rng: Bench, rule: str) -> None:
    for value in STATUS_SEQUENCES[rule]:
        if value is None:
            assert rng.driver.read("device_status") == 0
        else:
            rng.driver.write("device_status", value)
    assert rng.rules == [rule]


@pytest.mark.requirement("DEV-STATUS-05")
def test_status_shows_defined_bits_only(rng: Bench) -> None:
    rng.driver.reset()
    rng.driver.write("device_status", 0x20 | 0x40 | 0x10 | 1)
    assert rng.driver.read("device_status") == 1


@pytest.mark.requirement("DEV-RESET-01", "DEV-PCI-22", "DEV-PCI-23", "DEV-PCI-70", "DEV-STATUS-06")
def test_reset_forgets_everything(rng: Bench) -> None:
    queue = rng.driver.start(V1, {0: 8})[0]
    rng.driver.write("config_msix_vector", 1)
    rng.driver.reset()
    assert rng.driver.read("device_status") == 0
    rng.driver.write("queue_select", 0)
    assert rng.driver.read("queue_enable") == 0
    assert rng.driver.read("queue_size") == 16
    assert rng.driver.read("queue_desc") == 0
    assert rng.driver.read("config_msix_vector") == pci.NO_VECTOR
    queue.add([], [queue.buffer(4)])
    queue.kick()
    assert queue.used() == []
    assert rng.rules == ["DRV-INIT-13"]


def test_reset_may_take_some_reads(rng: Bench) -> None:
    rng.driver.start(V1, {0: 8})
    rng.function.registers.reset_reads = 3
    rng.driver.write("device_status", 0)
    assert [rng.driver.read("device_status") for _ in range(4)] == [0xF, 0xF, 0xF, 0]


@pytest.mark.requirement("DEV-STATUS-03", "DEV-STATUS-04", "DEV-PCI-45")
def test_needs_reset_is_a_configuration_change(rng: Bench) -> None:
    fd = rng.function.enable_msix(2)[0]
    rng.driver.negotiate(V1)
    rng.driver.write("config_msix_vector", 0)
    rng.driver.read("config_msix_vector")
    rng.device.need_reset()
    assert fired(fd) == 0
    rng.driver.driver_ok()
    rng.device.need_reset()
    assert fired(fd) == 1
    assert rng.driver.read("device_status") & Status.NEEDS_RESET
