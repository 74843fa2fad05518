"""QEMU's monitor (QMP): commands and events, from any thread."""

import json
import socket
import threading
import time
from typing import Any

from guestvm.errors import GuestDied, GuestTimeout, LabError


class Monitor:
    """One connection; its reader thread ends with the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._changed = threading.Condition()
        self._replies: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._count = 0
        self._ended = False
        threading.Thread(target=self._read, name="guest-monitor", daemon=True).start()
        self.command("qmp_capabilities")

    def command(self, name: str, timeout: float = 120, /, **arguments: Any) -> Any:
        """Run a command and give what it returns; LabError with QEMU's words if it fails."""
        with self._changed:
            self._count += 1
            ident = self._count
            request = {"execute": name, "id": ident, "arguments": arguments}
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
            except OSError:
                raise GuestDied(f"QEMU is gone: it cannot take {name}") from None
            if not self._changed.wait_for(lambda: ident in self._replies or self._ended, timeout):
                raise GuestTimeout(f"QEMU did not answer {name} within {timeout:g} s")
            if ident not in self._replies:
                raise GuestDied(f"QEMU ended before it answered {name}")
            reply = self._replies.pop(ident)
        if "error" in reply:
            raise LabError(f"QEMU refuses {name}: {reply['error']['desc']}")
        return reply["return"]

    def event(self, name: str, timeout: float, data: dict[str, Any]) -> dict[str, Any]:
        """Take the oldest event `name` whose data contains `data`, waiting for it if need be."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for event in self._events:
                    if event["event"] == name and data.items() <= event.get("data", {}).items():
                        self._events.remove(event)
                        return event
                if self._ended:
                    raise GuestDied(f"QEMU ended before it sent {name}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GuestTimeout(f"QEMU did not send {name} within {timeout:g} s")
                self._changed.wait(left)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    with self._changed:
                        if "event" in message:
                            self._events.append(message)
                        elif "id" in message:
                            self._replies[message["id"]] = message
                        self._changed.notify_all()
        except (OSError, ValueError):
            pass
        with self._changed:
            self._ended = True
            self._changed.notify_all()
