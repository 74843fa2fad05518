"""``guestpv conform driver``: our drivers in this process, and any driver through a socket."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import guestpv
from guestpv.cli.main import main
from guestpv.conformance import catalogue
from guestpv.conformance.driver.listen import Lives
from guestpv.conformance.driver.run import Run
from guestpv.conformance.driver.scenarios import RING_FEATURES, choose, pairwise
from guestpv.conformance.verdict import Outcome, Verdict
from guestpv.devices.loopback import make_model
from guestpv.drivers.blk import Blk
from guestpv.drivers.rng import Rng
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.serve.vhost_user import VhostUserServer

WANTED = list(catalogue.observable("driver"))
PATIENCE = 60.0
Serve = Callable[..., tuple[str, Lives, Run]]


def by_id(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {outcome.requirements[0]: outcome for outcome in outcomes if outcome.requirements}


def run(*words: str) -> tuple[int, dict[str, object]]:
    done = CliRunner().invoke(main, ["conform", "driver", *words, "--json"])
    return done.exit_code, json.loads(done.output.splitlines()[-1])


def test_our_own_driver_is_judged(tmp_path: Path) -> None:
    xml, page = tmp_path / "x.xml", tmp_path / "x.html"
    code, said = run(
        "loopback:blk",
        "--scenario",
        "plain,slow-reset",
        "--select",
        "DRV-INIT",
        "--junit",
        str(xml),
        "--html",
        str(page),
    )
    assert code == 0
    data = said["data"]
    assert isinstance(data, dict)
    assert data["requirements"]["DRV-INIT-08"] == "PASS"
    assert set(data["requirements"]) == {name for name in WANTED if name.startswith("DRV-INIT")}
    assert len(ElementTree.parse(xml).findall(".//testcase")) == len(data["outcomes"])
    assert "DRV-INIT-08" in page.read_text()


def test_tap_is_printed_instead_of_text() -> None:
    done = CliRunner().invoke(
        main, ["conform", "driver", "loopback:rng", "--select", "DRV-INIT", "--tap", "-"]
    )
    first, plan, *points = done.output.splitlines()
    assert (first, plan) == ("TAP version 14", f"1..{len(points)}")
    assert any(point.startswith("ok ") and "DRV-INIT-08" in point for point in points)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ((), "loopback:TYPE"),
        (("loopback:rng", "--listen", "vfio-user:/x"), "loopback:TYPE"),
        (("loopback:gpu",), "names no device"),
        (("loopback:rng", "--scenario", "dance"), "no scenario"),
        (("loopback:rng", "--select", "DRV-DANCE"), "no requirement"),
        (("--listen", "carrier:pigeon", "--device", "rng"), "is not"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], hint: str) -> None:
    code, said = run(*words)
    assert code == 2
    error = said["error"]
    assert isinstance(error, dict)
    assert hint in error["message"]


def test_the_scenarios_are_listed() -> None:
    done = CliRunner().invoke(main, ["conform", "driver", "loopback:net", "--scenario", "list"])
    assert "needs-reset" in done.output


def test_every_pair_of_switches_meets() -> None:
    rows = list(pairwise(RING_FEATURES))
    for one in RING_FEATURES:
        for other in RING_FEATURES:
            if one != other:
                assert {(row[one], row[other]) for row in rows} == {
                    (a, b) for a in ("on", "off") for b in ("on", "off")
                }
    assert len(rows) <= 12


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serve]:
    """A strict entropy device behind vfio-user."""
    with contextlib.ExitStack() as stack:

        def serve(names: str) -> tuple[str, Lives, Run]:
            server = VfioUserServer(make_function("rng"), str(tmp_path / "s"))
            result = Run(WANTED)
            chosen = [scenario for scenario in choose(names, "rng") if scenario.served]
            lives = Lives(
                server.function.device, server.function, "vfio-user", chosen, result, lambda text: None
            )
            stack.enter_context(server)
            return server.path, lives, result

        yield serve


def test_a_driver_behind_a_socket_goes_through_scenarios_life_by_life(served: Serve) -> None:
    path, lives, result = served("plain,features-1,slow-reset")
    with guestpv.open(f"vfio-user:{path}") as transport:
        for _ in range(3):
            assert len(Rng(transport).read(16, PATIENCE)) == 16
            transport.reset()
    lives.finish()
    found = by_id(result.outcomes())
    assert [name for name, outcome in found.items() if outcome.bad] == []
    assert found["DRV-INIT-08"].verdict is Verdict.PASS
    assert found["DRV-PACKED-24"].verdict is Verdict.PASS, "features-1 has packed rings"
    assert found["DRV-SPLIT-32"].verdict is Verdict.NOT_OBSERVABLE
    assert "sampled" in found["DRV-SPLIT-32"].seen
    assert [name for name, _ in result.results["DRV-INIT-08"]][:3] == ["plain", "features-1", "slow-reset"]


@pytest.mark.provokes("a status that is not")
def test_a_breach_behind_a_socket_is_told_with_its_evidence(
    served: Callable[..., tuple[str, Lives, Run]],
) -> None:
    path, lives, result = served("plain")
    with guestpv.open(f"vfio-user:{path}") as transport:
        transport.write_status(1)
        transport.write_status(1 | 32)
    lives.finish()
    outcome = by_id(result.outcomes())["DRV-STATUS-05"]
    assert outcome.verdict is Verdict.FAIL
    assert outcome.sent == "scenario plain"
    assert "device_status" in outcome.evidence[-1]
    assert outcome.section.startswith("2.1")


def test_a_vhost_user_front_end_is_judged_by_its_rings(tmp_path: Path) -> None:
    server = VhostUserServer(make_model("blk", {"size": "1M"}), str(tmp_path / "s"))
    result = Run(WANTED)
    lives = Lives(server.device, None, "vhost-user", choose("plain", "blk"), result, lambda text: None)
    with server, guestpv.open(f"vhost-user:blk:{server.path}") as transport, Blk(transport) as disk:
        disk.write(0, bytes(4096))
        assert not disk.read(0, 4096).any()
    lives.finish()
    found = by_id(result.outcomes())
    assert [name for name, outcome in found.items() if outcome.bad] == []
    assert found["DRV-SPLIT-40"].verdict is Verdict.PASS
    assert found["DRV-STATUS-01"].verdict is Verdict.NOT_OBSERVABLE


def test_the_command_serves_until_the_last_scenario_is_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    words = ["--listen", f"vfio-user:{path}", "--device", "rng", "--once", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "guestpv", "conform", "driver", *words], stdout=subprocess.PIPE, text=True
    ) as server:
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.01)
        with guestpv.open(f"vfio-user:{path}") as transport, Rng(transport) as rng:
            assert len(rng.read(16, PATIENCE)) == 16
        said, _ = server.communicate(timeout=PATIENCE)
    assert server.returncode == 0
    lines = [json.loads(line) for line in said.splitlines()]
    assert any("vfio-user-pci" in str(line["data"].get("event")) for line in lines)
    assert lines[-1]["data"]["requirements"]["DRV-INIT-01"] == "PASS"
    assert not path.exists()
