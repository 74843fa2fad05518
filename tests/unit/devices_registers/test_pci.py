"""The PCI side: identification, capabilities, BARs, resets (4.1.2 to 4.1.4)."""

from __future__ import annotations

import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.rng import Rng
from guestpv.spec import pci
from guestpv.spec.pci import CfgType

from .kit import V1, Bench


@pytest.mark.requirement("DEV-PCI-03", "DEV-PCI-04", "DEV-PCI-07", "DEV-PCI-08", "DEV-PCI-76")
def test_identification(nic: Bench) -> None:
    read = nic.function.config_read
    assert (read(0, 2), read(2, 2)) == (0x1AF4, 0x1041)
    assert read(8, 1) >= 1
    assert read(0x2E, 2) >= 0x40
    assert read(8, 4) >> 8 == 0x020000


@pytest.mark.requirement(
    "DEV-PCI-13", "DEV-PCI-16", "DEV-PCI-17", "DEV-PCI-43", "DEV-PCI-78", "DEV-PCI-80", "DEV-PCI-83"
)
def test_capabilities(nic: Bench) -> None:
    read = nic.function.config_read
    at, found = read(0x34, 1), {}
    while at:
        if read(at, 1) == 9:
            found[read(at + 3, 1)] = at
        at = read(at + 1, 1)
    assert set(found) == {1, 2, 3, 4, 5}
    for kind in (1, 2, 3, 4):
        bar, offset, length = read(found[kind] + 4, 1), read(found[kind] + 8, 4), read(found[kind] + 12, 4)
        assert offset % 4 == 0
        assert offset + length <= nic.function.bar(bar).size
    assert read(found[1] + 12, 4) >= 0x3C
    multiplier = read(found[2] + 16, 4)
    assert read(found[2] + 2, 1) == 20
    assert read(found[2] + 12, 4) >= 4 * multiplier + 4


def test_bar_sizing(nic: Bench) -> None:
    write, read = nic.function.config_write, nic.function.config_read
    write(0x20, 4, 0xFFFFFFFF)
    write(0x24, 4, 0xFFFFFFFF)
    value = read(0x20, 4) | read(0x24, 4) << 32
    assert (1 << 64) - (value & ~0xF) == nic.function.bar(4).size
    assert value & 0xF == 4
    write(0x14, 4, 0xFFFFFFFF)
    write(0x18, 4, 0xFFFFFFFF)
    assert read(0x18, 4) == 0


def test_memory_decoding_and_bus_master(rng: Bench) -> None:
    queue = rng.driver.start(V1, {0: 8})[0]
    rng.function.config_write(pci.PCI_CONFIG_COMMAND, 2, pci.COMMAND_MEMORY)
    queue.add([], [queue.buffer(4)])
    queue.kick()
    assert queue.used() == []
    assert len(rng.function.findings) == 1
    rng.function.config_write(pci.PCI_CONFIG_COMMAND, 2, 0)
    assert rng.driver.read("device_status") == 0xFF
    rng.function.config_write(pci.PCI_CONFIG_COMMAND, 2, 6)
    queue.kick()
    assert queue.used() == [(0, 4)]


@pytest.mark.requirement(
    "DEV-PCI-59",
    "DEV-PCI-60",
    "DEV-PCI-61",
    "DEV-PCI-98",
    "DRV-PCI-36",
    "DRV-PCI-38",
    "DRV-PCI-75",
    "DRV-PCI-17",
)
def test_configuration_access_capability(rng: Bench) -> None:
    at = rng.function.config.positions[CfgType.PCI_CFG]
    write, read = rng.function.config_write, rng.function.config_read

    def window(offset: int, length: int, bar: int = 4) -> None:
        write(at + 4, 1, bar)
        write(at + 8, 4, offset)
        write(at + 12, 4, length)

    window(pci.COMMON_CFG["num_queues"].offset, 2)
    assert read(at + 16, 4) & 0xFFFF == 1
    window(pci.COMMON_CFG["queue_select"].offset, 2)
    write(at + 16, 2, 5)
    assert rng.driver.read("queue_select") == 5
    assert rng.rules == []
    window(1, 4)
    read(at + 16, 4)
    window(0x800, 4)
    read(at + 16, 4)
    window(0, 3)
    read(at + 16, 4)
    write(rng.function.config.positions[CfgType.COMMON] + 8, 4, 0)
    assert rng.rules == ["DRV-PCI-36", "DRV-PCI-38", "DRV-PCI-75", "DRV-PCI-17"]


def test_function_level_reset(rng: Bench) -> None:
    rng.driver.start(V1, {0: 8})
    control = rng.function.config.positions["express"] + 8
    rng.function.config_write(control, 2, 0x8000)
    assert rng.function.config_read(pci.PCI_CONFIG_COMMAND, 2) == 0
    assert rng.device.status == 0
    rng.function.config_write(pci.PCI_CONFIG_COMMAND, 2, 6)
    rng.driver.start(V1, {0: 8})
    assert rng.function.reset()
    assert rng.function.config_read(pci.PCI_CONFIG_COMMAND, 2) == 6
    assert rng.driver.read("device_status") == 0


def test_function_without_reset() -> None:
    function = SoftwareFunction(Rng(), name="rng", flr=False)
    assert not function.reset()
    function.close()
