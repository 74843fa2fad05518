"""``guestpv net up`` over passt: a network on a plain machine, with no VM at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peers import tree
from peers.backend import PASST_ADDRESS, PASST_GATEWAY, Backend, passt

GPV = f"{sys.executable} -m guestpv"
UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
PORT = 8080
UNBUFFERED = os.environ | {"PYTHONUNBUFFERED": "1"}
DATA = hashlib.sha256(b"guestpv").digest() * (4 << 15)
"""4 MiB."""
FETCH = f"""
import hashlib, urllib.request
with urllib.request.urlopen("http://{PASST_GATEWAY}:{PORT}/data", timeout=120) as answer:
    print(hashlib.sha256(answer.read()).hexdigest())
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Backend]:
    """A passt with a web server on the loopback of its namespace."""
    (tmp_path / "data").write_bytes(DATA)
    with passt(tmp_path / "passt.sock", tree.get("peers")) as backend, web_server(backend, tmp_path):
        yield backend


def inside(process: int) -> list[str]:
    """A command that runs in the namespaces of a process."""
    command = ["nsenter", f"--target={process}", "--net"]
    return command if os.geteuid() == 0 else [*command, "--user", "--preserve-credentials"]


@contextmanager
def web_server(backend: Backend, directory: Path) -> Iterator[None]:
    command = [*inside(backend.pid), sys.executable, "-m", "http.server", str(PORT), "--bind", "127.0.0.1"]
    with subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=UNBUFFERED
    ) as server:
        try:
            assert server.stdout is not None
            assert b"Serving" in server.stdout.readline()
            yield
        finally:
            server.kill()


@pytest.mark.parametrize("options", ["", "--poll"], ids=["interrupts", "poll"])
def test_a_download_over_tcp_is_whole(network: Backend, tmp_path: Path, options: str) -> None:
    """passt leaves TCP checksums to DATA_VALID; a kernel drops such frames unless told what is open."""
    script = (
        f"{GPV} net up vhost-user:net:{network.socket} --detach {options} && ip -4 address show pv0 && "
        f"{sys.executable} -c '{FETCH}'; status=$?; {GPV} net down; exit $status"
    )
    done = subprocess.run(
        [*UNSHARE, "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ
        | {
            "RUNTIME_DIRECTORY": str(tmp_path / "run"),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert PASST_ADDRESS in done.stdout
    assert hashlib.sha256(DATA).hexdigest() in done.stdout


def test_a_network_that_ends_in_use_is_said(network: Backend, tmp_path: Path) -> None:
    """The link goes, and the reason with what to do stays; frames in flight are lost, as on any cable."""
    command = [*UNSHARE, sys.executable, "-m", "guestpv", "net", "up", f"vhost-user:net:{network.socket}"]
    environment = UNBUFFERED | {
        "RUNTIME_DIRECTORY": str(tmp_path / "run"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as link:
        assert link.stdout is not None
        said = ""
        while PASST_ADDRESS not in said:
            line = link.stdout.readline()
            assert line, said
            said += line
        network.kill()
        said += link.communicate(timeout=120)[0]
    assert link.returncode == 1, said
    assert "the back end closed the connection" in said
    assert str(network.socket) in said
    assert "start the back end again" in said


def test_a_network_that_comes_back_is_taken_again(network: Backend, tmp_path: Path) -> None:
    """With --restart the link, with its address, outlives the back end."""
    command = [*UNSHARE, sys.executable, "-m", "guestpv", "net", "up", f"vhost-user:net:{network.socket}"]
    environment = UNBUFFERED | {
        "RUNTIME_DIRECTORY": str(tmp_path / "run"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    said = ""
    with subprocess.Popen(
        [*command, "--restart"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as link:

        def hear(words: str) -> None:
            nonlocal said
            assert link.stdout is not None
            while words not in said:
                line = link.stdout.readline()
                assert line, said
                said += line

        try:
            hear("Up. Ctrl-C")
            network.kill()
            hear("restart 1: ")
            network.start()
            hear("the device was reset and goes on")
            with web_server(network, tmp_path):
                fetch = [*inside(link.pid), sys.executable, "-c", FETCH]
                fetched = subprocess.run(fetch, capture_output=True, text=True, timeout=600)
            assert fetched.stdout.strip() == hashlib.sha256(DATA).hexdigest(), fetched.stderr
        finally:
            link.terminate()
            said += link.communicate(timeout=120)[0]
    assert link.returncode == 0, said
