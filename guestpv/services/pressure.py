"""How short of memory the guest is: what is available, the kernel's own alarm (PSI), limits of cgroups."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Final

from ..drivers.balloon_statistics import read_counters
from ..system import SYSTEM, System
from .memory_cgroup import MemoryCgroups

PSI_PATH: Final = "/proc/pressure/memory"
PSI_TRIGGER: Final = "some 100000 2000000"
"""An alarm when tasks stood still for want of memory for 100 ms out of 2 s; 2 s is what an ordinary user
may ask for."""


class Pressure:
    """Watches the guest's memory, and what memory cgroups leave of it to this process.

    Attributes:
        limited_by: the memory cgroup that left less than the guest has when ``available`` was last asked
            for, or "".
    """

    def __init__(self, system: System = SYSTEM) -> None:
        self._system = system
        self._psi = -1
        self._groups = MemoryCgroups(system)
        self.limited_by = ""
        # The kernel says POLLPRI; an epoll that waits for it can itself be waited for like everything else.
        self._epoll = select.epoll()
        for fd in self._groups.fds:
            self._epoll.register(fd, select.EPOLLPRI)
        try:
            with contextlib.suppress(OSError):  # a kernel without PSI, or psi=0: MemAvailable has to do
                self._psi = system.open(PSI_PATH, os.O_RDWR | os.O_NONBLOCK)
                system.write(self._psi, PSI_TRIGGER.encode() + b"\0")
                self._epoll.register(self._psi, select.EPOLLPRI)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """Readable when the alarm went off, or a memory cgroup met a limit."""
        return self._epoll.fileno()

    def alarmed(self) -> bool:
        """Whether the kernel's alarm went off since the last call.

        A cgroup's limit is no alarm, only a reason to look: what it leaves is part of ``available``.
        """
        ready = {fd for fd, _ in self._epoll.poll(0)}
        if ready - {self._psi}:
            self._groups.settle()
        return self._psi in ready

    @property
    def available(self) -> int:
        """Bytes that applications could have without swapping (MemAvailable), or what the limits of this
        process's memory cgroups leave, if that is less."""
        free = read_counters("/proc/meminfo", self._system)["MemAvailable"]
        room = self._groups.room()
        self.limited_by = room[1] if room is not None and room[0] < free else ""
        return room[0] if room is not None and room[0] < free else free

    @property
    def total(self) -> int:
        """Bytes of memory that the guest has (MemTotal)."""
        return read_counters("/proc/meminfo", self._system)["MemTotal"]

    def average(self) -> float | None:
        """Percentage of the last 10 s in which some task waited for memory; None without PSI."""
        try:
            text = self._system.read_text(PSI_PATH)
        except OSError:
            return None
        return float(text.split("avg10=")[1].split()[0])

    def close(self) -> None:
        """Take the alarm away. Idempotent."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._epoll.close)
            stack.callback(self._groups.close)
            psi, self._psi = self._psi, -1
            if psi != -1:
                self._system.close(psi)
