"""``guestpv balloon`` on the command line, with our own device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Verb = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where sockets go: a socket's path has 107 bytes at most, so no long test name is part of it."""
    return tmp_path_factory.mktemp("b") / "run"


@pytest.fixture
def environment(runtime: Path) -> dict[str, str]:
    """Sockets, locks and logs in a directory of the test's own."""
    directory = runtime
    directory.mkdir(mode=0o700)
    return {**os.environ, "RUNTIME_DIRECTORY": str(directory)}


@pytest.fixture
def balloon(environment: dict[str, str]) -> Iterator[Verb]:
    """Runs ``guestpv balloon WORDS``; what is still up afterwards is ended."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "guestpv", "balloon", *words]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    yield run
    run("down", "--all")


def data(done: subprocess.CompletedProcess[str]) -> Any:
    """The data of the last line of JSON, which reports success."""
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["ok"], answer
    return answer["data"]


def test_up_status_down(balloon: Verb, runtime: Path) -> None:
    assert balloon("status").stdout == "Nothing is up. (guestpv balloon up)\n"
    up = data(balloon("up", "loopback:balloon?target=2560", "--detach", "--json"))
    assert up["target_pages"] == 2560
    assert {"STATS_VQ", "DEFLATE_ON_OOM", "PAGE_REPORTING"} <= set(up["features"])
    assert Path(f"/proc/{up['pid']}/oom_score_adj").read_text().strip() == "1000"
    deadline = time.monotonic() + 120
    while (one := data(balloon("status", "--json"))[0])["pages"] != 2560:
        assert time.monotonic() < deadline, one
    assert one["pool"]["bytes"] == (one["pages"] + one["free_pages"]) * 4096
    shown = balloon("status", "-v").stdout
    assert "10.0 MiB of 10.0 MiB wanted; the host sees 10.0 MiB" in shown
    assert "balloon at its target, 10 MiB" in shown
    assert "balloon at its target, 10 MiB" in Path(up["log"]).read_text()
    assert [data(balloon("status", name, "--json"))[0]["pid"] for name in (one["function"], one["spec"])] == [
        up["pid"]
    ] * 2
    assert balloon("down").stdout == "the balloon is down.\n"
    assert balloon("status").stdout.startswith("Nothing is up.")
    assert list((runtime / "balloon").glob("*.sock")) == []


def test_without_leave_to_deflate_the_process_is_no_preferred_victim(balloon: Verb) -> None:
    up = data(balloon("up", "loopback:balloon?offer=-deflate_on_oom", "--detach", "--json"))
    before = Path("/proc/self/oom_score_adj").read_text()
    assert Path(f"/proc/{up['pid']}/oom_score_adj").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(environment: dict[str, str], number: signal.Signals) -> None:
    command = [sys.executable, "-m", "guestpv", "balloon", "up", "loopback:balloon?target=1000"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ctrl-C takes all memory back" in line:
                break
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert f"going down: {number.name}" in rest


def test_a_second_one_of_the_same_name_is_refused(balloon: Verb) -> None:
    pid = data(balloon("up", "loopback:balloon", "--detach", "--json"))["pid"]
    again = balloon("up", "loopback:balloon", "--detach")
    assert again.returncode == 2
    assert f"is up already, in process {pid}" in again.stderr


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["up", "loopback:rng"], 2, "it is a virtio rng device, no memory balloon"),
        (["up", "loopback:balloon", "--rate", "fast"], 2, "'fast' is no amount of memory, such as 256M"),
        (["up", "loopback:balloon", "--rate", "4K", "--keep-free", "-1"], 2, "'-1' is no amount"),
        (["up", "loopback:balloon", "--rate", "1K"], 2, "less than a page a second"),
        (["up", "loopback:balloon", "--features", "+bogus"], 2, "no feature is called 'bogus'"),
        (["up", "loopback:balloon?offer=-stats_vq", "--features", "+stats_vq"], 3, "does not offer STATS_VQ"),
        (["up", "loopback:balloon?translated=on"], 3, "page number 0"),
        (["up", "loopback:balloon?translated=on", "--detach"], 3, "page number 0"),
        (["status", "0000:77:00.0"], 2, "0000:77:00.0 is not up"),
        (["down"], 2, "nothing is up"),
    ],
)
def test_bad_input(balloon: Verb, words: list[str], status: int, says: str) -> None:
    done = balloon(*words, "--json")
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert (done.returncode, says in error["message"]) == (status, True), error
    assert error["hint"] or "no memory balloon" in says
