"""Which observable requirement is checked by what, and why not where it is not.

``ledger-device.tsv`` and ``ledger-driver.tsv`` have a row for each observable requirement: the check, or a
reason. A requirement has a check there only if a peer that breaks it on purpose is caught by that check.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from .catalogue import Side, observable


@dataclass(frozen=True, slots=True)
class Entry:
    """One row.

    Attributes:
        id: the requirement.
        check: names of the checks that catch a peer breaking it, separated by spaces; empty without one.
        reason: why there is none.
    """

    id: str
    check: str
    reason: str


def load(side: Side) -> dict[str, Entry]:
    """The ledger of one side, as it was published with the package."""
    text = files(__package__).joinpath(f"ledger-{side}.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return {id: Entry(id, check, reason) for id, check, reason in rows}


def render(side: Side, checks: dict[str, list[str]], reasons: dict[str, str]) -> str:
    """The ledger's text.

    Args:
        side: of the catalogue.
        checks: requirement -> checks that caught a peer breaking it.
        reasons: requirement -> why it has none.
    """
    lines = ["id\tcheck\treason"]
    for id in observable(side):
        found = " ".join(sorted(checks.get(id, ())))
        lines.append(f"{id}\t{found}\t{'' if found else reasons.get(id) or 'no check yet'}")
    return "\n".join(lines) + "\n"
