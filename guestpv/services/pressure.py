"""How short of memory the guest is: what is available, and the kernel's own alarm (PSI)."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Final

from ..drivers.balloon_statistics import read_counters
from ..system import SYSTEM, System

PSI_PATH: Final = "/proc/pressure/memory"
PSI_TRIGGER: Final = "some 100000 2000000"
"""An alarm when tasks stood still for want of memory for 100 ms out of 2 s; 2 s is what an ordinary user
may ask for."""


class Pressure:
    """Watches the guest's memory.

    Attributes:
        fd: readable when the alarm went off, None where the kernel has no PSI.
    """

    def __init__(self, system: System = SYSTEM) -> None:
        self._system = system
        self._psi = -1
        self._epoll: select.epoll | None = None
        with contextlib.suppress(OSError):  # a kernel without PSI, or psi=0: MemAvailable has to do
            self._psi = system.open(PSI_PATH, os.O_RDWR | os.O_NONBLOCK)
            self._arm()

    def _arm(self) -> None:
        try:
            self._system.write(self._psi, PSI_TRIGGER.encode() + b"\0")
            # PSI says POLLPRI; an epoll that waits for it can itself be waited for like everything else.
            self._epoll = select.epoll()
            self._epoll.register(self._psi, select.EPOLLPRI)
        except OSError:
            self._system.close(self._psi)
            self._psi = -1
            raise

    @property
    def fd(self) -> int | None:
        return self._epoll.fileno() if self._epoll is not None else None

    def alarmed(self) -> bool:
        """Whether the alarm went off since the last call."""
        return self._epoll is not None and bool(self._epoll.poll(0))

    @property
    def available(self) -> int:
        """Bytes that applications could have without swapping (MemAvailable)."""
        return read_counters("/proc/meminfo", self._system)["MemAvailable"]

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
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
            self._system.close(self._psi)
