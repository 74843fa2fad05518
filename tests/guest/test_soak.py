"""A soak in short: load on all three devices, and once through all the bad luck of ``tools/soak``.

How fast anything was is not judged here.
"""

from __future__ import annotations

from pathlib import Path

from soak_suite.run import MIB, SERVICES, soak

from .conftest import once

EVENTS = {"flap": 1, "resize": 1, "target": 1, "break": len(SERVICES), "start over": 1}


@once
def test_nothing_is_lost_and_nothing_grows(kernel: str, tmp_path: Path) -> None:
    outcome = soak(0, kernel, packed=False, directory=tmp_path, verified=MIB, events=EVENTS)
    print(outcome)
    assert outcome.problems == []
    happened = outcome.events
    assert all(happened[what] == 1 for what in ("link flaps", "resizes", "balloon targets", "audits"))
    assert sum(outcome.reasons.values()) == len(SERVICES)
    assert sum(happened.get(f"{service}: down and up", 0) for service in SERVICES) == 1
    assert all(happened[f"audited {what}"] > 0 for what in ("frames from the guest", "bytes written"))
