"""Where our code names something: the functions, found in the sources as they are installed."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PACKAGE: Final = Path(__file__).parents[1]
SKIPPED: Final = ("explain/", "spec/")
"""Below the package: the data itself."""

_C_FUNCTION: Final = re.compile(r"^[a-z][\w\s*]*?\b(\w+)\([^;]*$")


@functools.cache
def sources() -> dict[str, str]:
    """Every Python and C source of ours below the package, by its path there."""
    found = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "core").glob("*.[ch]")]):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(SKIPPED) and not path.name.startswith("_core") and path.name != "_observing.c":
            found[name] = path.read_text(encoding="utf-8")
    return found


def mentions(word: str, below: tuple[str, ...] = ("",)) -> tuple[str, ...]:
    """``file:function`` of every place that names ``word``.

    Args:
        word: an identifier, or a requirement's id; whole words only.
        below: how the paths of the files begin.
    """
    whole = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")
    found: dict[str, None] = {}
    for name, text in sources().items():
        if name.startswith(below) and word in text:
            lines = [number for number, line in enumerate(text.splitlines(), 1) if whole.search(line)]
            spans = _python(text) if name.endswith(".py") else _c(text)
            found |= dict.fromkeys(f"{name}:{_holder(spans, line)}".rstrip(":") for line in lines)
    return tuple(found)


def names(path: str) -> set[str]:
    """Every function, method and class in a source, by qualified name."""
    text = sources().get(path) or (PACKAGE / path).read_text(encoding="utf-8")
    return {name for _, _, name in (_python(text) if path.endswith(".py") else _c(text))}


def _holder(spans: list[tuple[int, int, str]], line: int) -> str:
    """The innermost of the functions round a line."""
    inside = [(end - start, name) for start, end, name in spans if start <= line <= end]
    return min(inside)[1] if inside else ""


@functools.lru_cache(256)
def _python(text: str) -> list[tuple[int, int, str]]:
    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[int, int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                first = min([child.lineno, *(one.lineno for one in child.decorator_list)])
                yield first, child.end_lineno or child.lineno, name
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, prefix)

    return list(walk(ast.parse(text), ""))


@functools.lru_cache(64)
def _c(text: str) -> list[tuple[int, int, str]]:
    """Functions begin at the left edge, and end with a brace there."""
    found, start, name = [], 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := _C_FUNCTION.match(line):
            start, name = number, match[1]
        elif line == "}" and name:
            found.append((start, number, name))
            name = ""
    return found
