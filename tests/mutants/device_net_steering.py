"""Broken devices: hashes over packets, and which receive queue they come to."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace as other
from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.spec import net

from .device import mutant, replace
from .device_net import MANY
from .device_net_packets import commands, header, on_put

HASHES = "loopback:net?pairs=2&mtu=1400&offer=%2Bhash_report"


def refuses(requirement: str, command: int, *also: str, spec: str = MANY) -> None:
    def refuse(function: SoftwareFunction) -> None:
        """The command is refused."""
        commands(
            function,
            lambda kind, verb, right: (False, "", "") if (kind, verb) == (net.CTRL_MQ, command) else right,
        )

    refuse.__name__ = f"has_no_mq_command_{command}_for_{requirement[-2:]}"
    mutant(requirement, *also, spec=spec)(refuse)


refuses("DEV-NET-83", net.CTRL_MQ_RSS_CONFIG, "DEV-NET-82")
refuses("DEV-NET-84", net.CTRL_MQ_HASH_CONFIG, "DEV-NET-82", spec=HASHES)
refuses("DEV-NET-119", net.CTRL_MQ_HASH_CONFIG)


@mutant("DEV-NET-232", spec=MANY)
def keys_are_shorter_than_said(function: SoftwareFunction) -> None:
    """A key of rss_max_key_size bytes is refused."""
    control: Any = function.model.control  # type: ignore[attr-defined]

    def make(inner: Any) -> Any:
        def steer(data: bytes, rss: bool) -> Any:
            return (False, "", "") if data[-41] == 40 else inner(data, rss)

        return steer

    replace(control, "_steer", make)


def configured(function: SoftwareFunction, change: Callable[[Any], Any]) -> None:
    """Let ``change(steering)`` be what an RSS or hash configuration comes to."""
    control: Any = function.model.control  # type: ignore[attr-defined]

    def make(inner: Any) -> Any:
        def steer(data: bytes, rss: bool) -> Any:
            result = inner(data, rss)
            control.steering = control.steering and change(control.steering)
            return result

        return steer

    replace(control, "_steer", make)


@mutant("DEV-NET-120", spec=MANY)
def the_key_is_read_backwards(function: SoftwareFunction) -> None:
    """The hash is computed with the key's bytes in reverse order."""
    configured(function, lambda steering: other(steering, key=steering.key[::-1]))


@mutant("DEV-NET-221", spec=MANY)
def hashes_addresses_only(function: SoftwareFunction) -> None:
    """Ports are left out of every hash."""
    configured(function, lambda steering: other(steering, types=steering.types & 0b001001))


@mutant("DEV-NET-220", spec=MANY)
def reports_the_bit_of_a_hash(function: SoftwareFunction) -> None:
    """hash_report is the number of the type's bit, which is one less."""
    header(function, 16, lambda kind: max(kind - 1, 0))


@mutant("DEV-NET-221", spec=HASHES)
def hash_values_are_big_endian(function: SoftwareFunction) -> None:
    """hash_value is stored in the wrong byte order."""

    def edit(done: Any, _: Any) -> None:
        view = done[0][0].writable[0]
        view[12:16] = struct.pack(">I", *struct.unpack("<I", bytes(view[12:16])))

    on_put(function, edit)


@mutant("DEV-NET-121", spec=MANY)
def unclassified_packets_come_to_the_first_queue(function: SoftwareFunction) -> None:
    """unclassified_queue is not looked at."""
    configured(function, lambda steering: other(steering, unclassified=0))


@mutant("DEV-NET-122", spec=MANY)
def half_of_the_table_is_used(function: SoftwareFunction) -> None:
    """The mask that is applied is one bit short."""
    configured(
        function, lambda steering: other(steering, table=steering.table[: max(len(steering.table) // 2, 1)])
    )


@mutant("DEV-NET-230", spec=MANY)
def the_table_begins_too_early(function: SoftwareFunction) -> None:
    """unclassified_queue is taken for the first entry of the table."""
    configured(
        function,
        lambda steering: (
            steering
            and other(steering, table=(steering.unclassified, *steering.table[:-1]) if steering.table else ())
        ),
    )


@mutant("DEV-NET-231", spec=MANY)
def the_table_has_virtqueue_numbers(function: SoftwareFunction) -> None:
    """Entries are taken for virtqueue indices."""
    configured(
        function,
        lambda steering: other(
            steering,
            table=tuple(number // 2 for number in steering.table),
            unclassified=steering.unclassified // 2,
        ),
    )


@mutant("DEV-NET-112", spec=MANY)
def rss_is_for_ever(function: SoftwareFunction) -> None:
    """VQ_PAIRS_SET leaves the table of RSS_CONFIG in force."""
    control: Any = function.model.control  # type: ignore[attr-defined]

    def make(inner: Any) -> Any:
        def command(request: bytes) -> Any:
            kept = control.steering
            result = inner(request)
            control.steering = control.steering or kept
            return result

        return command

    replace(control, "command", make)


@mutant("DEV-NET-118", spec=MANY)
def packets_wait_for_a_queue(function: SoftwareFunction) -> None:
    """While all receive queues are in reset packets are kept for later."""
    model: Any = function.model
    replace(model, "_steer", lambda inner: lambda packet: inner(packet) or model.device.queues[0])


@mutant("DEV-NET-123", spec=MANY)
def packets_go_round_a_queue_in_reset(function: SoftwareFunction) -> None:
    """With RSS a packet whose queue is in reset comes to the first one."""
    model: Any = function.model
    replace(model, "_steer", lambda inner: lambda packet: inner(packet) or model.device.queues[0])
