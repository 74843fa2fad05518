"""Feature bits and their negotiation (2.2, chapter 6)."""

from __future__ import annotations

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Combination, Rig
from guestpv.errors import FeaturesRefused
from guestpv.spec import features as ft
from guestpv.spec.status import Status
from guestpv.transport.pci import PciTransport

UNASSIGNED = ft.mask(range(44, 50))
EXTENDED = 0x100
"""Where the list of extended capabilities begins."""
CAPABILITY_SR_IOV = 0x10
LEGACY_ONLY = {24: "NOTIFY_ON_EMPTY", 27: "ANY_LAYOUT"}


def names(rig: Rig, mask: int) -> str:
    """Features by name."""
    return " ".join(ft.feature_names(rig.transport.device_type, mask)) or "nothing"


@pytest.mark.requirement("DEV-FEAT-01")
def test_prerequisites_are_offered(rig: Rig) -> None:
    """A feature is offered only together with the features that it requires."""
    offered = rig.transport.offered
    lonely = offered & ~ft.close_dependencies(rig.transport.device_type, offered)
    assert not lonely, f"{names(rig, lonely)} offered without what they require"


@pytest.mark.requirement("DEV-FEAT-04")
def test_undefined_features_are_not_offered(rig: Rig) -> None:
    """No feature bit is offered that is not defined for the device type."""
    known = ft.mask({*ft.COMMON_FEATURES, *ft.DEVICE_FEATURES[rig.transport.device_type]} - {*LEGACY_ONLY})
    if not isinstance(rig.transport, PciTransport):
        # A back end speaks to front ends that drive legacy guests, too.
        known |= ft.mask(LEGACY_ONLY)
    unknown = rig.transport.offered & ~known
    assert not unknown, f"bits {list(ft.bits(unknown))} are offered and not defined"


@pytest.mark.requirement("DEV-FEAT-17")
def test_unassigned_features_are_not_offered(rig: Rig) -> None:
    """The bits 44 to 49 and all from 128 upwards are never offered."""
    found = rig.transport.offered & UNASSIGNED
    assert not found, f"bits {list(ft.bits(found))} are offered"
    common = rig.pci.common
    for word in (4, 5, 1 << 16, 0xFFFFFFFF):
        common.write("device_feature_select", word)
        found = common.read("device_feature")
        assert found == 0, f"device_feature reads {found:#x} with device_feature_select {word:#x}"


@pytest.mark.requirement("DEV-FEAT-06")
def test_version_1_is_offered(rig: Rig) -> None:
    """VIRTIO_F_VERSION_1 is offered."""
    assert rig.transport.offered >> ft.F_VERSION_1 & 1, "VERSION_1 is not offered"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-FEAT-03")
def test_a_feature_that_is_not_offered_is_refused(rig: Rig, case: Case) -> None:
    """FEATURES_OK does not stay with a feature that was not offered, unless the device ignored it."""
    transport, common = rig.transport, rig.pci.common
    bit = next(bit for bit in (44, 45, 46, 47, 48, 49, 42) if not transport.offered >> bit & 1)
    transport.write_status(Status.ACKNOWLEDGE)
    transport.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    case.sent(f"feature bit {bit}, which is not offered, and FEATURES_OK")
    transport.write_features(rig.features_for() | 1 << bit)
    common.write("driver_feature_select", bit // 32)
    mirrored = common.read("driver_feature") >> bit % 32 & 1
    transport.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    kept = transport.read_status() & Status.FEATURES_OK
    if not kept:
        case.refused("FEATURES_OK did not stay")
        return
    assert not mirrored, f"driver_feature shows bit {bit} as accepted, and FEATURES_OK stays"


@pytest.mark.requirement("DEV-FEAT-16")
def test_ring_features_do_what_they_say(queue: Queue, rig: Rig, combination: Combination) -> None:
    """Each ring feature that is negotiated by its number behaves as the feature of that name."""
    for _ in range(3):
        request = rig.work.request()
        queue.run(request.readable, request.writable, indirect=combination.indirect)
        request.check()


@pytest.mark.ring("in_order")
@pytest.mark.requirement("DEV-FEAT-10")
def test_buffers_come_back_in_order(rig: Rig, combination: Combination) -> None:
    """With IN_ORDER buffers are used in the order in which they were made available."""
    try:
        queue = rig.start(combination.features)
    except FeaturesRefused as refusal:
        pytest.skip(f"the device refuses this combination: {refusal.message}")
    count = min(8, queue.size // 4) or 1
    sent = []
    for _ in range(count):
        request = rig.work.request()
        sent.append(queue.add(request.readable, request.writable, kick=False))
    queue.kick()
    came = [id for id, _ in queue.wait(count)]
    assert came == sent, f"made available as {sent}, used as {came}"


@pytest.mark.requirement("DEV-FEAT-15")
def test_sr_iov_is_offered_only_with_its_capability(rig: Rig) -> None:
    """VIRTIO_F_SR_IOV is offered only by a function that has an SR-IOV capability."""
    if not rig.transport.offered >> ft.F_SR_IOV & 1:
        return
    at, seen = EXTENDED, set()
    found = False
    while at >= EXTENDED and at not in seen:
        seen.add(at)
        header = rig.function.config_read(at, 4)
        found |= header & 0xFFFF == CAPABILITY_SR_IOV
        at = header >> 20
    assert found, "SR_IOV is offered, the function has no SR-IOV capability"
