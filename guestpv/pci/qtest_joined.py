"""A QEMU that somebody else started, joined through its qtest socket and its monitor.

Its RAM has to be a file that this process can map; what QEMU tells of it is proved by writing through
the one and reading through the other. Whatever runs in it must leave the device and RAM above 1 MiB
alone: a processor that is halted, or a BIOS that found nothing to boot. An operating system is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import AccessDenied, DeviceGone, GuestpvError, Refused, TimeLimit, UsageError
from ..spec import pci as spec
from ..wire import qtest as wire
from ..wire import unix
from .qemu_ram import RAM_FIRST, RAM_LIMIT, GuestRam
from .qmp import Qmp
from .qtest_host import QtestHost, Window
from .qtest_session import QtestSession

LOG = logging.getLogger(__name__)

SHARED_RAM = "-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine q35,memory-backend=ram"
"""What its command line needs."""
ON_ROOT_BUS = "QEMU: -device ...,id=NAME,bus=pcie.0 (pci.0 on a pc); behind a bridge it cannot be driven"
SOCKETS = "-qtest unix:PATH,server=on,wait=off -qmp unix:PATH,server=on,wait=off"

IDLE_LIMIT = 20.0
"""Seconds that firmware may take until it gives up."""
IDLE_LOOKS = 6
IDLE_PAUSE = 0.02
CR0_PAGING = 1 << 31


def _patient(sock: socket.socket, seconds: float) -> None:
    sock.setblocking(True)
    packed = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, packed)


class JoinedQemu:
    """A running QEMU of somebody else's; see ``Emulator``. It is left as it is, never ended.

    Args:
        socket_path: its qtest socket.
        monitor_path: its QMP socket.
        memory_path: the file that is its RAM; empty: found by asking QEMU.
        answer_limit: seconds that it has for an answer.

    Raises:
        GuestpvError: a socket is missing or belongs to something else.
        TimeLimit: it does not answer, as when somebody else is connected.
        Refused: its RAM cannot be shared.
        AccessDenied: it belongs to somebody else.
    """

    def __init__(
        self, socket_path: str, monitor_path: str, *, memory_path: str = "", answer_limit: float = 20.0
    ) -> None:
        self.answer_limit = answer_limit
        self.name = f"the QEMU behind {socket_path}"
        self._paths = (socket_path, monitor_path)
        self._fate: GuestpvError | None = None
        self._closed = False
        self._answered = False
        with contextlib.ExitStack() as undo:
            self.qtest = undo.enter_context(self._connect(socket_path, "-qtest"))
            credentials = self.qtest.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            self.pid = struct.unpack("3i", credentials)[0]
            monitor = undo.enter_context(self._connect(monitor_path, "-qmp"))
            monitor.setblocking(False)
            self._qmp = Qmp(self, monitor)
            undo.callback(self._qmp.close)
            version = self._qmp.execute("query-version")["qemu"]
            self.version = (version["major"], version["minor"], version["micro"])
            _await_idle(self)
            self.ram = _ram(self, memory_path)
            undo.callback(self.ram.close)
            self._undo = undo.pop_all()

    def _connect(self, path: str, option: str) -> socket.socket:
        start = f"qemu-system-x86_64 {option} unix:{path},server=on,wait=off"
        sock = unix.connect(path, f"qtest {path}", self.answer_limit, server="QEMU", start=start)
        _patient(sock, self.answer_limit)
        return sock

    @property
    def qmp(self) -> Qmp:
        """Its monitor."""
        self.check()
        return self._qmp

    def check(self) -> None:
        """Raise what ended the connection, if anything did.

        Raises:
            DeviceGone: it was closed, QEMU went away or did not answer.
        """
        if self._fate is not None:
            raise DeviceGone(self._fate.message, where=self._fate.where, hint=self._fate.hint)
        if self._closed:
            raise DeviceGone("this QEMU was left", where=self.name)

    def answered(self) -> None:
        """Note that it answered: nobody else is connected."""
        self._answered = True

    def stuck(self, doing: str) -> GuestpvError:
        """The error for an answer that did not come in time. QEMU is not ours to kill."""
        if self._fate is None:
            busy = "each of its sockets serves one program at a time: is somebody else connected?"
            self._fate = TimeLimit(
                f"{self.name} (pid {self.pid}) gave no answer to `{doing}` within {self.answer_limit:g} s",
                where="qtest",
                hint=f"it may spin: top -p {self.pid}" if self._answered else busy,
            )
            LOG.warning("%s", self._fate.message)
        return self._fate

    def died(self, doing: str) -> GuestpvError:
        """The error for a closed socket."""
        if self._fate is None:
            what = "closed the connection" if self._answered else "is no QEMU: it closed the connection"
            self._fate = DeviceGone(
                f"{self.name} (pid {self.pid}) {what} at `{doing}`",
                where="qtest",
                hint=f"QEMU needs {SOCKETS}, and both paths here in their places",
            )
        return self._fate

    def close(self) -> None:
        """Leave it. Idempotent."""
        self._closed = True
        self._undo.close()


def _await_idle(qemu: JoinedQemu) -> None:
    """Wait until each processor is halted, or stands still.

    Raises:
        Refused: an operating system runs, or some program that does not end.
    """
    deadline = time.monotonic() + IDLE_LIMIT
    seen: list[tuple[str, ...]] = []
    while len(seen) < IDLE_LOOKS or len(set(seen[-IDLE_LOOKS:])) > 1:
        if time.monotonic() > deadline:
            raise Refused(
                "a program runs in this QEMU and would be in the way",
                where=qemu.name,
                hint="start one whose firmware finds nothing to boot, or -bios FILE with a halt",
            )
        time.sleep(IDLE_PAUSE)
        told = str(qemu.qmp.execute("human-monitor-command", {"command-line": "info registers -a"}))
        if any(int(value, 16) & CR0_PAGING for value in re.findall(r"\bCR0=([0-9a-f]+)", told)):
            raise Refused(
                "an operating system, or UEFI, runs in this QEMU: its memory would be overwritten",
                where=qemu.name,
                hint="inside that guest, drive the device as vfio:ADDRESS",
            )
        halted = re.findall(r"\bHLT=(\d)", told)
        places = re.findall(r"\b[ER]IP=([0-9a-f]+)", told)
        seen.append(tuple("halted" if halt == "1" else at for halt, at in zip(halted, places, strict=False)))


def _ram(qemu: JoinedQemu, memory_path: str) -> GuestRam:
    """The machine's RAM, mapped.

    Raises:
        Refused: it is not shared, or cannot be found.
    """
    backend = _ask(qemu, "/machine", "memory-backend")
    kind = _ask(qemu, backend, "type") if backend else ""
    if kind == "memory-backend-ram" or not backend or not _ask(qemu, backend, "share"):
        raise Refused(
            "the RAM of this QEMU is its own: nobody else can map it", where=qemu.name, hint=SHARED_RAM
        )
    size = int(_ask(qemu, backend, "size"))
    path = memory_path or str(_ask(qemu, backend, "mem-path") or "")
    session = QtestSession(qemu)
    for fd in _candidates(qemu, path, size, given=bool(memory_path)):
        ram = GuestRam(min(size, RAM_LIMIT), fd)
        if _is_seen(ram, session):
            return ram
        ram.close()
    raise Refused(
        f"the {size >> 20} MiB of {backend} were not found among the files of process {qemu.pid}",
        where=qemu.name,
        hint=f"name the file: ?memory_path=FILE; or start QEMU with {SHARED_RAM}",
    )


def _ask(qemu: JoinedQemu, path: str, name: str) -> Any:
    """A property of QEMU's object model, None where there is none."""
    try:
        return qemu.qmp.execute("qom-get", {"path": path, "property": name})
    except (DeviceGone, TimeLimit):
        raise
    except GuestpvError:
        return None


def _candidates(qemu: JoinedQemu, path: str, size: int, *, given: bool) -> Iterator[int]:
    """Open files that may be the RAM; whoever takes one owns it."""
    try:
        if path and stat.S_ISREG(os.stat(path).st_mode):
            yield os.open(path, os.O_RDWR | os.O_CLOEXEC)
            return
    except OSError as error:
        if given:
            raise UsageError(f"memory_path={path}: {error.strerror}", where=qemu.name) from None
    try:
        for entry in sorted(Path(f"/proc/{qemu.pid}/fd").iterdir(), key=lambda entry: int(entry.name)):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                if stat.S_ISREG(found.st_mode) and found.st_size == size:
                    yield os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise AccessDenied(
            f"the files of process {qemu.pid} are not for us to open",
            where=qemu.name,
            hint=f"run this as the user of that QEMU: ps -o user= -p {qemu.pid}",
        ) from None


def _is_seen(ram: GuestRam, session: QtestSession) -> bool:
    """Whether what is written through qtest is read in the file; what was there is put back."""
    before = session.ask(wire.read_memory(RAM_FIRST, 8)).number
    nonce = secrets.randbits(64)
    session.ask(wire.write_memory(RAM_FIRST, 8, nonce))
    seen = int.from_bytes(ram.array[RAM_FIRST : RAM_FIRST + 8].tobytes(), "little")
    session.ask(wire.write_memory(RAM_FIRST, 8, before))
    return seen == nonce


def _functions(buses: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every function that ``query-pci`` tells of, those behind bridges too."""
    for bus in buses:
        for device in bus["devices"]:
            yield device
            bridge = device.get("pci_bridge")
            if bridge and "devices" in bridge:
                yield from _functions([bridge])


def _address(device: dict[str, Any]) -> str:
    return f"{device['bus']:02x}:{device['slot']:02x}.{device['function']}"


class JoinedMachine(QtestHost):
    """A joined QEMU as a PCI host with one function for us.

    BARs that its firmware placed stay. MSI-X would have nobody to arrive at, so there is none; INTx and
    polling work.

    Args:
        qemu: owned; left when this closes.
        device: QEMU's ``id`` of the device, or its address, ``00:04.0``.

    Raises:
        UsageError: it is not there, or not on the root bus.
    """

    def __init__(self, qemu: JoinedQemu, device: str) -> None:
        functions = list(_functions(qemu.qmp.execute("query-pci")))
        found = [one for one in functions if device in (one["qdev_id"], _address(one))]
        if not found:
            known = ", ".join(
                f"{one['qdev_id'] or 'no id'} ({_address(one)})"
                for one in functions
                if one["id"]["vendor"] == spec.VENDOR_ID
            )
            raise UsageError(
                f"it has no PCI function {device!r}; of virtio it has {known or 'none'}",
                where=qemu.name,
                hint=ON_ROOT_BUS,
            )
        self._slot = int(found[0]["slot"])
        if found[0]["bus"] or found[0]["function"]:
            raise UsageError(
                f"{device} is at {_address(found[0])}; what can be driven is function 0 on the root bus",
                where=qemu.name,
                hint=ON_ROOT_BUS,
            )
        taken = [
            (region["address"], region["size"])
            for one in functions
            for region in one["regions"]
            if region["address"] > 0
        ]
        kind = str(qemu.qmp.execute("qom-get", {"path": "/machine", "property": "type"}))
        express = not re.match(r"pc-i440fx|pc-machine|isapc", kind)
        super().__init__(qemu, [device], express=express, taken=taken)
        self.open_ecam()

    def locate(self, number: int) -> tuple[int, int, Window | None]:
        return 0, self._slot, None
