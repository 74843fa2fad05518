"""The reference pages of the documentation, made of the same tables.

``python -m guestpv.explain.pages docs/reference`` writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from . import Topic, rows, topics

HEAD: Final = (
    "<!-- Made of guestpv/explain/{name}.tsv: python -m guestpv.explain.pages docs/reference -->\n\n"
)
REVISION: Final = "fbcc19d763f92a8281abe364c7ea1de3de87e61d"
"""Commit of virtio-win/kvm-guest-drivers-windows that the tables speak of."""
_SOURCE: Final = (
    "[virtio-win/kvm-guest-drivers-windows]"
    f"(https://github.com/virtio-win/kvm-guest-drivers-windows/tree/{REVISION}) at commit `{REVISION[:12]}`."
)
WINDOWS: Final = f"The Windows column names functions of {_SOURCE}"
FILES: Final = f"Files and functions are those of {_SOURCE}"


def _table(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _of(kind: str, device: str = "") -> list[Topic]:
    return [topic for topic in topics().values() if topic.kind == kind and topic.device == device]


def steps() -> str:
    """What a driver does, step by step."""
    table = _table(
        ("step", "section", "what", "when it is wrong", "our code", "Windows"),
        (
            (
                f"`{topic.name}`",
                topic.section,
                topic.what,
                topic.breaks,
                " ".join(f"`{place}`" for place in topic.code),
                topic.windows,
            )
            for topic in _of("step")
        ),
    )
    return (
        "# Steps\n\nWhat a driver does, from finding the device to leaving it. `guestpv explain STEP` shows "
        f"one; paths are below `guestpv/`. {WINDOWS}\n\n{table}\n"
    )


def features() -> str:
    """Every feature bit, by device."""
    parts = [
        "# Features\n\n`guestpv explain FEATURE` shows one, with the places in our code that name it. "
        f"{WINDOWS}"
    ]
    for device in ("", "net", "blk", "balloon", "console"):
        table = _table(
            ("bit", "feature", "section", "needs", "what", "when it is wrong", "Windows"),
            (
                (
                    topic.details["bit"],
                    f"`{topic.name}`",
                    topic.section,
                    topic.details.get("needs", ""),
                    topic.what,
                    topic.breaks,
                    topic.windows,
                )
                for topic in sorted(_of("feature", device), key=lambda one: int(one.details["bit"]))
            ),
        )
        parts.append(f"## {device or 'Every device'}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def registers() -> str:
    """The registers of the common configuration, and the two beside it."""
    table = _table(
        ("register", "offset", "width", "driver", "section", "what", "when it is wrong", "Windows"),
        (
            (
                f"`{topic.name}`",
                topic.details.get("offset", ""),
                topic.details.get("width", ""),
                topic.details.get("driver", ""),
                topic.section,
                topic.what,
                topic.breaks,
                topic.windows,
            )
            for topic in _of("register")
        ),
    )
    return (
        "# Registers\n\nThe common configuration structure (4.1.4.3), the ISR and the doorbell. "
        f"`guestpv explain REGISTER` shows one. {WINDOWS}\n\n{table}\n"
    )


def deviations() -> str:
    """What shipping Windows drivers do otherwise than the standard says, or than one expects."""
    table = _table(
        ("", "driver", "what", "requirements", "where", "what it means", "told"),
        (
            (
                row["id"],
                row["driver"],
                row["what"],
                " ".join(f"`{one}`" for one in row["requirements"].split() if one != "-") or "none",
                f"`{row['where'].replace(' ', '` `', 1)}`",
                row["consequence"],
                row["told"],
            )
            for row in rows("deviations")
        ),
    )
    return (
        "# Deviations of the Windows drivers\n\n**By reading only.** Nothing here was confirmed on a running "
        f"Windows guest. {FILES} Before calling one of them a bug, attach a guest to the strict device "
        "([how](../windows/index.md#a-windows-guest-on-the-strict-device)) and look whether its report says "
        "so: *told* is whether it does when a test of ours acts like the driver.\n\n"
        f"{table}\n"
    )


PAGES: Final[dict[str, Callable[[], str]]] = {
    "steps": steps,
    "features": features,
    "registers": registers,
    "deviations": deviations,
}
"""Page -> what makes its text."""


def write(directory: Path) -> list[Path]:
    """Write every page to ``directory``; returns the files."""
    written = []
    for name, make in PAGES.items():
        path = directory / f"{name}.md"
        path.write_text(HEAD.format(name=name) + make(), encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    write(Path(sys.argv[1]))
