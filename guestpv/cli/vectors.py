"""``guestpv vectors``: what a driver writes, byte for byte, as files for other drivers' tests."""

from __future__ import annotations

from typing import Final

import click

from .main import LazyGroup

VERBS: Final = {
    "list": ("vectors_export:list_vectors", "Show the vectors that there are."),
    "export": ("vectors_export:export", "Write them to a directory, with their schema."),
}


@click.group(cls=LazyGroup, verbs=VERBS, epilog="\b\nExample:\n  guestpv vectors export vectors")
def vectors() -> None:
    """Test vectors for drivers in other languages: rings, registers and requests, byte for byte."""
