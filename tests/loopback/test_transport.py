"""The status machine and the PCI transport, as a device sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner

import guestpv
from guestpv.cli.main import main
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.loopback import open_function
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceViolation, FeaturesRefused, Refused, TimeLimit, UsageError
from guestpv.memory import DmaRegion
from guestpv.spec import features as feat
from guestpv.spec import net
from guestpv.spec.status import Status
from guestpv.transport.base import FeatureFilter
from guestpv.transport.pci import PciTransport

Make = Callable[..., tuple[SoftwareFunction, PciTransport]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Software functions with a transport on each; at the end no finding may be left unexpected."""
    made: list[tuple[SoftwareFunction, PciTransport]] = []

    def build(body: str = "rng", **params: str) -> tuple[SoftwareFunction, PciTransport]:
        function = open_function(body, params)
        transport = PciTransport(function)
        made.append((function, transport))
        return function, transport

    yield build
    for function, transport in made:
        transport.close()
        assert [str(finding) for finding in function.findings] == []


def status_writes(function: SoftwareFunction) -> list[int]:
    return [e.value for e in function.journal.events if e.kind == "write" and e.name == "device_status"]


def names(function: SoftwareFunction, kind: str) -> list[str]:
    return [e.name for e in function.journal.events if e.kind == kind]


@pytest.mark.requirement(
    "DRV-STATUS-01", "DRV-STATUS-02", "DRV-INIT-01", "DRV-INIT-02", "DRV-INIT-06", "DRV-INIT-10"
)
def test_the_status_grows_bit_by_bit_from_a_reset_to_driver_ok(make: Make) -> None:
    function, transport = make()
    Rng(transport)
    assert status_writes(function) == [0, 1, 3, 3 | 8, 3 | 8 | 4]


@pytest.mark.requirement("DRV-INIT-08")
def test_features_ok_is_read_back_before_anything_else(make: Make) -> None:
    function, transport = make()
    transport.negotiate(0)
    events = [e for e in function.journal.events if e.kind in ("read", "write")]
    at = next(i for i, e in enumerate(events) if e.name == "device_status" and e.value == 11)
    assert (events[at + 1].kind, events[at + 1].name) == ("read", "device_status")


@pytest.mark.requirement("DRV-INIT-08", "DRV-INIT-11", "DRV-INIT-12")
def test_a_device_that_refuses_features_ok_ends_in_failed_and_an_error_that_names_the_features(
    make: Make,
) -> None:
    function, transport = make()
    function.device.refuse_features_ok = True
    with pytest.raises(FeaturesRefused, match=r"did not keep FEATURES_OK for .*VERSION_1"):
        Rng(transport)
    assert status_writes(function)[-1] & Status.FAILED
    assert "queue_enable" not in names(function, "write")


@pytest.mark.requirement("DRV-STATUS-03")
def test_after_failed_the_next_attempt_begins_with_a_reset(make: Make) -> None:
    function, transport = make()
    function.device.refuse_features_ok = True
    with pytest.raises(FeaturesRefused):
        Rng(transport)
    function.device.refuse_features_ok = False
    assert len(Rng(transport).read(8)) == 8
    writes = status_writes(function)
    assert writes[writes.index(11 | 128) + 1] == 0


@pytest.mark.requirement("DRV-RESET-01", "DRV-PCI-26")
def test_a_slow_reset_is_waited_for(make: Make) -> None:
    function, transport = make()
    transport.negotiate(0)
    function.registers.reset_reads = 5
    transport.reset()
    assert transport.status == 0


@pytest.mark.requirement("DRV-RESET-01")
def test_a_device_that_never_leaves_reset_is_given_up_after_the_time_limit(make: Make) -> None:
    function, transport = make()
    transport.negotiate(0)
    function.registers.reset_reads = 1 << 30
    started = time.monotonic()
    with pytest.raises(TimeLimit, match="after the reset"):
        transport.reset(timeout=0.2)
    assert 0.2 <= time.monotonic() - started < 60
    function.registers.reset_reads = 0


def test_memory_leaves_the_device_only_after_it_was_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device stuck in reset is reset at function level before its DMA mappings go."""
    function = open_function("rng", {})
    transport = PciTransport(function)
    Rng(transport)
    order: list[str] = []
    unmap, reset = function.dma.unmap, function.reset

    def noted_unmap(region: DmaRegion) -> None:
        order.append("unmap")
        unmap(region)

    def noted_reset() -> bool:
        order.append("function reset")
        return reset()

    monkeypatch.setattr(function.dma, "unmap", noted_unmap)
    monkeypatch.setattr(function, "reset", noted_reset)
    monkeypatch.setattr("guestpv.transport.base.RESET_TIME_LIMIT", 0.1)
    function.registers.reset_reads = 1 << 30
    transport.close()
    assert order[0] == "function reset"
    assert set(order[1:]) == {"unmap"}


@pytest.mark.provokes("it sets the status itself")
def test_a_device_stuck_in_reset_is_a_time_limit_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = open_function("rng", {})
    stuck.registers.reset_reads = 1 << 30
    stuck.device.write_status(int(Status.ACKNOWLEDGE))
    monkeypatch.setattr("guestpv.devices.loopback.open_function", lambda body, params: stuck)
    monkeypatch.setattr("guestpv.transport.base.RESET_TIME_LIMIT", 0.1)
    result = CliRunner().invoke(main, ["info", "loopback:rng"])
    assert result.exit_code == 6
    assert "device_status still reads" in result.output


@pytest.mark.requirement("DRV-FEAT-01", "DRV-FEAT-04", "DRV-FEAT-07", "DRV-FEAT-08", "DRV-FEAT-14")
def test_unknown_offered_features_are_neither_accepted_nor_an_error(make: Make) -> None:
    function, transport = make()
    function.device.offered |= 1 << 5 | 1 << 45 | 1 << 90
    Rng(transport)
    assert function.device.features & ~function.device.offered == 0
    assert not function.device.features & (1 << 5 | 1 << 45 | 1 << 90)


@pytest.mark.requirement("DRV-FEAT-15", "DRV-FEAT-17", "DRV-FEAT-20", "DRV-FEAT-21")
def test_what_a_driver_should_accept_is_accepted(make: Make) -> None:
    function, transport = make(packed="on")
    transport.negotiate(0)
    for bit in (feat.F_VERSION_1, feat.F_ACCESS_PLATFORM, feat.F_RING_PACKED, feat.F_ORDER_PLATFORM):
        assert function.device.features >> bit & 1


@pytest.mark.requirement("DRV-FEAT-13", "DRV-FEAT-16")
def test_a_device_without_version_1_is_refused_by_name(make: Make) -> None:
    function, transport = make()
    function.device.offered &= ~(1 << feat.F_VERSION_1)
    with pytest.raises(Refused, match="legacy"):
        transport.negotiate(0)
    assert status_writes(function)[-1] & Status.FAILED


@pytest.mark.requirement("DRV-FEAT-19")
def test_translated_addresses_are_never_given_to_a_device_without_access_platform(make: Make) -> None:
    function, transport = make()
    function.device.offered &= ~(1 << feat.F_ACCESS_PLATFORM)
    with pytest.raises(Refused, match="ACCESS_PLATFORM") as refused:
        Rng(transport)
    assert "iommu_platform=on" in refused.value.hint
    assert "queue_enable" not in names(function, "write")


def test_a_denied_feature_is_not_negotiated_and_a_required_one_must_be_there(make: Make) -> None:
    function, transport = make()
    transport.feature_filter = FeatureFilter.parse("-event_idx", transport.device_type)
    transport.negotiate(0)
    assert not function.device.features >> feat.F_EVENT_IDX & 1
    transport.feature_filter = FeatureFilter.parse("+packed", transport.device_type)
    with pytest.raises(Refused, match="does not offer RING_PACKED"):
        transport.negotiate(0)


def test_what_keeps_memory_safe_cannot_be_left_out(make: Make) -> None:
    _, transport = make()
    transport.feature_filter = FeatureFilter.parse("-access_platform", transport.device_type)
    with pytest.raises(Refused, match="cannot be left out"):
        transport.negotiate(0)


@pytest.mark.requirement("DRV-PCI-25", "DRV-PCI-65", "DRV-PCI-67")
def test_a_queue_is_described_before_it_is_enabled(make: Make) -> None:
    function, transport = make()
    transport.negotiate(0)
    function.journal.clear()
    transport.make_queue(0)
    writes = names(function, "write")
    assert writes.index("queue_select") == 0
    assert writes[-1] == "queue_enable"
    assert {"queue_size", "queue_msix_vector", "queue_desc", "queue_driver", "queue_device"} < set(
        writes[:-1]
    )


@pytest.mark.requirement("DRV-PCI-24", "DRV-PCI-66")
@pytest.mark.parametrize("size", [0, 3, 512, -1])
def test_an_impossible_queue_size_is_refused_before_the_device_sees_it(make: Make, size: int) -> None:
    function, transport = make(queue_size="256")
    transport.negotiate(0)
    with pytest.raises(UsageError, match="cannot have"):
        transport.make_queue(0, size)
    assert "queue_enable" not in names(function, "write")


@pytest.mark.parametrize("index", [1, 99, -1])
def test_a_queue_that_does_not_exist_is_refused(make: Make, index: int) -> None:
    _, transport = make()
    transport.negotiate(0)
    with pytest.raises(UsageError, match="no queue"):
        transport.make_queue(index)


@pytest.mark.requirement("DRV-PCI-45")
@pytest.mark.parametrize("granted", [0, 1])
def test_a_refused_vector_is_noticed(make: Make, granted: int) -> None:
    function, transport = make()
    function.registers.vectors_granted = granted
    with pytest.raises(guestpv.errors.GuestpvError, match=f"refused MSI-X vector {granted}"):
        Rng(transport)


@pytest.mark.requirement("DRV-PCI-41", "DRV-PCI-42", "DRV-PCI-72")
@pytest.mark.parametrize("msix", ["off", "1", "2", "3", "2048"])
@pytest.mark.parametrize("threaded", ["off", "on"])
def test_interrupts_arrive_with_any_number_of_vectors(make: Make, msix: str, threaded: str) -> None:
    _, transport = make(msix=msix, threaded=threaded)
    rng = Rng(transport)
    assert transport.mode == ("intx" if msix == "off" else "msix")
    for _ in range(20):
        assert len(rng.read(100)) == 100


@pytest.mark.requirement("DRV-VQRESET-01", "DRV-VQRESET-03", "DRV-PCI-28", "DRV-PCI-30")
def test_one_queue_is_reset_with_buffers_in_flight_and_comes_back_smaller(make: Make) -> None:
    function, transport = make()
    transport.negotiate(0)
    queue = transport.make_queue(0)
    buffer = transport.pool.allocate(64)
    transport.driver_ok()
    function.device.hold = True
    token = queue.add(writable=[buffer])
    queue.publish()
    function.registers.queue_reset_reads = 3
    assert transport.reset_queue(0) == [token]
    function.device.hold = False
    queue = transport.make_queue(0, 16)
    queue.add(writable=[buffer])
    queue.publish()
    assert queue.wait(60)
    assert [length for _, length in queue.completions()] == [64]


@pytest.mark.requirement("DRV-VQRESET-04")
def test_a_queue_is_not_reset_alone_without_the_feature(make: Make) -> None:
    function, transport = make(ring_reset="off")
    transport.negotiate(0)
    transport.make_queue(0)
    with pytest.raises(UsageError, match="RING_RESET"):
        transport.reset_queue(0)
    assert "queue_reset" not in names(function, "write")


def test_opening_names_what_is_wrong_with_a_specification() -> None:
    for text in ("nosuch:net", "net", "loopback", "0000:zz:00.0"):
        with pytest.raises(UsageError, match="neither a PCI address nor"):
            guestpv.open(text)
    with pytest.raises(UsageError, match="mode is msix, intx or poll"):
        guestpv.open("loopback:rng?mode=fast")
    with pytest.raises(UsageError, match="no feature is called 'nosuch'"):
        guestpv.open("loopback:rng?features=+nosuch")


def test_a_driver_is_found_by_device_type() -> None:
    driver = guestpv.open_driver("loopback:rng")
    assert isinstance(driver, Rng)
    driver.close()


def test_closing_twice_is_no_mistake(make: Make) -> None:
    _, transport = make()
    Rng(transport)
    transport.close()
    transport.close()


@pytest.mark.provokes("the driver gives up")
def test_a_generation_that_never_holds_still_is_the_devices_fault(make: Make) -> None:
    function, transport = make("net")
    transport.negotiate(1 << net.F_MAC)
    function.registers.generation_bumps = 1 << 30
    with pytest.raises(DeviceViolation, match="config_generation changed"):
        transport.config(net.CONFIG)
