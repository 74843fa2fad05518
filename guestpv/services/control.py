"""The control socket of something that is up, and running it in the background.

A process that is up listens on ``NAME.sock`` in the runtime directory. A client sends one JSON object a
line, ``{"command": "status"}`` or ``{"command": "down"}``, and gets ``{"ok": true, "data": ...}`` back; the
answer to ``down`` comes when everything was given back. Only the owner of the process and root get in.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

from ..errors import GuestpvError, TimeLimit, UsageError
from ..wire import unix

LINE_LIMIT: Final = 1 << 20
"""Bytes of the longest line either side accepts."""
STATUS_TIME_LIMIT: Final = 15.0
DOWN_TIME_LIMIT: Final = 60.0

Data = dict[str, Any]


class ControlServer:
    """Answers on the control socket from a thread of its own, from ``listen`` to ``close``.

    Args:
        directory: where the socket goes; nobody else can write there.
        status: what to answer to ``status``; called in the server's thread.
        wake: called in the server's thread when a client asks for the end.
        verb: ``net``, ``blk`` or ``balloon``: whose commands messages name.

    Attributes:
        farewell: the answer to those who asked for the end, given by ``close``.
    """

    def __init__(
        self, directory: str, status: Callable[[], Data], wake: Callable[[], None], verb: str = "net"
    ) -> None:
        self.farewell: Data = {}
        self._verb = verb
        self._directory = Path(directory)
        self._status = status
        self._wake = wake
        self._down = threading.Event()
        self._finished = threading.Event()
        self._listener: socket.socket | None = None
        self._waiting: list[threading.Thread] = []
        self._path: Path | None = None

    @property
    def down_requested(self) -> bool:
        """Whether a client asked for the end."""
        return self._down.is_set()

    def listen(self, name: str) -> Path:
        """Listen on ``name.sock``; a socket that nobody listens on any more is replaced.

        Raises:
            UsageError: something of this name is up, or the runtime directory's name is too long.
        """
        path = self._directory / f"{name}.sock"
        if path.exists() and (taken := ask_or_remove(path)) is not None:
            raise UsageError(
                f"{name} is up already, in process {taken.get('pid')}",
                where=str(path),
                hint=f"guestpv {self._verb} status",
            )
        hidden = path.with_name(f".{name}.{os.getpid()}")
        if (length := max(len(os.fsencode(one)) for one in (path, hidden))) > unix.PATH_MAX:
            raise UsageError(
                f"a socket's path has at most {unix.PATH_MAX} bytes, this one would have {length}",
                where=str(path),
                hint="set RUNTIME_DIRECTORY to a directory with a shorter name",
            )
        hidden.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(hidden))
            hidden.chmod(0o600)
            listener.listen(8)
            # Only a listening socket gets the public name: one that refuses connections is a stale one.
            hidden.rename(path)
        except BaseException:
            listener.close()
            hidden.unlink(missing_ok=True)
            raise
        self._listener, self._path = listener, path
        threading.Thread(target=self._accept, args=(listener,), name="control", daemon=True).start()
        return path

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="control client", daemon=True)
            self._waiting = [other for other in self._waiting if other.is_alive()] + [thread]
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(STATUS_TIME_LIMIT)
            _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (0, os.geteuid()):
                return
            for line in lines(client):
                client.sendall(json.dumps(self._answer(line)).encode() + b"\n")

    def _answer(self, line: bytes) -> Data:
        try:
            command = json.loads(line)["command"]
        except (ValueError, KeyError, TypeError):
            return {"ok": False, "error": 'a request is {"command": "status"} or {"command": "down"}'}
        if command == "status":
            try:
                return {"ok": True, "data": self._status()}
            except Exception as error:
                return {"ok": False, "error": f"{error}"}
        if command == "down":
            self._down.set()
            self._wake()
            self._finished.wait()
            return {"ok": True, "data": self.farewell}
        return {"ok": False, "error": f"unknown command {command!r}"}

    def close(self) -> None:
        """Remove the socket and give those who asked for the end their answer. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._finished.set()
        if self._down.is_set():
            for thread in self._waiting:
                thread.join(timeout=1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lines(stream: socket.socket) -> Iterator[bytes]:
    """Complete lines until the peer hangs up; one that is too long ends the conversation."""
    pending = b""
    while len(pending) <= LINE_LIMIT:
        chunk = stream.recv(65536)
        if not chunk:
            return
        *complete, pending = (pending + chunk).split(b"\n")
        yield from complete


def ask(path: Path, command: str, timeout: float) -> Data:
    """Send one command and wait for its answer.

    Args:
        timeout: seconds.

    Raises:
        ConnectionRefusedError, FileNotFoundError: nobody is there.
        TimeLimit: no answer in time.
        GuestpvError: it answered with an error, or hung up.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            client.connect(str(path))
            client.sendall(json.dumps({"command": command}).encode() + b"\n")
            for line in lines(client):
                answer = json.loads(line)
                if answer.get("ok"):
                    return dict(answer.get("data") or {})
                raise GuestpvError(f"{command}: {answer.get('error')}", where=str(path))
    except TimeoutError as error:
        raise TimeLimit(f"no answer to {command} within {timeout:g} s", where=str(path)) from error
    except (ConnectionResetError, BrokenPipeError):
        pass
    raise GuestpvError(f"hung up before it answered to {command}", where=str(path))


def ask_or_remove(path: Path) -> Data | None:
    """The status of whoever listens on ``path``; a socket that nobody listens on is removed: None."""
    try:
        return ask(path, "status", STATUS_TIME_LIMIT)
    except (ConnectionRefusedError, FileNotFoundError):
        path.unlink(missing_ok=True)
        return None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something that is up: its control socket and what it answered to ``status``."""

    path: Path
    status: Data

    @property
    def name(self) -> str:
        """The name it was given, such as that of its network link."""
        return self.path.stem


def endpoints(directory: str) -> list[Endpoint]:
    """All that is up and has its socket in ``directory``; stale sockets are removed on the way.

    One that does not answer has ``error`` in its status.
    """
    found = []
    for path in sorted(Path(directory).glob("*.sock")):
        try:
            status = ask_or_remove(path)
        except GuestpvError as error:
            status = {"error": str(error)}
        if status is not None:
            found.append(Endpoint(path, status))
    return found


def find(directory: str, wanted: str | None, verb: str = "net") -> list[Endpoint]:
    """Those of what is up that ``wanted`` names: a link, a PCI address, a SPEC, or None for all.

    Args:
        verb: as for ``ControlServer``.

    Raises:
        UsageError: a name was given and nothing of that name is up.
    """
    everything = endpoints(directory)
    if wanted is None:
        return everything
    found = [
        endpoint
        for endpoint in everything
        if wanted in (endpoint.name, endpoint.status.get("function"), endpoint.status.get("spec"))
    ]
    if not found:
        names = " ".join(endpoint.name for endpoint in everything)
        raise UsageError(
            f"{wanted} is not up",
            hint=f"up are: {names}" if names else f"nothing is up: guestpv {verb} up",
        )
    return found


# Running in the background.


class Detached(GuestpvError):
    """The background process could not do it; carries its error across."""

    def __init__(self, error: Data) -> None:
        super().__init__(error["message"], where=error["where"], hint=error["hint"])
        self.code = error["code"]
        self.exit_status = error["exit_status"]


def detach(run: Callable[[Callable[[Data], None]], None], up: Callable[[Data], None]) -> None:
    """Fork, ``run(ready)`` in a session of its own; ``up`` gets here what it hands to ``ready`` there.

    The fork comes before the work because neither threads nor DMA mappings survive one. Until ``ready`` is
    called a SIGINT or SIGTERM to this process ends the other one, too, and is waited for; from then on it is
    too late for that, and it changes nothing.

    Raises:
        Detached: it failed; nothing runs in the background.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    message: Data = {}
    came: list[int] = []
    child = 0

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if child and "ready" not in message:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # Blocked for the child until it has its own handlers. Another thread of this process takes them all the
    # same, so the handlers are there before the child is.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    before = {number: signal.signal(number, forward) for number in ending}
    try:
        child = os.fork()
        if child == 0:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(reader)
            _background(run, writer)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            forward(came[0], None)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            line = stream.readline()
        message.update(json.loads(line) if line else {})
        if "ready" in message:
            up(message["ready"])
            return
        _, status = os.waitpid(child, 0)
        if "error" in message:
            raise Detached(message["error"])
        raise GuestpvError(
            f"the background process {child} ended before it was up (wait status {status:#x})",
            hint="run it without --detach to see why",
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def _background(run: Callable[[Callable[[Data], None]], None], writer: int) -> None:
    """The child's whole life."""
    told = False

    def tell(message: Data) -> None:
        nonlocal told
        if told:
            os.write(2, json.dumps(message).encode() + b"\n")
            return
        told = True
        with contextlib.suppress(BrokenPipeError):
            os.write(writer, json.dumps(message).encode() + b"\n")
        os.close(writer)

    def ready(data: Data) -> None:
        tell({"ready": data})

    code = 1
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        run(ready)
        code = 0
    except GuestpvError as error:
        code = error.exit_status
        tell({"error": describe_error(error)})
    except BaseException as error:
        tell({"error": describe_error(GuestpvError(f"{type(error).__name__}: {error}"))})
    finally:
        os._exit(code)


def describe_error(error: GuestpvError) -> Data:
    """An error as it crosses from one process to the other."""
    return {
        "code": error.code,
        "message": error.message,
        "where": error.where,
        "hint": error.hint,
        "exit_status": error.exit_status,
    }
