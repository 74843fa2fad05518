"""Limits on this process's memory that ``MemAvailable`` knows nothing of: those of its memory cgroups (v2).

A page in the balloon is charged to the cgroup of the process that pinned it, and to every cgroup above.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import Final

from ..drivers.balloon_statistics import read_counters
from ..system import SYSTEM, System

LIMITS: Final = ("memory.max", "memory.high")
RECLAIMABLE: Final = ("active_file", "inactive_file")
"""What the kernel takes back before it lets a limit hurt: entries of ``memory.stat``."""


class MemoryCgroups:
    """The memory cgroup of this process and those above it; none where cgroups (v2) do not count memory.

    Attributes:
        fds: ``memory.events`` of each; a poll for ``POLLPRI`` tells that a limit was met since ``settle``.
    """

    def __init__(self, system: System = SYSTEM) -> None:
        self._system = system
        self._groups: dict[str, int] = {}
        try:
            with suppress(OSError, ValueError):  # no cgroups, or not this way
                self._find()
        except BaseException:
            self.close()
            raise

    def _find(self) -> None:
        mounts = [line.split() for line in self._system.read_text("/proc/self/mounts").splitlines()]
        (top,) = {words[1] for words in mounts if words[2] == "cgroup2"}
        lines = self._system.read_text("/proc/self/cgroup").splitlines()
        (path,) = {line.removeprefix("0::") for line in lines if line.startswith("0::")}
        while path.strip("/"):
            with suppress(OSError):  # memory is not counted at this level
                self._groups[top + path] = self._system.open(f"{top}{path}/memory.events", os.O_RDONLY)
            path = os.path.dirname(path)

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(self._groups.values())

    def settle(self) -> None:
        """Forget the events so far."""
        for fd in self._groups.values():
            with suppress(OSError):  # a cgroup that is gone has no more events
                self._system.pread(fd, 4096, 0)

    def room(self) -> tuple[int, str] | None:
        """Bytes until the tightest limit, caches taken back, and the cgroup that has it; None without one.

        Negative where a soft limit (``memory.high``) is exceeded.
        """
        rooms = [(self._room(group), group) for group in self._groups]
        return min(((room, group) for room, group in rooms if room is not None), default=None)

    def _room(self, group: str) -> int | None:
        try:
            texts = [self._system.read_text(f"{group}/{name}") for name in LIMITS]
            limits = [int(text) for text in texts if text != "max"]
            if not limits:
                return None
            caches = read_counters(f"{group}/memory.stat", self._system)
            used = int(self._system.read_text(f"{group}/memory.current"))
        except OSError:
            return None  # moved elsewhere, and the cgroup removed
        return min(limits) - used + sum(caches[name] for name in RECLAIMABLE)

    def close(self) -> None:
        """Close what was opened. Idempotent."""
        with ExitStack() as stack:
            while self._groups:
                stack.callback(self._system.close, self._groups.popitem()[1])
