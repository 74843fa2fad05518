"""What a transport needs of a PCI function, be it the kernel's, QEMU's or our own in software."""

from __future__ import annotations

from typing import Protocol

from ..memory import DmaSpace


class Bar(Protocol):
    """One base address register's window.

    Attributes:
        size: bytes.
        pointer: CPU address where the window is mapped into this process, or 0 where every access is a
            message; a doorbell in a mapped window is rung by C, otherwise through ``write``.
    """

    size: int
    pointer: int

    def read(self, offset: int, width: int) -> int:
        """One access of ``width`` 1, 2 or 4 bytes, little-endian."""
        ...

    def write(self, offset: int, width: int, value: int) -> None:
        """One access of ``width`` 1, 2 or 4 bytes, little-endian."""
        ...


class PciFunction(Protocol):
    """A PCI function that this process owns.

    Attributes:
        name: how messages call it: ``0000:01:00.0``, ``loopback:net``.
        dma: where the function sees memory.
        translated: True where bus addresses differ from guest-physical ones (an IOMMU), so that a virtio
            device must negotiate ACCESS_PLATFORM or it would corrupt memory.
    """

    name: str
    dma: DmaSpace
    translated: bool

    def config_read(self, offset: int, width: int) -> int:
        """Read 1, 2 or 4 bytes of PCI configuration space."""
        ...

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of PCI configuration space."""
        ...

    def bar(self, index: int) -> Bar:
        """The window of BAR ``index``."""
        ...

    @property
    def msix_vectors(self) -> int:
        """Number of MSI-X vectors, 0 where the function has no MSI-X."""
        ...

    def enable_msix(self, count: int) -> list[int]:
        """Enable ``count`` vectors; returns one eventfd each, owned by the function."""
        ...

    def enable_intx(self) -> int:
        """Enable the legacy interrupt; returns its eventfd. It is masked at each event."""
        ...

    def unmask_intx(self) -> None:
        """Let the next legacy interrupt through, after the ISR was read."""
        ...

    def disable_interrupts(self) -> None:
        """Take the eventfds away from the function."""
        ...

    def reset(self) -> bool:
        """Function level reset. Returns False where the function has no way of doing it."""
        ...

    def request_fd(self) -> int | None:
        """Eventfd that asks the owner to let go of the function (hot-unplug, unbind), if there is one."""
        ...

    def error_fd(self) -> int | None:
        """Eventfd of an unrecoverable PCI error, if there is one."""
        ...

    def close(self) -> None:
        """Give the function back. Idempotent."""
        ...
