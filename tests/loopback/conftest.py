"""Every device of the loopback tier is a strict one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guestpv.conformance.driver import rulebook  # noqa: F401 - it registers every rule
from guestpv.conformance.driver.rules import SIGHTS, Watch
from guestpv.devices.function import SoftwareFunction
from guestpv.serve.vhost_user import VhostUserServer


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a driver breaks in front of a device fails the test.

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
