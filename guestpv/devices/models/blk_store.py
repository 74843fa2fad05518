"""Sectors behind a block device: a file, or anonymous memory that behaves like one."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ...errors import UsageError
from ...spec.blk import SECTOR

MOST_PIECES = 512
ZEROES = bytes(1 << 16)


class Store:
    """A file of sectors.

    Args:
        path: a file or block device; empty gives memory.
        size: bytes; for a file 0 takes its own size, otherwise it is made that long.
        read_only: open the file for reading only.

    Raises:
        UsageError: the size is no positive multiple of 512.
    """

    def __init__(self, path: str = "", size: int = 0, read_only: bool = False) -> None:
        if path:
            self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        else:
            self._fd = os.memfd_create("guestpv-blk", os.MFD_CLOEXEC)
        try:
            if size and not (path and read_only):
                os.ftruncate(self._fd, size)
            self.size = size or os.lseek(self._fd, 0, os.SEEK_END)
            if not self.size or self.size % SECTOR:
                raise UsageError(f"{self.size} bytes are no positive multiple of {SECTOR}", where=path)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def sectors(self) -> int:
        """Capacity in 512-byte sectors."""
        return self.size // SECTOR

    def resize(self, size: int) -> None:
        """Grow or shrink to ``size`` bytes."""
        if size <= 0 or size % SECTOR:
            raise UsageError(f"{size} bytes are no positive multiple of {SECTOR}")
        os.ftruncate(self._fd, size)
        self.size = size

    def read(self, offset: int, pieces: list[memoryview]) -> None:
        """Fill ``pieces`` from ``offset`` on."""
        for part in _batches(pieces):
            length = sum(map(len, part))
            if os.preadv(self._fd, part, offset) != length:
                raise OSError(f"short read of {length} bytes at {offset}")
            offset += length

    def write(self, offset: int, pieces: list[memoryview]) -> None:
        """Store ``pieces`` from ``offset`` on."""
        for part in _batches(pieces):
            length = sum(map(len, part))
            if os.pwritev(self._fd, part, offset) != length:
                raise OSError(f"short write of {length} bytes at {offset}")
            offset += length

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""
        for start in range(offset, offset + length, len(ZEROES)):
            os.pwrite(self._fd, ZEROES[: offset + length - start], start)

    def flush(self) -> None:
        """Commit everything to the storage behind."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _batches(pieces: list[memoryview]) -> Iterator[list[memoryview]]:
    for start in range(0, len(pieces), MOST_PIECES):
        yield pieces[start : start + MOST_PIECES]
