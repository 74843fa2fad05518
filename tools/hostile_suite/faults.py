"""What a hostile device does to what it shares with a driver, one fault at a time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.packed import PackedRing
from guestpv.devices.ring import Chain, Used
from guestpv.devices.split import SplitRing

Fault = Callable[["Hostile", Any, Any, list[Used]], object]
"""Gets the device, a ring, its queue, and what is, or was just, shown as used."""

BEFORE: Final[dict[str, Fault]] = {}
"""Faults in what is about to be shown: lengths, and the buffers themselves."""
AFTER: Final[dict[str, Fault]] = {}
"""Faults once it was shown."""


def fault(stage: dict[str, Fault]) -> Callable[[Fault], Fault]:
    """Register a fault under its name."""

    def register(act: Fault) -> Fault:
        stage[act.__name__] = act  # type: ignore[attr-defined]
        return act

    return register


def area(queue: Any, ring: Any, which: int) -> memoryview:
    """The descriptor, driver or device area, with the right to write to it."""
    address = (queue.desc, queue.driver, queue.device)[which]
    view: memoryview = queue.owner.memory.view(address, len(ring.areas[which]), write=True)
    return view


@fault(BEFORE)
def length_over(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """More was written than there is room for."""
    used = staged[-1]
    room = used.chains[-1].writable_bytes
    staged[-1] = Used(used.chains, it.choose.choice((room + 1, room + 4096, 0x7FFFFFFF, 0xFFFFFFFF)))


@fault(BEFORE)
def length_short(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """Less was written than should be, or nothing."""
    used = staged[-1]
    staged[-1] = Used(used.chains, it.choose.randrange(max(1, used.length)))


@fault(BEFORE)
def last_byte(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """The last byte of a buffer, a disk's status, is nonsense."""
    chain = staged[-1].chains[-1]
    if chain.writable:
        chain.writable[-1][-1] = it.choose.randrange(256)


@fault(BEFORE)
def first_bytes(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """The first bytes of a buffer, a frame's header, are nonsense."""
    chain = staged[-1].chains[-1]
    if chain.writable:
        count = min(12, len(chain.writable[0]))
        chain.writable[0][:count] = it.choose.randbytes(count)


@fault(BEFORE)
def number_of_buffers(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """Where a frame says of how many buffers it is, there is another number."""
    chain = staged[-1].chains[-1]
    if chain.writable and len(chain.writable[0]) >= 12:
        number = it.choose.choice((0, 2, 3, 17, 18, 255, 256, 0xFFFF))
        chain.writable[0][10:12] = number.to_bytes(2, "little")


@fault(AFTER)
def unknown_id(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """A buffer comes back that the device does not have, or that cannot be."""
    wrong = it.choose.choice((it.choose.randrange(ring.size), ring.size, 0xFFFF, it.choose.getrandbits(32)))
    if isinstance(ring, SplitRing):
        ring._elements[2 * ((ring.used - 1) % ring.size)] = wrong
    else:
        ring._halves[8 * ((ring.used - 1) % ring.size) + 6] = wrong & 0xFFFF


@fault(AFTER)
def once_more(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """The same buffer comes back twice."""
    here, there = (ring.used - 1) % ring.size, ring.used % ring.size
    if isinstance(ring, SplitRing):
        ring._elements[2 * there], ring._elements[2 * there + 1] = ring._elements[2 * here : 2 * here + 2]
        ring._used[1] = (ring.used + 1) & 0xFFFF
    else:
        ring._words[4 * there + 2] = ring._words[4 * here + 2]
        ring._halves[8 * there + 6] = ring._halves[8 * here + 6]
        ring._halves[8 * there + 7] = ring._halves[8 * here + 7]


@fault(AFTER)
def index_or_wrap(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """The used index jumps, forwards or back; a wrap bit is turned over."""
    if isinstance(ring, SplitRing):
        ring._used[1] = (ring.used + it.choose.randrange(1, 0x10000)) & 0xFFFF
    else:
        slot = it.choose.randrange(ring.size)
        ring._halves[8 * slot + 7] ^= it.choose.choice((0x80, 0x8000, 0x8080))


@fault(AFTER)
def suppression(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """Flags and event positions that do not exist."""
    if isinstance(ring, SplitRing):
        ring._used[0] = it.choose.getrandbits(16)
        ring._used[ring._avail_event] = it.choose.getrandbits(16)
    else:
        ring._device[0], ring._device[1] = it.choose.getrandbits(16), it.choose.getrandbits(16)


@fault(AFTER)
def descriptors(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """Descriptors are written over."""
    memory = area(queue, ring, 0)
    for _ in range(it.choose.randrange(1, 8)):
        at = 16 * it.choose.randrange(ring.size)
        memory[at : at + 16] = it.choose.randbytes(16)


@fault(AFTER)
def drivers_area(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """What only the driver may write is written over."""
    memory = area(queue, ring, 1)
    at = it.choose.randrange(len(memory))
    memory[at : at + 1] = it.choose.randbytes(1)


@fault(AFTER)
def used_area(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """Random bytes all over the device's own area."""
    memory = area(queue, ring, 2)
    for _ in range(it.choose.randrange(1, 16)):
        memory[it.choose.randrange(len(memory))] = it.choose.randrange(256)


@fault(AFTER)
def buffers_after_use(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """A buffer changes once more after it came back: what was checked there may not be read again."""
    for piece in staged[-1].chains[-1].writable[:1]:
        count = min(12, len(piece))
        piece[:count] = it.choose.randbytes(count)


@fault(AFTER)
def needs_reset(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """DEVICE_NEEDS_RESET."""
    queue.owner.need_reset()


@fault(AFTER)
def interrupts(it: Hostile, ring: Any, queue: Any, staged: list[Used]) -> None:
    """Interrupts that mean nothing."""
    for _ in range(it.choose.randrange(1, 20)):
        queue.owner._interrupt(it.choose.choice((None, queue)))


class Hostile:
    """Makes a device hostile.

    Args:
        function: our own device; it is honest until now.
        seed: the faults are the same for the same seed and traffic.
        rate: how many of a hundred completions come with a fault.
        burst: how many faults may come at once; half of the time it is one.

    Attributes:
        done: faults by name.
        claims: buffers that were said to be written and were not.
    """

    def __init__(self, function: SoftwareFunction, seed: int, rate: float, burst: int = 1) -> None:
        self.choose = random.Random(seed)
        self.rate = rate
        self.done: Counter[str] = Counter()
        self.burst = burst
        self.kinds = [*BEFORE, *AFTER, "claimed_and_not_written"]
        self._claim = False
        device = function.device
        enable = device.enable_queue

        def enable_queue(queue: Any) -> None:
            enable(queue)
            if queue.ring is not None:
                assert isinstance(queue.ring, SplitRing | PackedRing)
                self._wrap(queue.ring, queue)

        device.enable_queue = enable_queue  # type: ignore[method-assign]

    def _wrap(self, ring: Any, queue: Any) -> None:
        write, pop = ring._write, ring.pop

        def hostile_write(staged: list[Used]) -> bool:
            wanted = [self._next() for _ in range(self.choose.choice((1, self.burst)))]
            for name in wanted:
                if name in BEFORE:
                    BEFORE[name](self, ring, queue, staged)
            notify: bool = write(staged)
            for name in wanted:
                if name in AFTER:
                    AFTER[name](self, ring, queue, staged)
            return notify or any(wanted)

        def hostile_pop() -> Chain | None:
            chain: Chain | None = pop()
            if chain is not None and self._claim and chain.writable:
                self._claim = False
                self.done["claimed_and_not_written"] += 1
                # The device writes into the void, but for the last byte, a disk's status.
                *pieces, last = chain.writable
                chain.writable = [memoryview(bytearray(len(piece))) for piece in pieces]
                chain.writable += [memoryview(bytearray(len(last))) if len(last) > 1 else last]
            return chain

        ring._write, ring.pop = hostile_write, hostile_pop

    def _next(self) -> str:
        if self.choose.random() * 100 >= self.rate:
            return ""
        kind = self.choose.choice(self.kinds)
        if kind == "claimed_and_not_written":
            self._claim = True
            return ""
        self.done[kind] += 1
        return kind


def formats() -> list[dict[str, str]]:
    """Parameters of ``loopback:`` for the ring formats with what changes them."""
    return [
        {},
        {"packed": "on"},
        {"event_idx": "off", "indirect_desc": "off"},
        {"packed": "on", "event_idx": "off"},
        {"in_order": "on"},
        {"packed": "on", "in_order": "on", "indirect_desc": "off"},
    ]
