"""Outcomes in the Test Anything Protocol, version 14: for consoles, and for harnesses such as Avocado."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from .verdict import Outcome, Verdict

VERSION: Final = "TAP version 14"
_DETAILS: Final = ("verdict", "severity", "section", "sent", "seen", "reproduce")
_NO_ANSWER: Final = (Verdict.SKIP, Verdict.NOT_OBSERVABLE, Verdict.NOT_EXERCISED)


def point(number: int, outcome: Outcome, place: str = "") -> str:
    """One test point: a line, and what is known about it below where it is bad.

    Args:
        number: counted from 1.
        outcome: what it says.
        place: put before the name, where several devices share a report.
    """
    about = f"({' '.join(outcome.requirements)})" if outcome.requirements else ""
    name = " ".join(filter(None, (place, outcome.check or outcome.title, about)))
    line = f"{'not ok' if outcome.bad else 'ok'} {number} - {_plain(name)}"
    if outcome.verdict in _NO_ANSWER:
        why = "" if outcome.verdict is Verdict.SKIP else outcome.verdict
        return f"{line} # SKIP {_plain(': '.join(filter(None, (why, outcome.seen))))}"
    if not outcome.bad:
        return line
    known = {name: str(getattr(outcome, name)) for name in _DETAILS}
    below = [f"  {name}: {json.dumps(text)}" for name, text in known.items() if text]
    if outcome.evidence:
        below += ["  evidence:", *(f"    - {json.dumps(event)}" for event in outcome.evidence)]
    return "\n".join([line, "  ---", *below, "  ..."])


def tap(outcomes: Iterable[Outcome]) -> str:
    """A whole document."""
    points = [point(number, outcome) for number, outcome in enumerate(outcomes, 1)]
    return "\n".join([VERSION, f"1..{len(points)}", *points]) + "\n"


def _plain(text: str) -> str:
    """On one line and without what TAP takes for a directive."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("#", "\\#")
