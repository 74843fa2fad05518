"""Console device (5.3) with one port: what is typed is what the test gives it."""

from __future__ import annotations

from collections.abc import Callable

from ...spec import console as spec
from ...spec import features as ft
from ...spec.layout import Field
from ..model import DEFAULT_QUEUE_SIZE, Model
from ..queue import DeviceQueue
from ..ring import Chain


class Console(Model):
    """A terminal that shows nothing: it keeps what was written, and can answer.

    Args:
        columns, rows: size of the terminal.
        depth: queue size offered.

    Attributes:
        written: everything the driver sent, with what came by emergency write.
        peer: called with each piece of it; None to only keep it.
    """

    device_type = ft.CONSOLE
    pci_class = 0x078000
    layout = spec.CONFIG
    written_early = frozenset({"emerg_wr"})

    def __init__(self, columns: int = 80, rows: int = 25, depth: int = DEFAULT_QUEUE_SIZE) -> None:
        super().__init__(depth)
        self.offered = ft.mask((spec.F_SIZE, spec.F_EMERG_WRITE))
        self.config = {"cols": columns, "rows": rows, "emerg_wr": 0}
        self.written = bytearray()
        self.peer: Callable[[bytes], None] | None = None
        self._typed = bytearray()

    @property
    def num_queues(self) -> int:
        """Receive and transmit of port 0 (5.3.2)."""
        return 2

    def reset(self) -> None:
        """What was typed and not taken is gone."""
        self._typed.clear()

    def config_written(self, field: Field, value: int) -> None:
        """5.3.5: the lower byte goes out, whatever state the device is in."""
        if field.name == "emerg_wr":
            self._write(bytes([value & 0xFF]))

    def serve(self, queue: DeviceQueue) -> None:
        """Receive buffers wait for something to be typed; what is to be sent is taken at once."""
        if queue.index == spec.RECEIVEQ:
            self._hand_over()
            return
        for chain in queue.chains():
            self.handle(queue, chain)

    def handle(self, queue: DeviceQueue, chain: Chain) -> None:
        """5.3.6: characters to put out."""
        if chain.writable_bytes:
            self.device.find("", f"chain {chain.id} in transmitq is device-writable (5.3.6.1)", queue.where)
        data = chain.read()
        queue.complete(chain, 0)
        self._write(data)

    def type(self, data: bytes) -> None:
        """Let the driver receive ``data``, as soon as it gives buffers for it."""
        with self.device.executor:
            self._typed += data
            self._hand_over()

    def resize(self, columns: int, rows: int) -> None:
        """Change the terminal's size: the driver is told (5.3.6)."""
        self.change_config(cols=columns, rows=rows)

    def _write(self, data: bytes) -> None:
        self.written += data
        if self.peer is not None:
            self.peer(data)

    def _hand_over(self) -> None:
        queue = self.device.queues[spec.RECEIVEQ]
        while self._typed and (chain := queue.pop()) is not None:
            if chain.readable_bytes:
                self.device.find(
                    "", f"chain {chain.id} in receiveq is device-readable (5.3.6.1)", queue.where
                )
            used = chain.write(bytes(self._typed))
            del self._typed[:used]
            queue.complete(chain, used)
        if self._typed:
            queue.rearm()
