"""A bench on which drivers make one mistake each, under the strict observer.

A mutant is a function that drives ``Bench`` rightly except for one thing, under the requirements that this
breaks; a healthy walk is one without a mistake, for what the package's own drivers do not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guestpv.conformance.driver import rulebook  # noqa: F401 - it registers every rule
from guestpv.conformance.driver.rules import Watch
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.looks import Looks
from guestpv.devices.loopback import open_function
from guestpv.devices.scripted import RawQueue, ScriptedDriver
from guestpv.opener import Spec
from guestpv.spec import features as ft

V1 = ft.mask((ft.F_VERSION_1, ft.F_ACCESS_PLATFORM))


class Bench:
    """A software function, its watch, and a driver by hand.

    Attributes:
        function, device, model, watch: the strict device.
        driver: registers and rings by hand; made when first used, as it looks at the capabilities.
    """

    def __init__(self, spec: str, looks: Looks | None = None) -> None:
        parsed = Spec.parse(f"loopback:{spec}")
        self.function: SoftwareFunction = open_function(parsed.body, parsed.params)
        if looks is not None:
            self.function.present(looks)
        self.device = self.function.device
        self.model: Any = self.device.model
        self.watch = Watch.over(self.function)
        self._driver: ScriptedDriver | None = None

    @property
    def driver(self) -> ScriptedDriver:
        if self._driver is None:
            self._driver = ScriptedDriver(self.function)
        return self._driver

    @property
    def must(self) -> int:
        """Features that every driver accepts here."""
        return V1 & self.device.offered

    def start(
        self, features: int = 0, sizes: dict[int, int] | None = None, offer: bool = True
    ) -> list[RawQueue]:
        """Negotiate VERSION_1, what the device requires and ``features``, which it is made to offer."""
        if offer:
            self.device.offered |= features
        return self.driver.start(self.must | features, dict(sizes or {0: 8}))

    def one(self, queue: RawQueue, length: int = 16, kick: bool = True, **how: Any) -> int:
        """Make a device-writable buffer available; returns head or buffer id."""
        head = queue.add([], [queue.buffer(length)], **how)
        if kick:
            queue.kick()
        return head

    def store(self, queue: RawQueue, area: str, offset: int, width: int, value: int) -> None:
        """Store to ring memory so that the observer sees it, as it sees those of the observing build."""
        from guestpv.devices.evidence import Event

        start = getattr(queue.layout, area).offset + offset
        self.function.journal.record(Event("store", area, offset, width, value, queue.index))
        queue.memory.array[start : start + width] = list(value.to_bytes(width, "little"))

    def finish(self) -> None:
        """The driver leaves as it should: it resets the device and waits."""
        if self._driver is not None:
            self._driver.reset()
        self.watch.finish()

    @property
    def broken(self) -> set[str]:
        """Requirements that were seen broken."""
        return {finding.requirement for finding in self.function.findings}


@dataclass(frozen=True)
class Walk:
    """A driver by hand: a mutant, or, without ``breaks``, a healthy one.

    Attributes:
        breaks: requirements that its one mistake breaks, all of them.
        spec: the device, as behind ``loopback:``.
        looks: how the function presents itself.
    """

    name: str
    breaks: frozenset[str]
    body: Callable[[Bench], object]
    spec: str = "rng"
    looks: Looks | None = None

    def run(self) -> Bench:
        """Drive, leave, and give back what was seen."""
        bench = Bench(self.spec, self.looks)
        try:
            self.body(bench)
            bench.finish()
        finally:
            bench.watch.finish()
            bench.function.close()
        return bench


WALKS: list[Walk] = []


def mutant(
    *breaks: str, spec: str = "rng", looks: Looks | None = None
) -> Callable[[Callable[[Bench], object]], Callable[[Bench], object]]:
    """Register a walk with one mistake, under the requirements that it breaks."""

    def register(body: Callable[[Bench], object]) -> Callable[[Bench], object]:
        name = (
            f"{body.__name__}[{spec}]" if any(walk.name == body.__name__ for walk in WALKS) else body.__name__
        )
        WALKS.append(Walk(name, frozenset(breaks), body, spec, looks))
        return body

    return register


def healthy(
    spec: str = "rng", looks: Looks | None = None
) -> Callable[[Callable[[Bench], object]], Callable[[Bench], object]]:
    """Register a walk without a mistake."""
    return mutant(spec=spec, looks=looks)
