"""Events as lines of a terminal: a sequence diagram that grows downwards."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.text import Text

from .record import LANES, Event

ARROWS: Final = {
    ("driver", "ring"): "├────▶│     │",
    ("ring", "driver"): "│◀────┤     │",
    ("driver", "device"): "├─────┼────▶│",
    ("device", "driver"): "│◀────┼─────┤",
    ("device", "ring"): "│     │◀────┤",
    ("driver", "driver"): "●     │     │",
}
HEADING: Final = "driver ring device"
STYLES: Final = {
    "doorbell": "bold red",
    "kick": "bold red",
    "interrupt": "bold magenta",
    "decision": "yellow",
    "add": "green",
    "publish": "green",
    "used": "cyan",
    "reap": "cyan",
    "fence": "dim",
    "poll": "dim",
    "config-read": "dim",
    "config-write": "dim",
}


class Live:
    """Prints events as they come.

    Args:
        console: where to.
        space: show accesses to PCI configuration space, too.
    """

    def __init__(self, console: Console, *, space: bool = False) -> None:
        self._console = console
        self._space = space
        self._console.print(Text(f"{'ms':>10}  {HEADING}", style="bold"), soft_wrap=True)

    def __call__(self, event: Event) -> None:
        """One more line."""
        if not self._space and event.kind.startswith("config-"):
            return
        self._console.print(line(event), soft_wrap=True)


def line(event: Event) -> Text:
    """An event in one line: when, from where to where, whether it is an exit, what, and the section."""
    text = Text(f"{event.nanoseconds / 1e6:10.3f}  ")
    text.append(ARROWS[LANES[event.kind]], style="dim")
    text.append("  exit  " if event.exits else "        ", style="red")
    text.append(event.text if "queue" not in event.facts else f"q{event.facts['queue']} {event.text}")
    text.stylize(STYLES.get(event.kind, ""), start=text.plain.index(event.text))
    if event.section:
        text.append(f"  [{event.section}]", style="dim")
    return text
