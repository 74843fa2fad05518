"""Interrupts of a function that a vfio-user client attached its eventfds to."""

from __future__ import annotations

import contextlib
import os
from errno import EINVAL, ENOTSUP
from typing import Final

from ..devices.function import SoftwareFunction
from ..devices.interrupts import signal
from ..system import SYSTEM
from ..wire import vfio_user as wire
from ..wire.stream import close_all
from ..wire.vfio_user import IrqFlag, IrqInfo, IrqSet, IrqSetFlag
from .vfio_user_memory import Objection

EVENTFD: Final = "anon_inode:[eventfd]"
DATA: Final = IrqSetFlag.DATA_NONE | IrqSetFlag.DATA_BOOL | IrqSetFlag.DATA_EVENTFD


class ClientInterrupts:
    """One client's eventfds, per kind of interrupt and number.

    Args:
        function: whose interrupts they are.
    """

    def __init__(self, function: SoftwareFunction) -> None:
        self._function = function
        self._fds: dict[int, dict[int, int]] = {index: {} for index in range(wire.NUM_IRQS)}
        self._intx_masked = False

    def info(self, index: int) -> IrqInfo:
        """What the function has of a kind of interrupt.

        Raises:
            Objection: there is no such kind.
        """
        flags, count = IrqFlag.EVENTFD, 0
        if index == wire.INTX:
            flags, count = flags | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED, 1
        elif index == wire.MSIX:
            count = self._function.msix_vectors
        elif index in (wire.ERR, wire.REQ):
            count = 1
        elif index >= wire.NUM_IRQS:
            raise Objection(EINVAL, f"there is no interrupt index {index}")
        return IrqInfo(wire.IRQ_INFO_FORM.size, flags if count else 0, index, count)

    def set(self, asked: IrqSet, fds: list[int]) -> None:
        """Carry out SET_IRQS; removes from ``fds`` what is kept.

        Raises:
            Objection: the action makes no sense for these interrupts.
        """
        count = self.info(asked.index).count
        chosen = list(range(asked.start, min(asked.start + asked.count, count)))
        if asked.start + asked.count > count:
            raise Objection(EINVAL, f"interrupts from {asked.start} on, {asked.count} of {count}")
        if any(SYSTEM.readlink(f"/proc/self/fd/{fd}") != EVENTFD for fd in fds):
            raise Objection(EINVAL, "a descriptor is no eventfd")
        kind, action = asked.flags & DATA, asked.flags & ~DATA
        if kind == IrqSetFlag.DATA_EVENTFD:
            if action != IrqSetFlag.ACTION_TRIGGER or not chosen or len(fds) not in (0, len(chosen)):
                raise Objection(ENOTSUP, f"{len(fds)} eventfds for action {action:#x}")
            self._attach(asked.index, chosen, fds)
        elif kind == IrqSetFlag.DATA_BOOL and len(asked.data) == len(chosen):
            self._act(asked.index, action, [n for n, on in zip(chosen, asked.data, strict=True) if on])
        elif kind != IrqSetFlag.DATA_NONE:
            raise Objection(EINVAL, f"flags {asked.flags:#x} with {len(asked.data)} bytes")
        elif action == IrqSetFlag.ACTION_TRIGGER and not chosen:
            self._detach(asked.index)
        else:
            self._act(asked.index, action, chosen)

    def _attach(self, index: int, chosen: list[int], fds: list[int]) -> None:
        """Signal these eventfds from now on, or none where none came."""
        kept = self._fds[index]
        old = [kept.pop(number) for number in chosen if number in kept]
        kept.update(zip(chosen, fds, strict=False))
        fds.clear()
        if index == wire.MSIX:
            self._function.set_irqs({number: kept.get(number) for number in chosen})
        elif index == wire.INTX:
            self._intx_masked = False
            self._show_intx()
        close_all(old)

    def _detach(self, index: int) -> None:
        """Disable a kind of interrupt."""
        old, self._fds[index] = self._fds[index], {}
        if index == wire.MSIX:
            self._function.set_irqs({})
        # Disabling MSI-X took the eventfd of INTx away, too.
        self._show_intx()
        close_all(old.values())

    def _show_intx(self) -> None:
        """Attach INTx's eventfd, which also lets the next event through; or take it away."""
        self._function.set_intx(None if self._intx_masked else self._fds[wire.INTX].get(0))

    def _act(self, index: int, action: int, chosen: list[int]) -> None:
        """Mask, unmask or trigger interrupts at the client's wish."""
        if action == IrqSetFlag.ACTION_TRIGGER:
            self.fire(index, chosen)
        elif index != wire.INTX or action not in (IrqSetFlag.ACTION_MASK, IrqSetFlag.ACTION_UNMASK):
            raise Objection(ENOTSUP, f"action {action:#x} on interrupt index {index}")
        elif chosen:
            self._intx_masked = action == IrqSetFlag.ACTION_MASK
            self._show_intx()

    def fire(self, index: int, chosen: list[int]) -> None:
        """Signal interrupts that have an eventfd."""
        for number in chosen:
            if number in self._fds[index]:
                signal(self._fds[index][number])

    def close(self) -> None:
        """Take all eventfds away from the function."""
        self._function.set_irqs({})
        for kept in self._fds.values():
            close_all(kept.values())
            kept.clear()


class Wishes:
    """What a function asks of its owner from its own side: to let go of it, to know of a bus error."""

    def __init__(self, function: SoftwareFunction) -> None:
        self._indexes = {function.request_fd(): wire.REQ, function.error_fd(): wire.ERR}

    @property
    def fds(self) -> list[int]:
        """What to poll."""
        return [fd for fd in self._indexes if fd is not None]

    def take(self, ready: set[int]) -> list[int]:
        """The interrupt indexes of those that asked, which are calm afterwards."""
        asked = []
        for fd, index in self._indexes.items():
            if fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                asked.append(index)
        return asked
