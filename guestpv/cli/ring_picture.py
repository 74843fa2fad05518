"""``guestpv ring-picture``: a virtqueue in one of the states that the documentation explains, drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import UsageError
from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv ring-picture
  guestpv ring-picture packed-wrapped -o packed-wrapped.svg
  guestpv ring-picture --all docs/pictures

\b
A queue of your own program, at any moment:
  from guestpv.trace import ring_picture
  svg = ring_picture(driver.queue)
"""


@click.command("ring-picture", epilog=EXAMPLE)
@click.argument("scenario", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the SVG; default: standard output.",
)
@click.option(
    "--all",
    "directory",
    metavar="DIRECTORY",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Draw every scenario into DIRECTORY.",
)
@reporting
def ring_picture(report: Report, scenario: str | None, output: Path | None, directory: Path | None) -> None:
    """Draw a virtqueue as SVG, in the state called SCENARIO.

    A real queue is brought into that state with a software device on its other side; no virtio device and
    no privilege is needed. Without SCENARIO the names are listed.
    """
    from .ring_scenarios import SCENARIOS

    if directory is not None:
        if scenario or output:
            raise UsageError("--all takes neither SCENARIO nor --output", hint="guestpv ring-picture --help")
        files = [_write(name, directory / f"{name}.svg") for name in SCENARIOS]
        report.done({"files": files}, lambda: click.echo("\n".join(files)))
    elif scenario is None:
        names = {name: (make.__doc__ or "") for name, make in SCENARIOS.items()}
        report.done({"scenarios": names}, lambda: _list(names))
    elif scenario not in SCENARIOS:
        raise UsageError(f"no scenario is called {scenario!r}", hint="guestpv ring-picture lists them")
    elif output is not None:
        files = [_write(scenario, output)]
        report.done({"files": files}, lambda: click.echo(files[0]))
    else:
        svg = SCENARIOS[scenario]().svg()
        report.done({"svg": svg}, lambda: _print(svg))


def _write(name: str, path: Path) -> str:
    from .ring_scenarios import SCENARIOS

    path.write_text(SCENARIOS[name]().svg(), encoding="utf-8")
    return str(path)


def _list(names: dict[str, str]) -> None:
    from .tables import console, table

    console().print(table(("SCENARIO", "WHAT IT SHOWS"), names.items()))


def _print(svg: str) -> None:
    sys.stdout.write(svg)
