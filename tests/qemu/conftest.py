"""Real QEMU devices without a guest: a fresh QEMU per case, ended by its pid whatever happens.

``GUESTPV_QEMU=/path/to/qemu-system-x86_64 pytest tests/qemu`` runs them on another QEMU.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from guestpv import opener
from guestpv.pci.qemu import DEFAULT_EXECUTABLE
from guestpv.pci.qtest import QtestFunction, open_function
from guestpv.pci.qtest_machine import QtestMachine
from guestpv.spec.features import feature_bit
from guestpv.spec.status import Status
from guestpv.transport.pci import PciTransport

EXECUTABLE = os.environ.get("GUESTPV_QEMU", DEFAULT_EXECUTABLE)
CASE_LIMIT = 900
"""Seconds a case may take; most take a tenth of one, the first with peers downloads them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/qemu/" in item.path.as_posix():
            item.add_marker(pytest.mark.timeout(CASE_LIMIT))


@pytest.fixture(autouse=True)
def qemu_is_there() -> None:
    """Without QEMU the tier fails and says why."""
    if shutil.which(EXECUTABLE) is None:
        pytest.fail(f"{EXECUTABLE} is missing: apt install qemu-system-x86", pytrace=False)


@pytest.fixture
def launch() -> Iterator[Callable[..., QtestMachine]]:
    """Start machines with the arguments of ``QtestMachine``; they end with the case."""
    machines: list[QtestMachine] = []

    def start(*devices: str, **options: Any) -> QtestMachine:
        machines.append(QtestMachine(devices, **{"executable": EXECUTABLE} | options))
        return machines[-1]

    yield start
    for machine in machines:
        machine.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., QtestFunction]]:
    """``open_function`` with parameters as keywords; what it opens ends with the case."""
    functions: list[QtestFunction] = []

    def start(body: str, **params: str) -> QtestFunction:
        functions.append(open_function(body, {"qemu": EXECUTABLE} | params))
        return functions[-1]

    yield start
    for function in functions:
        function.close()


@pytest.fixture
def device() -> Iterator[Callable[..., PciTransport]]:
    """``guestpv.open`` of a ``qtest:`` specification; the device's QEMU id is ``dev``."""
    transports: list[PciTransport] = []

    def start(body: str, **params: str) -> PciTransport:
        spec = f"qtest:{quote(f'{body},id=dev')}?{urlencode({'qemu': EXECUTABLE} | params)}"
        transport = opener.open(spec)
        assert isinstance(transport, PciTransport)
        transports.append(transport)
        return transport

    yield start
    for transport in transports:
        transport.close()


class Oracle:
    """What QEMU itself thinks of a device: an opinion that owes nothing to our registers and rings."""

    def __init__(self, transport: PciTransport) -> None:
        assert isinstance(transport.function, QtestFunction)
        self._qmp = transport.function.machine.qemu.qmp
        self._device_type = transport.device_type
        self._path = {"path": "/machine/peripheral/dev/virtio-backend"}

    def _device(self) -> dict[str, Any]:
        status: dict[str, Any] = self._qmp.execute("x-query-virtio-status", self._path)
        return status

    @property
    def features(self) -> int:
        """Features that the driver accepted, as a mask."""
        said = self._device()["guest-features"]
        mask: int = said.get("unknown-dev-features", 0)
        for line in said["transports"] + said["dev-features"]:
            mask |= 1 << feature_bit(self._device_type, line.split(":")[0])
        return mask

    @property
    def status(self) -> Status:
        """The device status field."""
        status = Status(0)
        for line in self._device()["status"]["statuses"]:
            status |= Status[line.split(":")[0].removeprefix("VIRTIO_CONFIG_S_")]
        return status

    @property
    def broken(self) -> bool:
        """Whether the device gave up on its driver."""
        return bool(self._device()["broken"])

    def queue(self, index: int) -> dict[str, Any]:
        """One virtqueue: ``vring-num``, ``vring-desc``, ``used-idx``, ``inuse``, ..."""
        queue: dict[str, Any] = self._qmp.execute(
            "x-query-virtio-queue-status", {**self._path, "queue": index}
        )
        return queue


@pytest.fixture
def oracle() -> Callable[[PciTransport], Oracle]:
    """QEMU's own view of a transport opened by ``device``."""
    return Oracle


class Wire:
    """The other end of a network device's cable: a datagram is a frame.

    Attributes:
        netdev: QEMU's ``-netdev`` option for the device's end.
    """

    def __init__(self, directory: Path) -> None:
        theirs, ours = directory / "device", directory / "wire"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(ours))
        self._socket.settimeout(60.0)
        self._theirs = str(theirs)
        self.netdev = f"dgram,local.type=unix,local.path={theirs},remote.type=unix,remote.path={ours},id=net"

    def send(self, frame: bytes) -> None:
        """Put a frame on the cable."""
        self._socket.sendto(frame, self._theirs)

    def receive(self) -> bytes:
        """The next frame from the device, which has to come within a minute."""
        return self._socket.recv(1 << 17)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    """A cable for ``netdev=wire.netdev``."""
    cable = Wire(tmp_path)
    yield cable
    cable.close()
