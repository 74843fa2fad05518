"""Virtual machines for the tests: one shared boot per kernel, and fresh ones on demand.

GUESTPV_KERNELS names the kernels ("6.1 6.12" by default). What cannot be had fails the tests with its reason.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guestvm import HostFiles, LabError, Machine, accel, image, line, machine
from guestvm import kernel as kernels
from guestvm.progress import Progress

KERNELS = os.environ.get("GUESTPV_KERNELS", "6.1 6.12").split()
TEST_LIMIT = 900
"""Seconds for a test with the boots that it needs, on a machine that is slow and busy."""
MODERN = "disable-legacy=on,iommu_platform=on,ats=on"
once = pytest.mark.parametrize("kernel", KERNELS[-1:], indirect=True)
"""For what does not depend on the guest's kernel: the last one is enough."""

_unavailable: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A time limit for tests that have none of their own."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_LIMIT))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test: the first time takes longer than a test's own time limit."""
    if not any("kernel" in getattr(item, "fixturenames", ()) for item in session.items):
        return
    if session.config.option.collectonly:
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else ExitStack():
        for series in KERNELS:
            _prepare(series)


def _prepare(series: str) -> None:
    try:
        machine.require_qemu()
        source = kernels.get(series, Progress())
        image.root(source, Progress())
        image.initramfs(source)
        accel.choose(source, line.QEMU, Progress())
    except LabError as error:
        _unavailable[series] = str(error)


@pytest.fixture(scope="session", params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """The kernel series; every test that uses it, also through `vm` or `boot`, runs once per kernel."""
    series = str(request.param)
    if series not in KERNELS:
        _prepare(series)
    if series in _unavailable:
        pytest.fail(_unavailable[series], pytrace=False)
    return series


@pytest.fixture(scope="session")
def host_files() -> Iterator[HostFiles]:
    """8 MiB on the host's loopback; the shared machine's net0 reaches them at guestvm.hostfiles.GUEST_URL."""
    with HostFiles(8 << 20) as files:
        yield files


class Shared:
    """The machine that the tests of one kernel share; booted when first needed, and again after its death."""

    def __init__(self, kernel: str, files: HostFiles) -> None:
        self._kernel = kernel
        self._files = files
        self._machine: Machine | None = None

    def get(self) -> Machine:
        """A machine that is alive."""
        if self._machine is None or not self._machine.alive:
            self.stop(failed=True)
            fresh = Machine(
                self._kernel,
                devices=[
                    f"virtio-net-pci,id=net0,netdev=n0,{MODERN}",
                    f"virtio-rng-pci,id=rng0,{MODERN}",
                    f"virtio-blk-pci,id=blk0,drive=d0,{MODERN}",
                    f"virtio-balloon-pci,id=balloon0,{MODERN}",
                ],
                netdevs=[self._files.netdev("n0")],
                blockdevs=["driver=null-co,node-name=d0,size=67108864,read-zeroes=on"],
                limit=7200,
                warm=True,
            )
            fresh.start()
            self._machine = fresh
        return self._machine

    def stop(self, failed: bool) -> None:
        """End the machine, if there is one."""
        if self._machine is not None:
            self._machine.stop(failed)
            self._machine = None


@pytest.fixture(scope="session")
def _shared(kernel: str, host_files: HostFiles, request: pytest.FixtureRequest) -> Iterator[Shared]:
    shared = Shared(kernel, host_files)
    failed_before = request.session.testsfailed
    yield shared
    shared.stop(failed=request.session.testsfailed > failed_before)


@pytest.fixture
def vm(_shared: Shared) -> Machine:
    """The shared machine: net0, rng0, blk0 and balloon0 behind root ports and spare ports for plug().

    Leave it as you found it: functions with the kernel, nothing plugged, no process left.
    """
    return _shared.get()


@pytest.fixture
def boot(kernel: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Boots a machine of the test's own, with Machine's arguments; it ends with the test."""
    machines: list[Machine] = []

    def start(**arguments: Any) -> Machine:
        fresh = Machine(kernel, **arguments)
        machines.append(fresh)
        fresh.start()
        return fresh

    failed_before = request.session.testsfailed
    yield start
    for booted in machines:
        booted.stop(failed=request.session.testsfailed > failed_before)
