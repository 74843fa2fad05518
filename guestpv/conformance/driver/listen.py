"""The strict device on a socket, for drivers that are not ours: each life of the driver is a scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...devices.device import Device
from ...devices.function import SoftwareFunction
from ...devices.loopback import SWITCHES
from ...spec.status import Status
from .rules import SIGHTS, Watch
from .run import Run
from .scenarios import Scenario, calm


class Lives:
    """Watches a served device, and goes on to the next scenario whenever the driver gave the device back.

    A driver gives it back by a reset after it set DRIVER_OK or FAILED: unbind and bind it in the guest to
    go on. The next scenario is set up at the reset after that one, with which the next life begins, so that
    nothing changes while the driver takes the former life's setup down. After the last scenario the device
    is an ordinary one.

    Args:
        device: what is served.
        function: the PCI function round it, if it is one.
        scheme: how the driver reaches it.
        scenarios: in this order.
        run: gathers what they say.
        tell: called when a scenario begins.
        done: called when the last one is over.
    """

    def __init__(
        self,
        device: Device,
        function: SoftwareFunction | None,
        scheme: str,
        scenarios: Sequence[Scenario],
        run: Run,
        tell: Callable[[str], None],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self._device = device
        self._function = function
        self._sees = SIGHTS[scheme]
        self._left = list(scenarios)
        self._run = run
        self._tell = tell
        self._done = done
        self._offered = device.offered
        self._lived = False
        self._name = ""
        self._scenario: Scenario | None = None
        self._begin()
        self._set_up()
        self._stop = device.journal.observe(self._see)

    def _begin(self) -> None:
        self._lived = False
        self.watch = Watch(self._device, self._function, self._sees)
        if self._function is not None:
            calm(self._function, self._offered)
        self._scenario = self._left.pop(0) if self._left else None
        self._name = self._scenario.name if self._scenario else "afterwards"

    def _set_up(self) -> None:
        scenario, self._scenario = self._scenario, None
        if scenario is None:
            return
        for name, value in scenario.params.items():
            bit = 1 << SWITCHES[name]
            offered = self._device.offered
            self._device.offered = offered | bit if value == "on" else offered & ~bit
        scenario.set_up(self.watch)
        self._tell(f"scenario {scenario.name}: {scenario.title}")

    def _see(self, event: object, subject: object) -> None:
        kind, name = getattr(event, "kind", ""), getattr(event, "name", "")
        if kind == "write" and name == "device_status":
            self._lived |= bool(getattr(event, "value", 0) & (Status.DRIVER_OK | Status.FAILED))
        elif kind == "reset" and name == "device_status":
            self._device.executor.post(self._next if self._lived else self._set_up)
            self._lived = False

    def _next(self) -> None:
        last = not self._left
        self._run.take(self._name, self.watch)
        self._begin()
        if last:
            self._done()

    def finish(self) -> None:
        """No driver comes any more."""
        self._stop()
        with self._device.executor:
            self.watch.settle()
            self._run.take(self._name, self.watch)
