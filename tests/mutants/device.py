"""Broken devices: our own device half with one mistake each.

``@mutant("DEV-...", ...)`` names the requirements that the mistake breaks. The function gets the opened
``SoftwareFunction`` before anything looks at it, and breaks it; its docstring says how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guestpv.conformance.bench import Peer
from guestpv.devices.function import SoftwareFunction

Break = Callable[[SoftwareFunction], object]

MUTANTS: list[Peer] = []


def mutant(*breaks: str, spec: str = "loopback:blk?packed=on") -> Callable[[Break], Break]:
    """Register a broken device.

    Args:
        breaks: requirements; each of them has to be caught by one of its checks.
        spec: the device that is broken.
    """

    def register(prepare: Break) -> Break:
        name = prepare.__name__  # type: ignore[attr-defined]
        MUTANTS.append(Peer(spec, name, prepare, breaks))  # type: ignore[arg-type]
        return prepare

    return register


def replace(thing: Any, method: str, make: Callable[[Any], Any]) -> None:
    """Replace a method of an object by ``make(the method)``."""
    setattr(thing, method, make(getattr(thing, method)))


@mutant("DEV-RESET-01", "DEV-PCI-22")
def never_leaves_reset(function: SoftwareFunction) -> None:
    """device_status keeps what it was."""
    function.registers.reset_reads = 1 << 60


@mutant("DEV-STATUS-01")
def runs_before_driver_ok(function: SoftwareFunction) -> None:
    """Buffers are used as soon as their queue is enabled."""
    device = function.device

    def enable_queue(inner: Any) -> Any:
        def enable(queue: Any) -> None:
            inner(queue)
            device.running = True

        return enable

    def kick(inner: Any) -> Any:
        def always(index: int, data: int | None = None) -> None:
            inner(index, data)
            device._serve(device.queues[index])

        return always

    replace(device, "enable_queue", enable_queue)
    replace(device, "kick", kick)
