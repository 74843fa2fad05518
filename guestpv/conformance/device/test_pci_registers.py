"""The common configuration structure (4.1.3, 4.1.4.3)."""

from __future__ import annotations

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Rig
from guestpv.spec import features as ft
from guestpv.spec import pci
from guestpv.spec.status import Status
from guestpv.transport.registers import RegisterBlock

ADDRESSES = ("queue_desc", "queue_driver", "queue_device")
READ_ONLY = ("device_feature", "num_queues", "config_generation", "queue_notify_off")


def write_and_read(common: RegisterBlock, name: str, value: int) -> None:
    """A register that keeps what is written."""
    common.write(name, value)
    shown = common.read(name)
    assert shown == value, f"{name} reads {shown:#x} after {value:#x} was written"


@pytest.mark.requirement("DEV-PCI-18")
def test_device_feature_follows_its_select(rig: Rig) -> None:
    """device_feature shows the offered bits of the selected word, and 0 in words without features."""
    common = rig.pci.common
    words = []
    for word in (0, 1, 2, 3):
        common.write("device_feature_select", word)
        words.append(common.read("device_feature"))
    for word in (3, 1, 0, 2):
        common.write("device_feature_select", word)
        shown = common.read("device_feature")
        assert shown == words[word], f"word {word} reads {shown:#x}, before it read {words[word]:#x}"
    assert words[1] & 1, "VERSION_1 is not in word 1"
    for word in (4, 7, 0x100, 0xFFFFFFFF):
        common.write("device_feature_select", word)
        assert common.read("device_feature") == 0, f"device_feature is not 0 with select {word:#x}"


@pytest.mark.requirement("DEV-PCI-19", "DEV-PCI-86")
def test_driver_feature_reads_back(rig: Rig) -> None:
    """driver_feature shows the offered bits that were written, word by word, by its own select."""
    transport, common = rig.transport, rig.pci.common
    offered = transport.offered
    transport.write_status(Status.ACKNOWLEDGE)
    transport.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    wanted = rig.features_for(offered)
    for word in (0, 1):
        common.write("driver_feature_select", word)
        common.write("driver_feature", wanted >> 32 * word & 0xFFFFFFFF)
    for word in (0, 1):
        common.write("driver_feature_select", word)
        common.write("device_feature_select", 1 - word)
        shown = common.read("driver_feature") & offered >> 32 * word
        assert shown == wanted >> 32 * word & 0xFFFFFFFF, f"driver_feature word {word} reads {shown:#x}"
        assert common.read("driver_feature_select") == word, "driver_feature_select follows the other one"
        other = common.read("device_feature")
        assert other == offered >> 32 * (1 - word) & 0xFFFFFFFF, f"device_feature reads {other:#x}"


@pytest.mark.requirement("DEV-PCI-81")
def test_device_registers(rig: Rig) -> None:
    """The registers of the whole device are where the standard puts them, with their widths."""
    transport, common = rig.transport, rig.pci.common
    for value in (1, 0):
        write_and_read(common, "device_feature_select", value)
        write_and_read(common, "driver_feature_select", 1 - value)
        assert common.read("device_feature_select") == value, "the two feature selects are one"
    assert 1 <= common.read("num_queues") < 0x8000
    write_and_read(common, "device_status", Status.ACKNOWLEDGE)
    generation = transport.config_generation()
    assert transport.config_generation() == generation, "config_generation changes by being read"
    if rig.function.msix_vectors:
        rig.function.enable_msix(1)
        write_and_read(common, "config_msix_vector", 0)


@pytest.mark.requirement("DEV-PCI-82", "DEV-PCI-09", "DEV-PCI-77")
def test_queue_registers(rig: Rig) -> None:
    """The registers of a queue keep what is written; 64-bit ones take their halves in any order."""
    common = rig.pci.common
    rig.negotiate(rig.features_for())
    write_and_read(common, "queue_select", rig.work.main)
    largest = common.read("queue_size")
    assert 1 <= largest <= 32768, f"queue_size {largest}"
    write_and_read(common, "queue_size", max(largest // 2, 1))
    assert common.read("queue_enable") == 0
    for number, name in enumerate(ADDRESSES, 1):
        at = pci.COMMON_CFG[name].offset
        low, high = 0x1000 * number, number
        common.write_at(at + 4, 4, high)
        common.write_at(at, 4, low)
        shown = common.read_at(at, 4), common.read_at(at + 4, 4)
        assert shown == (low, high), (
            f"{name}: halves {low:#x}, {high:#x} read back as {shown[0]:#x}, {shown[1]:#x}"
        )
        common.write_at(at, 4, low + 0x40000)
        shown = common.read_at(at, 4), common.read_at(at + 4, 4)
        assert shown == (low + 0x40000, high), f"{name}: writing one half changes the other"


@pytest.mark.requirement("DEV-PCI-87")
def test_queue_registers_are_per_queue(rig: Rig) -> None:
    """Each queue has registers of its own behind queue_select."""
    common = rig.pci.common
    rig.negotiate(rig.features_for())
    existing = []
    for index in range(common.read("num_queues")):
        common.write("queue_select", index)
        if common.read("queue_size"):
            existing.append(index)
    if len(existing) < 2:
        pytest.skip("the device has one queue")
    for index in existing:
        common.write("queue_select", index)
        common.write("queue_desc", 0x10000 * (index + 1))
        if rig.function.vectors:
            common.write("queue_msix_vector", index % len(rig.function.vectors))
    for index in existing:
        common.write("queue_select", index)
        shown = common.read("queue_desc")
        assert shown == 0x10000 * (index + 1), f"queue_desc of queue {index} reads {shown:#x}"
        if rig.function.vectors:
            vector = common.read("queue_msix_vector")
            assert vector == index % len(rig.function.vectors), (
                f"queue_msix_vector of queue {index}: {vector}"
            )


@pytest.mark.requirement("DEV-PCI-29", "DEV-PCI-89")
def test_queues_that_are_not_there(rig: Rig) -> None:
    """queue_size is 0 for queues from num_queues on, and there are queues below it."""
    common = rig.pci.common
    count = common.read("num_queues")
    for index in (count, count + 1, 0x4000, 0xFFFE):
        if index < count:
            continue
        common.write("queue_select", index)
        size = common.read("queue_size")
        assert size == 0, f"queue_size of queue {index} is {size}; num_queues is {count}"
    common.write("queue_select", 0)
    assert common.read("queue_size"), "queue 0 does not exist"


@pytest.mark.requirement("DEV-PCI-30")
def test_split_queue_sizes_are_powers_of_two(rig: Rig) -> None:
    """Without RING_PACKED queue_size is 0 or a power of two."""
    common = rig.pci.common
    rig.negotiate(rig.features_for())
    for index in range(common.read("num_queues")):
        common.write("queue_select", index)
        size = common.read("queue_size")
        assert size & (size - 1) == 0, f"queue_size of queue {index} is {size}"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-PCI-90")
def test_read_only_registers_keep_their_value(rig: Rig, case: Case) -> None:
    """A write to a register that the driver may only read changes nothing."""
    common = rig.pci.common
    common.write("device_feature_select", 1)
    common.write("queue_select", 0)
    for name in READ_ONLY:
        field = pci.COMMON_CFG[name]
        before = common.read(name)
        case.sent(f"{before ^ 3:#x} to {name}")
        common.write_at(field.offset, field.width, before ^ 3)
        after = common.read(name)
        assert after == before, f"{name} reads {after:#x} after a write; it was {before:#x}"


@pytest.mark.formats
@pytest.mark.requirement("DEV-PCI-89")
def test_a_queue_runs_only_when_enabled(negotiated: Rig) -> None:
    """A queue is not run before queue_enable is written, and is afterwards."""
    rig = negotiated
    rig.pci.common.write("queue_select", rig.work.main)
    queues = {
        index: rig.queue_with_vector(index, pci.NO_VECTOR, enable=index != rig.work.main)
        for index in rig.work.queues
    }
    queue = queues[rig.work.main]
    request = rig.work.request()
    queue.add(request.readable, request.writable, kick=False)
    rig.transport.driver_ok()
    rig.settle()
    assert queue.used() == [], "a buffer was used in a queue that is not enabled"


# Notifications (4.1.4.4, 4.1.5.2).


@pytest.mark.formats
@pytest.mark.requirement("DEV-PCI-91")
def test_each_queue_is_notified_at_its_address(queue: Queue, rig: Rig) -> None:
    """A notification at cap.offset + queue_notify_off * notify_off_multiplier is the queue's own."""
    for _ in range(2):
        request = rig.work.request()
        queue.run(request.readable, request.writable)
        request.check()


@pytest.mark.requirement("DEV-PCI-92")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_notifications_with_data(rig: Rig, packed: bool) -> None:
    """With NOTIFICATION_DATA a 32-bit notification names the queue in its low half and is obeyed."""
    wanted = 1 << ft.F_NOTIFICATION_DATA | packed << ft.F_RING_PACKED
    if wanted & ~rig.transport.offered:
        pytest.skip("NOTIFICATION_DATA or the ring format is not offered")
    queue = rig.start(wanted)
    for _ in range(queue.size + 2):
        request = rig.work.request()
        queue.run(request.readable, request.writable)


@pytest.mark.requirement("DEV-PCI-93")
def test_queues_at_one_address_are_told_apart(rig: Rig) -> None:
    """Where all queues share one notification address, the value that is written names the queue."""
    common = rig.pci.common
    queue = rig.start()
    notify = next(found for found in rig.pci.capabilities if found.cfg_type == pci.CfgType.NOTIFY)
    offsets = set()
    for index in rig.work.queues:
        common.write("queue_select", index)
        offsets.add(common.read("queue_notify_off") * notify.extra)
    if len(rig.work.queues) < 2 or len(offsets) > 1:
        pytest.skip("the queues have addresses of their own")
    request = rig.work.request()
    queue.run(request.readable, request.writable)
    request.check()
