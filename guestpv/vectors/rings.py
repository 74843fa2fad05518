"""The ring vectors: each operation of both formats, and where they wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .recorder import Recorder

BEFORE_WRAP = 0xFFFE
"""Buffers after which the third next one wraps the 16-bit index of a split ring."""

REQUEST = {"readable": (16,), "writable": (512, 1)}
"""The shape of a block read: header, a sector, the status."""


def one_buffer(recorder: Recorder) -> None:
    """One buffer of one element goes to the device and comes back."""
    number = recorder.add(writable=(64,))
    recorder.publish()
    recorder.use(number, lengths=[17])
    recorder.reap()


def chains(recorder: Recorder) -> None:
    """Two buffers of three elements in one batch, used in the other order; what is free is used again."""
    first, second = recorder.add(**REQUEST), recorder.add((16, 512), (1,))
    recorder.publish()
    recorder.use(second)
    recorder.reap()
    third = recorder.add(**REQUEST)
    recorder.publish()
    recorder.use(first, third)
    recorder.reap()


def wrap(recorder: Recorder) -> None:
    """The ring goes round more than twice with buffers of two elements, one at a time."""
    for _ in range(recorder.queue.size + 1):
        number = recorder.add((16,), (48,))
        recorder.publish()
        recorder.use(number)
        recorder.reap()


def index_wrap(recorder: Recorder) -> None:
    """The 16-bit indices wrap from 0xffff to 0 within a batch."""
    recorder.cycle(BEFORE_WRAP)
    numbers = [recorder.add(writable=(64,)) for _ in range(4)]
    recorder.publish()
    recorder.use(*numbers)
    recorder.reap()


def index_wrap_event(recorder: Recorder) -> None:
    """A batch goes over the device's event and the wrap of the index at once, the next one over neither."""
    recorder.cycle(BEFORE_WRAP)
    recorder.device_enable()
    numbers = [recorder.add(writable=(64,)) for _ in range(3)]
    recorder.publish()
    numbers.append(recorder.add(writable=(64,)))
    recorder.publish()
    recorder.device_enable()
    numbers.append(recorder.add(writable=(64,)))
    recorder.publish()
    recorder.use(*numbers)
    recorder.reap()


def suppressed(recorder: Recorder) -> None:
    """The device asks for no notification, then for one again."""
    recorder.device_disable()
    first = recorder.add(writable=(64,))
    recorder.publish()
    recorder.device_enable()
    second = recorder.add(writable=(64,))
    recorder.publish()
    recorder.use(first, second)
    recorder.reap()


def interrupts(recorder: Recorder) -> None:
    """The driver asks for no interrupts, then for them again with a buffer used meanwhile, then without."""
    recorder.disable_interrupts()
    numbers = [recorder.add(writable=(64,)) for _ in range(3)]
    recorder.publish()
    recorder.use(numbers[0])
    recorder.enable_interrupts()
    recorder.reap()
    recorder.enable_interrupts()
    recorder.use(numbers[1])
    recorder.reap()
    recorder.disable_interrupts()
    recorder.use(numbers[2])
    recorder.reap()


def in_order(recorder: Recorder) -> None:
    """One used entry returns a batch of three; one that was not filled ends the next batch."""
    numbers = [recorder.add(writable=(64,)) for _ in range(3)]
    recorder.publish()
    recorder.use(*numbers)
    recorder.reap()
    numbers = [recorder.add((16,), (64,)) for _ in range(2)]
    recorder.publish()
    recorder.use(*numbers, lengths=[3, 64])
    recorder.reap()
    number = recorder.add(writable=(64,))
    recorder.publish()
    recorder.use(number)
    recorder.reap()


Scene = Callable[[Recorder], None]
SCENES: tuple[tuple[str, Scene, tuple[str, ...], int, tuple[str, str]], ...] = (
    ("one-buffer", one_buffer, (), 8, ("2.7.13, 2.7.14", "2.8.21, 2.8.22")),
    ("chains", chains, (), 8, ("2.7.13, 2.7.14", "2.8.21, 2.8.22")),
    ("indirect", chains, ("INDIRECT_DESC",), 8, ("2.7.5.3", "2.8.7")),
    ("wrap", wrap, (), 4, ("2.7.6, 2.7.8", "2.8.1")),
    ("suppressed", suppressed, (), 8, ("2.7.10", "2.8.10")),
    ("suppressed-event-index", suppressed, ("EVENT_IDX",), 8, ("2.7.10", "2.8.10")),
    ("notification-data", wrap, ("NOTIFICATION_DATA",), 4, ("2.9", "2.9")),
    ("interrupts", interrupts, (), 8, ("2.7.7", "2.8.10")),
    ("interrupts-event-index", interrupts, ("EVENT_IDX",), 8, ("2.7.7", "2.8.10")),
    ("in-order", in_order, ("IN_ORDER",), 8, ("2.7.9", "2.8.8")),
    (
        "all-features",
        in_order,
        ("INDIRECT_DESC", "EVENT_IDX", "IN_ORDER", "NOTIFICATION_DATA"),
        8,
        ("2.7, 2.9", "2.8, 2.9"),
    ),
)
"""Name, what happens, features, queue size, sections for split and packed: recorded in both formats."""


def vectors() -> list[dict[str, Any]]:
    """All ring vectors."""
    found = []
    for form, extra in (("split", ()), ("packed", ("RING_PACKED",))):
        for name, scene, features, size, sections in SCENES:
            found.append(_vector(f"{form}-{name}", scene, (*extra, *features), size, sections))
    found.append(_vector("split-index-wrap", index_wrap, (), 8, ("2.7.6, 2.7.8", "")))
    found.append(_vector("split-index-wrap-event-index", index_wrap_event, ("EVENT_IDX",), 8, ("2.7.10", "")))
    odd = ("RING_PACKED", "EVENT_IDX")
    found.append(_vector("packed-odd-size", wrap, odd, 5, ("", "2.8.1, 2.8.10.1")))
    return found


def _vector(
    name: str, scene: Scene, features: tuple[str, ...], size: int, sections: tuple[str, str]
) -> dict[str, Any]:
    recorder = Recorder(*features, size=size)
    scene(recorder)
    assert scene.__doc__ is not None
    return recorder.vector(name, scene.__doc__, sections[recorder.queue.packed])
