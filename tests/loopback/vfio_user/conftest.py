"""A server with one of our models, and clients of it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestpv.errors import DeviceGone
from guestpv.pci.vfio_user import Session
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.wire.vfio_user import (
    Channel,
)

from .kit import PAGE, Script, Serve


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Put a device on a socket, ``server.path``; at the end no driver may have broken a rule."""
    servers: list[VfioUserServer] = []
    unclean: set[VfioUserServer] = set()

    def run(device: str = "rng", *, findings: bool = False, **options: Any) -> VfioUserServer:
        path = str(tmp_path / f"{len(servers)}.sock")
        servers.append(VfioUserServer(make_function(device), path, **options).start())
        if findings:
            unclean.add(servers[-1])
        return servers[-1]

    yield run
    for server in servers:
        server.close()
        assert not os.path.exists(server.path)
        if server not in unclean:
            assert [str(finding) for finding in server.function.findings] == []


@pytest.fixture
def raw(serve: Serve) -> Iterator[Session]:
    session = Session(serve("rng", findings=True).path, 60)
    yield session
    session.close()


@pytest.fixture
def memory() -> Iterator[int]:
    """A memfd of 16 pages."""
    fd = os.memfd_create("guestpv-test-memory")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[[Script], str]]:
    """A server of the test's own: the script answers each message, until it returns False."""
    threads: list[threading.Thread] = []
    failures: list[BaseException] = []

    def run(script: Script) -> str:
        path = str(tmp_path / "scripted.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        listener.settimeout(60)

        def answer() -> None:
            try:
                with listener:
                    channel = Channel(listener.accept()[0], "scripted", 60)
                while script(channel, channel.receive()):
                    pass
                channel.close()
            except DeviceGone:
                pass
            except BaseException as error:
                failures.append(error)

        threads.append(threading.Thread(target=answer, daemon=True))
        threads[-1].start()
        return path

    yield run
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures
