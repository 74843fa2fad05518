"""``guestpv doctor``: what is missing, and the command or option that mends it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..errors import GuestpvError
from .completion import complete_address
from .report import Report, reporting

if TYPE_CHECKING:
    from .checks import Check

EXAMPLE = """\b
Examples:
  guestpv doctor
  guestpv doctor 0000:01:00.0
"""
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(epilog=EXAMPLE)
@click.argument("spec", required=False, shell_complete=complete_address)
@reporting
def doctor(report: Report, spec: str | None) -> None:
    """Check what driving a device needs, and say how to mend what is missing.

    Looks at the machine, then at the device SPEC, or at every virtio function without one. Each check
    ends in ok, warn or fail; the exit code is 1 when one fails.
    """
    from .checks import examine

    checks = examine(spec)
    data = [asdict(check) for check in checks]
    failed = [check.name for check in checks if check.verdict == "fail"]
    if not report.as_json:
        show(checks)
    if failed:
        report.failed(
            GuestpvError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}"), data
        )
        click.get_current_context().exit(GuestpvError.exit_status)
    warned = any(check.verdict == "warn" for check in checks)
    report.done(data, lambda: click.echo("Nothing is missing." if warned else "All is well."))


def show(checks: list[Check]) -> None:
    """A line a check, and below it what mends it."""
    from rich.text import Text

    from .tables import console, indented, table

    out = console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = table(("", "", ""), [])
        line.show_header = False
        line.columns[0].width, line.columns[1].width = 4, width
        line.add_row(Text(check.verdict, COLOURS[check.verdict]), check.name, check.text)
        out.print(line)
        for text in check.mend.splitlines():
            out.print(indented(f"-> {text}", 6))
