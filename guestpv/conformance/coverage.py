"""How much of the standard the suite checks."""

from __future__ import annotations

from typing import Any

from . import ledger
from .catalogue import SIDES, Side, observable


def of(side: Side) -> dict[str, Any]:
    """``{"observable": N, "checked": M, "areas": {area: {"observable", "checked"}}}`` of one side.

    A requirement counts as checked only if a peer that breaks it is caught; see ``ledger``.
    """
    entries = ledger.load(side)
    areas: dict[str, dict[str, int]] = {}
    for row in observable(side).values():
        area = areas.setdefault(row.area, {"observable": 0, "checked": 0})
        area["observable"] += 1
        area["checked"] += bool(entries[row.id].check)
    return {
        "observable": sum(area["observable"] for area in areas.values()),
        "checked": sum(area["checked"] for area in areas.values()),
        "areas": areas,
    }


def coverage() -> dict[str, Any]:
    """Both sides."""
    return {side: of(side) for side in SIDES}


def unchecked(side: Side) -> dict[str, str]:
    """Requirement -> why nothing checks it."""
    return {entry.id: entry.reason for entry in ledger.load(side).values() if not entry.check}
