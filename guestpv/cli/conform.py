"""``guestpv conform``: the conformance suite."""

from __future__ import annotations

from typing import Final

import click

from .main import LazyGroup

VERBS: Final = {
    "device": ("conform_device:device", "Check a device against the standard."),
    "driver": ("conform_driver:driver", "Check a driver against the standard."),
    "coverage": ("conform_coverage:coverage", "Show how much of the standard is checked."),
}


@click.group(
    cls=LazyGroup, verbs=VERBS, epilog="\b\nExample:\n  guestpv conform device loopback:blk --html blk.html"
)
def conform() -> None:
    """Check devices and drivers against the standard, requirement by requirement."""
