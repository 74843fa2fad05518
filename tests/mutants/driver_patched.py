"""Our own drivers with one function broken, in front of a scenario that shows it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from guestpv.conformance import catalogue
from guestpv.conformance.driver import run
from guestpv.conformance.driver.scenarios import SCENARIOS
from guestpv.drivers.blk import Blk
from guestpv.errors import DeviceViolation, GuestpvError
from guestpv.transport.interrupts import Fanout
from guestpv.virtqueue.observed import ObservedVirtqueue
from guestpv.virtqueue.queue import Virtqueue

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Patched:
    """A mutant: what it breaks, in which scenario of which device type, and how."""

    name: str
    breaks: frozenset[str]
    scenario: str
    kind: str
    patch: Patch

    def run(self, monkeypatch: pytest.MonkeyPatch) -> run.Run:
        """Break it, and drive."""
        with monkeypatch.context() as patch:
            self.patch(patch)
            wanted = list(catalogue.observable("driver"))
            # What never comes is not waited for long.
            scenario = replace(SCENARIOS[self.scenario], patience=0.5)
            return run.loopback(self.kind, {}, [scenario], wanted)


PATCHED: list[Patched] = []


def patched(*breaks: str, scenario: str, kind: str = "rng") -> Callable[[Patch], Patch]:
    """Register a mutant."""

    def register(patch: Patch) -> Patch:
        PATCHED.append(Patched(f"{patch.__name__}[{scenario}]", frozenset(breaks), scenario, kind, patch))
        return patch

    return register


completions = Virtqueue.completions


def lengths_halved(patch: pytest.MonkeyPatch) -> None:
    def taken(queue: Any) -> Iterator[tuple[int, int]]:
        for token, length in completions(queue):
            yield token, length // 2

    patch.setattr(ObservedVirtqueue, "completions", taken)


def first_in_first_out(patch: pytest.MonkeyPatch) -> None:
    """Takes any completion for the oldest buffer's."""

    def taken(queue: Any) -> Iterator[tuple[int, int]]:
        came = list(completions(queue))
        for token, (_, length) in zip(sorted(token for token, _ in came), came, strict=True):
            yield token, length

    patch.setattr(ObservedVirtqueue, "completions", taken)


def drops_the_last(patch: pytest.MonkeyPatch) -> None:
    def taken(queue: Any) -> Iterator[tuple[int, int]]:
        yield from list(completions(queue))[:-1]

    patch.setattr(ObservedVirtqueue, "completions", taken)


SPLIT, PACKED, BATCHES = "any-order-packed-off", "any-order-packed-on", "any-order-in-order-on"
patched("DRV-SPLIT-20", "DRV-SPLIT-51", "DRV-SPLIT-54", scenario=SPLIT)(lengths_halved)
patched("DRV-SPLIT-53", scenario=SPLIT)(first_in_first_out)
patched("DRV-PACKED-29", "DRV-PACKED-35", scenario=PACKED)(first_in_first_out)
patched("DRV-SPLIT-57", scenario=BATCHES)(drops_the_last)
patched("DRV-PACKED-39", scenario="any-order-packed-on-in-order-on")(drops_the_last)


def isr(keep: int) -> Patch:
    """Sees only some bits of the ISR."""

    def sees_only(patch: pytest.MonkeyPatch) -> None:
        whole = Fanout.intx
        patch.setattr(
            Fanout,
            "intx",
            lambda self, source, read, *rest: whole(self, source, lambda: read() & keep, *rest),
        )

    sees_only.__name__ = f"sees_only_isr_{keep}"
    return sees_only


def serves_one_of_those_that_share(patch: pytest.MonkeyPatch) -> None:
    share = Fanout.share
    patch.setattr(Fanout, "share", lambda self, source, sinks: share(self, source, Last(sinks)))


class Last:
    """A list of which only the last is seen."""

    def __init__(self, sinks: list[int]) -> None:
        self.sinks = sinks

    def __iter__(self) -> Iterator[int]:
        return iter(self.sinks[-1:])


patched("DRV-PCI-70", "DRV-PCI-71", "DRV-PCI-53", scenario="both-causes-intx", kind="blk")(isr(2))
patched("DRV-PCI-70", "DRV-PCI-71", "DRV-PCI-53", scenario="both-causes-intx", kind="blk")(isr(1))
patched("DRV-PCI-72", "DRV-PCI-53", scenario="both-causes-one-vector", kind="blk")(
    serves_one_of_those_that_share
)


@patched("DRV-SPLIT-52", scenario="long-run")
def counts_to_65536(patch: pytest.MonkeyPatch) -> None:
    taken_before = [0]

    def taken(queue: Any) -> Iterator[tuple[int, int]]:
        for item in completions(queue):
            taken_before[0] += 1
            if taken_before[0] <= 0x10000:
                yield item

    patch.setattr(Virtqueue, "completions", taken)


@patched("DRV-SPLIT-19", scenario="spurious-interrupts")
def every_interrupt_is_a_buffer(patch: pytest.MonkeyPatch) -> None:
    def taken(queue: Any) -> Iterator[tuple[int, int]]:
        came = list(completions(queue))
        with contextlib.suppress(BlockingIOError):
            if os.eventfd_read(queue.interrupt_fd) > len(came):
                raise DeviceViolation("an interrupt without a used buffer", where=queue.name)
        yield from came

    patch.setattr(Virtqueue, "completions", taken)


@patched("DRV-PACKED-36", "DRV-PACKED-37", scenario="spoiled-used-descriptors")
def minds_next_in_used_descriptors(patch: pytest.MonkeyPatch) -> None:
    def taken(queue: Any) -> Iterator[tuple[int, int]]:
        if any(queue.desc["flags"] & 1):
            raise DeviceViolation("a used descriptor has NEXT", where=queue.name)
        yield from completions(queue)

    patch.setattr(Virtqueue, "completions", taken)


@patched("DRV-BLK-59", scenario="plain", kind="blk")
def an_id_ends_with_a_nul(patch: pytest.MonkeyPatch) -> None:
    get_id = Blk.get_id
    patch.setattr(Blk, "get_id", lambda self, **how: get_id(self, **how)[:19])


@patched("DRV-BLK-52", scenario="plain", kind="blk")
def errors_are_swallowed(patch: pytest.MonkeyPatch) -> None:
    read = Blk.read

    def quietly(self: Blk, offset: int, length: int, **how: Any) -> Any:
        try:
            return read(self, offset, length, **how)
        except GuestpvError:
            return np.zeros(length, np.uint8)

    patch.setattr(Blk, "read", quietly)
