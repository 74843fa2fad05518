"""What a lying device did, in words: from the core's ``struct gpv_violation`` to a ``DeviceViolation``."""

from __future__ import annotations

from typing import Any, Final

from guestpv.core._core import lib
from guestpv.errors import DeviceViolation

Rule = tuple[str, str]
"""Section of VIRTIO 1.4 and requirement id."""

RULES: Final[dict[int, tuple[str, Rule, Rule]]] = {
    lib.GPV_BAD_USED_INDEX: (
        "used idx is {got:#06x}: more buffers than were made available (available idx {expected:#06x})",
        ("2.7.8", "DEV-SPLIT-36"),
        ("2.7.8", "DEV-SPLIT-36"),
    ),
    lib.GPV_BAD_ID: (
        "used id {got} at position {position} is not below the queue size {expected}",
        ("2.7.8", "DEV-SPLIT-37"),
        ("2.8", "DEV-PACKED-20"),
    ),
    lib.GPV_ID_NOT_AVAILABLE: (
        "used id {got} at position {position} was never made available",
        ("2.7.8", "DEV-SPLIT-37"),
        ("2.8", "DEV-PACKED-20"),
    ),
    lib.GPV_ID_REPEATED: (
        "used id {got} at position {position} is not outstanding: it came back before",
        ("2.7.8", "DEV-SPLIT-37"),
        ("2.8", "DEV-PACKED-20"),
    ),
    lib.GPV_BAD_LENGTH: (
        "used length {got} of buffer {id} at position {position} is more than its {expected} writable bytes",
        ("2.7.8", "DEV-SPLIT-38"),
        ("2.8.5", "DEV-PACKED-21"),
    ),
    lib.GPV_BAD_ORDER: (
        "IN_ORDER: used id {got} at position {position} is out of order; id {expected} is next to come back",
        ("2.7.9", "DEV-SPLIT-41"),
        ("2.8.8", "DEV-PACKED-24"),
    ),
    lib.GPV_BAD_WRAP: (
        "flags {got:#06x} of descriptor {position} are neither available as the driver left it"
        " nor used with wrap counter {wrap}",
        ("2.8.1", "DEV-PACKED-16"),
        ("2.8.1", "DEV-PACKED-16"),
    ),
    lib.GPV_USED_UNASKED: (
        "descriptor {position} is marked used (id {id}, flags {got:#06x}) although no buffer is outstanding",
        ("2.8", "DEV-PACKED-20"),
        ("2.8", "DEV-PACKED-20"),
    ),
    lib.GPV_BAD_EVENT_FLAGS: (
        "notification suppression flags are {got:#06x}; at most {expected} is defined",
        ("2.7.10.2", "DEV-SPLIT-18"),
        ("2.8.10", "DEV-PACKED-27"),
    ),
    lib.GPV_BAD_EVENT_OFFSET: (
        "device event suppression names descriptor {got}, which is not below the queue size {expected}",
        ("2.8.10", "DEV-PACKED-26"),
        ("2.8.10", "DEV-PACKED-26"),
    ),
}
"""Violation kind -> message, rule for split, rule for packed."""


def device_violation(violation: Any, packed: bool, where: str) -> DeviceViolation:
    """The exception for a filled ``struct gpv_violation`` of the queue named ``where``."""
    text, split_rule, packed_rule = RULES[violation.kind]
    section, requirement = packed_rule if packed else split_rule
    message = text.format(
        got=violation.got,
        expected=violation.expected,
        position=violation.position,
        id=violation.id,
        wrap=1 if violation.expected else 0,
    )
    return DeviceViolation(
        message,
        requirement=requirement,
        section=section,
        where=where,
        hint="this virtqueue is broken: reset it or the device, then drain() returns its buffers",
    )
