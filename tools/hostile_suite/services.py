"""End to end: what `net up`, `blk up` and `balloon up` run, on a hostile device, restarted when it breaks.

What the guest sends and writes is a canary. It may not be in any frame that comes out of the TAP link, nor in
what is read from a part of the disk that nobody wrote to, whatever the device claims.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import select
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final
from unittest import mock

from guestpv import open as open_transport
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.loopback import open_function
from guestpv.drivers.balloon import Balloon
from guestpv.drivers.net_control import ControlQueue
from guestpv.errors import DeviceViolation, FeaturesRefused, GuestpvError, TimeLimit
from guestpv.serve.vfio_user import VfioUserServer
from guestpv.services import blk as blk_module
from guestpv.services.balloon import BalloonService
from guestpv.services.blk import BlkService
from guestpv.services.net import NetService
from guestpv.system import System
from guestpv.transport.pci import PciTransport
from guestpv.wire import nbd as wire
from guestvm import network

from .faults import Hostile, formats

CANARY: Final = b"canary! "
RATE: Final = 25.0
HANG: Final = 120
"""Seconds for one round; then the process ends with all its stacks."""
STALL: Final = 2.0
"""Seconds without an answer before an operator would restart a device that keeps what it was given."""
SHARES: Final = {"net": 0.4, "blk": 0.4, "balloon": 0.2}
MENDABLE: Final = (DeviceViolation, TimeLimit, FeaturesRefused)
TRIES: Final = 50
ETH_P_ALL, PACKET_OUTGOING = 3, 4
LOCAL = bytes.fromhex("525400000001")
MIB = 1 << 20


class Stage:
    """A hostile device, and one of our services on it.

    Args:
        over: ``loopback`` or ``vfio-user``.
        device: ``net``, ``blk`` or ``balloon``.
        params: of the device.
        seed: of the faults.
    """

    patience = 0.0

    def __init__(self, over: str, device: str, params: dict[str, str], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._undo = ExitStack()
        self.function: SoftwareFunction = open_function(device, {"threaded": "on", **params})
        self.hostile = Hostile(self.function, seed, RATE)
        self._path = ""
        if over == "vfio-user":
            directory = self._undo.enter_context(tempfile.TemporaryDirectory(prefix="guestpv-"))
            self._path = str(Path(directory) / "device.sock")
            self._undo.enter_context(VfioUserServer(self.function, self._path))
        self.service: Any = None

    def transport(self) -> Any:
        """The device, opened."""
        return open_transport(f"vfio-user:{self._path}") if self._path else PciTransport(self.function)

    def make(self) -> Any:
        """The service, set up."""
        raise NotImplementedError

    def round(self) -> None:
        """Some traffic, checked."""
        raise NotImplementedError

    def begin(self) -> None:
        """Bring the service up; the device turns hostile after that, and is so in every restart."""
        self.hostile.rate = 0
        self.service = self.make()
        self.hostile.rate = RATE

    def look(self) -> None:
        """Watch the service; restart it where the device broke."""
        try:
            self.service.watch(self.patience)
        except MENDABLE as error:
            self.restart(type(error).__name__)

    def restart(self, why: str) -> None:
        """Restart, again where a fault comes in between."""
        for _ in range(TRIES):
            self.counts[f"restarts, {why}"] += 1
            try:
                self.service.restart()
                return
            except MENDABLE as error:
                why = f"{type(error).__name__} during a restart"
        raise AssertionError(f"{TRIES} restarts in a row failed")

    def close(self) -> None:
        """Give everything back."""
        with self._undo:
            if self.service is not None:
                self.service.close()


class NetStage(Stage):
    """Frames both ways over a TAP link."""

    def make(self) -> NetService:
        """With a socket on the link that sees every frame."""
        service = NetService(self.transport())
        self.tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.tap.bind((service.ifname, ETH_P_ALL))
        self.tap.setblocking(False)
        self._undo.callback(self.tap.close)
        self._last, self._moved = -1, time.monotonic()
        return service

    def round(self) -> None:
        """Canaries out, others in."""
        choose = self.hostile.choose
        for _ in range(8):
            size = choose.randrange(60, 1500)
            with suppress(OSError):
                self.tap.send((b"\x02" * 6 + LOCAL + b"\x88\xb5" + CANARY * 200)[:size])
            self.function.model.deliver((LOCAL + b"\x02" * 6 + b"\x88\xb5" + b"honest. " * 200)[:size])
        while True:
            try:
                frame, where = self.tap.recvfrom(1 << 17)
            except BlockingIOError:
                break
            except OSError:
                continue
            if where[2] == PACKET_OUTGOING:
                continue
            self.counts["frames that came out"] += 1
            if CANARY in frame:
                raise AssertionError("memory of sent frames came out of the TAP link")
        self.look()
        now, done = time.monotonic(), self.hostile.done.total()
        if done != self._last:
            self._last, self._moved = done, now
        elif now > self._moved + STALL:
            self.restart("stalled")
            self._moved = now
        time.sleep(0.001)


class Kernel:
    """The kernel's side of a network block device: it takes the sockets and asks through them."""

    ends: list[socket.socket] = []

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def connect(self, index: int | None, size: int, block: int, flags: int, fds: list[int]) -> int:
        """Keep the sockets."""
        Kernel.ends = [socket.socket(fileno=os.dup(fd)) for fd in fds]
        return 99

    def resize(self, index: int, size: int) -> None:
        """Nobody looks at it."""

    def disconnect(self, index: int) -> None:
        """Hang up."""
        for end in Kernel.ends:
            end.close()


class BlkStage(Stage):
    """Canaries are written to the first half of a disk, the second half is read."""

    def make(self) -> BlkService:
        """Without a kernel."""
        service = BlkService(self.transport(), queues=1, restarts=True)
        self._handles = itertools.count(1)
        self._waiting: dict[bytes, int] = {}
        self._moved = time.monotonic()
        return service

    def round(self) -> None:
        """A few requests, each answered once, and without a canary."""
        choose, (end,) = self.hostile.choose, Kernel.ends
        for _ in range(choose.randrange(1, 9)):
            handle = next(self._handles).to_bytes(8, "big")
            size, offset = 512 * choose.randrange(1, 180), 512 * choose.randrange(7000)
            command = choose.choice(
                (wire.CMD_READ, wire.CMD_READ, wire.CMD_WRITE, wire.CMD_FLUSH, wire.CMD_TRIM)
            )
            offset += 4 * MIB if command in (wire.CMD_READ, wire.CMD_TRIM) else 0
            data = CANARY * (size // 8) if command == wire.CMD_WRITE else b""
            size = 0 if command == wire.CMD_FLUSH else size
            self._waiting[handle] = size if command == wire.CMD_READ else 0
            end.sendall(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, command, handle, offset, size) + data)
        self._moved = time.monotonic()
        while self._waiting:
            if select.select([end], [], [], 0.002)[0]:
                self._answer(end)
                self._moved = time.monotonic()
                continue
            self.look()
            if time.monotonic() > self._moved + STALL:
                self.restart("stalled")
                self._moved = time.monotonic()

    def _answer(self, end: socket.socket) -> None:
        magic, error, handle = wire.REPLY.unpack(self._take(end, wire.REPLY.size))
        if magic != wire.REPLY_MAGIC or handle not in self._waiting:
            raise AssertionError(f"an answer that nobody awaits: {handle.hex()}")
        size = self._waiting.pop(handle)
        self.counts["requests failed" if error else "requests done"] += 1
        if size and not error:
            self.counts["bytes read"] += size
            if CANARY in self._take(end, size):
                raise AssertionError("memory of other requests came out of the disk")

    @staticmethod
    def _take(end: socket.socket, size: int) -> bytes:
        got = b""
        while len(got) < size:
            part = end.recv(size - len(got))
            if not part:
                raise AssertionError("the export hung up")
            got += part
        return got


class Guest(System):
    """A guest with memory to spare."""

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
        """No pressure, and no cgroups."""
        if path.startswith(("/proc/pressure", "/sys/fs/cgroup")):
            raise FileNotFoundError(path)
        return super().open(path, flags, mode)

    def read_text(self, path: str) -> str:
        """Much memory."""
        if path == "/proc/meminfo":
            return "MemTotal: 524288 kB\nMemFree: 524288 kB\nMemAvailable: 524288 kB"
        if path == "/proc/pressure/memory":
            return "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00"
        return super().read_text(path)


class BalloonStage(Stage):
    """Targets that change all the time."""

    patience = 0.01

    def make(self) -> BalloonService:
        """As fast as it goes."""
        return BalloonService(self.transport(), system=Guest(), keep_free=64 * MIB, rate=1 << 40)

    def round(self) -> None:
        """Another target."""
        self.function.model.set_target(self.hostile.choose.randrange(8192))
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline and self.service.balloon.pages != self.service.target:
            self.look()
        self.look()
        pages = self.service.balloon.pages
        if not 0 <= pages <= 8192 + 512 or len(self.service.balloon.page_numbers()) != pages:
            raise AssertionError(f"{pages} pages in the balloon")
        self.counts["targets"] += 1


STAGES: Final[dict[str, type[Stage]]] = {"net": NetStage, "blk": BlkStage, "balloon": BalloonStage}
PARAMS: Final = {
    "net": {"peer": "sink"},
    "blk": {"size": "8M", "cache": "volatile"},
    "balloon": {"target": "1000"},
}


def run(faults: int, seed: int, over: str, say: Callable[[str], None]) -> dict[str, Any]:
    """So many faults, spread over the three devices and the ring formats.

    Raises:
        AssertionError: something came out that must not, or nothing went on.
        GuestpvError: a service did not get over a fault.
    """
    started, outcome, total = time.monotonic(), {}, Counter[str]()
    with ExitStack() as stack:
        stack.enter_context(network.own_network())
        stack.enter_context(mock.patch.object(blk_module, "Netlink", Kernel))
        stack.enter_context(mock.patch.object(blk_module, "load_module"))
        # A device that keeps an answer is waited for as long, only shorter.
        stack.enter_context(mock.patch.dict(Balloon.__init__.__kwdefaults__, answer_limit=1.0))
        stack.enter_context(mock.patch.object(ControlQueue.__init__, "__defaults__", (1.0,)))
        for device, kind in STAGES.items():
            counts, done = Counter[str](), Counter[str]()
            variants = formats()
            for number, params in enumerate(variants):
                target = int(faults * SHARES[device]) * (number + 1) // len(variants)
                stage = kind(over, device, PARAMS[device] | params, seed + number)
                try:
                    stage.begin()
                    while done.total() + stage.hostile.done.total() < target:
                        faulthandler.dump_traceback_later(HANG, exit=True)
                        stage.round()
                except GuestpvError as error:
                    raise AssertionError(f"{device} {params}: {error}") from error
                finally:
                    faulthandler.cancel_dump_traceback_later()
                    stage.close()
                done += stage.hostile.done
                counts += stage.counts
                say(f"{device} {params or 'split'}: {done.total()} faults, {dict(stage.counts)}")
            outcome[device] = {"faults": done.total(), **dict(sorted(counts.items()))}
            total += done
    descriptors = len(os.listdir("/proc/self/fd"))
    return {
        "faults": total.total(),
        "kinds": dict(sorted(total.items())),
        **outcome,
        "descriptors left": descriptors,
        "seconds": round(time.monotonic() - started, 1),
    }
