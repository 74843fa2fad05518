"""``net up``'s own driver before the strict device, in every scenario."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from guestpv.conformance import catalogue
from guestpv.conformance.driver import rulebook  # noqa: F401 - it registers every rule
from guestpv.conformance.driver.rules import Watch
from guestpv.conformance.driver.scenarios import Scenario, choose
from guestpv.conformance.verdict import Verdict
from guestpv.devices.loopback import open_function
from guestpv.errors import GuestpvError
from guestpv.services.net import NetService
from guestpv.transport.pci import PciTransport

WANTED = list(catalogue.observable("driver"))
PATIENCE = 60.0
OUTGOING = 4
FRAMES = [
    b"\xff" * 6 + b"\x52\x54\0\0\0\1" + b"\x88\xb5" + bytes([number]) * length
    for number, length in enumerate((46, 60, 46, 50, 60))
]

pytestmark = [pytest.mark.usefixtures("own_network"), pytest.mark.timeout(600)]


def exchange(service: NetService) -> None:
    """Send frames through the link to a device that sends them back."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as link:
        link.bind(("pv0", 0x88B5))
        link.settimeout(0.01)
        for frame in FRAMES:
            link.send(frame)
            deadline = time.monotonic() + PATIENCE
            while True:
                assert time.monotonic() < deadline, "a frame did not come back"
                service.watch(0.01)
                with contextlib.suppress(TimeoutError):
                    data, address = link.recvfrom(1 << 16)
                    if address[2] != OUTGOING:
                        assert data == frame
                        break


@pytest.mark.parametrize("scenario", choose("all", "net"), ids=lambda scenario: scenario.name)
def test_net_up_breaks_no_rule(scenario: Scenario) -> None:
    function = open_function("net", {"threaded": "on", "peer": "echo"} | scenario.params)
    if scenario.looks is not None:
        function.present(scenario.looks)
    watch = Watch.over(function)
    scenario.set_up(watch)
    gave_up = contextlib.suppress(GuestpvError) if scenario.fails else contextlib.nullcontext()
    try:
        with gave_up, contextlib.closing(NetService(PciTransport(function))) as service:
            if not scenario.fails:
                exchange(service)
    finally:
        watch.finish()
        function.close()
    failed = [r.requirement for r in watch.results(WANTED) if r.verdict is Verdict.FAIL]
    assert failed == [], "\n".join(map(str, watch.findings))
    assert [str(finding) for finding in watch.findings if not finding.requirement] == []
