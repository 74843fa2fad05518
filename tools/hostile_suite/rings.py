"""Ring level, in one process: every completion is a fault, and the queue is set up anew when it broke."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from guestpv.devices.loopback import open_function
from guestpv.errors import DeviceViolation, GuestpvError
from guestpv.spec import features as ft
from guestpv.transport.pci import PciTransport
from guestpv.virtqueue.queue import Virtqueue

from .faults import Hostile, formats

SIZE = 16
ROOM = 64
BURST = 12


class Rings:
    """One queue of an entropy device that is hostile in every answer."""

    def __init__(self, params: dict[str, str], seed: int) -> None:
        self.function = open_function("rng", {"queue_size": str(SIZE), "msix": "off", **params})
        self.hostile = Hostile(self.function, seed, 100, burst=BURST)
        self.transport = PciTransport(self.function)
        self.transport.mode = "poll"
        self.breaks: Counter[str] = Counter()
        self.survived = 0
        self.queue = self._begin()
        self.buffers = [self.transport.pool.allocate(ROOM) for _ in range(SIZE)]

    def _begin(self) -> Virtqueue:
        self.transport.negotiate(0)
        queue = self.transport.make_queue(0)
        self.transport.driver_ok()
        return queue

    def round(self) -> None:
        """A few buffers out, whatever comes back in, and the queue anew where it broke."""
        choose, queue = self.hostile.choose, self.queue
        out: dict[int, int] = {}
        try:
            for buffer in self.buffers[: choose.randrange(1, 5)]:
                size = choose.randrange(1, ROOM)
                if queue.free_slots < 2:
                    break
                out[queue.add(writable=[buffer[:size]])] = size
            queue.publish()
            for token, length in queue.completions():
                if token not in out:
                    raise AssertionError(f"token {token:#x} came back, out are {sorted(out)}")
                if not 0 <= length <= out.pop(token):
                    raise AssertionError(f"a used length of {length}")
            if queue.free_slots + 1 < SIZE - len(out):
                raise AssertionError(f"{queue.free_slots} slots are free, {len(out)} buffers are out")
            self.transport.check_live()
            if out:
                # What the device keeps for ever only a reset brings back.
                self._anew("kept")
            else:
                self.survived += 1
        except DeviceViolation as violation:
            self._anew(violation.requirement or violation.section or "other")

    def _anew(self, why: str) -> None:
        self.breaks[why] += 1
        transport = self.transport
        if transport.has(ft.F_RING_RESET) and not int(transport.status) & 64:
            transport.reset_queue(0)
            self.queue = transport.make_queue(0)
        else:
            self.queue = self._begin()

    def close(self) -> None:
        """Give everything back."""
        self.transport.close()


def run(faults: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """So many faults, spread over the ring formats.

    Raises:
        AssertionError: the driver took what it should not have.
        GuestpvError: it did not get over a fault.
    """
    started, total = time.monotonic(), Counter[str]()
    breaks, rounds, survived = Counter[str](), 0, 0
    variants = formats()
    for number, params in enumerate(variants):
        rings = Rings(params, seed + number)
        share = faults * (number + 1) // len(variants)
        try:
            while total.total() + rings.hostile.done.total() < share:
                rings.round()
                rounds += 1
        except GuestpvError as error:
            raise AssertionError(f"{params}, round {rounds}: {error}") from error
        finally:
            rings.close()
        total += rings.hostile.done
        breaks += rings.breaks
        survived += rings.survived
        say(f"{params or 'split'}: {total.total()} faults, {time.monotonic() - started:.0f} s")
    return {
        "faults": total.total(),
        "kinds": dict(sorted(total.items())),
        "broke the queue": dict(breaks.most_common()),
        "survived without a reset": survived,
        "rounds": rounds,
        "seconds": round(time.monotonic() - started, 1),
    }
