"""What the command line says when a device on a socket or in a QEMU cannot be had, and what to do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from guestpv.cli.main import main
from guestpv.serve.vfio_user import VfioUserServer, make_function
from peers import tree
from peers.backend import passt, storage_daemon

NULL = "driver=null-co,size=1048576,read-zeroes=on"
SLOW = ("--object", "throttle-group,id=slow,x-iops-total=50")
SLOW_NODE = "driver=throttle,throttle-group=slow,file.driver=null-co,file.size=16777216,file.read-zeroes=on"


def run(*arguments: str) -> Result:
    """One command; it must not end by an exception of its own."""
    done = CliRunner().invoke(main, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


@contextmanager
def talker(path: Path, answer: bytes) -> Iterator[None]:
    """Somebody who listens, says the same to everybody and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                with client:
                    if not client.recv(1):
                        return
                    client.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
        thread.join()


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("vhost-user:blk:{}", "start the back end first"),
        ("vfio-user:{}", "guestpv serve vfio-user:"),
        ("qtest:b0?join={}&qmp={}", "-qtest unix:"),
    ],
)
def test_a_socket_that_is_not_there(tmp_path: Path, spec: str, hint: str) -> None:
    path = tmp_path / "none"
    done = run("info", spec.format(path, path))
    assert done.exit_code == 1
    assert "there is no such socket" in done.output
    assert str(path) in done.output
    assert hint in done.output


@pytest.mark.parametrize("scheme", ["vhost-user:blk:", "vfio-user:"])
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n" * 8, b""], ids=["http", "silence"])
def test_somebody_who_speaks_something_else(tmp_path: Path, scheme: str, answer: bytes) -> None:
    path = tmp_path / "other"
    with talker(path, answer):
        done = run("info", f"{scheme}{path}")
    assert done.exit_code == 1
    assert scheme.split(":")[0] in done.output
    assert str(path) in done.output


def test_each_protocol_tells_the_other(tmp_path: Path) -> None:
    with VfioUserServer(make_function("rng"), str(tmp_path / "vfio")) as server:
        done = run("info", f"vhost-user:rng:{server.path}")
    assert done.exit_code == 1
    assert f"a vhost-user back end has to listen on {server.path}" in done.output
    with storage_daemon(tmp_path / "vhost", NULL) as backend:
        done = run("info", f"vfio-user:{backend.socket}")
    assert done.exit_code == 1
    assert "the peer does not speak vfio-user" in done.output


def test_a_back_end_that_lacks_what_a_disk_needs(tmp_path: Path) -> None:
    with passt(tmp_path / "passt", tree.get("peers")) as backend:
        done = run("blk", "info", f"vhost-user:blk:{backend.socket}")
    assert done.exit_code == 3
    assert "lacks the protocol feature CONFIG" in done.output
    assert "vhost-user-blk" in done.output


def test_a_feature_that_the_back_end_does_not_offer(tmp_path: Path) -> None:
    with storage_daemon(tmp_path / "disk", NULL) as backend:
        done = run(
            "blk", "bench", f"vhost-user:blk:{backend.socket}?features=%2Bring_packed", "--seconds", "0.1"
        )
    assert done.exit_code == 3
    assert "the device does not offer RING_PACKED" in done.output


@pytest.mark.parametrize("more", [(), ("--poll",)], ids=["interrupts", "poll"])
def test_a_back_end_that_dies_in_use(tmp_path: Path, more: tuple[str, ...]) -> None:
    with storage_daemon(tmp_path / "disk", SLOW_NODE, options=SLOW) as backend:
        death = threading.Timer(0.5, backend.kill)
        death.start()
        done = run("blk", "bench", f"vhost-user:blk:{backend.socket}", "--seconds", "3000", *more)
        death.join()
    assert done.exit_code == 1
    assert "the back end closed the connection" in done.output or "nobody listens" in done.output
    assert "start the back end again" in done.output or "start it again" in done.output


@pytest.mark.parametrize(
    ("spec", "status", "words"),
    [
        ("virtio-rng-pci?qemu=/nonexistent", 2, ["there is no /nonexistent", "apt install qemu-system-x86"]),
        ("virtio-rng-pci,speed=9", 2, ["refused its options", "Property 'virtio-rng-pci.speed' not found"]),
        ("virtio-blk-pci?blockdev=driver=file,filename=/nonexistent", 2, ["Could not open '/nonexistent'"]),
        ("virtio-rng-pci?accel=kvm", 3, ["with KVM", "accel=tcg"]),
    ],
)
def test_qemu_s_own_words(spec: str, status: int, words: list[str]) -> None:
    done = run("info", f"qtest:{spec}")
    assert done.exit_code == status
    for word in words:
        assert word in done.output


def test_a_qemu_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "qemu"
    old.write_text("#!/bin/sh\necho QEMU emulator version 5.2.0\n")
    old.chmod(0o755)
    done = run("info", f"qtest:virtio-rng-pci?qemu={old}")
    assert done.exit_code == 3
    assert "QEMU 5.2.0 is too old; 7.2 is the oldest that works" in done.output
    assert "?qemu=" in done.output
