"""Which tests run on the same worker, and what several tiers need."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from coverage import Coverage
from hypothesis import settings

from guestpv.conformance.driver import rulebook  # noqa: F401 - it registers every rule
from guestpv.conformance.driver.rules import SIGHTS, Watch
from guestpv.devices.function import SoftwareFunction
from guestpv.serve.vhost_user import VhostUserServer
from guestvm import network

# A failure is seen by who made it, not by who comes after. GUESTPV_RANDOM=1 looks further.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("random")
settings.load_profile("random" if os.environ.get("GUESTPV_RANDOM") else "fixed")

SHARE_A_MACHINE = {"test_crash.py", "test_lab.py", "test_net_up.py", "test_vfio.py", "test_worlds.py"}
"""Files of the guest tier whose tests share one virtual machine for each kernel."""
LARGE = {
    "tests/loopback/test_conform_device.py",
    "tests/loopback/test_restart.py",
    "tests/loopback/test_vhost_user.py",
    "tests/loopback/test_worlds.py",
}
"""Files so long that their tests are handed out one by one: they share nothing."""
KERNEL = re.compile(r"\[(?:.*?-)?(6\.\d+)(?:-.*)?\]$")


def group(nodeid: str) -> str:
    """What stays together: a file, as its tests share what is dear to set up; for guests, a kernel's part.

    In ``tests/qemu/test_worlds.py`` it is a world; its name follows that of the body.
    """
    file = nodeid.split("::")[0]
    if file in LARGE:
        return nodeid
    if file == "tests/qemu/test_worlds.py":
        return f"{file} {nodeid.partition('[')[2].partition('-')[2]}"
    if not file.startswith("tests/guest/"):
        return file
    kernel = KERNEL.search(nodeid)
    name = "tests/guest" if file.rpartition("/")[2] in SHARE_A_MACHINE else file
    return f"{name} {kernel[1] if kernel else ''}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``--dist loadscope``: groups, handed out in the order of the command line."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where other processes and emulated machines take part, a test that failed is tried once more.

    The host's other work may starve them. What needed a second try is counted in the closing line and
    listed by ``-rR``; code in one process gets none.
    """
    for item in items:
        if not item.nodeid.startswith("tests/unit/"):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Coverage is that of unit and loopback: Python 3.11 takes half as long again to count lines.

    pytest-cov has a mark for this, which stops one of the two countings that a worker of xdist has.
    """
    paused: list[Coverage] = []
    if item.nodeid.startswith(("tests/qemu/", "tests/guest/")):
        while counting := Coverage.current():
            counting.stop()
            paused.append(counting)
    try:
        return (yield)
    finally:
        for counting in reversed(paused):
            counting.start()


@pytest.fixture
def own_network() -> Iterator[None]:
    """A network namespace of the test's own, for the thread that runs it and those it starts."""
    with network.own_network():
        yield


@pytest.fixture
def strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a driver breaks in front of a software device fails the test: whatever it does on ``loopback:``.

    A test that breaks rules on purpose says so with ``@pytest.mark.provokes(reason)``.
    """
    if request.node.get_closest_marker("provokes"):
        yield
        return
    watches: list[Watch] = []

    def watched(kind: Any, watch: Callable[[Any], Watch]) -> None:
        make = kind.__init__

        def init(self: Any, *words: Any, **named: Any) -> None:
            make(self, *words, **named)
            watches.append(watch(self))

        monkeypatch.setattr(kind, "__init__", init)

    watched(SoftwareFunction, Watch.over)
    watched(VhostUserServer, lambda server: Watch(server.device, None, SIGHTS["vhost-user"]))
    yield
    for watch in watches:
        watch.finish()
    broken = [str(finding) for watch in watches for finding in watch.findings if finding.requirement]
    assert broken == []
