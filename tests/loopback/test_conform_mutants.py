"""Every device that is broken on purpose is caught by the check of what it breaks, and the ledger says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guestpv.conformance import catalogue, ledger

TESTS = Path(__file__).resolve().parents[1]


def test_every_broken_device_is_caught(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    run = subprocess.run(
        [sys.executable, "-m", "mutants", "device", "--json", str(out)],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    data = json.loads(out.read_text())
    assert data["missed"] == []
    assert data["errors"] == []
    published = Path(ledger.__file__).with_name("ledger-device.tsv").read_text()
    assert data["ledger"] == published, "run: PYTHONPATH=tests python -m mutants device --write"


@pytest.mark.parametrize("side", catalogue.SIDES)
def test_the_ledger_has_every_observable_requirement(side: catalogue.Side) -> None:
    entries = ledger.load(side)
    assert list(entries) == list(catalogue.observable(side))
    assert all(bool(entry.check) != bool(entry.reason) for entry in entries.values())
