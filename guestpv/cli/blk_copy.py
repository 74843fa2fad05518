"""``guestpv blk read|write|copy|verify``: content from and to disks."""

from __future__ import annotations

import time
from typing import Any

import click
import numpy as np

from ..errors import GuestpvError, UsageError
from .blk_disk import (
    CHUNK,
    SIZE,
    Bytes,
    DiskContent,
    FileContent,
    consent,
    content,
    is_spec,
    progress,
)
from .completion import complete_address
from .report import Report, reporting

RANGE = (
    click.option("--offset", type=SIZE, default=0, show_default=True, help="Where on the disk to begin."),
    click.option("--length", type=SIZE, help="How much.  [default: to the end]"),
)
YES = click.option("--yes", is_flag=True, help="Do not ask.")


def ranged(command: Any) -> Any:
    """Add the options of a range."""
    for option in reversed(RANGE):
        command = option(command)
    return command


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
    require_spec(spec)
    done = 0
    with content(spec, writing=False) as disk, content(file, writing=False) as other:
        total = wanted(other, disk, 0, offset, length)
        with progress(report, "comparing", total) as advance:
            while total is None or done < total:
                expected = other.read(done, CHUNK if total is None else min(CHUNK, total - done))
                if not expected.nbytes:
                    break
                found = disk.read(offset + done, expected.nbytes)
                if not np.array_equal(found, expected):
                    same = min(found.nbytes, expected.nbytes)
                    differs = np.flatnonzero(found[:same] != expected[:same])
                    where = offset + done + (int(differs[0]) if differs.size else same)
                    raise GuestpvError(
                        f"differs from {file} at byte {where} (sector {where // 512})", where=disk.name
                    )
                done += expected.nbytes
                advance(expected.nbytes)
    if length is not None and done < length:
        raise GuestpvError(f"{file} ends after {done} of {length} bytes", where=disk.name)
    finished(report, {"bytes": done, "zero_bytes": 0, "seconds": 0.0}, "compared, all equal")


def require_spec(text: str) -> None:
    """Raise UsageError for a file where a device has to be."""
    if not is_spec(text):
        raise UsageError(
            f"{text} is neither a PCI address nor scheme:body", hint="guestpv list; guestpv blk --help"
        )


def wanted(
    source: DiskContent | FileContent,
    target: DiskContent | FileContent,
    source_offset: int,
    target_offset: int,
    length: int | None,
) -> int | None:
    """Bytes to copy; None to the end of a stream.

    Raises:
        UsageError: the source has less, or the target has less room.
    """
    if source.size is not None:
        left = source.size - source_offset
        if left < 0 or (length is not None and length > left):
            raise UsageError(f"it has {source.size} bytes", where=source.name)
        length = left if length is None else length
    if target.size is not None and target_offset + (length or 0) > target.size:
        raise UsageError(
            f"{length} bytes from {target_offset} on do not fit into {target.size}", where=target.name
        )
    return length


def transfer(
    report: Report,
    source: DiskContent | FileContent,
    target: DiskContent | FileContent,
    *,
    source_offset: int,
    target_offset: int,
    length: int | None,
) -> dict[str, Any]:
    """Copy, skipping over what is known to be zero; flush at the end."""
    total = wanted(source, target, source_offset, target_offset, length)
    done = zeroes = 0
    started = time.monotonic()
    with progress(report, "copying", total) as advance:
        while total is None or done < total:
            step = CHUNK if total is None else min(CHUNK, total - done)
            hole = source.hole(source_offset + done, step) if isinstance(source, FileContent) else 0
            if hole == step and total is not None:
                target.zero(target_offset + done, step)
                zeroes += step
            else:
                data = source.read(source_offset + done, step)
                if not data.nbytes:
                    break
                step = data.nbytes
                zeroes += put(target, target_offset + done, data)
            done += step
            advance(step)
    if total is not None and done < total:
        raise GuestpvError(f"ended after {done} of {total} bytes", where=source.name)
    target.finish(target_offset + done)
    return {"bytes": done, "zero_bytes": zeroes, "seconds": time.monotonic() - started}


def put(target: DiskContent | FileContent, offset: int, data: Bytes) -> int:
    """Write one chunk, or zero it; returns how many bytes were zeroed."""
    if data.any():
        target.write(offset, data)
        return 0
    target.zero(offset, data.nbytes)
    return int(data.nbytes)


def finished(report: Report, done: dict[str, Any], verb: str) -> None:
    """Report what was done, on standard error: standard output may be the data."""
    from .counters import amount

    def show() -> None:
        rate = f", {amount(done['bytes'] / done['seconds'], 'B/s', 1024)}" if done["seconds"] else ""
        zero = f" ({amount(done['zero_bytes'], 'B', 1024)} of it zeroes)" if done["zero_bytes"] else ""
        click.echo(f"{amount(done['bytes'], 'B', 1024)} {verb}{zero}{rate}", err=True)

    report.done(done, show)
