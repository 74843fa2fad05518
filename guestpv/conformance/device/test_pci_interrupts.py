"""ISR status, INTx and MSI-X of used buffers (4.1.4.5, 4.1.5.1.2, 4.1.5.3)."""

from __future__ import annotations

import os

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Rig
from guestpv.pci.capabilities import walk
from guestpv.spec import pci

ISR_QUEUE = 1
STATUS_INTERRUPT = 1 << 3
MOST_VECTORS = 0x800


def without_msix(rig: Rig) -> Queue:
    """A running device with MSI-X disabled and INTx enabled in the command register."""
    rig.transport.mode = "poll"
    queue = rig.start()
    rig.function.disable_interrupts()
    command = rig.function.config_read(pci.PCI_CONFIG_COMMAND, 2)
    rig.function.config_write(pci.PCI_CONFIG_COMMAND, 2, command & ~pci.COMMAND_INTX_DISABLE)
    return queue


def use_one(queue: Queue, rig: Rig) -> None:
    """A good request."""
    request = rig.work.request()
    queue.run(request.readable, request.writable)


def started(rig: Rig, vector: int, enable: int = 2) -> Queue:
    """A running device whose main queue has this vector; nothing else has one."""
    if rig.function.msix_vectors < enable:
        pytest.skip(f"the function has {rig.function.msix_vectors} MSI-X vectors")
    # Nobody else may wait for the vectors.
    rig.transport.mode = "poll"
    rig.negotiate(rig.features_for())
    rig.function.disable_interrupts()
    rig.function.enable_msix(enable)
    main = rig.work.main
    queues = {
        index: rig.queue_with_vector(index, vector if index == main else pci.NO_VECTOR)
        for index in rig.work.queues
    }
    rig.transport.driver_ok()
    return queues[main]


@pytest.mark.requirement("DEV-PCI-46", "DEV-PCI-94")
def test_the_isr_tells_used_buffers(rig: Rig) -> None:
    """With MSI-X disabled the ISR's queue bit is set when buffers were used, and no undefined bit is."""
    queue = without_msix(rig)
    rig.isr()
    use_one(queue, rig)
    found = 0

    def told() -> bool:
        nonlocal found
        found |= rig.isr()
        return bool(found & ISR_QUEUE)

    rig.wait(told, "queue bit in the ISR after a buffer was used")
    assert found & ~3 == 0, f"the ISR reads {found:#x}"


@pytest.mark.requirement("DEV-PCI-48", "DEV-PCI-94")
def test_reading_the_isr_clears_it(rig: Rig) -> None:
    """The ISR status reads 0 after it was read."""
    queue = without_msix(rig)
    use_one(queue, rig)
    rig.wait(lambda: rig.isr() & ISR_QUEUE != 0, "queue bit in the ISR after a buffer was used")
    rig.settle()
    rig.isr()
    again = rig.isr()
    assert again == 0, f"the ISR reads {again:#x} when it is read again"


@pytest.mark.requirement("DEV-PCI-47")
def test_interrupt_status_follows_the_isr(rig: Rig) -> None:
    """With MSI-X disabled Interrupt Status in the PCI status register is the OR of the ISR bits."""

    def pending() -> int:
        return rig.function.config_read(pci.PCI_CONFIG_STATUS, 2) & STATUS_INTERRUPT

    queue = without_msix(rig)
    rig.isr()
    assert not pending(), "Interrupt Status is set while the ISR is 0"
    use_one(queue, rig)
    rig.wait(lambda: pending() != 0, "Interrupt Status after a buffer was used")
    rig.settle()
    rig.isr()
    assert not pending(), "Interrupt Status is set after the ISR was read"


@pytest.mark.requirement("DEV-PCI-46", "DEV-PCI-94")
def test_intx_is_raised_and_dropped(rig: Rig) -> None:
    """With MSI-X disabled a used buffer raises INTx, and reading the ISR drops it."""
    queue = without_msix(rig)
    if not rig.function.config_read(pci.PCI_CONFIG_INTERRUPT_PIN, 1):
        pytest.skip("the function has no INTx")
    fd = rig.function.enable_intx()
    rig.isr()
    rig.function.unmask_intx()
    drain(fd)
    use_one(queue, rig)
    rig.wait(lambda: drain(fd) > 0, "INTx after a buffer was used")
    rig.settle()
    rig.isr()
    rig.function.unmask_intx()
    rig.settle()
    assert drain(fd) == 0, "INTx stays up after the ISR was read"


def drain(fd: int) -> int:
    """Events of an eventfd."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@pytest.mark.requirement("DEV-PCI-65")
def test_table_size(rig: Rig) -> None:
    """The MSI-X capability's Table Size counts the vectors that the function has."""
    function = rig.function
    at = next((at for at, id in walk(function.config_read) if id == pci.PCI_CAP_MSIX), 0)
    if not at:
        pytest.skip("the function has no MSI-X")
    count = (function.config_read(at + 2, 2) & 0x7FF) + 1
    assert 1 <= count <= MOST_VECTORS
    table = function.config_read(at + 4, 4)
    size = function.bar(table & 7).size
    end = (table & ~7) + 16 * count
    assert end <= size, f"the table of {count} vectors ends at {end:#x}, its BAR has {size:#x} bytes"
    common = rig.pci.common
    rig.function.enable_msix(min(count, 2))
    for vector in {0, count - 1}:
        common.write("config_msix_vector", vector)
        shown = common.read("config_msix_vector")
        assert shown == vector, f"vector {vector} of {count} is refused: config_msix_vector reads {shown:#x}"


@pytest.mark.requirement("DEV-PCI-67", "DEV-PCI-69", "DEV-PCI-95", "DEV-PCI-68")
def test_every_event_takes_every_vector(rig: Rig) -> None:
    """Every event can be mapped to every vector and unmapped, and its register shows what it is mapped to."""
    common = rig.pci.common
    vectors = rig.function.msix_vectors
    if not vectors:
        pytest.skip("the function has no MSI-X")
    rig.negotiate(rig.features_for())
    events = [("config_msix_vector", 0)]
    for index in range(common.read("num_queues")):
        common.write("queue_select", index)
        if common.read("queue_size"):
            events.append(("queue_msix_vector", index))
    for name, index in events:
        common.write("queue_select", index)
        for vector in (*{0, vectors // 2, vectors - 1}, pci.NO_VECTOR):
            common.write(name, vector)
            shown = common.read(name)
            assert shown == vector, f"{name} of queue {index} reads {shown:#x} after {vector:#x} was written"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-PCI-72")
def test_a_vector_beyond_the_table_is_refused(rig: Rig, case: Case) -> None:
    """A vector that the table does not have is refused: the register reads NO_VECTOR."""
    common = rig.pci.common
    vectors = rig.function.msix_vectors
    if not vectors:
        pytest.skip("the function has no MSI-X")
    rig.negotiate(rig.features_for())
    case.sent(f"vector {vectors} of a table of {vectors}")
    common.write("queue_select", rig.work.main)
    for name in ("config_msix_vector", "queue_msix_vector"):
        common.write(name, vectors)
        shown = common.read(name)
        assert shown == pci.NO_VECTOR, f"{name} reads {shown:#x}"


@pytest.mark.requirement("DEV-PCI-96", "DEV-PCI-67")
@pytest.mark.parametrize("vector", [0, 1])
def test_a_used_buffer_is_the_message_of_its_vector(rig: Rig, vector: int) -> None:
    """With MSI-X a used buffer notification is the message of queue_msix_vector, and of no other."""
    queue = started(rig, vector)
    for one in (0, 1):
        rig.vector_events(one)
    use_one(queue, rig)
    rig.wait(lambda: rig.vector_events(vector) > 0, f"message of vector {vector}")
    assert rig.vector_events(1 - vector) == 0, f"vector {1 - vector} fired for a queue with vector {vector}"
    pending = rig.function.config_read(pci.PCI_CONFIG_STATUS, 2) & STATUS_INTERRUPT
    assert not pending, "INTx is up although MSI-X is enabled"


@pytest.mark.requirement("DEV-PCI-73", "DEV-PCI-68")
def test_an_unmapped_queue_sends_no_message(rig: Rig) -> None:
    """With queue_msix_vector at NO_VECTOR no interrupt comes for the queue."""
    queue = started(rig, pci.NO_VECTOR)
    for vector in (0, 1):
        rig.vector_events(vector)
    use_one(queue, rig)
    rig.settle()
    fired = [vector for vector in (0, 1) if rig.vector_events(vector)]
    assert not fired, f"vector {fired} fired for a queue that is unmapped"
