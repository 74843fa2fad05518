"""What the reference says that Windows drivers do, done by hand: the strict device has to say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.loopback import open_function
from guestpv.devices.scripted import ScriptedDriver
from guestpv.explain import rows
from guestpv.spec import balloon, blk
from guestpv.spec.features import F_ACCESS_PLATFORM, F_VERSION_1, mask
from guestpv.spec.pci import CfgType
from guestpv.spec.status import Status

BASE = mask((F_VERSION_1, F_ACCESS_PLATFORM))
DEVIATIONS = {row["id"]: row for row in rows("deviations")}


def vector_after_enable(function: SoftwareFunction) -> None:
    driver = ScriptedDriver(function)
    function.enable_msix(2)
    driver.negotiate(BASE)
    driver.queue(0)
    driver.write("queue_msix_vector", 1)
    assert driver.read("queue_msix_vector") == 1, "refused, a driver that does this would not start"


def config_vector_not_read_back(function: SoftwareFunction) -> None:
    driver = ScriptedDriver(function)
    function.enable_msix(2)
    driver.negotiate(BASE)
    driver.write("config_msix_vector", 0)
    driver.queue(0)
    driver.driver_ok()


def two_bits_at_once(function: SoftwareFunction) -> None:
    driver = ScriptedDriver(function)
    driver.reset()
    driver.write("device_status", Status.ACKNOWLEDGE | Status.DRIVER)


def narrow_fields_read_wide(function: SoftwareFunction) -> None:
    driver = ScriptedDriver(function)
    driver.negotiate(BASE)
    driver.read_at(CfgType.DEVICE, blk.CONFIG["cylinders"].offset, 4)


def refusal_ignored(function: SoftwareFunction) -> None:
    driver = ScriptedDriver(function)
    assert not driver.negotiate(mask((F_VERSION_1,)))
    driver.queue(0)
    driver.driver_ok()


def page_numbers_of_eight_bytes(function: SoftwareFunction) -> None:
    driver = ScriptedDriver(function)
    inflateq, _ = driver.start(mask((F_VERSION_1,)), {balloon.INFLATEQ: 8, balloon.DEFLATEQ: 8})
    memory = driver.pool.allocate(16)
    memory.write(b"".join(number.to_bytes(8, "little") for number in (0x1000, 0x1001)))
    inflateq.add([memory])
    inflateq.kick()


IMITATIONS: dict[str, tuple[str, Callable[[SoftwareFunction], None], str]] = {
    "W-NET-1": ("rng", vector_after_enable, "DRV-PCI-25"),
    "W-NET-2": ("rng", config_vector_not_read_back, "DRV-PCI-45"),
    "W-NET-4": ("rng", two_bits_at_once, "DRV-INIT-02"),
    "W-BLK-1": ("blk", refusal_ignored, "DRV-INIT-08"),
    "W-BLK-3": ("blk", narrow_fields_read_wide, "DRV-PCI-06"),
    "W-BAL-1": ("balloon", page_numbers_of_eight_bytes, "page 0x0 inflated twice"),
}


def test_the_table_says_which_of_them_are_told() -> None:
    assert {name for name, row in DEVIATIONS.items() if row["told"] == "yes"} == set(IMITATIONS)


@pytest.mark.parametrize("name", IMITATIONS)
@pytest.mark.provokes("each deviation is walked as the driver does it")
def test_the_strict_device_tells_of_it(name: str) -> None:
    device, imitate, told = IMITATIONS[name]
    function = open_function(device, {})
    try:
        imitate(function)
        assert any(told in str(finding) for finding in function.findings), function.findings
        assert not told.startswith("DRV-") or told in DEVIATIONS[name]["requirements"].split()
    finally:
        function.close()
