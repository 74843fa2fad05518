"""Queue registers: sizes, addresses, reset, widths (4.1.4.3)."""

from __future__ import annotations

import pytest

from guestpv.spec import features as ft
from guestpv.spec import net
from guestpv.spec.pci import CfgType

from .kit import V1, Bench


@pytest.mark.requirement("DEV-PCI-29", "DEV-PCI-87", "DEV-PCI-88", "DEV-PCI-89", "DEV-NET-180", "DEV-NET-181")
def test_queue_registers_are_per_queue(nic: Bench) -> None:
    nic.driver.negotiate(V1 | ft.mask((net.F_CTRL_VQ, net.F_MQ)))
    assert nic.driver.read("num_queues") == 5
    for index in range(5):
        nic.driver.write("queue_select", index)
        nic.driver.write("queue_size", 1 << index if index < 5 else 1)
        nic.driver.write("queue_desc", 0x1_0000_0010 * (index + 1))
    for index in range(5):
        nic.driver.write("queue_select", index)
        assert nic.driver.read("queue_size") == 1 << index
        assert nic.driver.read("queue_desc") == 0x1_0000_0010 * (index + 1)
        assert nic.driver.read("queue_notify_off") == index
    nic.driver.write("queue_select", 5)
    assert nic.driver.read("queue_size") == 0
    assert nic.rules == []


@pytest.mark.requirement("DEV-NET-180", "DEV-NET-181")
def test_queues_follow_the_features(nic: Bench) -> None:
    def sizes() -> list[int]:
        found = []
        for index in range(5):
            nic.driver.write("queue_select", index)
            found.append(nic.driver.read("queue_size"))
        return found

    nic.driver.negotiate(V1)
    assert sizes() == [16, 16, 0, 0, 0]
    nic.driver.negotiate(V1 | 1 << net.F_CTRL_VQ)
    assert sizes() == [16, 16, 16, 0, 0]


QUEUE_WRITES = {
    "DRV-PCI-24": ("queue_size", 3),
    "DRV-PCI-66": ("queue_size", 32),
    "DRV-PCI-27": ("queue_enable", 0),
    "DRV-PCI-67": ("queue_enable", 2),
    "DRV-PCI-44": ("queue_msix_vector", 9),
    "DRV-PCI-21": ("queue_notify_off", 1),
    "DRV-PCI-19": ("num_queues", 1),
    "DRV-PCI-20": ("config_generation", 1),
    "DRV-PCI-18": ("device_feature", 1),
}


@pytest.mark.parametrize("rule", QUEUE_WRITES)
@pytest.mark.requirement(*QUEUE_WRITES, "DEV-PCI-90")
def test_bad_register_writes_have_no_effect(rng: Bench, rule: str) -> None:
    rng.driver.negotiate(V1)
    name, value = QUEUE_WRITES[rule]
    before = rng.driver.read(name)
    rng.driver.write(name, value)
    assert rng.rules == [rule]
    assert rng.driver.read(name) == before


@pytest.mark.requirement("DRV-PCI-23", "DEV-PACKED-12")
def test_packed_sizes(rng: Bench) -> None:
    rng.device.offered |= 1 << ft.F_RING_PACKED
    rng.driver.negotiate(V1 | 1 << ft.F_RING_PACKED)
    rng.driver.write("queue_size", 7)
    assert rng.driver.read("queue_size") == 7
    rng.driver.write("queue_size", 0)
    assert rng.rules == ["DRV-PCI-23"]


@pytest.mark.parametrize(("name", "rule"), [("desc", "01"), ("driver", "02"), ("device", "03")])
@pytest.mark.requirement("DRV-SPLIT-01", "DRV-SPLIT-02", "DRV-SPLIT-03")
def test_misaligned_areas(rng: Bench, name: str, rule: str) -> None:
    rng.driver.negotiate(V1)
    memory = rng.driver.pool.allocate(4096)
    for area in ("desc", "driver", "device"):
        rng.driver.write(f"queue_{area}", memory.address + (1 if area == name else 0))
    rng.driver.write("queue_enable", 1)
    assert rng.rules == [f"DRV-SPLIT-{rule}"]
    assert rng.driver.read("queue_enable") == 0


@pytest.mark.requirement("DRV-FEAT-18", "DRV-PCI-25", "DRV-INIT-09")
def test_queue_setup_mistakes(rng: Bench) -> None:
    rng.driver.negotiate(V1)
    rng.driver.write("queue_desc", 0x1000)
    rng.driver.write("queue_enable", 1)
    assert rng.rules == ["DRV-FEAT-18"]
    rng.driver.negotiate(V1)
    rng.driver.queue(0)
    rng.driver.write("queue_size", 8)
    assert rng.rules[1:] == ["DRV-PCI-25"]
    rng.driver.reset()
    rng.driver.queue(0)
    assert rng.rules[2:] == ["DRV-INIT-09"]


@pytest.mark.requirement(
    "DEV-PCI-24", "DEV-PCI-26", "DEV-PCI-27", "DEV-PCI-28", "DEV-VQRESET-01", "DEV-VQRESET-05"
)
def test_queue_reset(rng: Bench) -> None:
    features = V1 | 1 << ft.F_RING_RESET
    queue = rng.driver.start(features, {0: 8})[0]
    rng.device.hold = True
    queue.add([], [queue.buffer(4)])
    queue.kick()
    rng.function.registers.queue_reset_reads = 2
    rng.driver.write("queue_reset", 1)
    assert [rng.driver.read("queue_reset") for _ in range(3)] == [1, 1, 0]
    assert rng.driver.read("queue_enable") == 0
    assert rng.driver.read("queue_size") == 16
    assert rng.device.release() == 0
    assert queue.used() == []
    rng.device.hold = False
    again = rng.driver.queue(0, 4)
    assert rng.driver.read("queue_reset") == 0
    head = again.add([], [again.buffer(4)])
    again.kick()
    assert again.used() == [(head, 4)]
    assert rng.rules == []


@pytest.mark.requirement("DRV-PCI-28", "DRV-PCI-61")
def test_queue_reset_mistakes(rng: Bench) -> None:
    rng.driver.start(V1 | 1 << ft.F_RING_RESET, {0: 8})
    rng.function.registers.queue_reset_reads = 2
    rng.driver.write("queue_reset", 1)
    rng.driver.queue(0, 4)
    assert rng.rules == ["DRV-PCI-28"]
    rng.driver.start(V1, {0: 8})
    rng.driver.write("queue_reset", 1)
    assert rng.rules[1:] == ["DRV-PCI-61", "DRV-VQRESET-04"]


@pytest.mark.parametrize(
    ("kind", "offset", "width", "rule"),
    [
        (CfgType.COMMON, 0x14, 2, "DRV-PCI-05"),
        (CfgType.COMMON, 0x16, 1, "DRV-PCI-06"),
        (CfgType.COMMON, 0x00, 2, "DRV-PCI-07"),
        (CfgType.COMMON, 0x22, 4, "DRV-PCI-07"),
        (CfgType.DEVICE, 0, 2, "DRV-PCI-05"),
        (CfgType.DEVICE, 6, 1, "DRV-PCI-06"),
        (CfgType.DEVICE, 12, 2, "DRV-PCI-07"),
    ],
)
@pytest.mark.requirement("DRV-PCI-05", "DRV-PCI-06", "DRV-PCI-07")
def test_wrong_widths_are_noted(nic: Bench, kind: CfgType, offset: int, width: int, rule: str) -> None:
    nic.driver.read_at(kind, offset, width)
    assert nic.rules[0] == rule


@pytest.mark.requirement("DEV-PCI-09")
def test_halves_of_a_64_bit_field(disk: Bench) -> None:
    disk.device.model.config["capacity"] = 0x1_2345_6789
    assert disk.driver.read_at(CfgType.DEVICE, 0, 4) == 0x23456789
    assert disk.driver.read_at(CfgType.DEVICE, 4, 4) == 1
    disk.driver.write_at(CfgType.COMMON, 0x24, 4, 7)
    assert disk.driver.read("queue_desc") == 7 << 32
