"""The same request in other shapes: cut into other descriptors, in another order, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..spec import ring as rs
from ..virtqueue.raw import Element
from .requests import Request

if TYPE_CHECKING:
    from .queue import Queue
    from .rig import Rig


def cut(elements: Sequence[Element], pieces: int) -> list[Element]:
    """Each element as up to ``pieces`` descriptors of unequal lengths, none of them empty."""
    found: list[Element] = []
    for address, length, flags in elements:
        count = min(pieces, length)
        # The first ones are short, so that structures are torn apart.
        for number in range(count):
            part = 1 if number + 1 < count else length - number
            found.append((address + number, part, flags))
    return found


def at_least(elements: Sequence[Element], count: int) -> list[Element]:
    """The elements, cut until there are ``count`` of them or they are single bytes."""
    pieces = 1
    shaped = list(elements)
    while len(shaped) < count and len(shaped) < sum(length for _, length, _ in elements):
        pieces += 1
        shaped = cut(elements, pieces)
    return shaped


def fitting(queue: Queue, elements: Sequence[Element], pieces: int) -> list[Element]:
    """``cut``, or less of it where the queue is too small for the descriptors."""
    while len(shaped := cut(elements, pieces)) > queue.size:
        pieces -= 1
    return shaped


def scattered(queue: Queue, elements: Sequence[Element], *, garbage: int = 0) -> int:
    """Write a split chain over descriptors far from each other, in falling order, and offer its head.

    Args:
        queue: a split queue with nothing outstanding.
        elements: of the chain.
        garbage: ``next`` of the last descriptor, where nobody may look.
    """
    places = list(reversed(range(queue.size)))[:: max(1, queue.size // (len(elements) + 1))][: len(elements)]
    if len(places) < len(elements):
        places = list(reversed(range(queue.size)))[: len(elements)]
    for number, (address, length, flags) in enumerate(elements):
        last = number + 1 == len(elements)
        queue.raw.descriptor(
            places[number],
            address,
            length,
            flags | (0 if last else rs.DESC_F_NEXT),
            garbage if last else places[number + 1],
        )
    queue.outstanding[places[0]] = len(elements)
    queue.raw.offer(places[0])
    return places[0]


def run_elements(queue: Queue, request: Request, elements: Sequence[Element]) -> None:
    """Offer a request in these descriptors, wait until it is used, and look at the outcome."""
    id = queue.offer(elements)
    ((used, length),) = queue.wait()
    assert used == id, f"buffer {id} was made available, {used} came back"
    judge(request, length)


def judge(request: Request, length: int) -> None:
    """What the device wrote, and the length that it reports."""
    writable = sum(buffer.nbytes for buffer in request.writable)
    if request.length is not None:
        assert length == request.length, f"used length {length}, expected {request.length}"
    assert length <= writable, f"used length {length}, the device-writable part has {writable} bytes"
    request.check()


def together(rig: Rig, queue: Queue, count: int) -> list[tuple[int, Request]]:
    """Make ``count`` requests available before the device is notified once; (id, request) of each."""
    made = []
    for _ in range(count):
        request = rig.work.request()
        made.append((queue.add(request.readable, request.writable, kick=False), request))
    queue.kick()
    return made


def sized(rig: Rig, size: int) -> Queue:
    """The main queue of the device, set running with queues of ``size`` entries or of their maximum."""
    transport = rig.transport
    queues = {
        index: rig.queue(index, min(size, transport.queue_max_size(index))) for index in rig.work.queues
    }
    transport.driver_ok()
    return queues[rig.work.main]


def most(rig: Rig, queue: Queue, limit: int = 8) -> int:
    """How many requests of the device type fit into the queue at once, at most ``limit``."""
    request = rig.work.request()
    return min(limit, queue.size // len(queue.elements(request.readable, request.writable)))
