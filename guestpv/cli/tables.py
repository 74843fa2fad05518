"""Tables and consoles that read well on 80 columns and in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDE = 4096
"""Columns assumed where nobody looks: nothing is wrapped or cut in a pipe or a file."""


def console() -> Console:
    """The standard output; colours only where a person looks."""
    return Console(highlight=False, emoji=False, markup=False, width=None if sys.stdout.isatty() else WIDE)


def table(headings: Sequence[str], rows: Iterable[Sequence[str | Text]], right: str = "") -> Table:
    """A table without lines, whose cells fold instead of losing their ends.

    Args:
        headings: of the columns.
        rows: a cell for every column.
        right: headings, separated by blanks, of columns that are aligned to the right.
    """
    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        justify = "right" if heading in right.split() else "left"
        result.add_column(heading, overflow="fold", justify=justify)  # type: ignore[arg-type]
    for row in rows:
        result.add_row(*row)
    return result


def pairs(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names and values in two columns."""
    result = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows:
        result.add_row(name, value)
    return result


def indented(text: str | Text | Table, by: int = 2) -> Padding:
    """Something moved to the right, also where it wraps."""
    return Padding(text, (0, 0, 0, by), expand=False)
