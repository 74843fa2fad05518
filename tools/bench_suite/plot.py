"""The ratios of a report as a picture: a bar a case, ours over the peer's; a line where both are equal."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .report import Row

RATES = ("iops", "pps")
WIDTH, NAME, BAR = 900, 280, 360
LINE, TOP = 24, 64
COLOURS = {True: "#2a7f62", False: "#b5553c"}
"""At least as fast as the peer, or not."""


def short(value: float) -> str:
    """1234567 is ``1.23 M``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def picture(title: str, machine: str, rows: Sequence[Row]) -> str:
    """An SVG of the rates among ``rows``."""
    shown = [row for row in rows if row.metric in RATES and row.ratio and row.peer_value]
    widest = max([1.25, *(row.ratio or 0 for row in shown)])
    scale = BAR / widest
    height = TOP + LINE * len(shown) + 30
    one = NAME + scale
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="12" y="42" fill="#666666" font-size="12">{escape(machine)}</text>',
    ]
    for number, row in enumerate(shown):
        assert row.ratio is not None
        assert row.peer_value is not None
        y = TOP + LINE * number
        figures = f"{row.ratio:.2f} ({short(row.value)} : {short(row.peer_value)})"
        parts += [
            f'<text x="{NAME - 8}" y="{y + 13}" text-anchor="end">{escape(row.case)}</text>',
            f'<rect x="{NAME}" y="{y}" width="{scale * row.ratio:.1f}" height="{LINE - 7}" '
            f'fill="{COLOURS[row.ratio >= 1]}"/>',
            f'<text x="{NAME + BAR + 10}" y="{y + 13}">{figures}</text>',
        ]
    bottom = TOP + LINE * len(shown)
    peer = escape(shown[0].peer or "") if shown else ""
    parts += [
        f'<line x1="{one:.1f}" y1="{TOP - 6}" x2="{one:.1f}" y2="{bottom}" stroke="#222222" '
        'stroke-dasharray="3 3"/>',
        f'<text x="{one:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#222222">as fast as {peer}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def write(path: Path, title: str, machine: str, rows: Sequence[Row]) -> None:
    """The picture as a file."""
    path.write_text(picture(title, machine, rows))
