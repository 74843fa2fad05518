"""``guestpv conform device``, and the pytest plugin behind it, on our own device half."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from guestpv.conformance import runner
from guestpv.conformance.verdict import Verdict
from guestpv.errors import UsageError

WRONG = "loopback:rng?offer=%2B20"
"""A device that offers a feature bit which its type does not have: one check fails, and no other."""
FAILING = "test_features.py::test_undefined_features_are_not_offered[device]"
LIMIT = 240


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # The suite runs pytest itself: what belongs to the pytest around it must not reach it.
    inside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=inside, cwd=cwd)


def conform(*words: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "guestpv", "conform", "device", *words)


def report(*words: str) -> dict[str, Any]:
    done = conform(*words, "--json")
    assert done.stdout, done.stderr
    line = json.loads(done.stdout)
    assert line["schema"] == "guestpv.conform-device/1"
    data: dict[str, Any] = line["data"]
    assert data["ok"] == (done.returncode == 0)
    return data


@pytest.mark.parametrize(
    "spec",
    [
        "loopback:rng",
        "loopback:blk?packed=on&in_order=on",
        "loopback:net?packed=on&notification_data=on&multiplier=0&pairs=2&mtu=1400&offer=%2Brss,%2Bhash_report",
        "loopback:balloon?packed=on",
    ],
)
def test_our_own_devices_are_in_order(spec: str) -> None:
    data = report(spec, "--hostile")
    bad = [o for o in data["outcomes"] if o["verdict"] not in ("PASS", "REJECT", "SKIP", "NOT_OBSERVABLE")]
    assert bad == []
    assert data["ok"]
    assert data["counts"]["PASS"] > 50
    assert all(o["seen"] for o in data["outcomes"] if o["verdict"] != "PASS"), "a verdict without a reason"


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ("conventional=1&max_open=3&max_active=4&granularity=1K&read_only_zones=1&offline_zones=1", 30),
        ("max_append=0&size_max=4096&seg_max=4&packed=on", 50),
        ("aware=on", 15),
    ],
)
def test_our_own_zoned_disks_are_in_order(options: str, passed: int) -> None:
    data = report(f"loopback:blk?size=1M&zoned=64K&{options}", "--hostile", "--select", "DEV-BLK")
    assert [o for o in data["outcomes"] if o["verdict"] not in ("PASS", "SKIP")] == []
    assert data["counts"]["PASS"] >= passed


def test_a_fault_is_reported_in_every_form(tmp_path: Path) -> None:
    junit, page = tmp_path / "out.xml", tmp_path / "out.html"
    done = conform(WRONG, "--select", "DEV-FEAT", "--junit", str(junit), "--html", str(page))
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout
    assert "bits [20] are offered" in done.stdout
    assert "section 2.2" in done.stdout
    suite = ElementTree.parse(junit).getroot()[0]
    assert suite.attrib["failures"] == "1"
    (failure,) = suite.iter("failure")
    assert "bits [20] are offered" in failure.attrib["message"]
    html = page.read_text()
    assert 'data-verdict="FAIL"' in html
    assert "DEV-FEAT-04" in html

    # The report's own command shows it again, and nothing else.
    (outcome,) = (o for o in report(WRONG, "--select", "DEV-FEAT")["outcomes"] if o["verdict"] == "FAIL")
    assert outcome["check"] == FAILING
    assert outcome["severity"] == "major"
    program, *words = shlex.split(outcome["reproduce"])
    assert program == "guestpv"
    again = run(sys.executable, "-m", "guestpv", *words, "--json")
    assert again.returncode == 1
    assert [o["verdict"] for o in json.loads(again.stdout)["data"]["outcomes"]] == ["FAIL"]


def test_checks_are_chosen_by_requirement_and_by_shard() -> None:
    chosen = report("loopback:rng", "--select", "DEV-RESET,DEV-STATUS-0[56]")
    ids = {id for o in chosen["outcomes"] for id in o["requirements"]}
    assert {"DEV-RESET-01", "DEV-STATUS-05"} <= ids
    assert not any(id.startswith(("DEV-FEAT", "DEV-STATUS-01")) for id in ids)
    part = report("loopback:rng", "--select", "DEV-RESET,DEV-STATUS-0[56]", "--shard", "2/2")
    assert [o["check"] for o in part["outcomes"]] == [o["check"] for o in chosen["outcomes"]][1::2]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["loopback:rng", "--select", "DEV-NONSENSE"], "no requirement matches"),
        (["loopback:rng", "--shard", "3/2"], "not a part"),
        (["loopback:rng", "--select", "DEV-BLK-07"], "no check was selected"),
        (["loopback:nothing"], "no device type is called"),
        (["nothing"], "neither a PCI address"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], complaint: str) -> None:
    done = conform(*words)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_device_that_cannot_be_driven_is_told_of() -> None:
    done = conform("loopback:rng?translated=on&offer=-access_platform", "--select", "DEV-STATUS-05")
    assert done.returncode == 1
    assert "ACCESS_PLATFORM" in done.stderr


def test_each_job_has_a_device_of_its_own(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"disk{number}").write_bytes(bytes(1 << 20))
    spec = f"loopback:blk?file={tmp_path}/disk{{job}}"
    select = ("--select", "DEV-RESET,DEV-STATUS")
    two = [o["check"] for o in report(spec, *select, "--jobs", "2")["outcomes"]]
    assert two == [o["check"] for o in report(spec, *select)["outcomes"]]
    (tmp_path / "disk1").unlink()
    done = conform(spec, *select, "--jobs", "2")
    assert done.returncode == 1
    assert "the checks could not run" in done.stderr
    assert "{job}" in done.stderr
    done = conform("loopback:rng", "--html", str(tmp_path / "nowhere" / "out.html"))
    assert done.returncode == 2
    assert "no such directory" in done.stderr


def test_without_pytest_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        runner.run("loopback:rng")
    assert "guestpv[conformance]" in caught.value.hint


def test_without_hostile_nothing_malformed_is_sent() -> None:
    verdicts = {o["check"]: o for o in report("loopback:rng", "--select", "DEV-STATUS-04")["outcomes"]}
    assert {o["verdict"] for o in verdicts.values()} == {"SKIP"}
    assert all("--hostile" in o["seen"] for o in verdicts.values())


OWN = '''
import pytest


@pytest.mark.requirement("DEV-SPLIT-01")
@pytest.mark.device("rng")
def test_own(queue, case):
    """What a user wants to know."""
    buffer = queue.buffer(8)
    assert queue.run(writable=[buffer]) <= 8


@pytest.mark.device("net")
def test_for_another_device(rig):
    raise AssertionError
'''


def test_pytest_runs_the_suite_and_a_users_own_checks(tmp_path: Path) -> None:
    suite = ("--pyargs", "guestpv.conformance.device")
    done = run(
        *(sys.executable, "-m", "pytest", "-q", "-n", "2", *suite, "--device", WRONG, "--select", "DEV-FEAT"),
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    assert "bits [20] are offered" in done.stdout
    (tmp_path / "test_own.py").write_text(OWN)
    done = run(sys.executable, "-m", "pytest", "-q", "--device", "loopback:rng", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


WEDGE = """
import sys
from guestpv.conformance import plugin, runner
from guestpv.conformance.bench import Peer


def prepare(function):
    def need_reset(inner=function.device.need_reset):
        function.registers.reset_reads = 1 << 60
        inner()
    function.device.need_reset = need_reset


class Broken:
    def pytest_configure(self, config):
        config.stash[plugin.PEERS] = [Peer("loopback:rng", "wedges", prepare)]
    pytest_configure.pytest_impl = {"trylast": True}


for outcome in runner.run("loopback:rng", select="DEV-STATUS,DEV-RESET", hostile=True, plugins=[Broken()]):
    print(outcome.verdict, outcome.severity, outcome.check)
"""


def test_a_wedged_device_costs_one_case() -> None:
    """A device that does not come back once it was broken is replaced, and the rest of the run goes on."""
    done = run(sys.executable, "-c", WEDGE)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    lost = {check.partition("[")[0] for verdict, _, check in lines if verdict == Verdict.WEDGED}
    assert lost == {"test_status.py::test_needs_reset_is_a_configuration_change"}
    assert all(severity == "critical" for verdict, severity, _ in lines if verdict == Verdict.WEDGED)
    assert {verdict for verdict, _, _ in lines} <= {"PASS", "REJECT", "SKIP", "WEDGED"}
