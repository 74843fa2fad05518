"""A run's report: as data, as text, as JUnit XML and as an HTML page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from .. import __version__
from .catalogue import Side, find, observable
from .verdict import Outcome, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

LAST_LINES: Final = 8
"""Lines of evidence in a text; the other formats have all of it."""

STYLE: Final = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.REJECT: "cyan",
    Verdict.WEDGED: "bold white on red",
    Verdict.ERROR: "bold magenta",
    Verdict.SKIP: "dim",
    Verdict.NOT_OBSERVABLE: "dim",
    Verdict.NOT_EXERCISED: "dim",
}


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def versions() -> dict[str, str]:
    """What the run ran with."""
    return {
        "guestpv": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


@dataclass
class Report:
    """Everything about one run of the suite.

    Attributes:
        side: who was checked.
        subject: what was checked: a specification, or how the driver came.
        outcomes: in the order of the run.
        versions: name -> version of what took part.
        date: of its start.
        command: the command line that makes it again.
        note: how was observed, where that limits what can be said.
    """

    side: Side
    subject: str
    outcomes: list[Outcome]
    versions: dict[str, str] = field(default_factory=versions)
    date: str = field(default_factory=now)
    command: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(outcome.bad for outcome in self.outcomes)

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> how often, in the order of ``Verdict``; what did not occur is left out."""
        found = Counter(outcome.verdict for outcome in self.outcomes)
        return {verdict.value: found[verdict] for verdict in Verdict if found[verdict]}

    def judged(self) -> dict[str, Verdict]:
        """Requirement -> the worst verdict about it, in the order of the catalogue."""
        order = list(reversed(RANK))
        worst: dict[str, Verdict] = {}
        for outcome in self.outcomes:
            for requirement in outcome.requirements:
                before = worst.get(requirement, order[0])
                worst[requirement] = max(before, outcome.verdict, key=order.index)
        return dict(sorted(worst.items(), key=lambda item: _place(item[0])))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        judged = self.judged()
        seen = observable(self.side)
        return {
            "side": self.side,
            "subject": self.subject,
            "date": self.date,
            "versions": self.versions,
            "command": self.command,
            "note": self.note,
            "ok": self.ok,
            "counts": self.counts,
            "requirements": {name: verdict.value for name, verdict in judged.items()},
            "judged": sum(judged.get(name) in JUDGEMENTS for name in seen),
            "observable": len(seen),
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Back from JSON."""
        return cls(
            data["side"],
            data["subject"],
            [Outcome.from_dict(outcome) for outcome in data["outcomes"]],
            data["versions"],
            data["date"],
            data["command"],
            data["note"],
        )

    def _groups(self) -> list[list[Outcome]]:
        """What is bad, with the variants of a check that ended alike together."""
        groups: dict[tuple[str, str, str], list[Outcome]] = {}
        for outcome in self.outcomes:
            if outcome.bad:
                name = outcome.check.partition("[")[0] or " ".join(outcome.requirements)
                groups.setdefault((name, outcome.verdict, outcome.seen), []).append(outcome)
        return list(groups.values())

    def text(self, verbose: int = 0) -> Sequence[RenderableType]:
        """What a terminal shows: what is bad in full, the rest counted.

        Args:
            verbose: 1: also a line for each outcome; 2: all evidence.
        """
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        about = [self.date, *(f"{name} {value}" for name, value in self.versions.items())]
        parts: list[RenderableType] = [Text("; ".join(about), style="dim")] if verbose else []
        if verbose:
            for outcome in self.outcomes:
                style = STYLE[outcome.verdict]
                reason = f"  [dim]{escape(outcome.seen)}[/]" if outcome.verdict is not Verdict.PASS else ""
                parts.append(
                    Text.from_markup(f"[{style}]{outcome.verdict:<14}[/] {escape(outcome.check)}{reason}")
                )
        for group in self._groups():
            parts.append(Text.from_markup(_in_full(group, verbose > 1)))
        table = Table("area", *(verdict.value for verdict in Verdict if verdict in self.counts), box=None)
        areas: dict[str, Counter[Verdict]] = {}
        for outcome in self.outcomes:
            areas.setdefault(outcome.area, Counter())[outcome.verdict] += 1
        for area, found in areas.items():
            table.add_row(
                area,
                *(
                    Text(str(found[verdict] or "."), style=STYLE[verdict])
                    for verdict in Verdict
                    if verdict in self.counts
                ),
            )
        parts.append(table)
        data = self.to_dict()
        parts.append(
            f"{self.subject}: {data['judged']} of {data['observable']} requirements judged, "
            + ", ".join(f"{count} {name}" for name, count in self.counts.items())
        )
        if self.note:
            parts.append(Text(self.note, style="dim"))
        return parts


RANK: Final = (
    Verdict.WEDGED,
    Verdict.FAIL,
    Verdict.ERROR,
    Verdict.REJECT,
    Verdict.PASS,
    Verdict.NOT_OBSERVABLE,
    Verdict.SKIP,
    Verdict.NOT_EXERCISED,
)
"""Of several verdicts about one requirement, the first of these counts."""

JUDGEMENTS: Final = (Verdict.PASS, Verdict.FAIL, Verdict.REJECT, Verdict.WEDGED)


def _place(requirement: str) -> tuple[str, int]:
    name, _, number = requirement.rpartition("-")
    return find(requirement).area + name, int(number)


def _in_full(group: list[Outcome], everything: bool) -> str:
    from rich.markup import escape

    outcome = group[0]
    style = STYLE[outcome.verdict]
    lines = [
        f"[{style}]{outcome.verdict}[/] [bold]{escape(outcome.title)}[/]"
        f"  ({' '.join(outcome.requirements)}; section {outcome.section}; {outcome.severity})"
    ]
    for name in ("sent", "seen", "reproduce"):
        if text := getattr(outcome, name):
            lines.append(f"  {name:<9} {escape(text)}")
    if len(group) > 1:
        others = (other.check.partition("[")[2].rstrip("]") for other in group[1:])
        lines.append(f"  also      {escape(' '.join(others))}")
    evidence = outcome.evidence if everything else outcome.evidence[-LAST_LINES:]
    lines += [f"  [dim]{escape(line)}[/]" for line in evidence]
    return "\n".join(lines) + "\n"
