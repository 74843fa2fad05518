"""A QEMU without a guest: its devices are real, its RAM is ours, its processor is halted.

The guest's RAM is a memfd that this process maps, so a guest-physical address below 4 GiB is an offset
into our own memory. The BIOS is one halt instruction. QEMU's devices are reached through its qtest
socket, the machine itself through its monitor (QMP). Nothing needs a privilege or an accelerator.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import DeviceGone, GuestpvError, Refused, TimeLimit, UsageError
from .qemu_ram import GuestRam
from .qmp import Qmp

LOG = logging.getLogger(__name__)

BIOS_SIZE = 64 << 10
BIOS_RESET_VECTOR = 0xFFF0
BIOS_HALT = bytes((0xFA, 0xF4, 0xEB, 0xFD))
"""``cli; hlt; jmp`` back to the ``hlt``."""
OLDEST = (7, 2)
"""First release whose monitor has x-query-virtio-status; ``-object qtest`` is older."""
MONITOR_OBJECTS = (11, 1, 0)
"""First release that warns about ``-mon``."""
DEFAULT_EXECUTABLE = "qemu-system-x86_64"
START_LIMIT = 60.0
"""Seconds that a QEMU may take to start, on a machine that is busy with other things."""


@functools.cache
def qemu_version(executable: str = DEFAULT_EXECUTABLE) -> tuple[int, int, int]:
    """Version of a QEMU executable.

    Raises:
        UsageError: it is missing, or it is not QEMU.
    """
    try:
        said = subprocess.run(
            [executable, "--version"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except FileNotFoundError:
        raise UsageError(
            f"there is no {executable}",
            where="qtest",
            hint="apt install qemu-system-x86, or name one: ?qemu=/path/to/qemu-system-x86_64",
        ) from None
    except OSError as error:
        raise UsageError(f"{executable} does not run: {error.strerror}", where="qtest") from error
    except subprocess.TimeoutExpired as error:
        raise TimeLimit(f"`{executable} --version` did not end within 20 s", where="qtest") from error
    match = re.search(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)", said)
    if not match:
        raise UsageError(f"{executable} is not QEMU: its --version says {said[:80]!r}", where="qtest")
    major, minor, micro = map(int, match.groups())
    return major, minor, micro


class Qemu:
    """One QEMU process without a guest, killed by its pid when it no longer answers.

    It ends with ``close()``; should this process be killed, a guardian shell ends it.

    Args:
        options: further command line arguments, such as ``["-device", "virtio-rng-pci"]``.
        machine: ``q35``, ``pc`` or a versioned one, with properties after a comma.
        accel: QEMU's accelerator; not KVM.
        executable: path or name of qemu-system-x86_64.
        memory: bytes of guest RAM.
        pass_fds: file descriptors that ``options`` mention.
        answer_limit: seconds after which a running QEMU that does not answer is killed.

    Attributes:
        ram: its RAM.
        qtest: our end of the qtest socket.
        version: of QEMU.
        name: how messages call it.

    Raises:
        UsageError: the executable is missing or no QEMU.
        Refused: it is too old, or the accelerator cannot work here.
    """

    def __init__(
        self,
        options: Sequence[str] = (),
        *,
        machine: str = "q35",
        accel: str = "tcg",
        executable: str = DEFAULT_EXECUTABLE,
        memory: int = 256 << 20,
        pass_fds: Sequence[int] = (),
        answer_limit: float = 20.0,
    ) -> None:
        self.version = qemu_version(executable)
        self.name = "QEMU " + ".".join(map(str, self.version))
        if self.version[:2] < OLDEST:
            raise Refused(
                f"{self.name} is too old; {OLDEST[0]}.{OLDEST[1]} is the oldest that works",
                where=executable,
                hint="name a newer one: ?qemu=/path/to/qemu-system-x86_64",
            )
        if accel.split(",")[0] == "kvm":
            raise Refused(
                "with KVM the message-signalled interrupts of a QEMU without a guest go nowhere",
                where=self.name,
                hint="leave accel= out, or say accel=tcg",
            )
        self.answer_limit = answer_limit
        self._answered = False
        self._fate: GuestpvError | None = None
        self._qmp: Qmp | None = None
        self._closed = False
        self._death_fd = -1
        self._mourner: threading.Thread | None = None
        self.ram = GuestRam(memory)
        self._stderr = os.memfd_create("guestpv-qemu-stderr", os.MFD_CLOEXEC)
        self.qtest, qtest_theirs = socket.socketpair()
        self._monitor, monitor_theirs = socket.socketpair()
        self._limit_answers(START_LIMIT)
        bios = os.memfd_create("guestpv-bios", os.MFD_CLOEXEC)
        os.pwrite(bios, BIOS_HALT, BIOS_RESET_VECTOR)
        os.ftruncate(bios, BIOS_SIZE)
        self.command = [
            executable,
            *("-machine", f"{machine},pit=off,accel={accel},memory-backend=ram"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-m", f"{memory >> 20}M"),
            *("-bios", f"/proc/self/fd/{bios}"),
            "-object",
            f"memory-backend-file,id=ram,size={memory},share=on,mem-path=/proc/self/fd/{self.ram.fd}",
            *("-chardev", f"socket,id=qtest-socket,fd={qtest_theirs.fileno()}"),
            *("-object", "qtest,id=qtest0,chardev=qtest-socket,log=none"),
            *("-chardev", f"socket,id=qmp-socket,fd={monitor_theirs.fileno()}"),
            *(
                ("-object", "monitor-qmp,id=qmp0,chardev=qmp-socket")
                if self.version >= MONITOR_OBJECTS
                else ("-mon", "chardev=qmp-socket,mode=control")
            ),
            *options,
        ]
        inherited = (bios, self.ram.fd, qtest_theirs.fileno(), monitor_theirs.fileno(), *pass_fds)
        try:
            # A session of its own: Ctrl-C in a terminal is for us, who then stop the devices in order.
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=inherited,
                start_new_session=True,
            )
        finally:
            qtest_theirs.close()
            monitor_theirs.close()
            os.close(bios)
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        # The pid cannot be reused while we live, because only close() reaps it, after the guardian went.
        self._guardian = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _ || kill -9 "$0"', str(self.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def qmp(self) -> Qmp:
        """Its monitor, connected at the first use."""
        self.check()
        if self._qmp is None:
            self._qmp = Qmp(self, self._monitor)
        return self._qmp

    def death_fd(self) -> int:
        """Eventfd that fires when the process ends; ``close`` closes it."""
        if self._death_fd < 0:
            self._death_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._mourner = threading.Thread(target=self._mourn, name="guestpv-qemu-death", daemon=True)
            self._mourner.start()
        return self._death_fd

    def _mourn(self) -> None:
        self._ended(None)
        os.eventfd_write(self._death_fd, 1)

    def check(self) -> None:
        """Raise what ended this QEMU, if anything did.

        Raises:
            DeviceGone: it was closed, died, or had to be killed.
        """
        if self._fate is not None:
            raise DeviceGone(self._fate.message, where=self._fate.where, hint=self._fate.hint)
        if self._closed:
            raise DeviceGone("this QEMU was closed", where=self.name)

    def _limit_answers(self, seconds: float) -> None:
        self._limit = seconds
        packed = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self.qtest.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
        self.qtest.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, packed)

    def answered(self) -> None:
        """Note that it answered for the first time: it accepted its options and runs."""
        if not self._answered:
            self._answered = True
            self._limit_answers(self.answer_limit)

    def words(self) -> str:
        """What QEMU has written to its standard output and error, without its own name before each line."""
        text = os.pread(self._stderr, 1 << 16, 0).decode("utf-8", "replace")
        prefix = f"{Path(self.command[0]).name}: "
        return "\n".join(line.removeprefix(prefix) for line in text.splitlines()).strip()

    def stuck(self, doing: str) -> GuestpvError:
        """Kill a QEMU that did not answer in time; returns the error to raise."""
        if self._fate is None:
            state = "spins" if self._spins() else "hangs"
            self._send(signal.SIGKILL)
            said = self.words()
            self._fate = TimeLimit(
                f"{self.name} (pid {self.pid}) {state}: no answer to `{doing}` within "
                f"{self._limit:g} s, so it was killed" + (f"; its last words: {said}" if said else ""),
                where="qtest",
                hint="a QEMU that spins after a malformed ring is a defect of that QEMU: try a newer one",
            )
            # A driver that is closing goes on without its device and would pass over the error.
            LOG.warning("%s", self._fate.message)
        return self._fate

    def died(self, doing: str) -> GuestpvError:
        """Why a QEMU closed its socket; returns the error to raise."""
        if self._fate is None:
            status = self._status(10.0)
            said = self.words() or "(nothing)"
            if not self._answered and status is not None and status > 0:
                self._fate = UsageError(
                    f"{self.name} refused its options: {said}",
                    where="qtest",
                    hint=f"{shlex.quote(self.command[0])} -device DEVICE,help lists a device's properties"
                    if "-device" in said
                    else "",
                )
            else:
                how = "closed its socket" if status is None else f"ended with status {status}"
                if status is not None and status < 0:
                    how = f"died of {signal.Signals(-status).name}"
                self._fate = DeviceGone(
                    f"{self.name} (pid {self.pid}) {how} at `{doing}`; its last words: {said}",
                    where="qtest",
                    hint=f"it ran as: {shlex.join(self.command)}",
                )
        return self._fate

    def _spins(self) -> bool:
        """Whether some thread of the process is running, or waiting for a processor, all the time."""

        def runnable() -> bool:
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    if (task / "stat").read_text().rsplit(") ", 1)[1].startswith("R"):
                        return True
            return False

        seen = []
        for _ in range(20):
            seen.append(runnable())
            time.sleep(0.005)
        return sum(seen) > len(seen) / 2

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def _ended(self, timeout: float | None) -> bool:
        """Whether the process ends within ``timeout`` seconds, if there is a limit; it is not reaped."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _status(self, timeout: float) -> int | None:
        """Exit status of the ended process (negative: signal), None while it runs; it is not reaped."""
        if not self._ended(timeout):
            return None
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
        assert result is not None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def close(self) -> None:
        """End QEMU: SIGTERM, so that images are flushed, then SIGKILL. Idempotent.

        Raises:
            TimeLimit: it had to be killed; everything was cleaned up nevertheless.
        """
        if self._closed:
            return
        self._closed = True
        if self._qmp is not None:
            self._qmp.close()
        error = None
        if self._fate is None:
            self._send(signal.SIGTERM)
            if not self._ended(self.answer_limit):
                error = self.stuck("SIGTERM")
        self._send(signal.SIGKILL)
        self._guardian.communicate(b"\n")
        self._process.wait()
        if self._mourner is not None:
            self._mourner.join()
            os.close(self._death_fd)
        os.close(self._pidfd)
        os.close(self._stderr)
        self.qtest.close()
        self._monitor.close()
        self.ram.close()
        if error is not None:
            raise error

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
