"""``guestpv net``: the verbs of a network device."""

from __future__ import annotations

from typing import Final

import click

from .main import LazyGroup

VERBS: Final = {
    "up": ("net_up:up", "Drive a network device as a link of this machine."),
    "status": ("net_status:status", "Show the links that are up, with counters."),
    "top": ("net_top:top", "Watch what the queues of a link do."),
    "capture": ("net_capture:capture", "Write the frames of a link into a file for Wireshark."),
    "down": ("net_down:down", "End a link and give its function back."),
}


@click.group(
    cls=LazyGroup, verbs=VERBS, epilog="\b\nExample:\n  guestpv net up --detach && guestpv net status"
)
def net() -> None:
    """Drive a virtio network device from user space, as a network link of this machine."""
