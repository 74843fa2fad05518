"""Code in the pages of the documentation, taken out so that tests run it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of Python.

    Attributes:
        heading: the heading of the section that it stands in.
        code: its text.
        printed: the text block right below it, which is what it prints; None where there is none.
        line: number of its first line in the page.
    """

    heading: str
    code: str
    printed: str | None
    line: int


def blocks(page: Path, part: str = "") -> Iterator[Block]:
    """Python blocks of a page, in order; of the part with this second-level heading only, if one is given."""
    lines = page.read_text(encoding="utf-8").splitlines()
    heading = here = ""
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("#"):
            heading = line.lstrip("# ")
            here = heading if line.startswith("## ") else here
        elif line.startswith("```"):
            end = lines.index("```", at)
            text = "\n".join(lines[at:end])
            first, at = at + 1, end + 1
            if line == "```python" and part in ("", here):
                printed = None
                if at < len(lines) and lines[at] == "```text":
                    stop = lines.index("```", at + 1)
                    printed = "\n".join(lines[at + 1 : stop])
                yield Block(heading, text, printed, first)


def run(block: Block, names: dict[str, object], page: Path, *changes: tuple[str, str]) -> str:
    """Run a block among ``names``, texts in it replaced; returns what it printed, less the last newline."""
    code = block.code
    for old, new in changes:
        code = code.replace(old, new)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        # Line numbers of a failure are those of the page.
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)
    return out.getvalue().rstrip("\n")
