"""The requirement catalogue: one testable statement of the standard a row (``spec/*-requirements.tsv``)."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Final, Literal

from ..errors import UsageError

Side = Literal["driver", "device"]
SIDES: Final[tuple[Side, ...]] = ("driver", "device")
BINDING: Final = ("MUST", "MUST NOT", "RULE")
"""Levels that a conforming implementation has no choice about; RULE is structure given without a keyword."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One row of the catalogue.

    Attributes:
        id: ``DEV-STATUS-01``; never changes.
        section: number and titles in the standard.
        clause_label: label of the clause in the standard's sources.
        level: MUST, MUST NOT, SHOULD, SHOULD NOT, MAY or RULE.
        area: common, pci, split, packed, net, blk, balloon, ...
        requirement: the statement.
        check: hint how to observe it; begins with ``none`` where nobody can.
        since: version of the standard that has it first.
        scope: core, rare, admin or legacy.
    """

    id: str
    section: str
    clause_label: str
    level: str
    area: str
    requirement: str
    check: str
    since: str
    scope: str

    @property
    def observable(self) -> bool:
        """Whether the suite has to check it: binding, in the core of the standard, and visible."""
        return self.scope == "core" and self.level in BINDING and not self.check.startswith("none")

    @property
    def number(self) -> str:
        """Section number alone: ``2.1.2``."""
        return self.section.split(" ", 1)[0]


@functools.cache
def load(side: Side) -> dict[str, Requirement]:
    """The catalogue of one side, by id, in its order."""
    text = files("guestpv.spec").joinpath(f"{side}-requirements.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return {row["id"]: Requirement(**row) for row in rows}


def find(requirement: str) -> Requirement:
    """The row of an id of either side.

    Raises:
        UsageError: there is none.
    """
    for side in SIDES:
        if requirement in load(side):
            return load(side)[requirement]
    raise UsageError(f"no requirement is called {requirement}")


def observable(side: Side) -> dict[str, Requirement]:
    """The rows that coverage is counted over."""
    return {row.id: row for row in load(side).values() if row.observable}


def matches(requirement: str, patterns: Sequence[str]) -> bool:
    """Whether an id is among the patterns: shell patterns, or whole leading words (``DRV-SPLIT``)."""
    return any(
        fnmatchcase(requirement, pattern) or requirement.startswith(f"{pattern}-") for pattern in patterns
    )


def patterns(text: str, known: Iterable[str] = ()) -> list[str]:
    """Split ``DRV-SPLIT,DEV-BLK-0*``.

    Args:
        text: patterns, separated by commas; nothing selects everything.
        known: ids of which every pattern has to match one; the whole catalogue where none are given.

    Raises:
        UsageError: a pattern matches nothing.
    """
    chosen = [word.strip().upper() for word in text.split(",") if word.strip()] or ["*"]
    ids = list(known) or [id for side in SIDES for id in load(side)]
    for pattern in chosen:
        if not any(matches(id, [pattern]) for id in ids):
            raise UsageError(
                f"no requirement matches {pattern!r}", hint="such as DEV-PCI, DEV-SPLIT-0*, DRV-BLK-12"
            )
    return chosen
