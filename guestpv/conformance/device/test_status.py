"""The device status field and reset (2.1, 2.4)."""

from __future__ import annotations

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Rig
from guestpv.spec.status import Status


@pytest.mark.requirement("DEV-RESET-01", "DEV-PCI-22")
def test_status_reads_0_after_a_reset(rig: Rig, case: Case) -> None:
    """Writing 0 to device_status resets the device, and device_status reads 0 once that is done."""
    rig.start()
    case.sent("0 to device_status of a running device")
    rig.transport.write_status(0)
    rig.wait(lambda: rig.transport.read_status() == 0, "device_status 0 after the reset")


@pytest.mark.requirement("DEV-STATUS-01")
def test_no_buffer_is_used_before_driver_ok(negotiated: Rig, case: Case) -> None:
    """Buffers that are available before DRIVER_OK are not used until it is set."""
    rig = negotiated
    queues = {index: rig.queue(index) for index in rig.work.queues}
    queue: Queue = queues[rig.work.main]
    request = rig.work.request()
    case.sent("a buffer and a notification before DRIVER_OK, then DRIVER_OK")
    queue.add(request.readable, request.writable)
    rig.settle()
    assert queue.used() == [], "the buffer was used before DRIVER_OK"
    rig.transport.driver_ok()
    assert rig.transport.status & Status.DRIVER_OK
    queue.kick()
    queue.wait()
    request.check()
