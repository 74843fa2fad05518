"""A vhost-user back end: any model of ``devices`` on a UNIX socket, for any front end.

The protocol carries rings, memory and device configuration, and a status only for front ends that negotiate
STATUS. The device's life is derived from the rest: SET_FEATURES negotiates, the first ring that starts is
DRIVER_OK, the end of the connection is the reset.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
import threading
from types import TracebackType
from typing import Final, Self

from ..devices.device import Device
from ..devices.dma import BusMemory
from ..devices.evidence import Journal
from ..devices.executor import Executor
from ..devices.model import Model
from ..devices.queue import DeviceQueue
from ..devices.registers import VirtioRegisters
from ..errors import DeviceGone, GuestpvError, UsageError
from ..spec import features as ft
from ..spec import net
from ..system import SYSTEM
from ..wire.vhost_user import Channel
from ..wire.vhost_user import ProtocolFeature as PF
from .vhost_user_connection import Connection, Vring

PROTOCOL_FEATURES: Final = ft.mask(
    (
        PF.MQ,
        PF.REPLY_ACK,
        PF.BACKEND_REQ,
        PF.CONFIG,
        PF.INFLIGHT_SHMFD,
        PF.RESET_DEVICE,
        PF.CONFIGURE_MEM_SLOTS,
        PF.STATUS,
    )
)
POLL_SECONDS: Final = 0.001
"""How often a ring without a kick descriptor is looked into."""
MESSAGE_SECONDS: Final = 10.0
"""How long a front end may take for the rest of a message."""

NOT_CARRIED: Final = ft.mask(
    (ft.F_ACCESS_PLATFORM, ft.F_IN_ORDER, ft.F_NOTIFICATION_DATA, ft.F_NOTIF_CONFIG_DATA)
)
"""Features that need an IOTLB, an order that a restart cannot take up again, or data beside a kick."""


class VhostUserServer:
    """A device model behind a socket; one front end at a time.

    >>> with VhostUserServer(Blk(Store(size=1 << 30)), "/run/disk.sock"):   # doctest: +SKIP
    ...     input("serving; Enter ends it")

    Args:
        model: the device type.
        path: where to listen; a socket left behind there by an earlier server is replaced.
        offer: further device-independent features, such as RING_PACKED, as a mask.
        protocol_features: mask of what GET_PROTOCOL_FEATURES answers.

    Attributes:
        device: the virtio device, with its knobs for tests.
        journal: what it saw, and what it holds against its driver.
        offered: what GET_FEATURES answers, without the protocol's own bit.

    Raises:
        UsageError: somebody listens at ``path`` already, or it is no socket.
    """

    def __init__(
        self, model: Model, path: str, *, offer: int = 0, protocol_features: int = PROTOCOL_FEATURES
    ) -> None:
        self.path = path
        self.name = f"vhost-user {path}"
        self.protocol_features = protocol_features
        self.journal = Journal(self.name)
        self.executor = Executor(self.name)
        self.device = Device(model, self.journal, BusMemory(), self.executor, self._interrupt)
        self.registers = VirtioRegisters(self.device, 0, 4, lambda: None)
        self.device.offered = self._restrict(self.device.offered | offer)
        self.connection: Connection | None = None
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stop = SYSTEM.eventfd()
        self._selector = selectors.DefaultSelector()
        self._listener = self._listen()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._stop, selectors.EVENT_READ, None)

    def _restrict(self, offered: int) -> int:
        offered &= ~NOT_CARRIED
        kind = self.device.model.device_type
        if kind == ft.NET:
            # The control queue belongs to the front end, and with it what depends on it; only how many pairs
            # it uses arrives here, by SET_VRING_ENABLE.
            pairs = ft.mask((net.F_CTRL_VQ, net.F_MQ)) if offered >> net.F_MQ & 1 else 0
            return ft.close_dependencies(kind, offered & ~(1 << net.F_CTRL_VQ)) | pairs
        return ft.close_dependencies(kind, offered)

    @property
    def offered(self) -> int:
        """Feature bits shown to front ends."""
        offered = self.device.offered
        return offered & ~(1 << net.F_CTRL_VQ) if self.device.model.device_type == ft.NET else offered

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            self._clear_path()
            listener.bind(self.path)
            listener.listen()
        except OSError as error:
            listener.close()
            raise UsageError(
                f"cannot listen: {error.strerror or error}",
                where=self.name,
                hint="check that the directory exists and may be written to",
            ) from None
        except BaseException:
            listener.close()
            raise
        return listener

    def _clear_path(self) -> None:
        """Remove a socket that nobody listens on any more; anything else stays."""
        if not SYSTEM.exists(self.path) or not stat.S_ISSOCK(SYSTEM.stat(self.path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                SYSTEM.unlink(self.path)
            else:
                raise UsageError("somebody listens there already", where=self.name)

    # The loop.

    def run(self) -> None:
        """Serve front ends, one after the other, until ``close`` is called from elsewhere."""
        while True:
            polling = self.connection is not None and any(
                ring.started and ring.kick < 0 for ring in self.connection.rings
            )
            ready = self._selector.select(POLL_SECONDS if polling else None)
            for key, _ in ready:
                if key.fd == self._stop:
                    return
                # An earlier event of this round may have closed what this one is about.
                if self._selector.get_map().get(key.fd) is not key:
                    continue
                # A front end that went away makes room for the one that came after it.
                if key.fd == self._listener.fileno() and self._client_is_in(ready):
                    continue
                key.data()
            if polling:
                self.device.poll()

    def _client_is_in(self, ready: list[tuple[selectors.SelectorKey, int]]) -> bool:
        channel = self.connection.channel.fileno() if self.connection is not None else -1
        return any(key.fd == channel for key, _ in ready)

    def start(self) -> Self:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(
            target=self._run_thread, name="guestpv-vhost-user-server", daemon=True
        )
        self._thread.start()
        return self

    def _run_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.failure = error

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if self.connection is not None:
            sock.close()
            return
        channel = Channel(sock, self.name, MESSAGE_SECONDS)
        self.connection = Connection(self, channel)
        self._selector.register(channel.fileno(), selectors.EVENT_READ, self._serve)

    def _serve(self) -> None:
        connection = self.connection
        assert connection is not None
        try:
            connection.serve()
        except DeviceGone:
            self._hang_up()
        except GuestpvError as error:
            self.journal.find("", error.message, "vhost-user")
            self._hang_up()

    def _hang_up(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            self._selector.unregister(connection.channel.fileno())
            connection.close()

    # What a connection asks of the loop.

    def watch_kick(self, ring: Vring) -> None:
        """Kick the ring's queue whenever its descriptor fires."""
        if ring.kick >= 0:
            fd = ring.kick

            def kicked() -> None:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 8)
                if ring.started:
                    self.device.kick(ring.index)

            self._selector.register(fd, selectors.EVENT_READ, kicked)

    def forget_kick(self, ring: Vring) -> None:
        """The ring's descriptor is about to be closed."""
        if ring.kick >= 0:
            self._selector.unregister(ring.kick)

    def backend_channel(self, fd: int) -> Channel:
        """The channel for our own requests on a descriptor that the front end sent."""
        return Channel(socket.socket(fileno=fd), f"{self.name} back-end channel", MESSAGE_SECONDS)

    def _interrupt(self, queue: DeviceQueue | None) -> None:
        if self.connection is not None:
            self.connection.interrupt(None if queue is None else queue.index)

    def close(self) -> None:
        """Stop serving, reset the device, remove the socket. Raises what the server's thread died of."""
        if self._stop < 0:
            return
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        self._hang_up()
        self._selector.close()
        self._listener.close()
        SYSTEM.close(self._stop)
        self._stop = -1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.device.model.close()
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
