"""The life of a Windows driver beside ours, drawn: ``python -m guestpv.explain.lifecycle DIRECTORY``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from ..trace.svg import Drawing
from . import rows

MODELS: Final = {
    "wdf": ("WDF (Balloon)", "a KMDF driver"),
    "ndis": ("NDIS miniport (NetKVM)", "an NDIS miniport"),
    "storport": ("StorPort miniport (viostor)", "a StorPort miniport"),
}
"""Model -> heading of its column, and what it is in a sentence."""

LEFT, MIDDLE, RIGHT, WIDTH = 24, 570, 826, 1206
TOP, ROW, HEAD = 64, 50, 40


def picture(model: str) -> str:
    """The life of one model as SVG: its callbacks, the steps of virtio, our functions."""
    phases = [row for row in rows("lifecycles") if row["model"] == model]
    heading, kind = MODELS[model]
    page = Drawing(WIDTH)
    page.text(LEFT, HEAD, heading, size=15, bold=True, sans=True)
    page.text(MIDDLE, HEAD, "virtio", size=15, bold=True, sans=True)
    page.text(RIGHT, HEAD, "guestpv", size=15, bold=True, sans=True)
    for number, row in enumerate(phases):
        y = TOP + number * ROW
        page.box(LEFT - 8, y, MIDDLE - LEFT - 24, ROW - 8, fill="placed", radius=5)
        page.text(LEFT, y + 17, row["callback"], size=12.5, bold=True)
        page.text(LEFT, y + 34, row["windows"], size=11)
        if row["irql"] != "-":
            page.text(MIDDLE - 40, y + 17, row["irql"], size=10.5, colour="quiet", anchor="end")
        page.text(MIDDLE, y + 25, row["phase"], size=12.5, sans=True)
        if row["code"] == "-":
            page.text(RIGHT, y + 25, "no counterpart", size=11, colour="quiet")
            continue
        page.box(RIGHT - 8, y, WIDTH - RIGHT - 8, ROW - 8, fill="used", radius=5)
        places = row["code"].split()
        for line, place in enumerate(places):
            page.text(RIGHT, y + (25 if len(places) == 1 else 17 + 17 * line), place, size=11)
    description = "; ".join(f"{row['phase']}: {row['callback']}" for row in phases)
    return page.svg(
        TOP + len(phases) * ROW + 8, f"The life of {kind} beside a driver of guestpv", description
    )


def write(directory: Path) -> list[Path]:
    """Draw every model into ``directory``; returns the files."""
    written = []
    for model in MODELS:
        path = directory / f"{model}.svg"
        path.write_text(picture(model), encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    write(Path(sys.argv[1]))
