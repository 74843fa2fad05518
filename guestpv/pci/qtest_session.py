"""The qtest socket of a QEMU: register accesses as lines, their answers, interrupts in between.

Writes are posted, as they are on a PCI bus: they are carried out in order, and whoever reads waits for
them.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable

from ..errors import GuestpvError
from ..wire import qtest as wire
from .qmp import Emulator

POSTED_LIMIT = 64
"""Posted writes without a look at their answers: few enough for both socket buffers."""


class QtestSession:
    """The qtest socket of one QEMU: lines out, answers and interrupts in. Any thread may use it."""

    def __init__(self, qemu: Emulator) -> None:
        self._qemu = qemu
        self._socket = qemu.qtest
        self.lock = threading.RLock()
        self._partial = b""
        self._outstanding = 0
        self._last = wire.Answer()
        self._refusal = ""
        self._doing = ""
        self._on_interrupt: Callable[[wire.Interrupt], None] | None = None
        self._listener: threading.Thread | None = None
        self._closing = False

    def post(self, lines: bytes, count: int = 1) -> None:
        """Send ``count`` lines without waiting for their answers."""
        with self.lock:
            self._send(lines, count)
            if self._outstanding >= POSTED_LIMIT:
                self._collect()

    def ask(self, lines: bytes, count: int = 1) -> wire.Answer:
        """Send ``count`` lines; returns the answer to the last once all posted ones were answered too.

        Raises:
            TimeLimit: QEMU did not answer in time and was killed.
            DeviceGone: QEMU is not there any more.
            GuestpvError: QEMU did not carry a command out.
        """
        with self.lock:
            self._send(lines, count)
            self._collect()
            return self._last

    def intercept(self, controller: str, handler: Callable[[wire.Interrupt], None]) -> None:
        """Report changes of the input pins of an interrupt controller to ``handler``, in some thread."""
        with self.lock:
            self._on_interrupt = handler
            self.ask(wire.intercept_inputs(controller))
        self._listener = threading.Thread(target=self._listen, name="guestpv-qtest", daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Stop listening."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._listener is not None:
            self._listener.join()

    def _send(self, lines: bytes, count: int) -> None:
        self._qemu.check()
        self._doing = lines.decode().strip().replace("\n", "; ")
        try:
            self._socket.sendall(lines)
        except BlockingIOError:
            raise self._qemu.stuck(self._doing) from None
        except OSError as error:
            raise self._qemu.died(self._doing) from error
        self._outstanding += count

    def _collect(self) -> None:
        while self._outstanding:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                raise self._qemu.stuck(self._doing) from None
            except OSError as error:
                raise self._qemu.died(self._doing) from error
            if not data:
                raise self._qemu.died(self._doing)
            self._take(data)
        self._qemu.answered()
        if self._refusal:
            refusal, self._refusal = self._refusal, ""
            raise GuestpvError(f"{self._qemu.name}: {refusal}", where="qtest")

    def _take(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            try:
                message = wire.parse(line)
            except ValueError as error:
                self._refusal = str(error)
                self._outstanding -= 1
                continue
            if isinstance(message, wire.Interrupt):
                if self._on_interrupt is not None:
                    self._on_interrupt(message)
                continue
            self._outstanding -= 1
            if isinstance(message, wire.Failure):
                self._refusal = f"`{self._doing}` was refused: {message.reason}"
            else:
                self._last = message

    def _listen(self) -> None:
        """Take interrupts that come while nobody waits for an answer."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while not self._closing:
            poll.poll()
            with self.lock:
                try:
                    data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                self._take(data)
