"""vhost-user back ends as child processes: started, waited for, killed by pid."""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from peers.errors import PeerError

LISTENING = 0x10000
"""``__SO_ACCEPTCON`` in the flags column of /proc/net/unix."""
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def listening(path: Path) -> bool:
    """Whether somebody listens on this UNIX socket, found out without connecting to it."""
    with open("/proc/net/unix") as table:
        for line in table:
            columns = line.split(maxsplit=7)
            if len(columns) == 8 and columns[7].rstrip("\n") == str(path) and int(columns[3], 16) & LISTENING:
                return True
    return False


class Backend:
    """A process that listens on a UNIX socket. A context manager; ``start`` again after ``kill``.

    Args:
        command: program and arguments.
        socket: the path it will listen on.
        package: Debian package that brings the program, for the message when it is missing.
        cpus: cores it may run on; None: all.
    """

    def __init__(
        self, command: Sequence[str], socket: Path, package: str, cpus: set[int] | None = None
    ) -> None:
        self.command = list(command)
        self.socket = socket
        self._package = package
        self._cpus = cpus
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115

    @property
    def pid(self) -> int:
        """Process id of the running back end."""
        if self._process is None:
            raise PeerError(f"{self.command[0]} is not running")
        return self._process.pid

    def start(self, timeout: float = 10.0) -> Self:
        """Start it and wait until it listens.

        Raises:
            PeerError: the program is missing, or ended, or does not listen in time; with its own words.
        """
        if shutil.which(self.command[0]) is None:
            raise PeerError(f"{self.command[0]} is missing: apt-get install {self._package}")
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            preexec_fn=_die_with_parent,
        )
        if self._cpus is not None:
            os.sched_setaffinity(self._process.pid, self._cpus)
        deadline = time.monotonic() + timeout
        while not listening(self.socket):
            ended = self._process.poll()
            if ended is not None or time.monotonic() > deadline:
                self.kill()
                state = f"does not listen on {self.socket} after {timeout:g} s" if ended is None else "ended"
                raise PeerError(f"{self.command[0]} {state}: {self.words().strip() or 'it said nothing'}")
            time.sleep(0.005)
        return self

    def words(self) -> str:
        """What it has printed so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self, timeout: float = 10.0) -> None:
        """End it in order (SIGTERM), so that it writes back what it holds."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            finally:
                self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL). Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin:
                self._process.stdin.close()
            self._process = None

    def close(self) -> None:
        """End it and forget what it said."""
        self.kill()
        self._log.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def storage_daemon(
    socket: Path,
    node: str,
    *,
    queues: int = 1,
    options: Sequence[str] = (),
    cpus: set[int] | None = None,
    program: str = "qemu-storage-daemon",
) -> Backend:
    """QEMU's block layer as a vhost-user-blk back end.

    Args:
        socket: where it listens.
        node: ``--blockdev`` options without ``node-name``, such as ``driver=null-co,size=1048576``.
        queues: virtqueues that it offers.
        options: further arguments, put before the block node.
        program: another build of it.
    """
    command = [program, *options, "--blockdev", f"{node},node-name=disk"]
    export = "type=vhost-user-blk,id=export,node-name=disk,writable=on"
    command += ["--export", f"{export},num-queues={queues},addr.type=unix,addr.path={socket}"]
    return Backend(command, socket, "qemu-system-common", cpus)
