"""What the tests of the software function share."""

from __future__ import annotations

import os

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.scripted import ScriptedDriver
from guestpv.spec import features as ft

V1 = ft.mask((ft.F_VERSION_1, ft.F_ACCESS_PLATFORM))


class Bench:
    def __init__(self, function: SoftwareFunction) -> None:
        self.function = function
        self.device = function.device
        self.driver = ScriptedDriver(function)

    @property
    def rules(self) -> list[str]:
        return [finding.requirement for finding in self.function.findings]


def fired(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
