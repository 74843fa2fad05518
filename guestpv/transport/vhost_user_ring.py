"""A virtqueue and the eventfds that it shares with a vhost-user back end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from ..memory import DmaPool
from ..system import SYSTEM
from ..virtqueue.kick import Kick
from ..virtqueue.queue import Virtqueue

FRESH_PACKED_BASE: Final = 1 << 15 | 1 << 31
"""SET_VRING_BASE of a fresh packed ring: both offsets 0, both wrap counters 1."""

LOOK: Final = 0.1
"""Seconds between two looks at the back end's health by a queue without an interrupt."""


def fresh_base(queue: Virtqueue) -> int:
    """SET_VRING_BASE of a ring that nobody has used yet."""
    return FRESH_PACKED_BASE if queue.packed else 0


def used_base(queue: Virtqueue) -> int:
    """SET_VRING_BASE of a ring whose completions were all taken; the back end knows what is in flight."""
    if queue.packed:
        return queue.used_position << 16 | queue.used_position
    return int(queue.device["idx"])


class PolledQueue(Virtqueue):
    """A queue without an interrupt, whose waiters look now and then whether the back end is alive."""

    def wait(self, timeout: float | None, spin_us: int = 50) -> bool:
        """As ``Virtqueue.wait``; raises what ``acknowledge`` raises."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = LOOK if deadline is None else max(0.0, deadline - time.monotonic())
            if super().wait(min(left, LOOK), spin_us):
                return True
            if self.acknowledge is not None:
                self.acknowledge()
            if left < LOOK:
                return False
            spin_us = 0


@dataclass(slots=True)
class Ring:
    """A queue and what it shares with the back end.

    Attributes:
        kick, call, error: eventfds.
        base: where the back end begins.
        started: whether the back end has all it needs to use the ring.
        enabled: whether it may (SET_VRING_ENABLE).
    """

    queue: Virtqueue
    kick: int
    call: int
    error: int
    base: int
    started: bool = False
    enabled: bool = False

    @classmethod
    def make(
        cls,
        index: int,
        size: int,
        features: int,
        pool: DmaPool,
        name: str,
        check: Callable[[], None],
        *,
        kind: type[Virtqueue],
        polled: bool,
    ) -> Self:
        """A fresh ring.

        Args:
            check: called by waiters; raises once the back end is gone.
            kind: class of the queue.
            polled: it has no interrupt.
        """
        with contextlib.ExitStack() as undo:
            fds = []
            for _ in range(3):
                fds.append(SYSTEM.eventfd())
                undo.callback(SYSTEM.close, fds[-1])
            kick, call, error = fds
            queue = kind(
                index,
                size,
                features,
                pool,
                Kick.eventfd(kick),
                interrupt_fd=None if polled else call,
                acknowledge=check,
                name=name,
            )
            undo.pop_all()
        return cls(queue, kick, call, error, fresh_base(queue))

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick, self.call, self.error):
            SYSTEM.close(fd)
