"""What broken devices need: hands on the ring of a queue, once it is enabled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.ring import Chain

from .device import replace

Change = Callable[[Any, Any], object]
"""Gets the ring and its ``DeviceQueue``."""


def on_enable(function: SoftwareFunction, change: Change) -> None:
    """Break the ring of each queue when it is enabled."""

    def make(inner: Any) -> Any:
        def enable(queue: Any) -> None:
            inner(queue)
            if queue.ring is not None:
                change(queue.ring, queue)

        return enable

    replace(function.device, "enable_queue", make)


def on_pop(function: SoftwareFunction, look: Callable[[Any, Chain], object]) -> None:
    """Let ``look(ring, chain)`` see each chain that was taken, before the model does."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def pop() -> Chain | None:
                chain: Chain | None = inner()
                if chain is not None:
                    look(ring, chain)
                return chain

            return pop

        replace(ring, "pop", make)

    on_enable(function, change)


def on_push(function: SoftwareFunction, length: Callable[[Any, Chain, int], int]) -> None:
    """Let ``length(ring, chain, length)`` say which used length is told."""

    def change(ring: Any, _: Any) -> None:
        replace(ring, "push", lambda inner: lambda chain, told: inner(chain, length(ring, chain, told)))

    on_enable(function, change)


def after_write(function: SoftwareFunction, act: Change) -> None:
    """Do something whenever used elements were written."""

    def change(ring: Any, queue: Any) -> None:
        def make(inner: Any) -> Any:
            def write(staged: Any) -> bool:
                wanted: bool = inner(staged)
                act(ring, queue)
                return wanted

            return write

        replace(ring, "_write", make)

    on_enable(function, change)


def interrupts(function: SoftwareFunction, wanted: Callable[[Any, int], bool]) -> None:
    """Let ``wanted(ring, old position)`` decide about used buffer notifications."""

    def change(ring: Any, _: Any) -> None:
        ring._wants_interrupt = lambda old: wanted(ring, old)

    on_enable(function, change)


def writable_area(queue: Any, address: int, size: int) -> memoryview:
    """Memory that only the driver may write, with the right to do so."""
    view: memoryview = queue.owner.memory.view(address, size, write=True)
    return view
