"""The device status field (2.1)."""

from __future__ import annotations

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.misuse import break_device
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Rig
from guestpv.spec import pci
from guestpv.spec.status import Status


@pytest.fixture(autouse=True)
def status_is_the_devices_own(rig: Rig) -> None:
    """Over vhost-user the front end keeps the status and starts and stops the rings by itself."""
    assert rig.pci


DEFINED = 0xFF & ~0x20
STEPS = (
    Status.ACKNOWLEDGE,
    Status.ACKNOWLEDGE | Status.DRIVER,
)


def prepared(rig: Rig) -> Queue:
    """The main queue of a device that lacks DRIVER_OK only, with a good buffer available."""
    queues = {index: rig.queue(index) for index in rig.work.queues}
    queue = queues[rig.work.main]
    request = rig.work.request()
    queue.add(request.readable, request.writable, kick=False)
    return queue


@pytest.mark.formats
@pytest.mark.requirement("DEV-STATUS-01")
def test_no_buffer_is_used_before_driver_ok(negotiated: Rig, case: Case) -> None:
    """Buffers that are available before DRIVER_OK are not used until it is set."""
    queue = prepared(negotiated)
    case.sent("a buffer before DRIVER_OK, without a notification")
    negotiated.settle()
    assert queue.used() == [], "the buffer was used before DRIVER_OK"
    negotiated.transport.driver_ok()
    queue.kick()
    queue.wait()


@pytest.mark.hostile
@pytest.mark.formats
@pytest.mark.requirement("DEV-STATUS-01")
def test_a_notification_before_driver_ok_uses_no_buffer(negotiated: Rig, case: Case) -> None:
    """A notification that comes before DRIVER_OK does not make the device use buffers."""
    queue = prepared(negotiated)
    case.sent("a buffer and its notification before DRIVER_OK")
    queue.kick()
    negotiated.settle()
    assert queue.used() == [], "the buffer was used before DRIVER_OK"


@pytest.mark.hostile
@pytest.mark.formats
@pytest.mark.requirement("DEV-STATUS-02")
def test_no_notification_before_driver_ok(negotiated: Rig, case: Case) -> None:
    """No used buffer notification comes before DRIVER_OK."""
    queue = prepared(negotiated)
    case.sent("a buffer and its notification before DRIVER_OK")
    queue.kick()
    negotiated.settle()
    assert queue.interrupts() == 0, "a used buffer notification came before DRIVER_OK"


@pytest.mark.hostile
@pytest.mark.formats
@pytest.mark.requirement("DEV-STATUS-04")
def test_needs_reset_is_a_configuration_change(queue: Queue, rig: Rig, case: Case) -> None:
    """When the device sets DEVICE_NEEDS_RESET while it runs, a configuration change notification follows."""
    if rig.transport.config_fd is None:
        case.not_observable("configuration changes have no interrupt here")
    if break_device(queue) != "needs-reset":
        pytest.skip("the device does not set DEVICE_NEEDS_RESET for this, which it may leave out")
    rig.wait_config_change()
    case.refused("DEVICE_NEEDS_RESET and a configuration change notification")


@pytest.mark.requirement("DEV-STATUS-05")
def test_status_shows_defined_bits_only(rig: Rig) -> None:
    """At each step of initialization device_status shows bits that were written, and no undefined one."""
    transport = rig.transport
    for status in STEPS:
        transport.write_status(status)
        shown = transport.read_status()
        assert shown == status, f"device_status reads {shown:#04x} after {int(status):#04x} was written"
    rig.start()
    shown = transport.read_status()
    assert shown & ~DEFINED == 0, f"device_status reads {shown:#04x}"
    assert shown & ~Status.NEEDS_RESET == 0xF, f"device_status of a running device reads {shown:#04x}"


@pytest.mark.fresh
@pytest.mark.requirement("DEV-STATUS-06")
def test_status_is_0_at_first(rig: Rig) -> None:
    """device_status is 0 before the driver has written anything."""
    status = rig.pci.common.read("device_status")
    assert status == 0, f"device_status of an untouched device reads {status:#04x}"


@pytest.mark.requirement("DEV-STATUS-06")
def test_status_is_0_after_a_reset_at_every_step(rig: Rig) -> None:
    """device_status is 0 after a reset, whatever it was before."""
    transport = rig.transport
    for status in (*STEPS, Status.ACKNOWLEDGE | Status.DRIVER | Status.FAILED):
        transport.write_status(status)
        transport.write_status(0)
        rig.wait(
            lambda: transport.read_status() == 0, f"device_status 0 after {int(status):#04x} and a reset"
        )


@pytest.mark.fresh
@pytest.mark.requirement("DEV-PCI-23", "DEV-PCI-70")
def test_queues_and_vectors_are_off_at_first(rig: Rig) -> None:
    """Before anything was written, no queue is enabled and no event has a vector."""
    common = rig.pci.common
    assert common.read("config_msix_vector") in _unmapped(rig), "config_msix_vector is mapped at power-on"
    for index in range(common.read("num_queues")):
        common.write("queue_select", index)
        assert common.read("queue_enable") == 0, f"queue {index} is enabled at power-on"
        assert common.read("queue_msix_vector") in _unmapped(rig), f"queue {index} has a vector at power-on"


def _unmapped(rig: Rig) -> tuple[int, ...]:
    # Without MSI-X the vector registers mean nothing.
    return (pci.NO_VECTOR,) if rig.function.msix_vectors else tuple(range(0x10000))
