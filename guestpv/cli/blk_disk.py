"""What the verbs that use a disk directly share: disks and files as content, copying, progress."""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..drivers.blk import Blk
from ..errors import GuestpvError, UsageError
from ..opener import SCHEMES, Spec
from ..opener import open as open_transport
from ..vfio.binding import bind, unbind
from .kinds import BLK
from .report import Report
from .vfio_option import is_noiommu

CHUNK: Final = 1 << 20
"""Bytes that are copied at a time."""
_SPEC = re.compile(
    rf"(?:{'|'.join(map(re.escape, SCHEMES))}):|(?:[0-9a-f]{{4,8}}:)?[0-9a-f]{{2}}:[01][0-9a-f]\.[0-7]",
    re.IGNORECASE,
)

Bytes = NDArray[np.uint8]


def is_spec(text: str) -> bool:
    """Whether a word names a device rather than a file."""
    return _SPEC.match(text) is not None


@contextmanager
def opened(spec: str) -> Iterator[Blk]:
    """The disk that SPEC names, driven; a function of the kernel's is taken and given back.

    Raises:
        Refused: the machine uses it, because it is mounted for example.
    """
    parsed = Spec.parse(spec)
    with ExitStack() as undo:
        if parsed.scheme == "vfio":
            bound = bind(parsed.body, noiommu=is_noiommu(parsed))
            if bound.changed:
                undo.callback(unbind, parsed.body)
        transport = open_transport(spec)
        undo.callback(transport.close)
        BLK.require(transport.device_type, transport.name)
        yield undo.enter_context(Blk(transport))


class DiskContent:
    """A driven disk as content; offsets that are no whole blocks can be read, not written."""

    def __init__(self, disk: Blk) -> None:
        self.disk = disk
        self.name = disk.transport.name
        self.size: int | None = disk.capacity

    def read(self, offset: int, length: int) -> Bytes:
        """Whole blocks are read, what was asked for is returned."""
        block = self.disk.block_size
        length = min(length, self.disk.capacity - offset)
        start, end = offset // block * block, -(-(offset + length) // block) * block
        return self.disk.read(start, end - start)[offset - start : offset - start + length]

    def write(self, offset: int, data: Bytes) -> None:
        """A last block that is not whole keeps its end."""
        block = self.disk.block_size
        if rest := data.nbytes % block:
            tail = self.disk.read(offset + data.nbytes - rest, block).copy()
            tail[:rest] = data[-rest:]
            data = np.concatenate([data[:-rest], tail])
        self.disk.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """By write zeroes where the device has it."""
        whole = length // self.disk.block_size * self.disk.block_size
        if self.disk.limits.write_zeroes.refusal:
            whole = 0
        if whole:
            self.disk.write_zeroes(offset, whole, unmap=True)
        if length > whole:
            self.write(offset + whole, np.zeros(length - whole, np.uint8))

    def finish(self, end: int) -> None:
        """Flush: on return it is safe from a power cut."""
        self.disk.flush()


class FileContent:
    """A file, block device, pipe or ``-`` as content; what is zero becomes a hole where there can be one."""

    def __init__(self, path: str, *, writing: bool) -> None:
        self.name = path
        self._own = path != "-"
        if path == "-":
            self._fd = 1 if writing else 0
            if os.isatty(self._fd):
                raise UsageError(
                    "a terminal is no place for a disk's content", hint="name a file, or use a pipe: | xxd"
                )
        else:
            flags = os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY
            self._fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
        mode = os.fstat(self._fd).st_mode
        self._regular = stat.S_ISREG(mode)
        self._seekable = self._regular or stat.S_ISBLK(mode)
        self._base = os.lseek(self._fd, 0, os.SEEK_CUR) if self._seekable else 0
        self._old_end = os.lseek(self._fd, 0, os.SEEK_END) if self._seekable else 0
        self.size: int | None = self._old_end - self._base if self._seekable and not writing else None

    def read(self, offset: int, length: int) -> Bytes:
        """A stream is read in order only."""
        parts: list[bytes] = []
        have = 0
        while have < length:
            if self._seekable:
                part = os.pread(self._fd, length - have, self._base + offset + have)
            else:
                part = os.read(self._fd, length - have)
            if not part:
                break
            parts.append(part)
            have += len(part)
        return np.frombuffer(b"".join(parts), np.uint8)

    def hole(self, offset: int, limit: int) -> int:
        """Bytes from ``offset`` on, at most ``limit``, that the file knows to be zero."""
        if not self._regular:
            return 0
        try:
            data = os.lseek(self._fd, self._base + offset, os.SEEK_DATA)
        except OSError:
            return limit
        return min(data - self._base - offset, limit)

    def write(self, offset: int, data: Bytes) -> None:
        """All of it."""
        view = memoryview(data.data)
        while view:
            if self._seekable:
                done = os.pwrite(self._fd, view, self._base + offset)
            else:
                done = os.write(self._fd, view)
            offset += done
            view = view[done:]

    def zero(self, offset: int, length: int) -> None:
        """A hole beyond the old end of a file, zeroes elsewhere."""
        if self._regular and self._base + offset >= self._old_end:
            return
        self.write(offset, np.zeros(length, np.uint8))

    def finish(self, end: int) -> None:
        """Give a regular file its length, and make it durable."""
        if self._regular and os.fstat(self._fd).st_size < self._base + end:
            os.ftruncate(self._fd, self._base + end)
        if self._seekable:
            os.fsync(self._fd)

    def close(self) -> None:
        """Close it, unless it is a standard stream."""
        if self._own:
            os.close(self._fd)


@contextmanager
def content(text: str, *, writing: bool) -> Iterator[DiskContent | FileContent]:
    """What a word on the command line names: a device by SPEC, a file, or ``-``."""
    if is_spec(text):
        with opened(text) as disk:
            yield DiskContent(disk)
        return
    file = FileContent(text, writing=writing)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def progress(report: Report, title: str, total: int | None) -> Iterator[Any]:
    """A bar on standard error where a person looks; gives a function that is told of bytes done."""
    if report.as_json or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=total)
        yield lambda done: bars.advance(task, done)


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


def compare(
    report: Report,
    disk: DiskContent | FileContent,
    other: DiskContent | FileContent,
    offset: int,
    length: int | None,
) -> int:
    """Bytes that are the same from ``offset`` of the disk on and from the start of the other.

    Raises:
        GuestpvError: they differ; the first byte that does is named.
    """
    done = 0
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
                    f"differs from {other.name} at byte {where} (sector {where // 512})", where=disk.name
                )
            done += expected.nbytes
            advance(expected.nbytes)
    return done
