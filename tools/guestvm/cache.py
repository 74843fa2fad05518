"""Build results on disk, kept by the hash of what went into them."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

KEEP = 4
"""Entries of one kind that stay; older ones go once nobody has used them for an hour."""


def root() -> Path:
    """The cache directory: GUESTPV_CACHE, or guestpv below XDG_CACHE_HOME (~/.cache)."""
    named = os.environ.get("GUESTPV_CACHE")
    if named:
        path = Path(named)
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guestpv"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock `name`: one builder at a time, the others wait and find the result."""
    with open(root() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def key_of(parts: Iterable[str | bytes]) -> str:
    """A short hash of `parts` in their order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def entry(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory of `kind` with `key`; `build` fills it first if it is not there.

    It appears whole or not at all: `build` works in a directory beside it that is renamed at the end.
    """
    home = root() / kind
    path = home / key
    if not path.is_dir():
        home.mkdir(exist_ok=True)
        with locked(kind):
            if not path.is_dir():
                work = Path(tempfile.mkdtemp(dir=home, prefix=".building-"))
                try:
                    build(work)
                    work.chmod(0o755)
                    work.rename(path)
                except BaseException:
                    shutil.rmtree(work, ignore_errors=True)
                    raise
                _forget_old(home)
    os.utime(path)
    return path


def _forget_old(home: Path) -> None:
    used = sorted((p for p in home.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in used[KEEP:]:
        if path.stat().st_mtime < time.time() - 3600:
            shutil.rmtree(path, ignore_errors=True)
