"""The benchmarks' tables in a document: between ``<!-- tools/bench NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .report import Row

COLUMNS = {
    "blk": (
        ("4 KiB random read", "guestpv IOPS", "libblkio IOPS", "ratio", "CPU s per million", "ratio"),
        ("notifications per read", "libblkio's", "runs, discarded"),
    ),
    "net": (("frames", "guestpv, a second", "DPDK virtio-user", "ratio", "runs, discarded"), ()),
    "ring": (
        ("one buffer, or all of the burst of 1", "ns", "over", "ratio", "at most", "runs, discarded"),
        (),
    ),
}
"""Benchmark -> the heads of its columns."""


def rate(value: float) -> str:
    """Operations a second, to three digits."""
    scale, unit = (1e6, "M") if value >= 1e6 else (1e3, "k")
    return f"{value / scale:.3g} {unit}"


def cost(row: Row) -> list[str]:
    """One line of the rings' table."""
    limit = "" if row.limit is None else f"{row.limit:g}"
    counts = f"{row.runs}, {row.discarded}"
    return [
        row.case,
        f"{row.value:.3g}" if row.value < 1000 else f"{row.value:.0f}",
        row.peer or "",
        f"**{row.ratio:.3g}**",
        limit,
        counts,
    ]


def cells(name: str, rows: dict[str, Row]) -> list[str]:
    """One line of the table from the metrics of one case."""
    first = rows["iops" if name == "blk" else "pps"]
    assert first.ratio is not None
    assert first.peer_value is not None
    line = [first.case, rate(first.value), rate(first.peer_value), f"**{first.ratio:.2f}**"]
    if name == "blk":
        cost, kicks = rows["cpu_s_per_million"], rows["kicks_per_op"]
        line += [f"{cost.value:.3g}", f"{cost.ratio:.2f}", f"{kicks.value:.2g}", f"{kicks.peer_value:.2g}"]
    return [*line, f"{first.runs}, {first.discarded}"]


def table(name: str, rows: Sequence[Row]) -> str:
    """The rows that compare, as a Markdown table."""
    heads = [head for part in COLUMNS[name] for head in part]
    compared = [row for row in rows if row.peer is not None]
    by_case: dict[str, dict[str, Row]] = {}
    for row in compared:
        by_case.setdefault(row.case, {})[row.metric] = row
    body = map(cost, compared) if name == "ring" else (cells(name, found) for found in by_case.values())
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(line)} |".replace(" --- ", "---") for line in lines)


def replace(path: Path, name: str, rows: Sequence[Row]) -> None:
    """Put the new table into the document.

    Raises:
        ValueError: the document has no place for it.
    """
    begin, end = f"<!-- tools/bench {name} -->\n", "\n<!-- end -->"
    text = path.read_text()
    new, found = re.subn(
        f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + table(name, rows) + end, text
    )
    if found != 1:
        raise ValueError(f"{path} has not one place marked {begin.strip()} ... {end.strip()}")
    path.write_text(new)
