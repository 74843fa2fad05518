"""What is up, for a person: what the `up` and `status` verbs of every kind show alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from .driven import Asked, Driven
    from .kinds import Kind
    from .report import Report

Wishes = TypeVar("Wishes", bound="Asked")
Status = dict[str, Any]
Rows = list[tuple[str, str]]
Describe = Callable[[Status], Rows]


class Line(Protocol):
    """A line at the bottom of the terminal that is renewed, and what is printed above it."""

    def update(self, status: Status) -> None: ...
    def say(self, event: str) -> None: ...


def bring_up(
    kind: Kind,
    session: Callable[[Wishes, Callable[[str], None]], Driven],
    wishes: Wishes,
    report: Report,
    *,
    detach: bool,
    describe: Describe,
    ending: str,
    line: Callable[[Status], AbstractContextManager[Line]] | None = None,
) -> None:
    """Run a session that a person or a program watches, or one in the background.

    Args:
        kind: what the session is for.
        session: makes it.
        wishes: what the user asked for.
        report: where it is told.
        detach: return once it is up.
        describe: what is up, as names and values.
        ending: what Ctrl-C does.
        line: a live line for a terminal.
    """
    from .driven import detach as run_detached

    if detach:

        def is_up(status: Status) -> None:
            closing = f"Up in the background, process {status['pid']}."
            report.done(status, lambda: show(describe(status), closing))

        run_detached(kind, session, wishes, report, is_up)
        return
    with ExitStack() as stack:
        live: Line | None = None

        def tell(event: str) -> None:
            if report.as_json:
                report.event(event)
            elif live is not None:
                live.say(event)
            else:
                report.say(event)

        def ready(status: Status) -> None:
            nonlocal live
            report.done(status, lambda: show(describe(status), f"Up. {ending}"))
            if line is not None and sys.stdout.isatty() and not report.as_json:
                live = stack.enter_context(line(status))

        def refresh(status: Status) -> None:
            if live is not None:
                live.update(status)

        session(wishes, tell).run(ready, refresh)


def function_rows(status: Status, remark: str = "") -> Rows:
    """The rows that every kind begins with: the function that is driven, and how.

    Args:
        status: what is up.
        remark: put behind the mode of its interrupts.
    """
    function = status["function"]
    rows = [("device", f"{function}, interrupts: {status['mode']}{remark}")]
    if status["stays_bound"]:
        rows.append(("", f"was bound to vfio-pci before, and stays so (guestpv unbind {function})"))
    return [*rows, ("features", " ".join(status["features"]))]


def show(rows: Rows, closing: str) -> None:
    """What is up, and what to know of it."""
    from .tables import console, pairs

    out = console()
    out.print(pairs(rows))
    out.print(closing)


def show_all(
    kind: Kind,
    found: list[Status],
    describe: Describe,
    verbose: int,
    more: Callable[[Status, int], Iterable[Any]] = lambda status, verbose: (),
) -> None:
    """Everything of a kind that is up.

    Args:
        kind: which.
        found: their statuses; one with ``error`` did not answer.
        describe: what one is, as names and values.
        verbose: how often the user asked for more.
        more: what to print below, for rich.
    """
    from .restarts import row
    from .tables import console, indented, pairs

    out = console()
    if not found:
        out.print(f"Nothing is up. (guestpv {kind.verb} up)")
    for number, data in enumerate(found):
        if number:
            out.print()
        if "error" in data:
            out.print(f"error: {data['error']}")
            continue
        minutes, seconds = divmod(int(time.time() - data["started"]), 60)
        process = ("process", f"{data['pid']}, for {minutes} min {seconds} s")
        out.print(pairs([*describe(data), *row(data), process]))
        for part in more(data, verbose):
            out.print(part)
        if verbose:
            out.print("events")
            for event in data["events"]:
                when = time.strftime("%F %T", time.localtime(event["time"]))
                out.print(indented(f"{when} {event['event']}"))
