"""A balloon for people: what it is, and the line that lives while it is up."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from ..drivers.balloon_queues import QUIRKS
from .counters import amount
from .views import function_rows

PAGE = 4096


def size(pages: int) -> str:
    """An amount of 4096-byte pages: ``size(256)`` is ``1.0 MiB``."""
    return amount(pages * PAGE, "B", 1024)


def line(status: dict[str, Any]) -> str:
    """Target, what is in the balloon, what the host sees, and how short memory is."""
    memory = status["memory"]
    pressure = memory["pressure_avg10"]
    parts = [
        f"target {size(status['target_pages'])}",
        f"actual {size(status['pages'])}",
        f"host sees {size(status['actual_pages'])}",
        f"free {amount(memory['available_bytes'], 'B', 1024)}",
    ]
    if pressure is not None:
        parts.append(f"pressure {pressure:g} %")
    return "  ".join(parts)


def describe(status: dict[str, Any]) -> list[tuple[str, str]]:
    """What is up and how it stands, as names and values."""
    pool, memory = status["pool"], status["memory"]
    quirk = QUIRKS[status["numbering"]]
    numbering = f" (quirk: {quirk})" if quirk else ""
    rows = [
        *function_rows(status, numbering),
        (
            "balloon",
            f"{size(status['pages'])} of {size(status['target_pages'])} wanted; "
            f"the host sees {size(status['actual_pages'])}",
        ),
        (
            "pool",
            f"{amount(pool['huge_bytes'], 'B', 1024)} in huge pages, "
            f"{amount(pool['small_bytes'], 'B', 1024)} in single pages, "
            f"{size(status['free_pages'])} not given",
        ),
        (
            "memory",
            f"{amount(memory['available_bytes'], 'B', 1024)} available, "
            f"{amount(memory['keep_free_bytes'], 'B', 1024)} stay free",
        ),
    ]
    if status["held"]:
        rows.append(("held", status["held"]))
    return rows


class BalloonLine:
    """One line at the bottom of the terminal, renewed with every ``update``."""

    def __init__(self) -> None:
        from rich.live import Live

        from .tables import console

        self._live = Live(console=console(), auto_refresh=False, transient=True)

    def update(self, status: dict[str, Any]) -> None:
        """Show how it stands."""
        from rich.text import Text

        self._live.update(Text(line(status), no_wrap=True, overflow="ellipsis"), refresh=True)

    def say(self, event: str) -> None:
        """Print a line above it."""
        self._live.console.print(event)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
