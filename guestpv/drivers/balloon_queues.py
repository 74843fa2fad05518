"""Which number each of the balloon's queues has: the standard's, or the one that some devices use instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DeviceViolation
from ..spec import balloon as spec

STANDARD = "standard"
DENSE = "dense"
"""The quirk: queues are numbered one after the other, without a gap for a queue that the device does not
have. QEMU does it, and Linux expects it."""
QUIRKS = {STANDARD: None, DENSE: "queues numbered without gaps"}
"""Name of a numbering -> what to call it where it is not the standard's."""


@dataclass(frozen=True, slots=True)
class Numbering:
    """Numbers of the queues.

    Attributes:
        name: ``standard`` or ``dense``. Where both are the same, ``standard``.
        numbers: number by the standard (``spec.STATSQ``, ...) -> number that the device uses.
    """

    name: str
    numbers: dict[int, int]

    @property
    def by_name(self) -> dict[str, int]:
        """Numbers that the device uses, by the names of 5.5.2 (``statsq``, ...)."""
        return {spec.QUEUE_NAMES[queue]: number for queue, number in self.numbers.items()}


def find_numbering(
    offered: int, features: int, queue_size: Callable[[int], int], where: str = ""
) -> Numbering:
    """Find out the numbers of inflateq, deflateq and the optional queues (5.5.2).

    A device of the standard leaves the number of a queue that it does not offer without a queue; on a dense
    one the next queue is there.

    Args:
        offered: mask of offered features.
        features: mask of the features whose queues are wanted: the negotiated ones, or the offered ones.
        queue_size: the device's ``queue_size`` for a number, 0 where there is no queue.

    Raises:
        DeviceViolation: a wanted queue is in neither place.
    """
    fixed = {spec.INFLATEQ: spec.INFLATEQ, spec.DEFLATEQ: spec.DEFLATEQ}
    there = [queue for queue, bit in spec.OPTIONAL_QUEUES.items() if offered >> bit & 1]
    wanted = [queue for queue in there if features >> spec.OPTIONAL_QUEUES[queue] & 1]
    gaps = [queue for queue in spec.OPTIONAL_QUEUES if queue not in there and queue < max(there, default=0)]
    if all(map(queue_size, [*fixed, *wanted])) and not any(map(queue_size, gaps)):
        return Numbering(STANDARD, fixed | {queue: queue for queue in wanted})
    dense = {queue: spec.STATSQ + place for place, queue in enumerate(there) if queue in wanted}
    if all(map(queue_size, [*fixed, *dense.values()])):
        return Numbering(DENSE, fixed | dense)
    names = ", ".join(f"{spec.QUEUE_NAMES[queue]} at {queue}" for queue in [*fixed, *wanted])
    raise DeviceViolation(
        f"the balloon has no {names}, nor are its queues numbered without gaps",
        requirement="DEV-BALLOON-15",
        section="5.5.2",
        where=where,
    )
