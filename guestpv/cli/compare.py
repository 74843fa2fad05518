"""``guestpv compare``: what a packet and a block cost, emulated and paravirtual, by the kernel and by us."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from ..errors import AccessDenied, Refused, UsageError
from .report import Report, reporting

if TYPE_CHECKING:
    from .compare_find import Candidate
    from .compare_ways import Ends, Way

EXAMPLE = """\b
Examples:
  guestpv compare
  guestpv compare 0000:01:00.0 0000:02:00.0 --plot cost.svg

\b
On the host, in a checkout: `./tools/guest compare` boots a guest with all
these devices and counts every driver's register accesses in QEMU's trace.
"""
SETTLE = 0.02
"""Seconds after a lone operation, so that what its interrupt still has to do counts as its own."""
WARM_UP = 10
FIRST_MARK = ord("a")

Row = dict[str, Any]


def address(context: click.Context, parameter: click.Parameter, value: str) -> Any:
    """An IPv4 address."""
    from ipaddress import IPv4Address

    try:
        return IPv4Address(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an IPv4 address") from None


def port(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """An I/O port's number."""
    try:
        return None if value is None else int(value, 0)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number such as 0xe9") from None


@click.command(epilog=EXAMPLE)
@click.argument("functions", nargs=-1, metavar="[FUNCTION]...")
@click.option("--peer", default="10.0.2.2", show_default=True, callback=address, metavar="ADDRESS",
              help="Who answers ARP requests on the links (QEMU's user network by default).")  # fmt: skip
@click.option("--own", default="10.0.2.15", show_default=True, callback=address, metavar="ADDRESS",
              help="The address that the requests come from.")  # fmt: skip
@click.option("--count", type=click.IntRange(0), default=500, show_default=True,
              help="Operations that are timed, one after the other.")  # fmt: skip
@click.option("--lone", type=click.IntRange(1), default=20, show_default=True,
              help="Operations that are counted, each by itself.")  # fmt: skip
@click.option("--mark-port", callback=port, metavar="PORT",
              help="Write a letter to this I/O port before each lone operation, for a trace.")  # fmt: skip
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE", help="Draw the table, as SVG.")
@reporting
def compare(
    report: Report,
    functions: tuple[str, ...],
    peer: Any,
    own: Any,
    count: int,
    lone: int,
    mark_port: int | None,
    plot: str | None,
) -> None:
    """Measure what a packet there and back and a block of 4 KiB cost through each driver of this machine.

    For each FUNCTION, or all that are not in use: the kernel's driver, and on virtio functions ours after
    it, waiting for interrupts and polling. Links that are down are up for that long; disks are only read.
    Interrupts and times are measured. Our driver's register accesses, each an exit to the hypervisor, are
    counted; those of the kernel's drivers a guest cannot see.
    """
    from .compare_find import candidates
    from .compare_view import picture, show
    from .compare_ways import Ends

    if os.geteuid() != 0:
        raise AccessDenied("raw sockets, disks and binding are for root", hint="sudo guestpv compare")
    found, left_out = candidates(functions)
    if not found:
        why = "; ".join(f"{where}: {reason}" for where, reason in left_out)
        raise Refused(f"nothing to compare{': ' + why if why else ''}", hint="guestpv compare FUNCTION")
    rows: list[Row] = []
    with Marks(mark_port) as marks:
        for candidate in found:
            for mode, ready in ways(candidate, Ends(own, peer)):
                report.say(f"{candidate.name} ({candidate.device}), {mode or 'kernel'} ...")
                with ready as way:
                    rows.append(measured(candidate, mode, way, count, lone, marks))
            if candidate.ours and candidate.device == "virtio":
                left_out.append((candidate.address, f"not by our driver: {candidate.ours}"))
    data = {"rows": rows, "left_out": [{"function": where, "why": why} for where, why in left_out]}
    if plot:
        try:
            with open(plot, "w", encoding="utf-8") as file:
                file.write(picture(rows))
        except OSError as error:
            raise UsageError(f"cannot write the picture: {error.strerror}", where=plot) from error
    report.done(data, lambda: show(rows, left_out))


def ways(candidate: Candidate, ends: Ends) -> Iterator[tuple[str, AbstractContextManager[Way]]]:
    """The drivers of one function in turn."""
    from .compare_ways import kernels, ours

    yield "", kernels(candidate, ends)
    if candidate.ours is None:
        for mode in ("msix", "poll"):
            yield mode, ours(candidate, ends, mode)


def measured(candidate: Candidate, mode: str, way: Way, count: int, lone: int, marks: Marks) -> Row:
    """Operations one after the other, timed; then each by itself, counted."""
    from .compare_find import interrupts

    way.times(WARM_UP)
    times = way.times(count)
    letter = marks.next_letter()
    seen = []
    for _ in range(lone):
        time.sleep(SETTLE)
        kicks, before = way.kicks() if way.kicks else 0, interrupts(way.needles)
        marks.write(letter)
        way.times(1)
        time.sleep(SETTLE)
        seen.append((way.kicks() - kicks if way.kicks else None, interrupts(way.needles) - before))
    marks.write("z")
    ((accesses, raised),) = [most for most, _ in Counter(seen).most_common(1)]
    return {
        "kind": candidate.kind,
        "function": candidate.address,
        "name": candidate.name,
        "device": candidate.device,
        "driver": "guestpv" if mode else "kernel",
        "mode": mode,
        "ring": way.ring,
        "microseconds": statistics.median(times) / 1000 if times else None,
        "interrupts": raised,
        "accesses": accesses,
        "iommu_accesses": None,
        "counted_by": "guestpv" if mode else None,
        "mark": letter if marks.used else None,
    }


class Marks:
    """Letters on an I/O port that a hypervisor traces, one for each driver.

    Args:
        port: None where nobody looks.
    """

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._fd = -1
        self._next = FIRST_MARK

    @property
    def used(self) -> bool:
        """Whether somebody looks."""
        return self._port is not None

    def __enter__(self) -> Marks:
        if self._port is not None:
            self._fd = os.open("/dev/port", os.O_WRONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def next_letter(self) -> str:
        """A letter of its own for the next driver."""
        letter = chr(self._next)
        if letter >= "z":
            raise UsageError("too many functions for one run", hint="guestpv compare FUNCTION...")
        self._next += 1
        return letter

    def write(self, letter: str) -> None:
        """Say what begins."""
        if self._port is not None:
            os.pwrite(self._fd, letter.encode("ascii"), self._port)
