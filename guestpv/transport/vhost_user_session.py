"""One connection to a vhost-user back end: requests, acknowledgements, and what the back end says unasked."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from ..errors import BackEndGone, DeviceGone, GuestpvError, TimeLimit
from ..system import SYSTEM, System
from ..wire import unix
from ..wire import vhost_user as wire
from ..wire.stream import ProtocolError
from ..wire.vhost_user import U64, AnyPayload, BackendRequest, Channel, Message, Request
from ..wire.vhost_user import ProtocolFeature as PF

ANSWER_LIMIT: Final = 10.0
"""Seconds a back end has for an answer."""

HUNG_UP: Final = (
    "it ended, or did not like what it was asked: look at what it printed; its device type has to be the "
    "specification's"
)

USED_PROTOCOL_FEATURES: Final = (
    PF.MQ,
    PF.REPLY_ACK,
    PF.BACKEND_REQ,
    PF.CONFIG,
    PF.INFLIGHT_SHMFD,
    PF.RESET_DEVICE,
    PF.CONFIGURE_MEM_SLOTS,
    PF.STATUS,
)

_Answer = TypeVar("_Answer", bound=AnyPayload)


class Session:
    """A connected back end after the protocol's own handshake.

    A thread serves the back end's requests and notices its death.

    Args:
        path: the back end's UNIX socket.
        on_config: called, in that thread, when the device configuration changed.
        on_death: called, in that thread, when the back end went away.

    Attributes:
        features: what GET_FEATURES answered.
        protocol_features: mask of the protocol features in use.
        queue_num: what GET_QUEUE_NUM answered, None without MQ.
        max_regions: memory regions the back end takes.
        death: why there is no back end any more; empty while there is one.

    Raises:
        GuestpvError: nobody listens there.
        AccessDenied: the socket's permissions.
        ProtocolError, TimeLimit, DeviceGone: who listens there does not speak vhost-user.
    """

    def __init__(
        self,
        path: str,
        on_config: Callable[[], None],
        on_death: Callable[[], None],
        *,
        system: System = SYSTEM,
    ) -> None:
        self.name = f"vhost-user {path}"
        self.death = ""
        self.protocol_features = 0
        self.queue_num: int | None = None
        self.max_regions = wire.MAX_REGIONS
        self._system = system
        self._on_config = on_config
        self._on_death = on_death
        self._lock = threading.Lock()
        self._channel = Channel(
            unix.connect(path, self.name, ANSWER_LIMIT, server="the back end"), self.name, ANSWER_LIMIT
        )
        self._backend_channel: Channel | None = None
        self._stop = system.eventfd()
        self._thread: threading.Thread | None = None
        try:
            self._shake_hands()
            self._thread = threading.Thread(target=self._watch, name="guestpv-vhost-user", daemon=True)
            self._thread.start()
        except (DeviceGone, TimeLimit, ProtocolError) as error:
            self.close()
            error.hint = (
                f"a vhost-user back end has to listen on {path}: ss -xlp | grep {path} shows who does"
            )
            raise
        except BaseException:
            self.close()
            raise

    def _shake_hands(self) -> None:
        self.features = self.ask(Request.GET_FEATURES, None, U64).value
        if self.features >> wire.F_PROTOCOL_FEATURES & 1:
            offered = self.ask(Request.GET_PROTOCOL_FEATURES, None, U64).value
            wanted = sum(1 << feature for feature in USED_PROTOCOL_FEATURES) & offered
            self.tell(Request.SET_PROTOCOL_FEATURES, U64(wanted))
            self.protocol_features = wanted
        self.tell(Request.SET_OWNER)
        if self.has(PF.MQ):
            self.queue_num = self.ask(Request.GET_QUEUE_NUM, None, U64).value
        if self.has(PF.CONFIGURE_MEM_SLOTS):
            self.max_regions = self.ask(Request.GET_MAX_MEM_SLOTS, None, U64).value
        if self.has(PF.BACKEND_REQ):
            ours, theirs = socket.socketpair()
            with theirs:
                self._backend_channel = Channel(ours, f"{self.name} back-end channel", ANSWER_LIMIT)
                self.tell(Request.SET_BACKEND_REQ_FD, None, (theirs.fileno(),))

    def has(self, feature: PF) -> bool:
        """Whether a protocol feature is in use."""
        return bool(self.protocol_features >> feature & 1)

    # Requests.

    def ask(
        self, request: Request, payload: AnyPayload | None, answer: type[_Answer], fds: tuple[int, ...] = ()
    ) -> _Answer:
        """A request that always has an answer.

        Raises:
            DeviceGone: the back end died.
            TimeLimit: it does not answer.
            ProtocolError: it answered something else.
        """
        reply = self._exchange(request, payload, fds)
        reply.close_fds()
        return self._decode(request, reply, answer)

    def ask_with_fd(
        self, request: Request, payload: AnyPayload, answer: type[_Answer]
    ) -> tuple[_Answer, int]:
        """The same for a request whose answer brings one descriptor, which the caller owns then."""
        reply = self._exchange(request, payload, ())
        try:
            if len(reply.fds) != 1:
                raise ProtocolError(
                    f"the answer to {request.name} brings {len(reply.fds)} descriptors, not 1",
                    where=self.name,
                )
            return self._decode(request, reply, answer), reply.fds[0]
        except BaseException:
            reply.close_fds()
            raise

    def tell(self, request: Request, payload: AnyPayload | None = None, fds: tuple[int, ...] = ()) -> None:
        """A request without an answer of its own; acknowledged where the back end can do that.

        Raises:
            GuestpvError: the back end says that it failed.
            DeviceGone, TimeLimit, ProtocolError: as for ``ask``.
        """
        data = payload.pack() if payload else b""
        if not self.has(PF.REPLY_ACK):
            with self._lock:
                self._send(Message(request, data, fds))
            return
        reply = self._exchange(request, payload, fds, wire.FLAG_NEED_REPLY)
        reply.close_fds()
        if status := self._decode(request, reply, U64).value:
            raise GuestpvError(f"the back end refused {request.name} (status {status})", where=self.name)

    def _send(self, message: Message) -> None:
        if self.death:
            raise BackEndGone(self.death, where=self.name)
        with self._explaining():
            self._channel.send(message)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except DeviceGone as error:
            raise BackEndGone(error.message, where=error.where, hint=error.hint or HUNG_UP) from error

    def _exchange(
        self, request: Request, payload: AnyPayload | None, fds: tuple[int, ...], flags: int = 0
    ) -> Message:
        with self._lock:
            self._send(Message(request, payload.pack() if payload else b"", fds, wire.VERSION | flags))
            try:
                with self._explaining():
                    reply = self._channel.receive()
            except TimeLimit:
                raise TimeLimit(
                    f"no answer to {request.name} within {self._channel.timeout:g} s", where=self.name
                ) from None
        if reply.request != request or not reply.is_reply:
            reply.close_fds()
            raise ProtocolError(
                f"the answer to {request.name} ({int(request)}) is message {reply.request} with flags "
                f"{reply.flags:#x}",
                where=self.name,
            )
        return reply

    def _decode(self, request: Request, reply: Message, answer: type[_Answer]) -> _Answer:
        try:
            return answer.unpack(reply.payload)
        except ProtocolError as error:
            raise ProtocolError(f"the answer to {request.name}: {error.message}", where=self.name) from None

    # What the back end does unasked.

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self._stop, select.POLLIN)
        poller.register(self._channel.fileno(), select.POLLRDHUP)
        if self._backend_channel:
            poller.register(self._backend_channel.fileno(), select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll()]
            if self._stop in ready:
                return
            if self._channel.fileno() in ready:
                self._die("the back end closed the connection")
                return
            try:
                self._serve(self._backend_channel)  # type: ignore[arg-type]
            except DeviceGone:
                poller.unregister(ready[0])
            except GuestpvError as error:
                self._die(f"back-end channel: {error.message}")
                return

    def _serve(self, channel: Channel) -> None:
        message = channel.receive()
        message.close_fds()
        known = message.request == BackendRequest.CONFIG_CHANGE_MSG
        if known:
            self._on_config()
        if message.wants_reply:
            channel.send(message.answer(U64(0 if known else 1).pack()))

    def _die(self, reason: str) -> None:
        self.death = reason
        self._on_death()

    def close(self) -> None:
        """Close the connection and stop the thread. Idempotent."""
        if self._stop < 0:
            return
        if self._thread:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        self._system.close(self._stop)
        self._stop = -1
        self._channel.close()
        if self._backend_channel:
            self._backend_channel.close()
        self.death = self.death or "the connection is closed"
