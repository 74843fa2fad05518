"""A PCI function that tells its trace of every register access, doorbell and interrupt."""

from __future__ import annotations

from typing import Any

from ..pci.capabilities import identify, virtio_capabilities
from ..pci.function import Bar, PciFunction
from ..spec import pci
from ..transport.pci import PciTransport
from .queue import queue_class
from .record import DeviceTrace, Recorder
from .relay import Relay
from .words import Registers, facts, space_word


class TracedBar:
    """A BAR whose accesses are told; see ``Bar``. Nothing is mapped: doorbells come here too."""

    pointer = 0

    def __init__(self, trace: DeviceTrace, registers: Registers, index: int, bar: Bar) -> None:
        self._trace = trace
        self._registers = registers
        self._index = index
        self._bar = bar
        self.size = bar.size

    def read(self, offset: int, width: int) -> int:
        """One access, told when it is done."""
        value = self._bar.read(offset, width)
        found = self._registers.access(self._index, offset, width, value, write=False)
        text = f"read {found.name} = {value:#0{2 + 2 * width}x}"
        self._trace.tell(
            "read",
            text + (f" {found.meaning}" if found.meaning else ""),
            found.section,
            **facts(found, width, value),
        )
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        """One access, told before it is done: what it makes the device do comes after it."""
        found = self._registers.access(self._index, offset, width, value, write=True)
        kind = "doorbell" if found.structure == "notify" else "write"
        verb = "rings" if kind == "doorbell" else "write"
        text = f"{verb} {found.name} = {value:#0{2 + 2 * width}x}"
        extra = {"queue": value & 0xFFFF} if kind == "doorbell" else {}
        self._trace.tell(
            kind,
            text + (f" {found.meaning}" if found.meaning else ""),
            found.section,
            **facts(found, width, value),
            **extra,
        )
        self._bar.write(offset, width, value)


class TracedFunction:
    """See ``PciFunction``. What a function has beyond that is had of the function itself.

    Attributes:
        inner: the function.
        trace: where everything is told.
    """

    def __init__(self, inner: PciFunction, recorder: Recorder, spec: str = "") -> None:
        self.inner = inner
        self.name = inner.name
        self.dma = inner.dma
        self.translated = inner.translated
        read = inner.config_read
        identity = identify(read(pci.PCI_CONFIG_VENDOR, 2), read(pci.PCI_CONFIG_DEVICE, 2))
        self.trace = recorder.device(inner.name, identity[0] if identity else None)
        self._registers = Registers(self.trace.device_type, virtio_capabilities(read))
        self._relay: Relay | None = None
        self._open = True
        self.trace.tell(
            "open",
            f"opens {inner.name}",
            "4.1.2",
            name=inner.name,
            spec=spec,
            device_type=self.trace.device_type,
            translated=inner.translated,
            bus="pci",
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def config_read(self, offset: int, width: int) -> int:
        """Told."""
        value = self.inner.config_read(offset, width)
        text = f"read {space_word(offset)} = {value:#0{2 + 2 * width}x}"
        self.trace.tell("config-read", text, "4.1.4", offset=offset, width=width, value=value)
        return value

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Told."""
        text = f"write {space_word(offset)} = {value:#0{2 + 2 * width}x}"
        self.trace.tell("config-write", text, "4.1.4", offset=offset, width=width, value=value)
        self.inner.config_write(offset, width, value)

    def bar(self, index: int) -> TracedBar:
        """The window of a BAR, told."""
        return TracedBar(self.trace, self._registers, index, self.inner.bar(index))

    @property
    def msix_vectors(self) -> int:
        """As the function has it."""
        return self.inner.msix_vectors

    def enable_msix(self, count: int) -> list[int]:
        """Told, and every interrupt from then on."""
        self.trace.tell("vectors", f"MSI-X on with {count} vectors", "4.1.5.1.2", count=count)
        self._relay = relay = Relay()
        return [
            relay.add(fd, lambda vector=number: self._interrupted(vector))  # type: ignore[misc]
            for number, fd in enumerate(self.inner.enable_msix(count))
        ]

    def _interrupted(self, vector: int) -> None:
        whose = [queue for queue, mapped in self._registers.vectors.items() if mapped == vector]
        names = ", ".join("configuration" if queue < 0 else f"queue {queue}" for queue in whose)
        queues = {"queue": whose[0]} if len(whose) == 1 and whose[0] >= 0 else {}
        self.trace.tell(
            "interrupt",
            f"interrupt, vector {vector}" + (f": {names}" if names else ""),
            "4.1.5.1.3, 4.1.5.3",
            vector=vector,
            **queues,
        )

    def enable_intx(self) -> int:
        """Told, and every interrupt from then on."""
        self.trace.tell("vectors", "INTx on", "4.1.5.3", count=0)
        self._relay = relay = Relay()
        return relay.add(self.inner.enable_intx(), self._intx)

    def _intx(self) -> None:
        self.trace.tell("interrupt", "interrupt, INTx: the ISR says whose", "4.1.5.3", vector=-1)

    def unmask_intx(self) -> None:
        """As the function does it."""
        self.inner.unmask_intx()

    def disable_interrupts(self) -> None:
        """Told where there are any."""
        if self._relay is not None:
            self.trace.tell("vectors", "interrupts off", "4.1.5.1.2", count=-1)
            self._relay.close()
            self._relay = None
        self.inner.disable_interrupts()

    def reset(self) -> bool:
        """Told."""
        self.trace.tell("function-reset", "function level reset", "4.1")
        return self.inner.reset()

    def request_fd(self) -> int | None:
        """As the function has it."""
        return self.inner.request_fd()

    def error_fd(self) -> int | None:
        """As the function has it."""
        return self.inner.error_fd()

    def close(self) -> None:
        """As the function does it, told once."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        if self._open:
            self._open = False
            self.trace.tell("close", f"closes {self.name}", "")
        self.inner.close()


def traced_pci(function: PciFunction, recorder: Recorder, spec: str = "") -> PciTransport:
    """The transport on a function, both traced.

    Args:
        function: what is traced.
        recorder: where to.
        spec: how the user named it.

    Raises:
        Refused: as for ``PciTransport``.
    """
    traced = TracedFunction(function, recorder, spec)
    transport = PciTransport(traced)
    transport.queue_class = queue_class(traced.trace)
    return transport
