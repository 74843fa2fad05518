"""Broken devices: the memory balloon."""

from __future__ import annotations

import struct
from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.ring import Chain
from guestpv.spec import balloon

from .device import mutant, replace
from .device_ring import on_push

BALLOON = "loopback:balloon"
HINTS = "loopback:balloon?offer=%2Bfree_page_hint,%2Bpage_poison"
STAT = struct.Struct("<HQ")


def statistics(function: SoftwareFunction, change: Any) -> None:
    """Let ``change(entries, model)`` say which (tag, value) entries a buffer has."""
    model: Any = function.model

    def make(inner: Any) -> Any:
        def stats(queue: Any, chain: Chain) -> None:
            data = b"".join(STAT.pack(*row) for row in change(list(STAT.iter_unpack(chain.read())), model))
            chain.readable[:] = [memoryview(data)]
            inner(queue, chain)

        return stats

    replace(model, "_stats", make)


@mutant("DEV-BALLOON-22", spec=BALLOON)
def statistics_of_16_bytes(function: SoftwareFunction) -> None:
    """Values are taken from 4 bytes behind the tag."""
    statistics(function, lambda rows, _: [(tag, value >> 16) for tag, value in rows])


@mutant("DEV-BALLOON-04", spec=BALLOON)
def stops_at_unknown_statistics(function: SoftwareFunction) -> None:
    """What comes behind an unknown tag is dropped."""

    def known(rows: list[tuple[int, int]], _: Any) -> list[tuple[int, int]]:
        unknown = [place for place, (tag, _) in enumerate(rows) if tag > 9]
        return rows[: unknown[0]] if unknown else rows

    statistics(function, known)


@mutant("DEV-BALLOON-05", spec=BALLOON)
def statistics_by_place(function: SoftwareFunction) -> None:
    """Statistics are taken to come as in the first buffer."""
    order: list[int] = []

    def placed(rows: list[tuple[int, int]], _: Any) -> list[tuple[int, int]]:
        order.extend([] if order else [tag for tag, _ in rows])
        return [(tag, value) for tag, (_, value) in zip(order, rows, strict=False)]

    statistics(function, placed)


@mutant("DEV-BALLOON-23", spec=BALLOON)
def gives_statistics_back(function: SoftwareFunction) -> None:
    """The statistics buffer is used at once."""
    model: Any = function.model

    def make(inner: Any) -> Any:
        def stats(queue: Any, chain: Chain) -> None:
            inner(queue, chain)
            model.ask_statistics()

        return stats

    replace(model, "_stats", make)


@mutant("DEV-BALLOON-15", spec=BALLOON)
def statsq_is_missing(function: SoftwareFunction) -> None:
    """No queue has the number of the statistics queue, nor does another one take its place."""
    replace(
        function.model,
        "queue_size",
        lambda inner: lambda index, features: 0 if index >= balloon.STATSQ else inner(index, features),
    )


@mutant("DEV-BALLOON-16", spec=BALLOON)
def reports_go_nowhere(function: SoftwareFunction) -> None:
    """The reporting queue is never looked at."""
    replace(
        function.model,
        "handle",
        lambda inner: (
            lambda queue, chain: None if queue.index == balloon.REPORTING_VQ else inner(queue, chain)
        ),
    )


@mutant("DEV-BALLOON-17", spec=BALLOON)
def forgets_actual(function: SoftwareFunction) -> None:
    """actual stays 0."""
    replace(function.model, "config_written", lambda inner: lambda field, value: inner(field, 0))


@mutant("DEV-BALLOON-18", spec=BALLOON)
def pages_of_8_kib(function: SoftwareFunction) -> None:
    """Page numbers count 8 KiB."""
    replace(
        function.model,
        "_numbers",
        lambda inner: lambda queue, chain: tuple(number * 2 for number in inner(queue, chain)),
    )


@mutant("DEV-BALLOON-19", spec=BALLOON)
def targets_of_8_kib(function: SoftwareFunction) -> None:
    """num_pages counts 8 KiB."""
    replace(
        function.model,
        "change_config",
        lambda inner: lambda **fields: inner(**{name: value // 2 for name, value in fields.items()}),
    )


@mutant("DEV-BALLOON-20", spec=BALLOON)
def counts_page_numbers(function: SoftwareFunction) -> None:
    """The used length of a request is that of its page numbers."""
    on_push(function, lambda ring, chain, length: chain.readable_bytes)


def silent_changes(function: SoftwareFunction, name: str) -> None:
    """Change a field of the configuration without a notification."""
    model: Any = function.model

    def make(inner: Any) -> Any:
        def change(**fields: int) -> None:
            if name in fields:
                model.config.update(fields)
            else:
                inner(**fields)

        return change

    replace(model, "change_config", make)


@mutant("DEV-BALLOON-21", spec=BALLOON)
def silent_targets(function: SoftwareFunction) -> None:
    """A new target is not notified."""
    silent_changes(function, "num_pages")


@mutant("DEV-BALLOON-25", spec=HINTS)
def silent_rounds(function: SoftwareFunction) -> None:
    """A new command id is not notified."""
    silent_changes(function, "free_page_hint_cmd_id")


@mutant("DEV-BALLOON-24", spec=HINTS)
def done_is_0(function: SoftwareFunction) -> None:
    """STOP and DONE have each other's number."""
    replace(
        function.model,
        "change_config",
        lambda inner: (
            lambda **fields: inner(
                **{
                    name: value ^ 1 if name == "free_page_hint_cmd_id" and value < 2 else value
                    for name, value in fields.items()
                }
            )
        ),
    )


@mutant("DEV-BALLOON-08", spec=HINTS)
def every_hint_counts(function: SoftwareFunction) -> None:
    """Hints count whatever their round."""
    model: Any = function.model

    def make(inner: Any) -> Any:
        def pages(queue: Any, chain: Chain) -> None:
            if not chain.readable_bytes:
                model.hinted += [(part.address, part.length) for part in chain.elements]
                queue.complete(chain, 0)
            else:
                inner(queue, chain)

        return pages

    replace(model, "_free_pages", make)


@mutant("DEV-BALLOON-14", spec=HINTS)
def discards_poisoned_pages(function: SoftwareFunction) -> None:
    """Reported pages read as zero in spite of PAGE_POISON."""

    def make(inner: Any) -> Any:
        def handle(queue: Any, chain: Chain) -> None:
            if queue.index == balloon.REPORTING_VQ:
                for piece in chain.writable:
                    piece[:] = bytes(len(piece))
            inner(queue, chain)

        return handle

    replace(function.model, "handle", make)
