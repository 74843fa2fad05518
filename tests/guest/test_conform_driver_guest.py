"""Linux's own drivers, and the firmware's, before strict devices: one boot, each life a scenario."""

import os
from collections.abc import Iterator

import pytest

from guestpv.conformance.driver.run import Run
from guestpv.conformance.verdict import Verdict
from strictguest import StrictGuest

pytestmark = pytest.mark.timeout(1800)

KERNEL = os.environ.get("GUESTPV_KERNELS", "6.1 6.12").split()[0]
SCENARIOS = "plain,features-1,features-4,unknown-features,slow-reset"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StrictGuest]:
    with StrictGuest(KERNEL, tmp_path_factory.mktemp("strict")) as strict:
        yield strict


def verdicts(run: Run, verdict: Verdict) -> set[str]:
    return {outcome.requirements[0] for outcome in run.outcomes() if outcome.verdict is verdict}


EXERCISED = {"DRV-INIT-08", "DRV-FEAT-14", "DRV-PCI-26", "DRV-PCI-68", "DRV-SPLIT-40", "DRV-PACKED-24"}
KNOWN = {
    "blk": set[str](),
    # The RSS command is longer by a byte of padding; 6.1 does not send it by itself.
    "net": set[str]() if KERNEL == "6.1" else {"DRV-NET-193"},
    # The statistics queue is notified while the driver is still being set up.
    "balloon": {"DRV-INIT-13", "DRV-BALLOON-52"},
}


@pytest.mark.parametrize("kind", KNOWN)
def test_linux_keeps_the_rules_but_for_what_is_known(guest: StrictGuest, kind: str) -> None:
    run = guest.drive(kind, SCENARIOS)
    assert verdicts(run, Verdict.FAIL) == KNOWN[kind]
    assert verdicts(run, Verdict.PASS) >= EXERCISED
    assert any(requirement.startswith(f"DRV-{kind.upper()}") for requirement in verdicts(run, Verdict.PASS))


def test_seabios_does_not_wait_for_its_reset(guest: StrictGuest) -> None:
    failed = verdicts(guest.firmware, Verdict.FAIL)
    assert failed >= {"DRV-PCI-26", "DRV-INIT-02"}
    assert failed <= {"DRV-PCI-26", "DRV-INIT-02", "DRV-CONFIG-04"}
