"""One virtual machine: its QEMU command line, its life and what can be asked of it."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from guestvm import accel as accelerators
from guestvm import cache, image
from guestvm import kernel as kernels
from guestvm.errors import GuestDied, GuestTimeout, LabError
from guestvm.line import MACHINE, MARK_PORT, QEMU, Line, check_iommu, option_fields
from guestvm.link import Link, Process, Result
from guestvm.monitor import Monitor
from guestvm.progress import Progress

# QEMU's parent-death signal belongs to the thread that started it: this one lives as long as the interpreter.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guest-starter")


class Machine:
    """A guest. Use it as a context manager: it is booted on entry and ended on exit.

    kernel: one of guestvm.kernel.SERIES.
    devices, netdevs, blockdevs, objects: QEMU's own option strings. Without `devices` it is the default lab.
        A PCI device without `bus=` gets a pcie-root-port of its own; `bus=pcie.0` puts it on the root bus.
    spare_ports: empty root ports spare0, spare1, ... for hot-plug.
    iommu: intel, virtio, amd or none. accel: auto (KVM where it works, else TCG), kvm or tcg.
    trace: file and names of QEMU trace events (patterns) to write there from the start.
    limit: seconds that the machine may live (0: any); then it is killed.
    boot_limit: seconds until the agent must answer.
    qemu: the QEMU program. prefix: a command that QEMU is started through (`ip netns exec NAME`).
    extra: further QEMU arguments. pass_fds: file descriptors that QEMU inherits.
    keep_log: when the serial log is kept and its path printed: failure, always or never.
    warm: fork guestpv's commands, and Python programs, from a process that has loaded guestpv (guestvm.warm).
    """

    def __init__(
        self,
        kernel: str = "6.1",
        devices: Sequence[str] | None = None,
        netdevs: Sequence[str] = (),
        blockdevs: Sequence[str] = (),
        objects: Sequence[str] = (),
        *,
        spare_ports: int = 2,
        machine: str = MACHINE,
        iommu: str = "intel",
        accel: str = "auto",
        memory: int = 1024,
        cpus: int = 2,
        append: str = "",
        trace: tuple[Path, Sequence[str]] | None = None,
        limit: float = 900,
        boot_limit: float = 240,
        qemu: str = QEMU,
        prefix: Sequence[str] = (),
        extra: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        keep_log: str = "failure",
        warm: bool = False,
        progress: Progress | None = None,
    ) -> None:
        check_iommu(iommu)
        self.kernel, self.iommu, self.accel, self.limit = kernel, iommu, accel, limit
        options = {"netdev": list(netdevs), "blockdev": list(blockdevs), "object": list(objects)}
        self._spare = [f"spare{number}" for number in range(spare_ports)]
        self._plugged: dict[str, str] = {}
        self._line = Line(
            qemu, machine, iommu, memory, cpus, append, devices, options, self._spare, trace, extra, prefix
        )
        self._pass_fds, self._boot_limit, self._keep_log = tuple(pass_fds), boot_limit, keep_log
        self._warm = warm
        self._progress = progress or Progress(quiet=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._monitor: Monitor | None = None
        self._killed: str | None = None
        self._stopping = False
        self._timer: threading.Timer | None = None
        self.words: list[str] = []
        self.directory: Path | None = None
        self.sockets: Path | None = None
        self.log: Path | None = None
        self.boot_seconds = 0.0

    def __enter__(self) -> "Machine":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(failed=kind is not None)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        """Whether the virtual machine runs and was not given up."""
        return self._process is not None and self._process.poll() is None and self._killed is None

    @property
    def qmp_path(self) -> Path:
        """A second QMP socket, free for others."""
        return self.run_directory / "qmp2.sock"

    @property
    def _home(self) -> Path:
        if self.directory is None:
            raise LabError("the machine has not been started")
        return self.directory

    @property
    def run_directory(self) -> Path:
        """Where the sockets and logs of the QEMU that runs now are."""
        return self.sockets or self._home

    def start(self) -> None:
        """Build what is missing, boot and wait for the agent."""
        require_qemu(self._line.qemu)
        source = kernels.get(self.kernel, self._progress)
        if self.iommu == "virtio" and not kernels.closure(source, ["virtio_iommu"]):
            raise LabError(
                f"kernel {self.kernel} has no virtio-iommu driver; use --kernel 6.12 or --iommu intel"
            )
        root = image.root(source, self._progress)
        initramfs = image.initramfs(source)
        if self.accel == "auto":
            self.accel = accelerators.choose(source, self._line.qemu, self._progress)
        self.directory = Path(tempfile.mkdtemp(prefix="guestpv-"))
        try:
            initrd = self._home / "initrd"
            initrd.write_bytes(initramfs.read_bytes() + image.checkout())
            with self._progress.step(f"booting kernel {source.release} with {self.accel}"):
                self.words = self._line.words(self.accel, source.image, initrd, root, self._home)
                try:
                    self._boot()
                except GuestDied:
                    # Emulated processors now and then meet code half way while the kernel patches itself.
                    if self.accel != "tcg" or not self._panicked():
                        raise
                    if self._monitor is not None:
                        self._monitor.close()
                    self._boot()
        except BaseException:
            self.stop(failed=True)
            raise

    def _boot(self) -> None:
        started = time.monotonic()
        self._process = self.launch(self.words, self._home)
        self.set_limit(self.limit)
        agent = self.connect(self._process, self._home, "agent.sock")
        monitor = self.connect(self._process, self._home, "qmp.sock")
        self._link = Link(agent, self.kill, self._warm)
        self._watch(self._process)
        try:
            self._monitor = Monitor(monitor)
        except GuestDied:
            # QEMU's own words, which the watcher has, say more.
            self._link.wait(lambda: False, 30)
            raise
        if not self._link.wait(
            lambda: self._link is not None and self._link.ready is not None, self._boot_limit
        ):
            raise GuestTimeout(self.kill(f"the guest's agent did not answer within {self._boot_limit:g} s"))
        self.boot_seconds = time.monotonic() - started

    def _panicked(self) -> bool:
        serial = self._home / "serial.log"
        return serial.exists() and b"Kernel panic" in serial.read_bytes()

    def set_limit(self, seconds: float) -> None:
        """Kill the machine when it still lives `seconds` from now, whatever was set before; 0 is never."""
        if self._timer is not None:
            self._timer.cancel()
        if seconds:
            self._timer = threading.Timer(seconds, self.kill, [f"time limit of {seconds:g} s passed"])
            self._timer.daemon = True
            self._timer.start()

    def launch(self, words: Sequence[str], directory: Path) -> "subprocess.Popen[bytes]":
        """Start a QEMU that says what it has to say to qemu.log in `directory`."""
        with open(directory / "qemu.log", "wb") as log:
            # setpriv becomes QEMU: the pid is QEMU's own, and QEMU ends when we do.
            return _starter.submit(
                subprocess.Popen,
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._pass_fds,
            ).result()

    def connect(self, process: "subprocess.Popen[bytes]", directory: Path, name: str) -> socket.socket:
        """Connect to a socket of a QEMU that was just started."""
        deadline = time.monotonic() + 60
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(directory / name))
                return sock
            except OSError:
                sock.close()
            if process.poll() is not None:
                raise GuestDied(f"QEMU ended with status {process.returncode}:\n{_said(directory)}")
            if time.monotonic() > deadline:
                process.kill()
                raise LabError("QEMU did not open its sockets within 60 s")
            time.sleep(0.005)

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        def wait() -> None:
            status = process.wait()
            if process is not self._process or self._link is None:
                return
            if self._killed is not None:
                self._link.died(self._killed)
            elif not self._stopping:
                said = _said(self.run_directory)
                self._link.died(
                    f"the virtual machine ended by itself (QEMU status {status}){': ' + said if said else ''}"
                )

        threading.Thread(target=wait, name="guest-watch", daemon=True).start()

    def move(self, process: "subprocess.Popen[bytes]", directory: Path, monitor: Monitor) -> None:
        """From now on the guest lives in another QEMU; the one before is ended."""
        before, self._process = self._process, process
        self.sockets = directory
        assert before is not None
        assert self._monitor is not None
        self._monitor.close()
        self._monitor = monitor
        self._watch(process)
        before.kill()
        before.wait(10)

    def kill(self, reason: str) -> str:
        """Kill QEMU by its pid; the sentence that says so. Everything that waits fails with it."""
        if self._killed is None and self._process is not None:
            self._killed = f"{reason}: killed the virtual machine (pid {self._process.pid})"
            self._process.kill()
            if self._link is not None:
                self._link.died(self._killed)
        return self._killed or reason

    def stop(self, failed: bool = False) -> None:
        """End the machine. After a failure its serial log is kept and its path printed."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        if self._process is not None and self._process.poll() is None:
            if self._monitor is not None and self._killed is None:
                with contextlib.suppress(LabError, subprocess.TimeoutExpired):
                    self._monitor.command("quit", 5)
                    self._process.wait(5)
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(60)
        if self._monitor is not None:
            self._monitor.close()
        if self.directory is None:
            return
        serial = self.run_directory / "serial.log"
        wanted = self._keep_log == "always" or (self._keep_log == "failure" and (failed or self._killed))
        if wanted and serial.exists():
            self.log = _keep(serial, self.kernel)
            print(f"guest: serial log: {self.log}", file=sys.stderr, flush=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory = self.sockets = None

    @property
    def link(self) -> Link:
        """The connection to the guest's agent."""
        if self._link is None:
            raise LabError("the machine has not been started")
        return self._link

    def run(
        self,
        command: str | Sequence[str],
        timeout: float = 180,
        *,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
        cwd: str = "/root",
        on_output: Callable[[str, bytes], None] | None = None,
    ) -> Result:
        """Run a command (a string goes through the shell) and wait for its end; see Process.wait."""
        process = self.link.spawn(command, on_output, env=env or {}, cwd=cwd)
        # A command may end without having read its input.
        with contextlib.suppress(LabError):
            process.write(stdin)
            process.close_stdin()
        return process.wait(timeout)

    def spawn(
        self,
        command: str | Sequence[str],
        *,
        env: dict[str, str] | None = None,
        cwd: str = "/root",
        pty: tuple[int, int] | None = None,
        on_output: Callable[[str, bytes], None] | None = None,
    ) -> Process:
        """Start a command in the background; `pty` (rows, columns) gives it a pseudo-terminal."""
        terminal = {"pty": True, "size": list(pty)} if pty else {}
        return self.link.spawn(command, on_output, env=env or {}, cwd=cwd, **terminal)

    def read_file(self, path: str) -> bytes:
        """A guest file's content."""
        return self.link.call("read_file", path=path)[1]

    def write_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a guest file."""
        self.link.call("write_file", data, path=path, mode=mode)

    def mark(self, letter: str) -> None:
        """Write one character to I/O port 0xe9: a phase mark in a trace (guestvm.accesses)."""
        self.link.call("mark", letter.encode("ascii"), port=MARK_PORT)

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        """A QMP command and its return value; `_` in argument names stands for `-`."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._qemu_monitor.command(command, **arguments)

    def wait_event(self, name: str, timeout: float = 120, **data: Any) -> dict[str, Any]:
        """The next QMP event `name` whose data contains `data`; GuestTimeout if it does not come."""
        return self._qemu_monitor.event(name, timeout, data)

    @property
    def _qemu_monitor(self) -> Monitor:
        if self._monitor is None:
            raise LabError("the machine has not been started")
        return self._monitor

    def plug(self, device: str, netdev: str | None = None) -> str:
        """Hot-plug a device (it needs an `id=`) into a free spare root port; its PCI address in the guest.

        `netdev` is a -netdev string that is added first.
        """
        free = [port for port in self._spare if port not in self._plugged.values()]
        if not free:
            raise LabError(
                f"all {len(self._spare)} spare root ports are taken; ask for more with spare_ports="
            )
        for command in ([f"netdev_add {netdev}"] if netdev else []) + [f"device_add {device},bus={free[0]}"]:
            said = self.qmp("human-monitor-command", command_line=command)
            if said.strip():
                raise LabError(f"QEMU refuses {command}: {said.strip()}")
        ident = option_fields(device)["id"]
        self._plugged[ident] = free[0]
        appeared = (
            f"for i in $(seq 3000); do ls {self._port_path(ident)}/*:00.0 && exit; sleep 0.02; done; exit 1"
        )
        if self.run(appeared).status != 0:
            raise LabError(f"{ident} did not appear in the guest")
        return self.address(ident)

    def unplug(self, ident: str, timeout: float = 120) -> None:
        """Ask the guest to let the device go (device_del) and wait until QEMU has removed it."""
        self.qmp("device_del", id=ident)
        self.wait_event("DEVICE_DELETED", timeout, device=ident)
        self._plugged.pop(ident, None)

    def interrupts(self) -> Counter[str]:
        """How often each interrupt fired, all CPUs together, by its name in the guest's /proc/interrupts."""
        lines = self.read_file("/proc/interrupts").decode().splitlines()
        cpus = len(lines[0].split())
        counts: Counter[str] = Counter()
        for line in lines[1:]:
            words = line.split()
            if words[0].rstrip(":").isdigit():
                counts[" ".join(words[cpus + 3 :])] += sum(map(int, words[1 : cpus + 1]))
        return counts

    def _port_path(self, ident: str) -> str:
        port = self._plugged.get(ident, f"port-{ident}")
        if port not in self._line.ports:
            raise LabError(f"{ident} is not a device behind a root port")
        return f"/sys/bus/pci/devices/0000:00:{self._line.ports[port]:02x}.0"

    def address(self, ident: str) -> str:
        """The PCI address in the guest of the device that sits behind a root port with QEMU id `ident`."""
        listing = self.run(["ls", self._port_path(ident)]).check().stdout
        found = re.findall(r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$", listing, re.MULTILINE)
        if not found:
            raise LabError(f"no device behind the root port of {ident}")
        return str(found[0])


def require_qemu(program: str = QEMU) -> None:
    """LabError with what to install if QEMU is not there."""
    if shutil.which(program) is None:
        raise LabError(f"{program} is not installed; run: apt-get install qemu-system-x86")


def _said(directory: Path) -> str:
    return (directory / "qemu.log").read_text(errors="replace").strip()


def _keep(serial: Path, kernel: str) -> Path:
    logs = cache.root() / "logs"
    logs.mkdir(exist_ok=True)
    kept = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{kernel}-{os.getpid()}.serial.log"
    shutil.copy(serial, kept)
    for old in sorted(logs.iterdir())[:-50]:
        old.unlink(missing_ok=True)
    return kept
