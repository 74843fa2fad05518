"""The control socket, and running in the background."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestpv.errors import GuestpvError, Refused, TimeLimit, UsageError
from guestpv.services import control
from guestpv.services.control import ControlServer, Detached, ask, endpoints, find


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def woken() -> list[int]:
    return []


@pytest.fixture
def server(runtime: Path, woken: list[int]) -> Iterator[ControlServer]:
    status = {"pid": os.getpid(), "name": "pv0", "function": "0000:01:00.0", "spec": "vfio:0000:01:00.0"}
    with ControlServer(str(runtime), lambda: status, lambda: woken.append(1)) as running:
        yield running


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_status_over_the_socket(server: ControlServer, runtime: Path) -> None:
    path = server.listen("pv0")
    assert ask(path, "status", 60)["function"] == "0000:01:00.0"
    assert [endpoint.name for endpoint in endpoints(str(runtime))] == ["pv0"]
    assert not server.down_requested


def test_only_the_owner_gets_in(
    server: ControlServer, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = server.listen("pv0")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(entry.name for entry in runtime.iterdir()) == ["pv0.sock"]
    peer = (0).to_bytes(4, "little") + (4711).to_bytes(4, "little") + bytes(4)
    monkeypatch.setattr(
        control.struct, "unpack", lambda form, data: (1, int.from_bytes(peer[4:8], "little"), 1)
    )
    with pytest.raises(GuestpvError, match="hung up"):
        ask(path, "status", 60)


@pytest.mark.parametrize("name", ["pv0", "0000:01:00.0", "vfio:0000:01:00.0"])
def test_finding_by_name_address_or_spec(server: ControlServer, runtime: Path, name: str) -> None:
    server.listen("pv0")
    assert [endpoint.name for endpoint in find(str(runtime), name)] == ["pv0"]


def test_finding_what_is_not_there(server: ControlServer, runtime: Path) -> None:
    assert find(str(runtime), None) == []
    with pytest.raises(UsageError) as caught:
        find(str(runtime), "nbd1", "blk")
    assert caught.value.hint == "nothing is up: guestpv blk up"
    with pytest.raises(UsageError, match="pv1 is not up") as caught:
        find(str(runtime), "pv1")
    assert "nothing is up" in caught.value.hint
    server.listen("pv0")
    with pytest.raises(UsageError) as caught:
        find(str(runtime), "pv1")
    assert caught.value.hint == "up are: pv0"


def test_down_is_answered_when_it_is_over(server: ControlServer, woken: list[int]) -> None:
    path = server.listen("pv0")
    answers: list[dict[str, Any]] = []
    client = threading.Thread(target=lambda: answers.append(ask(path, "down", 60)))
    client.start()
    eventually(lambda: server.down_requested)
    assert woken
    time.sleep(0.05)
    assert answers == []
    server.farewell = {"driver": "virtio-pci"}
    server.close()
    client.join(60)
    assert answers == [{"driver": "virtio-pci"}]
    assert not path.exists()


def test_stale_sockets_are_removed(runtime: Path, server: ControlServer) -> None:
    stale = runtime / "pv0.sock"
    socket.socket(socket.AF_UNIX).bind(str(stale))
    assert endpoints(str(runtime)) == []
    assert not stale.exists()
    socket.socket(socket.AF_UNIX).bind(str(stale))
    server.listen("pv0")
    assert [endpoint.name for endpoint in endpoints(str(runtime))] == ["pv0"]


def test_a_name_that_is_taken_is_refused(server: ControlServer, runtime: Path) -> None:
    server.listen("pv0")
    with (
        ControlServer(str(runtime), dict, lambda: None) as second,
        pytest.raises(UsageError, match=f"pv0 is up already, in process {os.getpid()}") as caught,
    ):
        second.listen("pv0")
    assert caught.value.hint == "guestpv net status"
    assert [endpoint.name for endpoint in endpoints(str(runtime))] == ["pv0"]
    assert len(list(runtime.iterdir())) == 1


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with (
        ControlServer(str(long), dict, lambda: None) as server,
        pytest.raises(UsageError, match="a socket's path has at most 107 bytes") as caught,
    ):
        server.listen("pv0")
    assert "RUNTIME_DIRECTORY" in caught.value.hint
    assert list(long.iterdir()) == []


@pytest.mark.parametrize(
    ("request_line", "error"),
    [
        (b"nonsense\n", "a request is"),
        (b"[1]\n", "a request is"),
        (b'{"command": "dance"}\n', "unknown command 'dance'"),
    ],
)
def test_nonsense_is_answered_and_harmless(server: ControlServer, request_line: bytes, error: str) -> None:
    path = server.listen("pv0")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(request_line + b'{"command": "status"}\n')
        answers = control.lines(client)
        first = json.loads(next(answers))
        assert first["ok"] is False
        assert error in first["error"]
        assert json.loads(next(answers))["ok"] is True


def test_a_line_without_end_is_cut_off(server: ControlServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LINE_LIMIT", 1000)
    path = server.listen("pv0")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.settimeout(60)
        client.sendall(b"x" * 2000)
        assert client.recv(10) == b""


def test_a_client_that_says_nothing_holds_nobody_up(server: ControlServer) -> None:
    path = server.listen("pv0")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        assert ask(path, "status", 60)["name"] == "pv0"


def test_a_status_that_fails_is_said(runtime: Path) -> None:
    def status() -> dict[str, Any]:
        raise ValueError("no counters")

    with ControlServer(str(runtime), status, lambda: None) as server:
        server.listen("pv0")
        (endpoint,) = endpoints(str(runtime))
        assert "no counters" in endpoint.status["error"]


def test_no_answer_in_time(server: ControlServer) -> None:
    path = server.listen("pv0")
    with pytest.raises(TimeLimit, match=r"no answer to down within 0.1 s"):
        ask(path, "down", 0.1)


# In the background.


Ready = Callable[[dict[str, Any]], None]


def detach(run: Callable[[Ready], None], meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What came up in the background."""
    came: list[dict[str, Any]] = []

    def up(data: dict[str, Any]) -> None:
        meanwhile()
        came.append(data)

    control.detach(run, up)
    return came[0]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    done, _ = os.waitpid(pid, os.WNOHANG)
    return done == pid


def test_detach_returns_what_is_up(tmp_path: Path) -> None:
    release = tmp_path / "release"
    os.mkfifo(release)

    def run(ready: Ready) -> None:
        ready({"pid": os.getpid(), "session": os.getsid(0), "cwd": os.getcwd()})
        release.read_text()

    data = detach(run)
    assert data["pid"] != os.getpid()
    assert data["session"] == data["pid"]
    assert data["cwd"] == "/"
    assert not gone(data["pid"])
    release.write_text("")
    assert os.waitpid(data["pid"], 0) == (data["pid"], 0)


def test_detach_passes_the_error_on() -> None:
    def run(ready: Ready) -> None:
        raise Refused("in use", where="0000:01:00.0", hint="--force")

    with pytest.raises(Detached) as caught:
        detach(run)
    error = caught.value
    assert (error.message, error.where, error.hint) == ("in use", "0000:01:00.0", "--force")
    assert (error.code, error.exit_status) == ("refused", 3)


def test_detach_passes_a_defect_on() -> None:
    def run(ready: Ready) -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(Detached, match="ZeroDivisionError: oops"):
        detach(run)


def test_a_background_process_that_dies_is_noticed() -> None:
    def run(ready: Ready) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(GuestpvError, match="ended before it was up"):
        detach(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting_ends_the_other_process_first(number: signal.Signals) -> None:
    def run(ready: Ready) -> None:
        came: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
        os.kill(os.getppid(), number)
        eventually(lambda: bool(came))
        raise GuestpvError("stopped and tidied up")

    before = signal.getsignal(number)
    with pytest.raises(Detached, match="stopped and tidied up"):
        detach(run)
    assert signal.getsignal(number) == before


def test_a_signal_that_another_thread_takes_right_after_the_fork_is_forwarded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork = os.fork

    def fork_and_be_signalled() -> int:
        child = fork()
        if child:
            os.kill(os.getpid(), signal.SIGINT)
        return child

    def run(ready: Ready) -> None:
        signal.pause()

    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    monkeypatch.setattr(os, "fork", fork_and_be_signalled)
    try:
        with pytest.raises(GuestpvError, match="ended before it was up"):
            detach(run)
    finally:
        over.set()
        other.join()


def test_what_goes_wrong_later_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def run(ready: Ready) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        ready({"pid": os.getpid()})
        raise Refused("later")

    pid = detach(run)["pid"]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert json.loads(log.read_text())["error"]["message"] == "later"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_once_it_is_up_changes_nothing(tmp_path: Path, number: signal.Signals) -> None:
    release = tmp_path / "release"
    os.mkfifo(release)

    def run(ready: Ready) -> None:
        ready({"pid": os.getpid()})
        release.read_text()

    pid = detach(run, lambda: signal.raise_signal(number))["pid"]
    assert not gone(pid)
    release.write_text("")
    assert os.waitpid(pid, 0) == (pid, 0)
