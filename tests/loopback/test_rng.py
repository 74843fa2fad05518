"""The tutorial driver against the entropy device's model."""

from __future__ import annotations

import pytest

from guestpv.devices.loopback import open_function
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceViolation, TimeLimit
from guestpv.transport.pci import PciTransport


def test_bytes_come_in_any_number_whatever_the_device_gives_at_a_time() -> None:
    function = open_function("rng", {"seed": "1", "most": "7"})
    with PciTransport(function) as transport, Rng(transport) as rng:
        data = rng.read(10_000)
    assert len(data) == 10_000
    assert len(set(data)) == 256
    assert [str(finding) for finding in function.findings] == []


def test_a_late_answer_is_used_once_and_not_again() -> None:
    function = open_function("rng", {"seed": "1"})
    with PciTransport(function) as transport, Rng(transport) as rng:
        function.device.hold = True
        with pytest.raises(TimeLimit, match="no entropy"):
            rng.read(4, timeout=0.05)
        function.device.hold = False
        function.device.release()
        first, second = rng.read(4), rng.read(4)
    assert (len(first), len(second)) == (4, 4)
    assert first != second


def test_an_empty_answer_is_the_devices_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    function = open_function("rng", {})
    with PciTransport(function) as transport, Rng(transport) as rng:
        monkeypatch.setattr(rng.queue, "completions", lambda: iter([(0, 0)]))
        with pytest.raises(DeviceViolation, match="came back empty"):
            rng.read(4)
