"""Broken devices: masks and pending bits of MSI-X."""

from __future__ import annotations

from typing import Any

from guestpv.devices.function import SoftwareFunction

from .device import mutant, replace


@mutant("DEV-PCI-96", "DEV-PCI-97")
def masks_mean_nothing(function: SoftwareFunction) -> None:
    """Messages are sent whether masked or not."""
    interrupts: Any = function.interrupts
    interrupts.set_mask = lambda vector, masked: None
    interrupts.table[:] = bytes(len(interrupts.table))


@mutant("DEV-PCI-96", "DEV-PCI-97")
def function_mask_means_nothing(function: SoftwareFunction) -> None:
    """The mask of all vectors is ignored."""
    interrupts: Any = function.interrupts
    replace(interrupts, "set_control", lambda inner: lambda enabled, masked: inner(enabled, False))


@mutant("DEV-PCI-96", "DEV-PCI-97")
def masked_messages_are_lost(function: SoftwareFunction) -> None:
    """What comes while masked is forgotten."""
    interrupts: Any = function.interrupts

    def make(inner: Any) -> Any:
        def message(vector: int) -> None:
            inner(vector)
            interrupts.pending[:] = bytes(len(interrupts.pending))

        return message

    replace(interrupts, "message", make)


@mutant("DEV-PCI-96", "DEV-PCI-97")
def pending_bits_stay(function: SoftwareFunction) -> None:
    """A pending bit is not cleared by the message."""
    interrupts: Any = function.interrupts

    def make(inner: Any) -> Any:
        seen = bytearray(len(interrupts.pending))

        def read(offset: int, width: int) -> int:
            for at, bits in enumerate(interrupts.pending):
                seen[at] |= bits
            return int.from_bytes(seen[offset : offset + width], "little")

        return read

    replace(interrupts, "pending_read", make)
