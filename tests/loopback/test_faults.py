"""Every call of the operating system fails in turn while a service comes up, works and ends.

Whatever fails: the device is quiet afterwards, its memory is taken away, no descriptor, thread or link is
left, and the next start works.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.loopback import open_function
from guestpv.errors import GuestpvError
from guestpv.services import blk as blk_module
from guestpv.services.balloon import BalloonService
from guestpv.services.blk import BlkService
from guestpv.services.net import NetService
from guestpv.system import SYSTEM, System
from guestpv.transport.pci import PciTransport

from .test_restart import Kernel

RELEASING = ("close", "munmap")
"""What these give back is given back, whatever they say about it."""
ERRORS: dict[str, Callable[[], BaseException]] = {
    "EIO": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "ENOMEM": lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "Ctrl-C": KeyboardInterrupt,
}
MOST = 400


class Door:
    """The door to the operating system, of which call number ``fail_at`` fails."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: Callable[[], BaseException]
    ) -> None:
        self.calls: list[str] = []
        self._fail_at, self._error = fail_at, error
        self.open = True
        self._main = threading.get_ident()
        for name, method in vars(System).items():
            if callable(method) and not name.startswith("_"):
                monkeypatch.setattr(SYSTEM, name, self._guarded(name, getattr(SYSTEM, name)), raising=False)

    def _guarded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self.open or threading.get_ident() != self._main:
                return real(*arguments, **options)
            self.calls.append(name)
            if len(self.calls) - 1 != self._fail_at:
                return real(*arguments, **options)
            if name in RELEASING:
                real(*arguments, **options)
            raise self._error()

        return call


def net(function: SoftwareFunction) -> NetService:
    return NetService(PciTransport(function))


def blk(function: SoftwareFunction) -> BlkService:
    return BlkService(PciTransport(function), queues=1, restarts=True)


def balloon(function: SoftwareFunction) -> BalloonService:
    return BalloonService(PciTransport(function), keep_free=1 << 20, rate=1 << 40)


SERVICES: dict[str, tuple[Callable[[SoftwareFunction], Any], dict[str, str]]] = {
    "net": (net, {"peer": "sink"}),
    "blk": (blk, {"size": "1M"}),
    "balloon": (balloon, {"target": "512"}),
}


def life(function: SoftwareFunction, make: Callable[[SoftwareFunction], Any]) -> None:
    """Up, at work, restarted, down."""
    service = make(function)
    try:
        service.watch(0.02)
        service.restart()
        service.watch(0.02)
    finally:
        service.close()


def hang_up() -> None:
    """Close the kernel's ends of a disk's connections."""
    while Kernel.sockets:
        Kernel.sockets.pop().close()


def held() -> tuple[int, set[str], int]:
    """Descriptors, links and threads of this process."""
    links = {
        line.split(":")[0].strip() for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
    }
    return len(os.listdir("/proc/self/fd")), links, threading.active_count()


@pytest.mark.provokes("a service that fails half-way may leave its device without a word")
@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize("error", ERRORS)
def test_whatever_fails_nothing_is_left(
    own_network: None, monkeypatch: pytest.MonkeyPatch, name: str, error: str
) -> None:
    monkeypatch.setattr(blk_module, "Netlink", Kernel)
    monkeypatch.setattr(blk_module, "load_module", lambda: None)
    make, params = SERVICES[name]
    # Whatever is imported or opened once is there before anything is counted.
    life(open_function(name, {"threaded": "on", **params}), make)
    hang_up()
    before = held()
    number, survived, failed = 0, 0, []
    while number < MOST:
        function = open_function(name, {"threaded": "on", **params})
        with monkeypatch.context() as patch:
            door = Door(patch, number, ERRORS[error])
            try:
                life(function, make)
                survived += 1
            except (GuestpvError, OSError, KeyboardInterrupt, MemoryError):
                failed.append(door.calls[number])
            door.open = False
        hang_up()
        where = f"{error} at call {number}, {door.calls[number] if number < len(door.calls) else 'none'}"
        assert int(function.device.status) == 0, f"{where}: the device is not quiet"
        assert not any(queue.enabled for queue in function.device.queues), where
        deadline = time.monotonic() + 20
        while (now := held()) != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert now == before, where
        if number >= len(door.calls):
            break
        number += 1
    # How often it looks around depends on the time it is given.
    assert number >= len(door.calls) > 5, "the last one went through without a fault"
    assert failed, "some of them matter"
