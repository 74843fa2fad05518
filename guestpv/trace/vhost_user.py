"""A vhost-user back end whose messages, rings and eventfds are told."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from ..transport.vhost_user import VhostUserTransport
from ..transport.vhost_user_session import Session
from ..wire.vhost_user import AnyPayload, Request
from .queue import polled_class, queue_class
from .record import DeviceTrace, Recorder
from .words import status_words

_Answer = TypeVar("_Answer", bound=AnyPayload)


class TracedSession(Session):
    """See ``Session``. Make a class of one device with ``traced_vhost_user``."""

    trace: ClassVar[DeviceTrace]

    def ask(
        self, request: Request, payload: AnyPayload | None, answer: type[_Answer], fds: tuple[int, ...] = ()
    ) -> _Answer:
        """Told, with its answer."""
        self._said(request, payload, fds)
        return self._answered(request, super().ask(request, payload, answer, fds))

    def ask_with_fd(
        self, request: Request, payload: AnyPayload, answer: type[_Answer]
    ) -> tuple[_Answer, int]:
        """Told, with its answer."""
        self._said(request, payload, ())
        found, fd = super().ask_with_fd(request, payload, answer)
        return self._answered(request, found), fd

    def tell(self, request: Request, payload: AnyPayload | None = None, fds: tuple[int, ...] = ()) -> None:
        """Told."""
        self._said(request, payload, fds)
        super().tell(request, payload, fds)

    def _said(self, request: Request, payload: AnyPayload | None, fds: tuple[int, ...]) -> None:
        text = request.name + (f" {_words(payload)}" if payload is not None else "")
        text += f" with {len(fds)} descriptor{'s' if len(fds) > 1 else ''}" if fds else ""
        data = payload.pack().hex() if payload is not None else ""
        self.trace.tell("message", text, "", request=request.name, payload=data, fds=len(fds))

    def _answered(self, request: Request, answer: _Answer) -> _Answer:
        text = f"{request.name}: {_words(answer)}"
        self.trace.tell("answer", text, "", request=request.name, payload=answer.pack().hex())
        return answer


def _words(payload: AnyPayload) -> str:
    value = getattr(payload, "value", None)
    return f"{value:#x}" if isinstance(value, int) else str(payload)


def traced_vhost_user(recorder: Recorder) -> type[VhostUserTransport]:
    """A class of ``VhostUserTransport`` whose one device is told of."""

    class Traced(VhostUserTransport):
        def __init__(self, device_type: int, path: str, **rest: Any) -> None:
            name = f"vhost-user:{path}"
            self._trace = trace = recorder.device(name, device_type)
            trace.tell("open", f"opens {name}", "", name=name, device_type=device_type, bus="vhost-user")
            self.session_class = type("TracedSession", (TracedSession,), {"trace": trace})
            self.queue_class = queue_class(trace)
            self.polled_class = polled_class(trace)
            super().__init__(device_type, path, **rest)

        def write_status(self, value: int) -> None:
            text = f"device_status = {value:#04x} {status_words(value)}, kept by the front end"
            self._trace.tell("status", text, "2.1", value=value)
            super().write_status(value)

        def release(self) -> None:
            if not self._closed_told:
                self._closed_told = True
                self._trace.tell("close", f"closes {self._trace.name}", "")
            super().release()

        _closed_told = False

    return Traced
