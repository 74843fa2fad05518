"""``guestpv blk read|write|copy|verify``: content from and to disks."""

from __future__ import annotations

from typing import Any

import click

from ..errors import GuestpvError
from .blk_options import SIZE, YES, consent, ranged
from .completion import complete_address
from .report import Report, reporting


@click.command(epilog="\b\nExamples:\n  guestpv blk read 0000:03:00.0 disk.img\n"
               "  guestpv blk read loopback:blk --length 1s - | xxd")  # fmt: skip
@click.argument("spec", shell_complete=complete_address)
@click.argument("file", type=click.Path(allow_dash=True))
@ranged
@reporting
def read(report: Report, spec: str, file: str, offset: int, length: int | None) -> None:
    """Read the disk SPEC into FILE, or `-` for standard output.

    Zeroes become holes in FILE. FILE is on its own disk, flushed, when the command returns.
    """
    from .blk_disk import content, require_spec, transfer

    require_spec(spec)
    with content(spec, writing=False) as source, content(file, writing=True) as target:
        done = transfer(report, source, target, source_offset=offset, target_offset=0, length=length)
    finished(report, done, "read")


@click.command(epilog="\b\nExamples:\n  guestpv blk write 0000:03:00.0 disk.img --yes\n"
               "  zcat disk.img.gz | guestpv blk write 0000:03:00.0 - --yes")  # fmt: skip
@click.argument("spec", shell_complete=complete_address)
@click.argument("file", type=click.Path(allow_dash=True))
@ranged
@YES
@reporting
def write(report: Report, spec: str, file: str, offset: int, length: int | None, yes: bool) -> None:
    """Write FILE, or `-` for standard input, to the disk SPEC.

    Holes of FILE are written by write zeroes where the device has it. The disk was flushed when the command
    returns; when it fails, any part may be written.
    """
    from .blk_disk import content, require_spec, transfer

    require_spec(spec)
    consent(report, yes, f"overwrite {spec} from byte {offset} on with {file}")
    with content(spec, writing=True) as target, content(file, writing=False) as source:
        done = transfer(report, source, target, source_offset=0, target_offset=offset, length=length)
    finished(report, done, "written")


@click.command(epilog="\b\nExamples:\n  guestpv blk copy 0000:03:00.0 0000:04:00.0 --yes\n"
               "  guestpv blk copy vhost-user:blk:/run/a.sock backup.img")  # fmt: skip
@click.argument("source", shell_complete=complete_address)
@click.argument("target", shell_complete=complete_address)
@click.option("--length", type=SIZE, help="How much.  [default: all of SOURCE]")
@YES
@reporting
def copy(report: Report, source: str, target: str, length: int | None, yes: bool) -> None:
    """Copy SOURCE to TARGET; each is a disk's SPEC, a file, or `-`.

    Zeroes become holes in a file and write zeroes on a disk. The target was flushed when the command returns.
    """
    from .blk_disk import content, is_spec, transfer

    if is_spec(target):
        consent(report, yes, f"overwrite {target} with {source}")
    with content(source, writing=False) as one, content(target, writing=True) as other:
        done = transfer(report, one, other, source_offset=0, target_offset=0, length=length)
    finished(report, done, "copied")


@click.command(epilog="\b\nExample:\n  guestpv blk verify 0000:03:00.0 disk.img")
@click.argument("spec", shell_complete=complete_address)
@click.argument("file", type=click.Path(allow_dash=True))
@ranged
@reporting
def verify(report: Report, spec: str, file: str, offset: int, length: int | None) -> None:
    """Compare the disk SPEC with FILE, or `-` for standard input; exit 1 at the first difference."""
    from .blk_disk import compare, content, require_spec

    require_spec(spec)
    with content(spec, writing=False) as disk, content(file, writing=False) as other:
        done = compare(report, disk, other, offset, length)
    if length is not None and done < length:
        raise GuestpvError(f"{file} ends after {done} of {length} bytes", where=disk.name)
    finished(report, {"bytes": done, "zero_bytes": 0, "seconds": 0.0}, "compared, all equal")


def finished(report: Report, done: dict[str, Any], verb: str) -> None:
    """Report what was done, on standard error: standard output may be the data."""
    from .counters import amount

    def show() -> None:
        rate = f", {amount(done['bytes'] / done['seconds'], 'B/s', 1024)}" if done["seconds"] else ""
        zero = f" ({amount(done['zero_bytes'], 'B', 1024)} of it zeroes)" if done["zero_bytes"] else ""
        click.echo(f"{amount(done['bytes'], 'B', 1024)} {verb}{zero}{rate}", err=True)

    report.done(done, show)
