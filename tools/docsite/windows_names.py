"""Whether what the documents name in the Windows drivers is there: ``python -m docsite.windows_names TREE``.

TREE is a checkout of virtio-win/kvm-guest-drivers-windows at the commit that the pages name.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from guestpv.explain import rows
from guestpv.explain.mentions import sources
from guestpv.explain.pages import REVISION

DOCS = Path(__file__).resolve().parents[2] / "docs" / "windows"
SOURCES = ("*.c", "*.cpp", "*.h", "*.inx", "*.txt", "*.props")
NAME = re.compile(r"[A-Za-z_]\w{4,}")


def claimed() -> Iterator[tuple[str, str]]:
    """(where it is said, name) of everything that looks like a name in the drivers."""
    for table in ("steps", "registers", "features"):
        for row in rows(table):
            for code in re.findall(r"`([^`]+)`", row["windows"]):
                yield f"{table}: {row['name']}", code.split("::")[-1]
    for row in rows("lifecycles"):
        for name in NAME.findall(row["windows"]):
            if "_" in name or re.search(r"[a-z][A-Z]", name):
                yield f"lifecycles: {row['model']}", name
    ours = set(NAME.findall("\n".join(sources().values())))
    for page in sorted(DOCS.glob("*.md")):
        for code in re.findall(r"`([A-Za-z_][\w:>-]*)`", page.read_text(encoding="utf-8")):
            name = re.split(r"::|->", code)[-1]
            if NAME.fullmatch(name) and name not in REVISION and name not in ours:
                yield f"docs/windows/{page.name}", name


def wrong(tree: Path) -> list[str]:
    """Names that are nowhere in the tree, and deviations whose function is not in their file."""
    files = {path: path.read_text(errors="replace") for pattern in SOURCES for path in tree.rglob(pattern)}
    known = set(NAME.findall("\n".join(files.values())))
    found = [f"{where}: no {name}" for where, name in claimed() if not set(NAME.findall(name)) <= known]
    for row in rows("deviations"):
        file, _, functions = row["where"].partition(" ")
        text = files.get(tree / file)
        for name in functions.split(", "):
            if text is None or not re.search(rf"\b{re.escape(name.split('::')[-1])}\b", text):
                found.append(f"deviations: {row['id']}: {file} has no {name}")
    return sorted(set(found))


def main(tree: Path) -> int:
    """Print what is wrong; 0 when nothing is."""
    head = subprocess.run(
        ["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30
    )
    if head.stdout.strip() not in ("", REVISION):
        print(f"{tree} is at {head.stdout.strip()[:12]}, the documents speak of {REVISION[:12]}")
    problems = wrong(tree)
    print("\n".join(problems) if problems else f"{len(set(claimed()))} names are there")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
