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
from peers.tree import LIBRARIES, Tree

LISTENING = 0x10000
"""``__SO_ACCEPTCON`` in the flags column of /proc/net/unix."""
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def listening(path: Path, pid: int) -> bool:
    """Whether somebody in the network namespace of ``pid`` listens there, found out without connecting."""
    with open(f"/proc/{pid}/net/unix") as table:
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

    def start(self, timeout: float = 60.0) -> Self:
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
        while not ((ended := self._process.poll()) is None and listening(self.socket, self.pid)):
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

    def stop(self, timeout: float = 60.0) -> None:
        """End it in order (SIGTERM), so that it writes back what it holds."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            finally:
                self.kill()

    def wait(self, timeout: float) -> None:
        """Wait until it ends by itself.

        Raises:
            PeerError: it lives on.
        """
        if self._process is not None:
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise PeerError(f"{self.command[0]} still runs after {timeout:g} s: {self.words()}") from None
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
    tree: Tree | None = None,
) -> Backend:
    """QEMU's block layer as a vhost-user-blk back end.

    Args:
        socket: where it listens.
        node: ``--blockdev`` options without ``node-name``, such as ``driver=null-co,size=1048576``.
        queues: virtqueues that it offers.
        options: further arguments, put before the block node.
        tree: where to take the program from; None: the machine's own.
    """
    name = "qemu-storage-daemon"
    command = [*(tree.program(name) if tree else [name]), *options, "--blockdev", f"{node},node-name=disk"]
    export = "type=vhost-user-blk,id=export,node-name=disk,writable=on"
    command += ["--export", f"{export},num-queues={queues},addr.type=unix,addr.path={socket}"]
    return Backend(command, socket, "qemu-system-common", cpus)


def qemu_to_join(
    socket: Path,
    monitor: Path,
    options: Sequence[str],
    *,
    machine: str = "q35",
    memory: str = "memory-backend-memfd",
    executable: str = "qemu-system-x86_64",
) -> Backend:
    """A QEMU as somebody else may have started it, who knows nothing of guestpv. Its processor is halted,
    unless ``options`` give it firmware by ``-bios``.

    Args:
        socket, monitor: where its qtest and its monitor listen.
        options: its devices.
        memory: type and further properties of the object that is its RAM of 128 MiB.
    """
    command = [executable, "-machine", f"{machine},accel=tcg,memory-backend=ram", "-nodefaults"]
    command += ["-display", "none", "-m", "128M", "-object", f"{memory},id=ram,size=128M"]
    command += ["-qtest-log", "none", "-qtest", f"unix:{socket},server=on,wait=off"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off", *options]
    if "-bios" not in options:
        halt = socket.parent / "halt.bin"
        halt.write_bytes(bytes(0xFFF0) + b"\xfa\xf4\xeb\xfd" + bytes(12))
        command += ["-bios", str(halt)]
    return Backend(command, socket, "qemu-system-x86")


PASST_GATEWAY = "192.0.2.1"
"""What the guest sees as its router; packets to it reach the loopback of passt's namespace."""
PASST_ADDRESS = "192.0.2.2"
"""What passt gives its guest."""

_PASST_SETUP = f"""
set -e
ip link set lo up
ip tuntap add dev tap0 mode tap
ip address add {PASST_ADDRESS}/24 dev tap0
ip link set tap0 up
ip route add default via {PASST_GATEWAY}
echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range
exec "$@"
"""


def passt(socket: Path, tree: Tree) -> Backend:
    """passt as a vhost-user-net back end, alone in a network namespace that reaches nothing."""
    command = [*_namespace(), "sh", "-c", _PASST_SETUP, "sh", *tree.program("passt")]
    command += ["--vhost-user", "--foreground", "--ipv4-only", "--socket", str(socket)]
    return Backend(command, socket, "util-linux iproute2")


def _namespace() -> list[str]:
    return ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]


def dpdk_vhost(
    socket: Path,
    tree: Tree,
    *,
    forward: str = "macswap",
    queues: int = 1,
    cores: tuple[int, int] = (0, 1),
    memory: int = 256,
) -> Backend:
    """DPDK's vhost PMD under testpmd, as a vhost-user-net back end that polls.

    Args:
        forward: testpmd's forwarding mode: ``macswap`` sends every frame back, ``txonly``, ``rxonly``.
        queues: queue pairs; each one's frames go back into the same.
        cores: CPU for the commands and CPU for the packets.
        memory: MiB; no huge pages are used.
    """
    drivers = next((tree.root / LIBRARIES[0] / "dpdk").glob("pmds-*"))
    command = [*tree.program("dpdk-testpmd"), "-d", str(drivers), "--no-huge", "-m", str(memory), "--no-pci"]
    command += ["--no-shconf", "--no-telemetry", "-l", f"{cores[0]},{cores[1]}"]
    command += ["--vdev", f"net_vhost0,iface={socket},queues={queues}", "--", "--interactive", "--auto-start"]
    command += [f"--rxq={queues}", f"--txq={queues}"]
    command += [f"--forward-mode={forward}", "--nb-cores=1", "--total-num-mbufs=8192"]
    return Backend(command, socket, "dpdk")
