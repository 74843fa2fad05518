"""``guestpv blk``: the verbs of a disk."""

from __future__ import annotations

from typing import Final

import click

from .main import LazyGroup

VERBS: Final = {
    "info": ("blk_info:info", "Show what a disk is and what it takes."),
    "read": ("blk_copy:read", "Read a disk into a file."),
    "write": ("blk_copy:write", "Write a file to a disk."),
    "copy": ("blk_copy:copy", "Copy between disks and files."),
    "verify": ("blk_copy:verify", "Compare a disk with a file."),
    "discard": ("blk_ranges:discard", "Give up the content of a range."),
    "zero": ("blk_ranges:zero", "Make a range read as zeroes."),
    "bench": ("blk_bench:bench", "Measure how fast a disk answers."),
    "up": ("blk_up:up", "Drive a disk as a block device of this machine."),
    "status": ("blk_status:status", "Show the disks that are up, with counters."),
    "down": ("blk_down:down", "End a disk and give its function back."),
}


@click.group(
    cls=LazyGroup, verbs=VERBS, epilog="\b\nExample:\n  guestpv blk up --detach && mkfs.ext4 /dev/nbd0"
)
def blk() -> None:
    """Drive a virtio disk from user space: as a block device of this machine, or directly."""
