"""What the tests of the device models share."""

from __future__ import annotations

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.model import Model
from guestpv.devices.scripted import ScriptedDriver
from guestpv.spec import features as ft
from guestpv.spec.status import Status

V1 = ft.mask((ft.F_VERSION_1, ft.F_ACCESS_PLATFORM))


class Bench:
    def __init__(self, model: Model, **options: bool) -> None:
        self.function = SoftwareFunction(model, name="test", **options)
        self.driver = ScriptedDriver(self.function)

    @property
    def rules(self) -> list[str]:
        return [finding.requirement for finding in self.function.findings]

    @property
    def broken(self) -> bool:
        return bool(self.function.device.status & Status.NEEDS_RESET)
