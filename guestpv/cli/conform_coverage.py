"""``guestpv conform coverage``: how much of the standard the suite checks."""

from __future__ import annotations

from typing import Any

import click

from .report import Report, reporting


@click.command(epilog="\b\nExample:\n  guestpv conform coverage --missing")
@click.option("--missing", is_flag=True, help="Also name what is not checked, and why.")
@reporting
def coverage(report: Report, missing: bool) -> None:
    """Show how many of the standard's observable requirements the suite checks.

    Observable are the MUST, MUST NOT and structural rules of the standard's core that can be seen at
    all. One counts as checked only if a peer that breaks it on purpose is caught.
    """
    from ..conformance import coverage as covered
    from ..conformance.catalogue import SIDES

    data = covered.coverage()
    reasons: dict[str, dict[str, str]] = {}
    if missing:
        reasons.update((side, covered.unchecked(side)) for side in SIDES)
    report.done(data | ({"missing": reasons} if missing else {}), lambda: show(data, reasons))


def show(data: dict[str, Any], reasons: dict[str, dict[str, str]]) -> None:
    """A table of areas, and what is missing."""
    from rich.table import Table

    from .tables import console

    table = Table("area", box=None)
    for side in data:
        table.add_column(side, justify="right")
        table.add_column("")
    areas = list(dict.fromkeys(area for side in data.values() for area in side["areas"]))
    for area in [*areas, "all"]:
        cells = []
        for side in data.values():
            counts = side if area == "all" else side["areas"].get(area)
            cells += _cells(counts) if counts else ["", ""]
        table.add_row(area, *cells, style="bold" if area == "all" else "")
    out = console()
    out.print(table)
    for side, rows in reasons.items():
        out.print(f"\n{side}: {len(rows)} not checked", style="bold")
        for id, reason in rows.items():
            out.print(f"  {id:<16} {reason}")


def _cells(counts: dict[str, int]) -> list[str]:
    checked, all_of_them = counts["checked"], counts["observable"]
    return [f"{checked}/{all_of_them}", f"{checked / all_of_them:.0%}"]
