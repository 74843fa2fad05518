"""``guestpv conform device``: check a device against the standard."""

from __future__ import annotations

import contextlib
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from .report import Report, reporting

if TYPE_CHECKING:
    from ..conformance.report import Report as Findings
    from ..conformance.verdict import Outcome

EXAMPLE = """\b
Examples:
  guestpv conform device loopback:blk
  guestpv conform device 'qtest:virtio-balloon-pci,packed=on' --hostile
  guestpv conform device 0000:01:00.0 --select DEV-PCI --html pci.html
"""


@click.command(epilog=EXAMPLE)
@click.argument("spec")
@click.option("--select", default="", metavar="IDS", help="Only these requirements: DEV-SPLIT,DEV-BLK-0*.")
@click.option(
    "--hostile", is_flag=True, help="Also malformed rings and requests; can take a hypervisor down."
)
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case; may be repeated.")
@click.option("--shard", default="1/1", metavar="I/N", help="Only the I-th of N parts.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    help="Processes, each with a device of its own; {job} in SPEC is the number of one.",
)
@click.option("--wire", default="", metavar="INTERFACE", help="The other end of a network device's cable.")
@click.option("--junit", type=click.Path(dir_okay=False), metavar="FILE", help="Write JUnit XML.")
@click.option(
    "--tap", type=click.Path(dir_okay=False, allow_dash=True), metavar="FILE", help="Write TAP; - prints it."
)
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Write a page for a browser.")
@reporting
def device(
    report: Report,
    spec: str,
    select: str,
    hostile: bool,
    cases: tuple[str, ...],
    shard: str,
    jobs: int,
    wire: str,
    junit: str | None,
    tap: str | None,
    html: str | None,
) -> None:
    """Check the device SPEC against VIRTIO 1.4, requirement by requirement.

    The device must be free to be used: it is reset, driven and, with --hostile, given what no driver may
    give it. A disk is read and written. Exit status 0 means that nothing failed and nothing was wedged.
    """
    from ..conformance import catalogue, runner
    from ..conformance.report import Report as Findings
    from ..conformance.report import now, versions

    catalogue.patterns(select)
    if wire and wire not in (name for _, name in socket.if_nameindex()):
        raise UsageError(f"there is no network interface {wire!r}", hint="ip -brief link")
    for file in (junit, html):
        if file and not Path(file).absolute().parent.is_dir():
            raise UsageError("there is no such directory", where=str(Path(file).parent))
    found = Findings(
        "device", spec, [], versions() | look(spec), now(), shlex.join(["guestpv", *sys.argv[1:]])
    )
    with progress(report) as tell:
        found.outcomes = runner.run(
            spec,
            select=select,
            hostile=hostile,
            shard=shard,
            cases=cases,
            jobs=jobs,
            wire=wire,
            tell=tell,
        )
    save(found, junit, tap, html)
    report.done(found.to_dict(), lambda: show(found, report.verbose, tap))
    if not found.ok:
        click.get_current_context().exit(1)


def look(spec: str) -> dict[str, str]:
    """Open the device once, so that what keeps it from being opened is said plainly; who made it."""
    from .. import opener
    from ..conformance.rig import require_type

    with opener.open(spec.replace("{job}", "0")) as transport:
        require_type(transport)
        machine = getattr(getattr(transport, "function", None), "machine", None)
        if machine is None:
            return {}
        told = machine.qemu.qmp.execute("query-version")
        number = ".".join(str(told["qemu"][part]) for part in ("major", "minor", "micro"))
        return {"qemu": f"{number} ({told['package']})" if told["package"] else number}


@contextlib.contextmanager
def progress(report: Report) -> Iterator[Callable[[Outcome], None]]:
    """A line that counts, where a person looks on."""
    if report.as_json or not sys.stderr.isatty():
        yield lambda outcome: None
        return
    from rich.console import Console

    counts: dict[str, int] = {}
    console = Console(stderr=True, emoji=False)
    with console.status("opening the device") as status:

        def tell(outcome: Outcome) -> None:
            counts[outcome.verdict] = counts.get(outcome.verdict, 0) + 1
            shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
            status.update(f"{shown}   {outcome.check.partition('::')[2]}")

        yield tell


def save(found: Findings, junit: str | None, tap: str | None, html: str | None) -> None:
    """Write the files that were asked for."""
    if junit:
        from ..conformance.junit import junit as as_junit

        Path(junit).write_text(as_junit(found), encoding="utf-8")
    if tap and tap != "-":
        from ..conformance.tap import tap as as_tap

        Path(tap).write_text(as_tap(found.outcomes), encoding="utf-8")
    if html:
        from ..conformance.html import html as as_html

        Path(html).write_text(as_html(found), encoding="utf-8")


def show(found: Findings, verbose: int, tap: str | None = None) -> None:
    """For people; for harnesses where ``tap`` is ``-``."""
    if tap == "-":
        from ..conformance.tap import tap as as_tap

        click.echo(as_tap(found.outcomes), nl=False)
        return
    from .tables import console

    out = console()
    for part in found.text(verbose):
        out.print(part)
