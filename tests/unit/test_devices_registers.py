"""Registers, status, features and interrupts of the software PCI function (2.1-2.6, 3.1, 4.1)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.blk import Blk
from guestpv.devices.models.blk_store import Store
from guestpv.devices.models.net import Net
from guestpv.devices.models.rng import Rng
from guestpv.devices.scripted import ScriptedDriver
from guestpv.errors import UsageError
from guestpv.spec import blk, net, pci
from guestpv.spec import features as ft
from guestpv.spec.pci import CfgType
from guestpv.spec.status import Status

V1 = ft.mask((ft.F_VERSION_1, ft.F_ACCESS_PLATFORM))
SETUP = Status.ACKNOWLEDGE | Status.DRIVER


class Bench:
    def __init__(self, function: SoftwareFunction) -> None:
        self.function = function
        self.device = function.device
        self.driver = ScriptedDriver(function)

    @property
    def rules(self) -> list[str]:
        return [finding.requirement for finding in self.function.findings]


def fired(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


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


# Features and status


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


# Queues


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


# Widths


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


# Device configuration


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


# Interrupts


def with_vectors(bench: Bench, vector: int = 1) -> list[int]:
    fds = bench.function.enable_msix(2)
    bench.driver.negotiate(V1)
    bench.queue = bench.driver.queue(0, 8, vector)  # type: ignore[attr-defined]
    bench.driver.driver_ok()
    return fds


def use_one(bench: Bench) -> None:
    queue = bench.queue  # type: ignore[attr-defined]
    queue.add([], [queue.buffer(4)])
    queue.kick()


@pytest.mark.requirement("DEV-PCI-65", "DEV-PCI-67", "DEV-PCI-69", "DEV-PCI-96", "DEV-PCI-73")
def test_used_buffer_interrupt_goes_to_its_vector(rng: Bench) -> None:
    fds = with_vectors(rng, 0)
    use_one(rng)
    assert [fired(fd) for fd in fds] == [1, 0]
    assert rng.driver.read_at(CfgType.ISR, 0, 1) == 0
    with_vectors(rng, pci.NO_VECTOR)
    use_one(rng)
    assert rng.function.interrupts.delivered == [1, 0]


@pytest.mark.requirement("DEV-PCI-72", "DRV-PCI-45")
def test_refused_and_unverified_vectors(rng: Bench) -> None:
    rng.driver.negotiate(V1)
    rng.function.registers.vectors_granted = 1
    rng.driver.write("config_msix_vector", 1)
    assert rng.driver.read("config_msix_vector") == pci.NO_VECTOR
    rng.driver.write("config_msix_vector", 0)
    rng.driver.driver_ok()
    assert rng.rules == ["DRV-PCI-45"]


def test_masked_vector_is_pending_until_unmasked(rng: Bench) -> None:
    fds = with_vectors(rng)
    bar = rng.function.bar(0)
    pending = 16 * 2
    bar.write(16 + 12, 4, 1)
    use_one(rng)
    assert fired(fds[1]) == 0
    assert bar.read(pending, 4) == 2
    bar.write(16 + 12, 4, 0)
    assert fired(fds[1]) == 1
    assert bar.read(pending, 4) == 0
    control = rng.function.config.positions["msix"] + 2
    rng.function.config_write(control, 2, 0xC000)
    use_one(rng)
    assert fired(fds[1]) == 0
    rng.function.config_write(control, 2, 0x8000)
    assert fired(fds[1]) == 1


def test_withheld_interrupts_come_later(rng: Bench) -> None:
    fds = with_vectors(rng)
    rng.function.interrupts.withhold = True
    use_one(rng)
    assert fired(fds[1]) == 0
    assert rng.function.interrupts.deliver_withheld() == 1
    assert fired(fds[1]) == 1


@pytest.mark.requirement("DEV-PCI-46", "DEV-PCI-47", "DEV-PCI-48", "DEV-PCI-94")
def test_intx_follows_the_isr(rng: Bench) -> None:
    fd = rng.function.enable_intx()
    rng.driver.negotiate(V1)
    rng.queue = rng.driver.queue(0, 8)  # type: ignore[attr-defined]
    rng.driver.driver_ok()
    use_one(rng)
    use_one(rng)
    assert fired(fd) == 1
    assert rng.function.config_read(pci.PCI_CONFIG_STATUS, 2) & 8
    rng.function.unmask_intx()
    assert fired(fd) == 1
    assert rng.driver.read_at(CfgType.ISR, 0, 1) == pci.ISR_QUEUE
    assert rng.driver.read_at(CfgType.ISR, 0, 1) == 0
    assert not rng.function.config_read(pci.PCI_CONFIG_STATUS, 2) & 8
    rng.function.unmask_intx()
    assert fired(fd) == 0
    rng.device.config_changed()
    assert fired(fd) == 1
    assert rng.driver.read_at(CfgType.ISR, 0, 1) == pci.ISR_CONFIG


def test_interrupt_disable_of_the_command_register(rng: Bench) -> None:
    fd = rng.function.enable_intx()
    rng.driver.start(V1, {})
    command = rng.function.config_read(pci.PCI_CONFIG_COMMAND, 2)
    rng.function.config_write(pci.PCI_CONFIG_COMMAND, 2, command | pci.COMMAND_INTX_DISABLE)
    rng.device.config_changed()
    assert fired(fd) == 0
    rng.function.config_write(pci.PCI_CONFIG_COMMAND, 2, command)
    assert fired(fd) == 1


# PCI


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


# Kicks


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


# Evidence


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
