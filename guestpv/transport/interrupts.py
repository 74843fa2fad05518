"""From a function's vectors to one eventfd a queue.

A queue's owner, Python or the C pump, only ever waits on its own eventfd. Where several queues share a
vector, or there is only INTx with its ISR byte, a thread passes the interrupt on to all concerned.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

from ..spec.pci import ISR_CONFIG, ISR_QUEUE
from ..system import SYSTEM

ReadIsr = Callable[[], int]


class Fanout:
    """Passes events of a few source eventfds on to the eventfds that share them."""

    def __init__(self) -> None:
        self._stop = SYSTEM.eventfd()
        self._poll = select.epoll()
        self._poll.register(self._stop, select.EPOLLIN)
        self._handlers: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None

    def share(self, source: int, sinks: list[int]) -> None:
        """Every event on ``source`` becomes one on each of ``sinks`` (the list may grow later)."""

        def pass_on() -> None:
            for sink in sinks:
                os.eventfd_write(sink, 1)

        self.add(source, pass_on)

    def intx(
        self, source: int, read_isr: ReadIsr, unmask: Callable[[], None], queues: list[int], config: int
    ) -> None:
        """Serve INTx: read the ISR byte, which lowers the line, pass on, unmask (4.1.5.3)."""

        def serve() -> None:
            isr = read_isr()
            if isr & ISR_QUEUE:
                for sink in queues:
                    os.eventfd_write(sink, 1)
            if isr & ISR_CONFIG:
                os.eventfd_write(config, 1)
            unmask()

        self.add(source, serve)

    def add(self, source: int, handler: Callable[[], None]) -> None:
        """Call ``handler``, in the thread, for every event on ``source``."""
        self._handlers[source] = handler
        self._poll.register(source, select.EPOLLIN)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="guestpv-interrupts", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._stop:
                    return
                try:
                    os.eventfd_read(fd)
                except BlockingIOError:
                    continue
                self._handlers[fd]()

    def close(self) -> None:
        """Stop the thread. Sources and sinks stay open: they belong to others."""
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            self._thread = None
        if not self._poll.closed:
            self._poll.close()
            SYSTEM.close(self._stop)
