"""Device configuration and its generation (2.5)."""

from __future__ import annotations

import pytest

from guestpv.spec.pci import CfgType

from .kit import V1, Bench, fired


@pytest.mark.requirement("DEV-CONFIG-04", "DEV-PCI-21", "DEV-CONFIG-03")
def test_generation_changes_once_a_change_is_read(disk: Bench) -> None:
    fd = disk.function.enable_msix(1)[0]
    disk.driver.negotiate(V1)
    disk.driver.write("config_msix_vector", 0)
    disk.driver.read("config_msix_vector")
    disk.driver.driver_ok()
    before = disk.driver.read("config_generation")
    low = disk.driver.read_at(CfgType.DEVICE, 0, 4)
    disk.device.model.resize(2 << 20)
    assert fired(fd) == 1
    assert disk.driver.read_at(CfgType.DEVICE, 0, 4) == 2 * low
    assert disk.driver.read("config_generation") == before + 1
    disk.driver.read_at(CfgType.DEVICE, 0, 4)
    assert disk.driver.read("config_generation") == before + 1


def test_generation_can_be_bumped_in_mid_read(disk: Bench) -> None:
    disk.function.registers.generation_bumps = 2
    seen = []
    for _ in range(4):
        disk.driver.read_at(CfgType.DEVICE, 0, 4)
        seen.append(disk.driver.read("config_generation"))
    assert seen == [1, 2, 2, 2]


@pytest.mark.requirement("DEV-CONFIG-01", "DRV-CONFIG-04", "DRV-BLK-04", "DRV-INIT-05", "DRV-NET-01")
def test_device_configuration_rules(disk: Bench, nic: Bench) -> None:
    assert disk.driver.read_at(CfgType.DEVICE, 12, 4) == 14
    disk.driver.read_at(CfgType.DEVICE, 8, 4)
    disk.driver.read_at(CfgType.DEVICE, 32, 1)
    disk.driver.write_at(CfgType.DEVICE, 32, 1, 0)
    assert disk.rules == ["DRV-CONFIG-04", "DRV-BLK-04", "DRV-INIT-05"]
    nic.driver.start(V1, {})
    nic.driver.write_at(CfgType.DEVICE, 0, 1, 1)
    assert nic.rules == ["DRV-NET-01"]
    assert nic.driver.read_at(CfgType.DEVICE, 0, 1) == 0x52
