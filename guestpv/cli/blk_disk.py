"""What the verbs that use a disk directly share: amounts, disks and files as content, progress, consent."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Protocol

import click
import numpy as np
from numpy.typing import NDArray

from ..drivers.blk import Blk
from ..errors import Refused, UsageError
from ..opener import SCHEMES, Spec
from ..opener import open as open_transport
from ..vfio.binding import bind, unbind
from .blk_session import require_blk
from .report import Report

CHUNK: Final = 1 << 20
"""Bytes that are copied at a time."""
UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "S": 512}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTS]?)(?:I?B)?", re.IGNORECASE)
_SPEC = re.compile(
    rf"(?:{'|'.join(map(re.escape, SCHEMES))}):|(?:[0-9a-f]{{4,8}}:)?[0-9a-f]{{2}}:[01][0-9a-f]\.[0-7]",
    re.IGNORECASE,
)

Bytes = NDArray[np.uint8]


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


class Content(Protocol):
    """Something with bytes in it: a disk, a file, a stream.

    Attributes:
        name: for messages.
        size: bytes, None where nobody knows.
    """

    name: str
    size: int | None

    def read(self, offset: int, length: int) -> Bytes:
        """Up to ``length`` bytes; fewer only at the end."""

    def write(self, offset: int, data: Bytes) -> None:
        """Store ``data``."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes, without storing them if that is possible."""

    def finish(self, end: int) -> None:
        """Everything up to ``end`` was written: make it last."""


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
            bound = bind(parsed.body)
            if bound.changed:
                undo.callback(unbind, parsed.body)
        transport = open_transport(spec)
        undo.callback(transport.close)
        require_blk(transport.device_type, transport.name)
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
