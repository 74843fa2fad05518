"""The tutorial driver against the entropy device's model."""

from __future__ import annotations

import pytest

from guestpv.devices.loopback import open_function
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceViolation, TimeLimit, UsageError
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


@pytest.mark.parametrize("packed", ["off", "on"])
def test_a_bus_of_small_pieces_has_room_for_some_indirect_tables(packed: str) -> None:
    """Buffers without a table go straight into the ring; a ring that fits into no piece is refused."""
    function = open_function("rng", {"segment": "4096", "packed": packed, "queue_size": "512"})
    with PciTransport(function) as transport:
        transport.negotiate(supported=0)
        with pytest.raises(UsageError, match="a ring of 512 entries does not fit into one piece"):
            transport.make_queue(0, 512)
        queue = transport.make_queue(0, 128)
        transport.driver_ok()
        memory = transport.pool.allocate(40 * 48)
        tokens = [
            queue.add(writable=[memory[48 * n + 16 * part : 48 * n + 16 * part + 16] for part in range(3)])
            for n in range(40)
        ]
        queue.publish()
        used: dict[int, int] = {}
        while len(used) < len(tokens):
            assert queue.wait(60)
            used.update(queue.completions())
        assert used == dict.fromkeys(tokens, 48)
    assert [str(finding) for finding in function.findings] == []
