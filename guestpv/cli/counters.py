"""Counters for people: amounts, rates, and the line that lives while a link is up."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self


def amount(value: float, unit: str, step: int = 1000) -> str:
    """A number of three or four digits with a prefix: ``amount(1536, "B", 1024)`` is ``1.5 KiB``."""
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if step == 1024 else ("", "k", "M", "G", "T")
    index = 0
    while value >= step and index < len(prefixes) - 1:
        value /= step
        index += 1
    number = f"{value:.0f}" if index == 0 else f"{value:.1f}"
    return f"{number} {prefixes[index]}{unit}".rstrip()


class Counters:
    """One line at the bottom of the terminal, renewed with every ``update``."""

    def __init__(self, status: dict[str, Any]) -> None:
        from rich.live import Live

        from .tables import console

        self._last = status
        self._when = time.monotonic()
        self._live = Live(console=console(), auto_refresh=False, transient=True)

    def update(self, status: dict[str, Any]) -> None:
        """Show the counters, and the rates since the last update."""
        from rich.text import Text

        now = time.monotonic()
        text = line(self._last, status, max(now - self._when, 0.001))
        self._last, self._when = status, now
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

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


def line(before: dict[str, Any], after: dict[str, Any], seconds: float) -> str:
    """Both ways in at most 80 columns: packets, bits a second, and what was dropped."""
    ways = []
    for way in ("rx", "tx"):
        rate = (after[way]["bytes"] - before[way]["bytes"]) * 8 / seconds
        dropped = f" drop {after[way]['dropped']}" if after[way]["dropped"] else ""
        ways.append(f"{way} {after[way]['packets']} pkt {amount(rate, 'bit/s')}{dropped}")
    return f"{after['name']} {after['link']}  " + "  ".join(ways)
