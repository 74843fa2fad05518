"""The host's end of the agent's port: requests, running commands and their output."""

import contextlib
import itertools
import json
import re
import shlex
import signal as signals
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from guestvm.errors import GuestDied, GuestTimeout, LabError

CHUNK = 65536
PLAIN = re.compile(r"guestpv(?: [\w./:=,+@%-]+)+")
"""What a shell would run as it stands."""


@dataclass(frozen=True)
class Result:
    """How a command ended: `status` is its exit status, or minus the signal that ended it."""

    status: int
    stdout: str
    stderr: str

    def check(self) -> "Result":
        """This result if the status is 0; otherwise LabError with what was printed."""
        if self.status != 0:
            raise LabError(f"status {self.status}\nstdout: {self.stdout}\nstderr: {self.stderr}")
        return self


class Process:
    """A command in the guest. Output is gathered as it comes, or handed to `on_output` instead."""

    def __init__(self, link: "Link", ident: int, name: str) -> None:
        self._link = link
        self._ident = ident
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self.on_output: Callable[[str, bytes], None] | None = None
        self.name = name
        self.pid = 0
        self.status: int | None = None

    @property
    def stdout(self) -> str:
        """What it printed so far."""
        return self._output["stdout"].decode(errors="replace")

    @property
    def stderr(self) -> str:
        """What it printed so far on stderr."""
        return self._output["stderr"].decode(errors="replace")

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the process, or to its whole process group."""
        self._link.call("signal", child=self._ident, number=int(number), group=group)

    def write(self, data: bytes) -> None:
        """Send bytes to its standard input."""
        for start in range(0, len(data), CHUNK):
            self._link.call("stdin", data[start : start + CHUNK], child=self._ident)

    def close_stdin(self) -> None:
        """End its standard input."""
        self._link.call("stdin", child=self._ident)

    def resize(self, rows: int, columns: int) -> None:
        """Tell a command on a pseudo-terminal its window's size."""
        self._link.call("resize", child=self._ident, size=[rows, columns])

    def wait(self, timeout: float = 180) -> Result:
        """Wait for its end. After `timeout` seconds it is killed and GuestTimeout raised.

        If the guest does not even answer the kill, the virtual machine is killed.
        """
        if self._link.wait(lambda: self.status is not None, timeout):
            assert self.status is not None
            return Result(self.status, self.stdout, self.stderr)
        said = f"time limit of {timeout:g} s passed for: {self.name}"
        try:
            self.signal(signals.SIGKILL, group=True)
            ended = self._link.wait(lambda: self.status is not None, 60)
        except GuestDied:
            raise
        except LabError:
            ended = False
        if not ended:
            said += f"; it could not be ended in the guest, so {self._link.kill(said)}"
        raise GuestTimeout(said, self.stdout, self.stderr)

    def wait_for(self, text: str, timeout: float = 180, stream: str = "stdout") -> str:
        """Wait until `text` has been printed; the output so far. GuestTimeout if it does not come.

        LabError if the process ends without having printed it.
        """
        wanted = text.encode()
        done = self._link.wait(lambda: wanted in self._output[stream] or self.status is not None, timeout)
        if wanted in self._output[stream]:
            return self._output[stream].decode(errors="replace")
        if done:
            raise LabError(
                f"{self.name} ended with status {self.status} before printing {text!r}\n"
                f"stdout: {self.stdout}\nstderr: {self.stderr}"
            )
        raise GuestTimeout(
            f"{self.name} did not print {text!r} within {timeout:g} s", self.stdout, self.stderr
        )

    def _receive(self, stream: str, data: bytes) -> None:
        if self.on_output is not None:
            self.on_output(stream, data)
        else:
            self._output[stream] += data


class Link:
    """Requests to the agent and its answers. `kill` ends the virtual machine and says so.

    `warm`: guestpv, and Python with a file, are forked from a process that has loaded what they need.
    """

    def __init__(self, sock: socket.socket, kill: Callable[[str], str], warm: bool = False) -> None:
        self._warm = warm
        self._socket = sock
        self._incoming = sock
        self.kill = kill
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        self._sending = threading.RLock()
        self._replies: dict[int, tuple[dict[str, Any], bytes]] = {}
        self._processes: dict[int, Process] = {}
        self._dead: str | None = None
        self.ready: dict[str, Any] | None = None
        threading.Thread(target=self._read, name="guest-link", daemon=True).start()

    def call(
        self, op: str, data: bytes = b"", timeout: float = 120, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """One request and its reply. LabError if the agent refuses, GuestTimeout if it is silent."""
        ident = next(self._ids)
        self._send(ident, op, data, fields)
        return self._reply(ident, op, timeout)

    def spawn(
        self,
        command: str | Sequence[str],
        on_output: Callable[[str, bytes], None] | None = None,
        **fields: Any,
    ) -> Process:
        """Start a command; a string goes through the guest's shell."""
        name = command if isinstance(command, str) else shlex.join(command)
        if self._warm and isinstance(command, str) and PLAIN.fullmatch(command):
            command = command.split(" ")
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        ident = next(self._ids)
        process = Process(self, ident, name)
        if self._warm:
            known = argv[0] == "guestpv" or re.match(r"python (-|[^-].*)( |$)", " ".join(argv[:2]))
            fields = fields | {"warm": bool(known)}
        process.on_output = on_output
        with self._changed:
            self._processes[ident] = process
        self._send(ident, "spawn", b"", {"argv": argv, **fields})
        process.pid = self._reply(ident, "spawn", 120)[0]["pid"]
        return process

    def wait(self, happened: Callable[[], bool], timeout: float) -> bool:
        """Whether `happened` within `timeout` seconds; GuestDied if the guest ends first."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not happened():
                if self._dead is not None:
                    raise GuestDied(self._dead)
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def died(self, reason: str) -> None:
        """Let everything that waits fail with `reason`."""
        with self._changed:
            self._dead = self._dead or reason
            self._changed.notify_all()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is on its way to the guest, and nobody else sends, until the end of the block."""
        with self._sending:
            self.call("ping")
            yield

    def follow(self, sock: socket.socket) -> None:
        """Send on another socket, and read there once the present one has ended."""
        with self._sending:
            self._socket = sock

    def _send(self, ident: int, op: str, data: bytes, fields: dict[str, Any]) -> None:
        head = json.dumps({"id": ident, "op": op, **fields}).encode()
        with self._sending:
            try:
                self._socket.sendall(struct.pack(">II", len(head), len(data)) + head + data)
            except OSError as error:
                self.wait(lambda: False, 2)
                raise GuestDied(f"the guest's agent is gone: {error}") from None

    def _reply(self, ident: int, op: str, timeout: float) -> tuple[dict[str, Any], bytes]:
        if not self.wait(lambda: ident in self._replies, timeout):
            raise GuestTimeout(f"the guest's agent did not answer {op} within {timeout:g} s")
        head, data = self._replies.pop(ident)
        if "error" in head:
            raise LabError(f"in the guest: {head['error']}")
        return head, data

    def _read(self) -> None:
        try:
            while True:
                head_size, data_size = struct.unpack(">II", self._take(8))
                head = json.loads(self._take(head_size))
                self._dispatch(head, self._take(data_size))
        except (OSError, ValueError):
            return

    def _take(self, count: int) -> bytes:
        """The next bytes from the guest; a message may begin on one socket and end on its successor."""
        data = bytearray()
        while len(data) < count:
            more = self._incoming.recv(count - len(data))
            if not more:
                if self._incoming is self._socket:
                    raise OSError("the agent's socket has ended")
                self._incoming.close()
                self._incoming = self._socket
            data += more
        return bytes(data)

    def _dispatch(self, head: dict[str, Any], data: bytes) -> None:
        event = head.get("event")
        if event in ("stdout", "stderr"):
            self._processes[head["id"]]._receive(event, data)
        with self._changed:
            if "reply" in head:
                self._replies[head["reply"]] = (head, data)
            elif event == "ready":
                self.ready = head
            elif event == "exit":
                self._processes[head["id"]].status = head["status"]
            self._changed.notify_all()
