"""Reset of the device and of single queues (2.4, 2.6.1, 4.1.4.3.1)."""

from __future__ import annotations

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Combination, Rig
from guestpv.spec import features as ft
from guestpv.spec import pci
from guestpv.spec.status import Status


@pytest.fixture(autouse=True)
def status_is_the_devices_own(rig: Rig) -> None:
    """Over vhost-user the front end keeps the status and starts and stops the rings by itself."""
    assert rig.pci


def reset(rig: Rig) -> None:
    """Reset by the status register alone, so that queues and their memory stay to be looked at."""
    rig.case.sent("0 to device_status")
    rig.transport.write_status(0)
    rig.wait(lambda: rig.transport.read_status() == 0, "device_status 0 after the reset")


def make_available(queue: Queue, rig: Rig, count: int = 3, *, kick: bool) -> None:
    """Some good requests."""
    for _ in range(count):
        request = rig.work.request()
        queue.add(request.readable, request.writable, kick=False)
    if kick:
        queue.kick()


@pytest.mark.requirement("DEV-RESET-01", "DEV-PCI-22")
def test_status_reads_0_after_a_reset(rig: Rig) -> None:
    """Writing 0 to device_status resets the device, and device_status reads 0 once that is done."""
    rig.start()
    reset(rig)


@pytest.mark.formats
@pytest.mark.requirement("DEV-RESET-03")
def test_queues_are_left_alone_after_a_reset(queue: Queue, rig: Rig) -> None:
    """Once device_status reads 0, the device writes to no ring and no buffer any more."""
    make_available(queue, rig, kick=True)
    make_available(queue, rig, kick=False)
    reset(rig)
    before = [area.tobytes() for area in (queue.raw.desc, queue.ring.device)]
    rig.settle()
    after = [area.tobytes() for area in (queue.raw.desc, queue.ring.device)]
    assert before == after, "ring memory changed after device_status read 0"


@pytest.mark.hostile
@pytest.mark.formats
@pytest.mark.requirement("DEV-RESET-03")
def test_a_notification_after_a_reset_moves_no_queue(queue: Queue, rig: Rig, case: Case) -> None:
    """A notification after the reset does not make the device use what is available in a former ring."""
    make_available(queue, rig, kick=False)
    reset(rig)
    # A device that polls, or looks once more before it stops, has used them before.
    queue.used()
    case.sent("a reset, and a notification for a queue with available buffers after it")
    queue.kick()
    rig.settle()
    assert queue.used() == [], "a buffer was used after device_status read 0"


@pytest.mark.hostile
@pytest.mark.formats
@pytest.mark.requirement("DEV-RESET-02")
def test_no_notification_after_a_reset(queue: Queue, rig: Rig, case: Case) -> None:
    """Once device_status reads 0, no used buffer notification comes any more."""
    make_available(queue, rig, kick=True)
    reset(rig)
    queue.interrupts()
    case.sent("a reset, and a notification for a queue after it")
    queue.kick()
    rig.settle()
    assert queue.interrupts() == 0, "a used buffer notification came after device_status read 0"


@pytest.mark.requirement("DEV-PCI-23")
def test_queues_are_disabled_by_a_reset(rig: Rig) -> None:
    """After a reset queue_enable reads 0 for every queue."""
    common = rig.pci.common
    rig.start()
    reset(rig)
    for index in range(common.read("num_queues")):
        common.write("queue_select", index)
        assert common.read("queue_enable") == 0, f"queue_enable of queue {index} is not 0 after a reset"


@pytest.mark.requirement("DEV-PCI-70")
def test_vectors_are_unmapped_by_a_reset(rig: Rig) -> None:
    """After a reset no event is mapped to an MSI-X vector."""
    common = rig.pci.common
    if not rig.function.msix_vectors:
        pytest.skip("the function has no MSI-X")
    rig.start()
    reset(rig)
    assert common.read("config_msix_vector") == pci.NO_VECTOR, "config_msix_vector stays mapped"
    for index in range(common.read("num_queues")):
        common.write("queue_select", index)
        assert common.read("queue_msix_vector") == pci.NO_VECTOR, f"the vector of queue {index} stays mapped"


@pytest.mark.requirement("DEV-PCI-88")
def test_queue_size_is_the_maximum_again_after_a_reset(rig: Rig) -> None:
    """queue_size shows the maximum after a reset, and what was written once it was written."""
    common = rig.pci.common
    rig.negotiate(rig.features_for())
    common.write("queue_select", rig.work.main)
    largest = common.read("queue_size")
    if largest < 2:
        pytest.skip("the queue has one entry")
    common.write("queue_size", largest // 2)
    shown = common.read("queue_size")
    assert shown == largest // 2, f"queue_size reads {shown} after {largest // 2} was written"
    reset(rig)
    common.write("queue_select", rig.work.main)
    shown = common.read("queue_size")
    assert shown == largest, f"queue_size reads {shown} after a reset; the maximum is {largest}"


# One queue (RING_RESET).


@pytest.fixture
def resettable(rig: Rig, combination: Combination) -> Queue:
    """The main queue of a running device with RING_RESET."""
    if not rig.transport.offered >> ft.F_RING_RESET & 1:
        pytest.skip("RING_RESET is not offered")
    return rig.start(combination.features | 1 << ft.F_RING_RESET)


def reset_queue(queue: Queue, rig: Rig) -> None:
    """Write 1 to queue_reset and wait until it reads 0."""
    rig.case.sent(f"1 to queue_reset of queue {queue.index}")
    rig.transport.request_queue_reset(queue.index)
    rig.wait(lambda: rig.transport.queue_reset_done(queue.index), "queue_reset 0")


@pytest.mark.formats
@pytest.mark.requirement("DEV-PCI-24", "DEV-PCI-25")
def test_queue_reset_reads_0_at_first(resettable: Queue, rig: Rig) -> None:
    """queue_reset reads 0 after a reset and after the queue is enabled."""
    common = rig.pci.common
    common.write("queue_select", resettable.index)
    assert common.read("queue_reset") == 0, "queue_reset is not 0 after queue_enable"
    reset(rig)
    rig.negotiate(rig.transport.offered & rig.features_for(1 << ft.F_RING_RESET))
    common.write("queue_select", resettable.index)
    assert common.read("queue_reset") == 0, "queue_reset is not 0 after a reset"


@pytest.mark.formats
@pytest.mark.requirement("DEV-PCI-26", "DEV-PCI-27", "DEV-PCI-28")
def test_queue_reset_disables_the_queue(resettable: Queue, rig: Rig) -> None:
    """Writing 1 to queue_reset resets the queue; once it reads 0, queue_enable reads 0 as well."""
    common = rig.pci.common
    common.write("queue_select", resettable.index)
    assert common.read("queue_enable") == 1, "queue_enable is not 1 while the queue is enabled"
    common.write("queue_reset", 1)
    values = []

    def done() -> bool:
        values.append(common.read("queue_reset"))
        return values[-1] == 0

    rig.wait(done, "queue_reset 0")
    assert set(values) <= {0, 1}, f"queue_reset reads {values}"
    assert common.read("queue_enable") == 0, "queue_reset reads 0 and queue_enable still 1"


@pytest.mark.hostile
@pytest.mark.formats
@pytest.mark.requirement("DEV-VQRESET-01", "DEV-VQRESET-02", "DEV-PCI-26")
def test_a_queue_that_was_reset_is_quiet(resettable: Queue, rig: Rig, case: Case) -> None:
    """After a queue reset no request of the queue is executed, and no notification comes for it."""
    queue = resettable
    make_available(queue, rig, kick=False)
    reset_queue(queue, rig)
    queue.used()
    queue.interrupts()
    case.sent("available buffers, a queue reset, and a notification for that queue after it")
    queue.kick()
    rig.settle()
    assert queue.used() == [], "a buffer was used after its queue was reset"
    assert queue.interrupts() == 0, "a used buffer notification came after the queue was reset"


@pytest.mark.formats
@pytest.mark.requirement("DEV-VQRESET-03", "DEV-VQRESET-04")
@pytest.mark.parametrize("smaller", [False, True], ids=["same", "smaller"])
def test_a_queue_starts_over_after_its_reset(resettable: Queue, rig: Rig, smaller: bool) -> None:
    """A queue that is enabled again starts at its first entry, with the size and the addresses given then."""
    for _ in range(3):
        request = rig.work.request()
        resettable.run(request.readable, request.writable)
    rig.transport.reset_queue(resettable.index)
    size = max(resettable.size // 4, 1) if smaller else resettable.size
    queue = rig.queue(resettable.index, size)
    # More requests than entries, so that a device with another idea of the size or position goes astray.
    for _ in range(size + 2):
        request = rig.work.request()
        if len(queue.elements(request.readable, request.writable)) > size:
            pytest.skip("a request does not fit")
        queue.run(request.readable, request.writable)
        request.check()


@pytest.mark.formats
@pytest.mark.requirement("DEV-VQRESET-05")
def test_a_queue_reset_leaves_the_rest_alone(resettable: Queue, rig: Rig) -> None:
    """The reset of one queue leaves device_status and the other queues as they were."""
    others = [index for index in rig.transport.queues if index != resettable.index]
    before = rig.transport.read_status()
    rig.transport.reset_queue(others[0] if others else resettable.index)
    after = rig.transport.read_status()
    assert after == before, f"device_status went from {before:#04x} to {after:#04x} with a queue reset"
    assert after & Status.DRIVER_OK
    if others:
        request = rig.work.request()
        resettable.run(request.readable, request.writable)
        request.check()
