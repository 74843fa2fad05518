"""``guestpv serve``: a device on a socket from start to signal, and every way not to get there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import guestpv
from guestpv.drivers.rng import Rng

Serve = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start ``guestpv serve`` with these words, in ``tmp_path``; killed with the test."""
    running: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "guestpv", "serve", *words]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON."""
    assert process.stdout is not None
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    assert answer["ok"]
    return answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal(serve: Serve, tmp_path: Path, number: signal.Signals) -> None:
    process = serve("vfio-user:rng.sock", "--device", "rng?packed=on", "--json")
    started = line(process)
    assert started["schema"] == "guestpv.serve/1"
    data = started["data"]
    path = tmp_path / "rng.sock"
    assert (data["socket"], data["type_name"], data["pid"]) == (str(path), "rng", process.pid)
    device = json.loads(data["qemu"][-1])
    assert (device["driver"], device["socket"]["path"]) == ("vfio-user-pci", str(path))
    with guestpv.open(f"vfio-user:{path}") as transport, Rng(transport) as rng:
        assert transport.has(34)
        assert len(rng.read(100)) == 100
    assert [line(process)["data"]["event"] for _ in range(2)] == ["a client came", "the client went"]
    process.send_signal(number)
    assert line(process)["data"]["event"] == f"ended by {number.name}"
    assert process.wait(60) == 0
    assert not path.exists()


def test_for_a_person_it_says_what_qemu_needs(serve: Serve, tmp_path: Path) -> None:
    process = serve("vfio-user:net.sock", "--device", "net")
    assert process.stdout is not None
    text = "".join(process.stdout.readline() for _ in range(3))
    assert f"Serving a virtio net device on {tmp_path}/net.sock." in text
    assert "-object memory-backend-memfd,id=ram,size=1G,share=on" in text
    assert '-device \'{"driver": "vfio-user-pci"' in text
    process.terminate()
    assert process.wait(60) == 0


def test_what_a_driver_breaks_is_told_at_once(serve: Serve, tmp_path: Path) -> None:
    process = serve("vfio-user:rng.sock", "--device", "rng", "--json")
    line(process)
    transport = guestpv.open(f"vfio-user:{tmp_path}/rng.sock")
    transport.write_status(2)
    assert line(process)["data"]["event"] == "a client came"
    assert "DRV-INIT-02" in line(process)["data"]["event"]
    transport.close()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["vfio-user:x.sock"], 2, "--device"),
        (["x.sock", "--device", "rng"], 2, "'x.sock' is not vfio-user:SOCKET"),
        (["vhost-net:x.sock", "--device", "rng"], 2, "is not vfio-user:SOCKET"),
        (["vfio-user:x.sock", "--device", "gpu"], 2, "no device type is called 'gpu'"),
        (["vfio-user:x.sock", "--device", "rng?speed=1"], 2, "unknown parameter speed"),
        (["vfio-user:x.sock", "--device", "blk?file=none.img"], 1, "none.img: No such file"),
        (["vfio-user:no/x.sock", "--device", "rng"], 2, "cannot listen: No such file"),
        (["vfio-user:", "--device", "rng"], 2, "a socket needs a path"),
    ],
)
def test_what_cannot_be_served(serve: Serve, words: list[str], code: int, text: str) -> None:
    process = serve(*words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert text in err
    assert out == ""
