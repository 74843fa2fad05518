"""A report as pictures.

Ratios: a bar a case, ours over the peer's, and a line where both are equal. Distributions: a curve a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from .report import CURVE, Row

RATES = ("iops", "pps", "throughput")
WIDTH, NAME, BAR = 900, 280, 360
LINE, TOP = 24, 64
COLOURS = {True: "#2a7f62", False: "#b5553c"}
"""At least as fast as the peer, or not."""

Drawing = Callable[[str, str, Sequence[Row]], str]


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


SHADES = ("#2b6cb0", "#2a7f62", "#b5553c", "#7b4fa3", "#8a6d1f", "#444444")
PANEL, LEFT, GAP = 250, 70, 60


def curves(title: str, machine: str, rows: Sequence[Row]) -> str:
    """An SVG of the distributions among ``rows``, one panel for what stands before the slash of their cases.

    Across: microseconds, logarithmic. Up: the share of requests that took no longer.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.metric.startswith(CURVE):
            panel, _, name = row.case.rpartition("/")
            point = (row.value, float(row.metric.removeprefix(CURVE)))
            panels.setdefault(panel, {}).setdefault(name, []).append(point)
    values = [x for lines in panels.values() for points in lines.values() for x, _ in points]
    low, high = (
        (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if values else (0, 1)
    )
    wide = WIDTH - LEFT - 190

    def across(value: float) -> float:
        return LEFT + wide * (math.log10(value) - low) / max(high - low, 1)

    height = TOP + (PANEL + GAP) * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="12" y="42" fill="#666666" font-size="12">{escape(machine)}</text>',
    ]
    for number, (panel, lines) in enumerate(panels.items()):
        top = TOP + (PANEL + GAP) * number
        bottom = top + PANEL
        parts.append(f'<text x="{LEFT + 8}" y="{top + 16}" font-weight="bold">{escape(panel)}</text>')
        for exponent in range(low, high + 1):
            x = across(10.0**exponent)
            parts += [
                f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>',
                f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{short(10.0**exponent)} us</text>',
            ]
        for share in (0, 25, 50, 75, 100):
            y = bottom - PANEL * share / 100
            parts += [
                f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + wide}" y2="{y:.1f}" stroke="#dddddd"/>',
                f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share} %</text>',
            ]
        for which, (name, points) in enumerate(lines.items()):
            shade = SHADES[which % len(SHADES)]
            path = " ".join(f"{across(x):.1f},{bottom - PANEL * share / 100:.1f}" for x, share in points)
            x, y = LEFT + wide + 12, top + 16 + 20 * which
            parts += [
                f'<polyline points="{path}" fill="none" stroke="{shade}" stroke-width="2"/>',
                f'<text x="{x}" y="{y}" fill="{shade}">{escape(name)}</text>',
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(path: Path, title: str, machine: str, rows: Sequence[Row], draw: Drawing = picture) -> None:
    """The picture as a file."""
    path.write_text(draw(title, machine, rows))
