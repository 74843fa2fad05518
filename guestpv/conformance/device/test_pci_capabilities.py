"""Identity and capabilities of a virtio PCI function (4.1.1, 4.1.2, 4.1.4), with nothing driving it."""

from __future__ import annotations

import itertools

import pytest

from guestpv.conformance.rig import Rig
from guestpv.conformance.structures import Structure, structures
from guestpv.conformance.watched import WatchedFunction
from guestpv.errors import GuestpvError
from guestpv.spec import features as ft
from guestpv.spec import pci
from guestpv.spec.pci import CfgType

MODERN_IDS = range(0x1040, 0x1080)
HEADER_TYPE = 0x0E
HEADER_END = 0x40
KNOWN = {int(kind) for kind in CfgType}
MAPPED = (CfgType.COMMON, CfgType.NOTIFY, CfgType.ISR, CfgType.DEVICE)
LEAST = {CfgType.NOTIFY: 20, CfgType.PCI_CFG: 20, CfgType.SHARED_MEMORY: 24}
"""Bytes of the capabilities that have something behind the common part."""


def bar_size(function: WatchedFunction, bar: int) -> int:
    """Size of a BAR, 0 where it is not implemented."""
    try:
        return function.bar(bar).size
    except GuestpvError:
        return 0


@pytest.mark.requirement("DEV-PCI-03")
def test_vendor_id(function: WatchedFunction) -> None:
    """The PCI vendor id is 0x1AF4."""
    vendor = function.config_read(pci.PCI_CONFIG_VENDOR, 2)
    assert vendor == pci.VENDOR_ID, f"vendor id {vendor:#06x}"


@pytest.mark.requirement("DEV-PCI-04", "DEV-PCI-76", "DEV-CONF-07")
def test_device_id(function: WatchedFunction) -> None:
    """The PCI device id is 0x1040 plus the device type, or the transitional id of the type."""
    device = function.config_read(pci.PCI_CONFIG_DEVICE, 2)
    subsystem = function.config_read(pci.PCI_CONFIG_SUBSYSTEM, 2)
    assert device in MODERN_IDS or device in pci.TRANSITIONAL_DEVICES, f"device id {device:#06x}"
    kind = device - pci.MODERN_DEVICE_BASE
    if device in pci.TRANSITIONAL_DEVICES:
        kind = pci.TRANSITIONAL_DEVICES[device]
        assert subsystem == kind, f"transitional id {device:#06x} with subsystem id {subsystem:#06x}"
        revision = function.config_read(pci.PCI_CONFIG_REVISION, 1)
        assert revision == 0, f"transitional id {device:#06x} with revision {revision}"
    common = structures(function, CfgType.COMMON)
    assert common, "no common configuration capability"
    assert kind in ft.DEVICE_NAMES, f"device type {kind}"


@pytest.mark.requirement("DEV-PCI-01", "DEV-PCI-78")
def test_capability_list(function: WatchedFunction) -> None:
    """The capability list is announced, ends, and no two capabilities overlap."""
    header = function.config_read(HEADER_TYPE, 1) & 0x7F
    assert header == 0, f"header type {header:#x}"
    status = function.config_read(pci.PCI_CONFIG_STATUS, 2)
    assert status & pci.PCI_STATUS_CAPABILITIES, "the status register announces no capability list"
    places: list[int] = []
    at = function.config_read(pci.PCI_CONFIG_CAPABILITIES, 1) & 0xFC
    while at:
        assert at >= HEADER_END, f"the capability list leads to {at:#x}, inside the header"
        assert at not in places, f"the capability list leads back to {at:#x}"
        places.append(at)
        at = function.config_read(at + 1, 1) & 0xFC
    assert places, "the capability list is empty"
    places.sort()
    last = places[-1]
    ends = {found.at: found.at + found.cap_len for found in structures(function)}
    for here, following in itertools.pairwise(places):
        end = ends.get(here, here + 2)
        assert end <= following, f"the capability at {here:#x} reaches into the one at {following:#x}"
    assert ends.get(last, 0) <= 0x100, f"the capability at {last:#x} reaches out of configuration space"


@pytest.mark.requirement("DEV-PCI-13", "DEV-PCI-78", "DEV-PCI-91", "DEV-PCI-98")
def test_capability_lengths(function: WatchedFunction) -> None:
    """cap_len covers the capability with all that belongs to its type."""
    for found in structures(function):
        if found.cfg_type == CfgType.VENDOR:
            continue
        least = LEAST.get(CfgType(found.cfg_type), 16) if found.cfg_type in KNOWN else 16
        assert found.cap_len >= least, f"{found}: cap_len {found.cap_len}, at least {least}"


@pytest.mark.requirement("DEV-PCI-79")
def test_capability_types(function: WatchedFunction) -> None:
    """cfg_type is one of those in use."""
    for found in structures(function):
        assert found.cfg_type in KNOWN, f"{found}: no such type"


def present(function: WatchedFunction, kind: CfgType) -> None:
    """There is a capability of this structure."""
    assert structures(function, kind), f"no capability with cfg_type {int(kind)} ({kind.name})"


@pytest.mark.requirement("DEV-PCI-17")
def test_common_configuration_is_there(function: WatchedFunction) -> None:
    """The function has a common configuration structure."""
    present(function, CfgType.COMMON)


@pytest.mark.requirement("DEV-PCI-33")
def test_notification_structure_is_there(function: WatchedFunction) -> None:
    """The function has a notification structure."""
    present(function, CfgType.NOTIFY)


@pytest.mark.requirement("DEV-PCI-44")
def test_isr_is_there(function: WatchedFunction) -> None:
    """The function has an ISR status."""
    present(function, CfgType.ISR)


@pytest.mark.device("net", "blk", "balloon")
@pytest.mark.requirement("DEV-PCI-49")
def test_device_configuration_is_there(function: WatchedFunction) -> None:
    """A function whose device type has a configuration has its structure."""
    present(function, CfgType.DEVICE)


@pytest.mark.requirement("DEV-PCI-59")
def test_configuration_access_is_there(function: WatchedFunction) -> None:
    """The function has a PCI configuration access capability."""
    present(function, CfgType.PCI_CFG)


@pytest.mark.requirement("DEV-PCI-16", "DEV-PCI-50")
def test_structures_are_aligned(function: WatchedFunction) -> None:
    """The common and the device configuration structure lie at multiples of 4 bytes."""
    for kind in (CfgType.COMMON, CfgType.DEVICE):
        for found in structures(function, kind):
            assert found.offset % 4 == 0, f"{found}: offset {found.offset:#x}"


@pytest.mark.requirement("DEV-PCI-80")
def test_structures_lie_in_bars(function: WatchedFunction) -> None:
    """Every structure that is accessed lies wholly inside a BAR that the function has."""
    for found in structures(function):
        if found.cfg_type not in MAPPED or found.bar > 5:
            # A structure behind a reserved BAR number is to be ignored.
            continue
        size = bar_size(function, found.bar)
        assert size, f"{found}: BAR {found.bar} is not implemented"
        end = found.offset + found.length
        assert end <= size, f"{found}: ends at {end:#x}, BAR {found.bar} has {size:#x} bytes"


@pytest.mark.requirement("DEV-PCI-81", "DEV-PCI-82")
def test_common_configuration_is_long_enough(function: WatchedFunction) -> None:
    """The common configuration structure reaches to the end of queue_device at least."""
    for found in structures(function, CfgType.COMMON):
        assert found.length >= pci.COMMON_CFG_MIN_LENGTH, f"{found}: length {found.length:#x}"


@pytest.mark.requirement("DEV-PCI-83")
def test_common_configuration_has_room_for_queue_reset(rig: Rig) -> None:
    """With RING_RESET offered, the common configuration structure reaches to the end of queue_reset."""
    if not rig.transport.offered >> ft.F_RING_RESET & 1:
        pytest.skip("RING_RESET is not offered")
    length = rig.pci.common.length
    assert length >= pci.COMMON_CFG["queue_reset"].end, f"length {length:#x}"


# The notification structure.


def notification(rig: Rig) -> tuple[Structure, int]:
    """The first notification capability and its multiplier."""
    found = structures(rig.function, CfgType.NOTIFY)[0]
    return found, rig.function.config_read(found.at + pci.CAPABILITY_NOTIFY_MULTIPLIER, 4)


def data_is_offered(rig: Rig, wanted: bool) -> None:
    """Leave where NOTIFICATION_DATA is offered, or is not."""
    if bool(rig.transport.offered >> ft.F_NOTIFICATION_DATA & 1) != wanted:
        pytest.skip(f"NOTIFICATION_DATA is {'not ' * wanted}offered")


def check_notification(rig: Rig, width: int) -> None:
    """Offset, multiplier and length for notifications of this width."""
    found, multiplier = notification(rig)
    assert found.offset % width == 0, f"{found}: offset {found.offset:#x} is not aligned to {width}"
    power = multiplier & (multiplier - 1) == 0
    assert multiplier == 0 or (power and multiplier % width == 0), f"notify_off_multiplier {multiplier}"
    assert found.length >= width, f"{found}: length {found.length}"
    common = rig.pci.common
    for index in range(common.read("num_queues")):
        common.write("queue_select", index)
        end = common.read("queue_notify_off") * multiplier + width
        assert end <= found.length, f"queue {index} is notified up to {end:#x}, length {found.length:#x}"


@pytest.mark.requirement("DEV-PCI-34", "DEV-PCI-35", "DEV-PCI-36", "DEV-PCI-37", "DEV-PCI-38")
def test_notification_structure(rig: Rig) -> None:
    """Without NOTIFICATION_DATA offset, multiplier and length fit 16-bit notifications of every queue."""
    data_is_offered(rig, False)
    check_notification(rig, 2)


@pytest.mark.requirement("DEV-PCI-39", "DEV-PCI-40", "DEV-PCI-41", "DEV-PCI-42", "DEV-PCI-43")
def test_notification_structure_with_data(rig: Rig) -> None:
    """With NOTIFICATION_DATA offset, multiplier and length fit 32-bit notifications of every queue."""
    data_is_offered(rig, True)
    check_notification(rig, 4)


# Access through configuration space (4.1.4.9).


def window(function: WatchedFunction) -> int:
    """Offset of the PCI configuration access capability."""
    found = structures(function, CfgType.PCI_CFG)
    if not found:
        pytest.skip("there is no such capability; another check says so")
    return found[0].at


@pytest.mark.requirement("DEV-PCI-98")
def test_the_window_is_writable(function: WatchedFunction) -> None:
    """bar, offset and length of the PCI configuration access capability take what is written to them."""
    at = window(function)
    common = structures(function, CfgType.COMMON)[0]
    for offset, width, value in ((4, 1, common.bar), (8, 4, common.offset + 0x14), (12, 4, 1)):
        function.config_write(at + offset, width, value)
        shown = function.config_read(at + offset, width)
        assert shown == value, f"+{offset} reads {shown:#x} after {value:#x} was written"


@pytest.mark.requirement("DEV-PCI-60", "DEV-PCI-61")
def test_the_window_reaches_the_registers(rig: Rig) -> None:
    """Through pci_cfg_data the driver reads and writes what lies at the offset in the BAR."""
    function, common = rig.function, rig.pci.common
    at = window(function)
    place = structures(function, CfgType.COMMON)[0]

    def aim(name: str) -> int:
        field = pci.COMMON_CFG[name]
        function.config_write(at + 4, 1, place.bar)
        function.config_write(at + 8, 4, place.offset + field.offset)
        function.config_write(at + 12, 4, field.width)
        return field.width

    for name, value in (("device_feature_select", 1), ("driver_feature_select", 0), ("queue_select", 1)):
        width = aim(name)
        function.config_write(at + pci.CAPABILITY_PCI_CFG_DATA, width, value)
        shown = common.read(name)
        assert shown == value, f"{name} reads {shown:#x} after {value:#x} was written through the window"
    for name in ("num_queues", "device_feature", "device_status"):
        width = aim(name)
        told = function.config_read(at + pci.CAPABILITY_PCI_CFG_DATA, width)
        shown = common.read(name)
        assert told == shown, f"{name} reads {told:#x} through the window and {shown:#x} directly"
