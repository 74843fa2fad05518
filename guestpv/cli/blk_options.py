"""Options and words that the verbs of a disk share; imports nothing heavy, for help is to be quick."""

from __future__ import annotations

import re
import sys
from typing import Any, Final

import click

from ..errors import Refused
from .report import Report

UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "S": 512}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTS]?)(?:I?B)?", re.IGNORECASE)


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes, with K, M, G or T (powers of 1024) or s (512-byte sectors): ``4096``, ``1.5G``, ``16s``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """From text to bytes."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is no size: 4096, 64K, 1.5G, or 16s for sectors", param, ctx)
        size = float(match[1]) * UNITS[match[2].upper()]
        if size != int(size):
            self.fail(f"{value!r} is no whole number of bytes", param, ctx)
        return int(size)


SIZE: Final = Size()

RANGE: Final = (
    click.option("--offset", type=SIZE, default=0, show_default=True, help="Where on the disk to begin."),
    click.option("--length", type=SIZE, help="How much.  [default: to the end]"),
)
YES: Final = click.option("--yes", is_flag=True, help="Do not ask.")


def ranged(command: Any) -> Any:
    """Add the options of a range."""
    for option in reversed(RANGE):
        command = option(command)
    return command


def consent(report: Report, yes: bool, what: str) -> None:
    """Ask before something is destroyed.

    Raises:
        Refused: nobody is there to ask, or the answer was no.
    """
    if yes:
        return
    if report.as_json or not sys.stdin.isatty():
        raise Refused(f"this would {what}", hint="add --yes if that is what you want")
    if not click.confirm(f"This will {what}. Go on?", err=True):
        raise Refused("not done: you said no")
