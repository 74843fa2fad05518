"""Firmware's own drivers before strict devices: a boot each, of seconds."""

from pathlib import Path

import pytest

from guestpv.conformance.driver.run import Run
from guestpv.conformance.driver.scenarios import SCENARIOS
from guestpv.conformance.verdict import Verdict
from strictfirmware import FIRMWARE, boot, fat
from strictguest import rows_of

EXERCISED = {"DRV-INIT-08", "DRV-FEAT-15", "DRV-PCI-26", "DRV-SPLIT-03"}
KNOWN = {
    # ACKNOWLEDGE is set before the reset that initialization begins with, and not after it.
    "u-boot-blk": {"DRV-INIT-01", "DRV-INIT-02"},
    # Buffers go back to the receive queue without a notification.
    "u-boot-net": {"DRV-INIT-01", "DRV-INIT-02", "DRV-SPLIT-25"},
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", KNOWN)
def test_u_boot_keeps_the_rules_but_for_what_is_known(name: str, tmp_path: Path) -> None:
    run = Run(rows_of(FIRMWARE[name].kind))
    assert boot(name, SCENARIOS["plain"], run, tmp_path) == ""
    verdicts = {outcome.requirements[0]: outcome.verdict for outcome in run.outcomes()}
    assert {row for row, verdict in verdicts.items() if verdict is Verdict.FAIL} == KNOWN[name]
    passed = {row for row, verdict in verdicts.items() if verdict is Verdict.PASS}
    assert passed >= EXERCISED
    assert any(row.startswith(f"DRV-{FIRMWARE[name].kind.upper()}") for row in passed)


def test_the_disk_for_firmware_holds_what_it_was_given(tmp_path: Path) -> None:
    image = fat({"one.txt": b"first", "two.txt": b"second"})
    assert len(image) == 16 << 20
    assert image[510:512] == b"\x55\xaa"
    assert image[54:62] == b"FAT16   "
    root = 512 * (1 + 2 * int.from_bytes(image[22:24], "little"))
    assert [image[root + at : root + at + 11] for at in (0, 32)] == [b"ONE     TXT", b"TWO     TXT"]
    data = root + 512 * 32
    assert image[data : data + 5] == b"first"
    assert image[data + 2048 : data + 2054] == b"second"
