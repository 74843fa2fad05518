"""Interrupts of a PCI function: MSI-X table and pending bits, or the level of INTx; delivered as eventfds."""

from __future__ import annotations

import contextlib
import os

from ..errors import UsageError

ENTRY = 16
CONTROL = 12
MASKED = 1


class Interrupts:
    """Interrupt state of one function.

    Attributes:
        vectors: size of the MSI-X table.
        enabled, function_masked: the two bits of the MSI-X message control register.
        withhold: keep MSI-X messages back (counted in ``withheld``) until ``deliver_withheld``.
        delivered: messages sent per vector.
    """

    def __init__(self, vectors: int) -> None:
        self.vectors = vectors
        self.table = bytearray(ENTRY * vectors)
        self.pending = bytearray(-(-vectors // 64) * 8)
        self.delivered = [0] * vectors
        self.withhold = False
        self.withheld: list[int] = []
        self.enabled = False
        self.function_masked = False
        self._fds: dict[int, int] = {}
        self._intx_fd = -1
        self._intx_level = False
        self._intx_masked = False
        self.reset()

    def reset(self) -> None:
        """All vectors masked, nothing pending, MSI-X off; eventfds stay."""
        self.enabled = self.function_masked = False
        for vector in range(self.vectors):
            self.table[ENTRY * vector + CONTROL] = MASKED
        self.pending[:] = bytes(len(self.pending))
        self.withheld.clear()
        self._intx_level = self._intx_masked = False

    def attach(self, vector: int, fd: int | None) -> None:
        """Signal ``fd`` for a vector (None: nothing), and unmask it, as VFIO's set_irqs does."""
        if not 0 <= vector < self.vectors:
            raise UsageError(f"MSI-X vector {vector} of {self.vectors}")
        if fd is None:
            self._fds.pop(vector, None)
            return
        self._fds[vector] = fd
        self.set_mask(vector, False)

    def attach_intx(self, fd: int | None) -> None:
        """Signal ``fd`` when INTx goes up; it is masked at each event until ``unmask_intx``."""
        self._intx_fd = -1 if fd is None else fd
        self._intx_masked = False
        self._signal_intx()

    def message(self, vector: int) -> None:
        """Send a vector's message, or mark it pending while masked."""
        if self.withhold:
            self.withheld.append(vector)
        elif self.function_masked or self.table[ENTRY * vector + CONTROL] & MASKED:
            self.pending[vector // 8] |= 1 << vector % 8
        else:
            self.delivered[vector] += 1
            if vector in self._fds:
                signal(self._fds[vector])

    def deliver_withheld(self) -> int:
        """Send the messages kept back; returns how many."""
        kept, self.withheld = self.withheld, []
        self.withhold = False
        for vector in kept:
            self.message(vector)
        return len(kept)

    def set_mask(self, vector: int, masked: bool) -> None:
        """Set a vector's mask bit; a pending message goes out when it clears."""
        self.table[ENTRY * vector + CONTROL] = MASKED if masked else 0
        self._flush()

    def set_control(self, enabled: bool, function_masked: bool) -> None:
        """The driver wrote the message control register."""
        self.enabled, self.function_masked = enabled, function_masked
        self._flush()

    def _flush(self) -> None:
        if not self.enabled or self.function_masked:
            return
        for byte, bits in enumerate(self.pending):
            for bit in range(8):
                vector = 8 * byte + bit
                if bits >> bit & 1 and not self.table[ENTRY * vector + CONTROL] & MASKED:
                    self.pending[byte] &= ~(1 << bit)
                    self.message(vector)

    def table_read(self, offset: int, width: int) -> int:
        """The MSI-X table, 16 bytes a vector."""
        return int.from_bytes(self.table[offset : offset + width], "little")

    def table_write(self, offset: int, width: int, value: int) -> None:
        """Write the MSI-X table; bits of vector control but the mask bit stay 0."""
        if offset + width > len(self.table):
            return
        self.table[offset : offset + width] = value.to_bytes(width, "little")
        vector = offset // ENTRY
        control = ENTRY * vector + CONTROL
        self.set_mask(vector, bool(self.table[control] & MASKED))
        self.table[control + 1 : control + 4] = bytes(3)

    def pending_read(self, offset: int, width: int) -> int:
        """The pending bit array."""
        return int.from_bytes(self.pending[offset : offset + width], "little")

    def set_intx(self, level: bool) -> None:
        """Assert or deassert INTx."""
        self._intx_level = level
        self._signal_intx()

    def unmask_intx(self) -> None:
        """Let the next event through; at once if the line is still up."""
        self._intx_masked = False
        self._signal_intx()

    def _signal_intx(self) -> None:
        if self._intx_level and not self._intx_masked and self._intx_fd >= 0:
            self._intx_masked = True
            signal(self._intx_fd)

    def detach(self) -> None:
        """Forget all eventfds."""
        self._fds.clear()
        self._intx_fd = -1


def signal(fd: int) -> None:
    """Add one to an eventfd. A full counter has woken its reader already."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(fd, 1)
