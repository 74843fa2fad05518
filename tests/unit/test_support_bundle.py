"""The support bundle: what helps is in it, and what is nobody's business is not."""

from __future__ import annotations

import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import guestpv
from guestpv.cli import checks
from guestpv.cli.checks import Check
from guestpv.cli.main import main
from guestpv.cli.redact import Redactor
from guestpv.errors import AccessDenied

SECRETS = ("hunter2", "192.0.2.77", "2001:db8::5", "52:54:00:aa:bb:cc", "alices-laptop", "alice")


@pytest.fixture(autouse=True)
def alice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a name, a user and a secret in the environment."""
    monkeypatch.setattr("socket.gethostname", lambda: "alices-laptop.example")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    monkeypatch.setenv("GUESTPV_PASSWORD", "hunter2")
    monkeypatch.setattr("guestpv.vfio.survey.survey", list)
    text = "eth0 52:54:00:aa:bb:cc has 192.0.2.77/24 and 2001:db8::5, lock in /home/alice/x of alices-laptop"
    monkeypatch.setattr(checks, "examine", lambda spec: [Check("link", "ok", text)])


def bundle(tmp_path: Path, *words: str) -> tuple[Result, dict[str, str]]:
    path = tmp_path / "bundle.tar.gz"
    done = CliRunner().invoke(main, ["support-bundle", "-o", str(path), *words])
    if done.exit_code:
        return done, {}
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        texts = {name.partition("/")[2]: file.read().decode() for name, file in files.items() if file}
    return done, texts


def test_it_has_what_a_report_needs(tmp_path: Path) -> None:
    done, texts = bundle(tmp_path)
    assert {"README.txt", "versions.json", "doctor.json", "functions.json"} == set(texts)
    versions: dict[str, Any] = json.loads(texts["versions.json"])
    assert versions["guestpv"] == guestpv.__version__
    assert versions["packages"]["numpy"]
    assert json.loads(texts["doctor.json"])[0]["name"] == "link"
    assert str(tmp_path / "bundle.tar.gz") in done.output


def test_nothing_that_identifies_is_in_it(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("10.1.2.3 -> fe80::1 by alice at 0000:01:00.0, 127.0.0.1, kernel 6.1.0-18, 12:34:56\n")
    _, texts = bundle(tmp_path, "--add", str(log))
    for name, text in texts.items():
        for secret in SECRETS:
            assert secret not in text, (name, secret)
    assert texts["added/log.txt"] == (
        "(IPv4) -> (IPv6) by USER at 0000:01:00.0, 127.0.0.1, kernel 6.1.0-18, 12:34:56\n"
    )
    assert "52:54:00:xx:xx:xx has (IPv4)/24 and (IPv6), lock in ~/x of HOST" in texts["doctor.json"]


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    bundle(tmp_path)
    assert stat.S_IMODE((tmp_path / "bundle.tar.gz").stat().st_mode) == 0o600


def test_what_cannot_be_found_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise AccessDenied("no sysfs here", hint="mount it")

    monkeypatch.setattr("guestpv.vfio.survey.survey", refused)
    _, texts = bundle(tmp_path)
    assert json.loads(texts["functions.json"])["error"]["message"] == "no sysfs here"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    frames = tmp_path / "frames.pcap"
    frames.write_bytes(b"\xd4\xc3\xb2\xa1\xff\xfe")
    done, _ = bundle(tmp_path, "--add", str(frames))
    assert done.exit_code == 2
    assert "not a text file" in done.stderr
    assert not (tmp_path / "bundle.tar.gz").exists()


def test_names_that_everybody_has_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    monkeypatch.setattr(Path, "home", lambda: Path("/root"))
    assert Redactor.here()("root in /root") == "root in /root"
