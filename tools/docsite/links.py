"""Links in Markdown: which there are, and whether what they lead to inside of the repository is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
EXTERNAL = re.compile(r"^[a-z][a-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class Link:
    """A link in a page: ``target`` as it is written, in line ``line`` of ``page``."""

    page: Path
    line: int
    target: str


def links(page: Path) -> Iterator[Link]:
    """Links and images of a page, without those in code."""
    text = page.read_text(encoding="utf-8")
    for pattern in (FENCE, CODE):
        text = pattern.sub(
            lambda match: re.sub(r"[^\n]", " ", match[0]) if "](" in match[0] else match[0], text
        )
    for match in LINK.finditer(text):
        yield Link(page, text.count("\n", 0, match.start()) + 1, match[1])


def anchors(page: Path) -> set[str]:
    """What can stand behind ``#``: headings as GitHub and Python-Markdown name them, and explicit ids."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set(re.findall(r"""(?:id|name)=["']([^"']+)["']""", text))
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*\s*$", text, re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower().replace("`", "")).strip().replace(" ", "-")
        number = seen.get(name, 0)
        seen[name] = number + 1
        found |= {name, f"{name}-{number}", f"{name}_{number}"} if number else {name}
    return found


def pages(root: Path) -> list[Path]:
    """Every Markdown page of the repository: in its root, and below docs."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def broken(root: Path) -> list[str]:
    """Every link to something in the repository that is not there. External ones are not looked at."""
    found = []
    for page in pages(root):
        for link in links(page):
            if EXTERNAL.match(link.target):
                continue
            path, _, anchor = link.target.partition("#")
            target = (page.parent / path).resolve() if path else page
            where = f"{page.relative_to(root)}:{link.line}: {link.target}"
            if not target.exists():
                found.append(f"{where}: no such file")
            elif not target.is_relative_to(root):
                found.append(f"{where}: outside of the repository")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                found.append(f"{where}: no such heading")
    return found
