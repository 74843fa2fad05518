"""Device configuration space: reading it, its generation, its changes (2.5, 3.2.1, 4.1.4.3, 4.1.5.4)."""

from __future__ import annotations

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Rig
from guestpv.conformance.stimulus import change_config
from guestpv.spec import balloon, blk, net, pci
from guestpv.spec import features as ft
from guestpv.spec.layout import Field, Layout

LAYOUTS: dict[int, Layout] = {ft.NET: net.CONFIG, ft.BLK: blk.CONFIG, ft.BALLOON: balloon.CONFIG}
ISR_CONFIG = 2


def layout_of(rig: Rig) -> Layout:
    """The configuration of the device type."""
    if rig.transport.device_type not in LAYOUTS:
        pytest.skip("the device type has no configuration")
    return LAYOUTS[rig.transport.device_type]


def read(rig: Rig, field: Field) -> int:
    """One field of one element."""
    return rig.transport.read_config(field.offset, field.width)


def needs(rig: Rig, field: Field) -> None:
    """Leave where the field does not exist."""
    if not field.exists(rig.transport.offered):
        pytest.skip(f"the device has no {field.name}")


def changeable(rig: Rig) -> None:
    """Leave where the field that ``change_config`` would change does not exist."""
    layout_of(rig)
    if rig.transport.device_type == ft.NET:
        needs(rig, net.CONFIG["status"])


def running(rig: Rig) -> Queue:
    """A running device that has negotiated what makes its configuration change."""
    changeable(rig)
    extra = 1 << net.F_STATUS if rig.transport.device_type == ft.NET else 0
    rig.negotiate(rig.features_for() | extra & rig.transport.offered)
    queues = {index: rig.queue(index) for index in rig.work.queues}
    rig.transport.driver_ok()
    return queues[rig.work.main]


@pytest.mark.requirement("DEV-CONFIG-01")
def test_configuration_is_readable_before_features_ok(rig: Rig) -> None:
    """Before FEATURES_OK every field whose feature is offered can be read, with the values it has later."""
    layout = layout_of(rig)
    fields = [field for field in layout if field.exists(rig.transport.offered) and field.name not in LIVE]
    short = [field.name for field in fields if field.end > rig.transport.config_length]
    assert not short, f"the structure of {rig.transport.config_length} bytes has no room for {short}"
    before = rig.transport.config(layout)
    wanted = ft.mask(
        bit
        for field in fields
        if field.feature is not None
        for bit in ((field.feature,) if isinstance(field.feature, int) else field.feature)
    )
    asked = ft.close_dependencies(
        rig.transport.device_type, rig.features_for() | wanted & rig.transport.offered
    )
    rig.negotiate(asked)
    after = rig.transport.config(layout)
    for field in fields:
        if field.exists(asked):
            early, late = before[field.name], after[field.name]
            assert early == late, f"{field.name} reads {early!r} before FEATURES_OK and {late!r} after it"


LIVE = ("status", "num_pages", "actual", "free_page_hint_cmd_id", "writeback")
"""Fields that may change at any time."""


@pytest.mark.requirement("DEV-CONFIG-02", "DEV-PCI-77")
def test_fields_are_little_endian(rig: Rig) -> None:
    """A field of several bytes has its lowest byte first: a value that is known reads as itself."""
    queue = running(rig)
    field, value = change_config(rig)
    if field.width == 8:
        # The halves of a field of 64 bits are accessed one by one (4.1.3.1).
        low, high = (rig.transport.read_config(field.offset + at, 4) for at in (0, 4))
        shown = low | high << 32
    else:
        shown = read(rig, field)
    assert shown == value, f"{field.name} reads {shown:#x}; it is {value:#x}"
    del queue


@pytest.mark.requirement("DEV-CONFIG-03")
def test_a_change_is_notified(rig: Rig) -> None:
    """When the device changes its configuration, a configuration change notification comes."""
    running(rig)
    rig.config_changes()
    field, value = change_config(rig)
    rig.wait_config_change()
    shown = read(rig, field)
    assert shown == value, f"{field.name} reads {shown:#x} after the notification; it is {value:#x}"


@pytest.mark.requirement("DEV-CONFIG-04", "DEV-PCI-21")
def test_a_change_makes_a_new_generation(rig: Rig) -> None:
    """config_generation differs once a changed value was read, and stays while nothing changes."""
    running(rig)
    field = layout_of(rig)["status" if rig.transport.device_type == ft.NET else first_changing(rig)]
    for _ in range(2):
        read(rig, field)
        before = rig.transport.config_generation()
        changed, value = change_config(rig)
        rig.wait(lambda c=changed, v=value: read(rig, c) == v, f"{field.name} to change")  # type: ignore[misc]
        after = rig.transport.config_generation()
        assert after != before, f"config_generation reads {after} before and after the change of {field.name}"
    read(rig, field)
    assert rig.transport.config_generation() == after, "config_generation changes without a change"


def first_changing(rig: Rig) -> str:
    """The field that ``change_config`` changes."""
    return "capacity" if rig.transport.device_type == ft.BLK else "num_pages"


# The interrupt of a change, on PCI.


def isr(rig: Rig) -> int:
    """Read the ISR status, which clears it."""
    return rig.isr()


@pytest.mark.requirement("DEV-PCI-45")
@pytest.mark.parametrize("msix", [False, True], ids=["no-msix", "msix"])
def test_the_isr_tells_a_change(rig: Rig, msix: bool) -> None:
    """The ISR's configuration bit is set when a configuration change notification comes."""
    if msix and not rig.function.msix_vectors:
        pytest.skip("the function has no MSI-X")
    rig.transport.mode = "msix" if msix else "poll"
    running(rig)
    if not msix:
        rig.function.disable_interrupts()
    isr(rig)
    change_config(rig)
    if msix:
        rig.wait_config_change()
        assert isr(rig) & ISR_CONFIG, "the notification came with the ISR's configuration bit clear"
    else:
        seen = 0

        def told() -> bool:
            nonlocal seen
            seen |= isr(rig)
            return bool(seen & ISR_CONFIG)

        rig.wait(told, "configuration bit in the ISR after a change")


@pytest.mark.requirement("DEV-PCI-97", "DEV-PCI-67")
def test_a_change_is_the_message_of_its_vector(rig: Rig, case: Case) -> None:
    """With MSI-X a configuration change is the message of config_msix_vector, whichever vector that is."""
    vectors = rig.function.msix_vectors
    if vectors < 2:
        pytest.skip("the function has fewer than two MSI-X vectors")
    changeable(rig)
    for vector in (0, 1):
        rig.transport.reset(rig.limit)
        running_with_config_vector(rig, vector)
        change_config(rig)
        rig.wait(lambda v=vector: rig.vector_events(v) > 0, f"message of vector {vector}")  # type: ignore[misc]
        other = rig.vector_events(1 - vector)
        assert other == 0, f"vector {1 - vector} fired; config_msix_vector is {vector}"


def running_with_config_vector(rig: Rig, vector: int) -> None:
    """Running, queues without vectors, changes on this vector."""
    extra = 1 << net.F_STATUS if rig.transport.device_type == ft.NET else 0
    # Nobody else may wait for the vectors.
    rig.transport.mode = "poll"
    rig.negotiate(rig.features_for() | extra & rig.transport.offered)
    rig.function.disable_interrupts()
    rig.function.enable_msix(2)
    rig.pci.common.write("config_msix_vector", vector)
    for index in rig.work.queues:
        rig.queue_with_vector(index, pci.NO_VECTOR)
    rig.transport.driver_ok()


@pytest.mark.requirement("DEV-PCI-75", "DEV-PCI-68")
def test_an_unmapped_change_sends_no_message(rig: Rig) -> None:
    """With config_msix_vector at NO_VECTOR no interrupt comes for a configuration change."""
    if rig.function.msix_vectors < 2:
        pytest.skip("the function has fewer than two MSI-X vectors")
    changeable(rig)
    running_with_config_vector(rig, 0)
    rig.pci.common.write("config_msix_vector", pci.NO_VECTOR)
    assert rig.pci.common.read("config_msix_vector") == pci.NO_VECTOR, "config_msix_vector stays mapped"
    for vector in (0, 1):
        rig.vector_events(vector)
    change_config(rig)
    rig.settle()
    fired = [vector for vector in (0, 1) if rig.vector_events(vector)]
    assert not fired, f"vector {fired} fired for a change that is unmapped"
