"""The documents' systemd units: systemd understands them, and the sandbox takes away what is not needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "docs" / "systemd").glob("*.service"))
EXPOSURE = 35
"""Tenths of systemd's exposure level, which is 96 for a service without a sandbox."""
PROVIDED = {"balloon", "blk@", "net@", "net-user@"}


def systemd_analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(params=UNITS, ids=lambda path: path.name)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit as it would be installed, starting a program that exists here."""
    source: Path = request.param
    text = source.read_text()
    assert "ExecStart=/usr/local/bin/guestpv " in text
    for line in ("NoNewPrivileges=yes", "DevicePolicy=closed", "DeviceAllow=char-vfio rw", "UMask=0077"):
        assert line in text.splitlines()
    assert re.search("^CapabilityBoundingSet=.*CAP", text, re.MULTILINE)
    installed = tmp_path / source.name
    installed.write_text(text.replace("/usr/local/bin/guestpv", sys.executable))
    return installed


def test_each_service_has_a_unit() -> None:
    assert {path.stem.removeprefix("guestpv-") for path in UNITS} == PROVIDED


def test_systemd_understands_every_line(unit: Path) -> None:
    done = systemd_analyze("verify", unit)
    assert (done.returncode, unit.name in done.stderr) == (0, False), done.stderr
    unit.write_text(unit.read_text() + "\n[Service]\nProtectEverything=yes\n")
    assert "ProtectEverything" in systemd_analyze("verify", unit).stderr


def test_the_sandbox_is_worth_its_name(unit: Path) -> None:
    done = systemd_analyze("security", "--offline=true", f"--threshold={EXPOSURE}", unit)
    assert done.returncode == 0, done.stdout
    bare = re.sub(
        r"^(Protect|Restrict|Private|Capability|Device|SystemCall).*\n",
        "",
        unit.read_text(),
        flags=re.MULTILINE,
    )
    unit.write_text(bare)
    assert systemd_analyze("security", "--offline=true", f"--threshold={EXPOSURE}", unit).returncode != 0
