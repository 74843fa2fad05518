"""Our own vhost-user disk in a process of its own, which kills itself at a chosen moment.

Requests complete out of order, three at a time, and each one that is carried out leaves a line in a log.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from guestpv.devices.evidence import Event
from guestpv.devices.models.blk import Blk
from guestpv.devices.models.blk_store import Store
from guestpv.devices.queue import DeviceQueue
from guestpv.devices.ring import Chain
from guestpv.serve.vhost_user import PROTOCOL_FEATURES, VhostUserServer
from peers.backend import Backend

BLOCK = 4096
RELEASE_SECONDS = 0.005


def mortal_disk(
    socket: Path,
    file: Path,
    log: Path,
    *,
    kind: str = "",
    count: int = 0,
    late: bool = False,
    offer: int = 0,
    protocol_features: int = PROTOCOL_FEATURES,
) -> Backend:
    """The back end, not started.

    Args:
        file, log: the disk's file, and where numbers of written or read blocks go, one a line.
        kind, count: dies at the ``count``-th event of this kind (``pop``, ``push``, ``publish``); 0: never.
        late: after it wrote the event down in its record of requests in flight, not before.
        offer, protocol_features: as for ``VhostUserServer``.
    """
    options = {
        "socket": str(socket),
        "file": str(file),
        "log": str(log),
        "kind": kind,
        "count": count,
        "late": late,
        "offer": offer,
        "protocol_features": protocol_features,
    }
    program = f"import sys; sys.path[:0] = {sys.path!r}; from peers.mortal import main; main()"
    return Backend([sys.executable, "-c", program, json.dumps(options)], socket, "python3")


def immortal(backend: Backend) -> None:
    """Let it live for ever from its next start on."""
    options = json.loads(backend.command[-1])
    backend.command[-1] = json.dumps({**options, "count": 0})


class LoggedDisk(Blk):
    """A disk that writes down what it carries out."""

    log: str

    def handle(self, queue: DeviceQueue, chain: Chain) -> None:
        """5.2.6; the sector is in the last half of the header."""
        with open(self.log, "a") as lines:
            print(int.from_bytes(chain.read(8, 8), "little") * 512 // BLOCK, file=lines)
        super().handle(queue, chain)


def main() -> None:
    """Serve until killed."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    model = LoggedDisk(Store(options["file"]))
    model.log = options["log"]
    server = VhostUserServer(
        model, options["socket"], offer=options["offer"], protocol_features=options["protocol_features"]
    )
    left = options["count"]

    def die(event: Event, _subject: object) -> None:
        nonlocal left
        if event.kind == options["kind"]:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def become_last(event: Event, _subject: object) -> None:
        """Observers are called in their order, and records of rings are there once a ring is kicked."""
        if event.kind == "kick":
            leave()
            server.journal.observe(die)

    leave = server.journal.observe(become_last if options["late"] else die)
    server.device.hold = True

    def release() -> None:
        while True:
            time.sleep(RELEASE_SECONDS)
            # Without the condition "publish" would count time.
            if any(queue.held for queue in server.device.queues):
                server.device.release(3, lambda place: place * 7 % 5)

    threading.Thread(target=release, daemon=True).start()
    server.run()
