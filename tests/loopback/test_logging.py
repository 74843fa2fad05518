"""What the library logs, and that it is quiet where nobody asked."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import guestpv
from guestpv.drivers.rng import Rng
from guestpv.errors import Refused

SILENT = """
import guestpv
from guestpv.errors import Refused
try:
    guestpv.open_driver("loopback:rng?offer=-version_1")
except Refused:
    print("refused")
"""


def test_a_driver_s_life_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG, logger="guestpv"),
        guestpv.open("loopback:rng") as transport,
        Rng(transport),
    ):
        pass
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert told[0] == "opening loopback:rng"
    assert "negotiated" in told[1]
    assert "VERSION_1" in told[1]
    assert told[2] == "loopback:rng: live"
    assert {record.name.split(".")[0] for record in caplog.records} == {"guestpv"}


def test_giving_up_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Refused):
        guestpv.open_driver("loopback:rng?offer=-version_1")
    assert "loopback:rng: giving up, setting FAILED" in caplog.text


def test_nothing_is_printed_unless_somebody_asks() -> None:
    done = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_the_command_line_shows_it_with_vv() -> None:
    command = [sys.executable, "-m", "guestpv", "info", "loopback:rng", "-vv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "INFO guestpv.opener: opening loopback:rng" in done.stderr
    assert "guestpv.opener" not in done.stdout
