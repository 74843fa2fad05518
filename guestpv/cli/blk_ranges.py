"""``guestpv blk discard|zero``: ranges without content."""

from __future__ import annotations

import click

from ..errors import UsageError
from .blk_options import YES, consent, ranged
from .completion import complete_address
from .report import Report, reporting

STEP = 1 << 30
"""Bytes between two moves of the progress bar."""


@click.command(epilog="\b\nExample:\n  guestpv blk discard 0000:03:00.0 --offset 1G --length 512M --yes")
@click.argument("spec", shell_complete=complete_address)
@ranged
@YES
@reporting
def discard(report: Report, spec: str, offset: int, length: int | None, yes: bool) -> None:
    """Tell the disk SPEC that a range is no longer needed; what it reads as afterwards is not defined."""
    from .blk_disk import opened, progress

    consent(report, yes, f"discard the content of {spec}{span(offset, length)}")
    with opened(spec) as disk:
        end = end_of(disk.capacity, offset, length)
        with progress(report, "discarding", end - offset) as advance:
            for start in range(offset, end, STEP):
                disk.discard(start, min(STEP, end - start))
                advance(min(STEP, end - start))
        disk.flush()
    report.done(
        {"offset": offset, "bytes": end - offset}, lambda: click.echo(f"{end - offset} bytes discarded")
    )


@click.command(epilog="\b\nExample:\n  guestpv blk zero 0000:03:00.0 --length 1M --yes")
@click.argument("spec", shell_complete=complete_address)
@ranged
@click.option("--keep", is_flag=True, help="The device is not to give the storage back.")
@YES
@reporting
def zero(report: Report, spec: str, offset: int, length: int | None, keep: bool, yes: bool) -> None:
    """Make a range of the disk SPEC read as zeroes, by write zeroes where the device has it.

    The disk was flushed when the command returns.
    """
    from .blk_disk import CHUNK, DiskContent, opened, progress

    consent(report, yes, f"zero {spec}{span(offset, length)}")
    with opened(spec) as disk:
        end = end_of(disk.capacity, offset, length)
        native = not disk.limits.write_zeroes.refusal
        step = STEP if native else CHUNK
        with progress(report, "zeroing", end - offset) as advance:
            for start in range(offset, end, step):
                part = min(step, end - start)
                if native and part % disk.block_size == 0:
                    disk.write_zeroes(start, part, unmap=not keep)
                else:
                    DiskContent(disk).zero(start, part)
                advance(part)
        disk.flush()
    report.done({"offset": offset, "bytes": end - offset}, lambda: click.echo(f"{end - offset} bytes zeroed"))


def span(offset: int, length: int | None) -> str:
    """A range in words, for the question."""
    if not offset and length is None:
        return ""
    return f" from byte {offset} " + ("to its end" if length is None else f"on, {length} bytes")


def end_of(capacity: int, offset: int, length: int | None) -> int:
    """First byte after the range.

    Raises:
        UsageError: it does not lie on the disk.
    """
    end = capacity if length is None else offset + length
    if offset >= capacity or end > capacity:
        raise UsageError(f"the range ends at byte {end}, the disk at {capacity}")
    return end
