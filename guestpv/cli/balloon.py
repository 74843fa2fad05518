"""``guestpv balloon``: the verbs of a memory balloon."""

from __future__ import annotations

from typing import Final

import click

from .main import LazyGroup

VERBS: Final = {
    "up": ("balloon_up:up", "Give memory to the host as it asks for it."),
    "status": ("balloon_status:status", "Show the balloons that are up."),
    "down": ("balloon_down:down", "Take all memory back and give the function back."),
}


@click.group(
    cls=LazyGroup, verbs=VERBS, epilog="\b\nExample:\n  guestpv balloon up --detach && guestpv balloon status"
)
def balloon() -> None:
    """Drive a virtio memory balloon from user space: lend this guest's memory to the host."""
