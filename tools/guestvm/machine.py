"""One virtual machine: its QEMU command line, its life and what can be asked of it."""

import contextlib
import json
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
from functools import cache as remembered
from pathlib import Path
from typing import Any

from guestvm import accel as accelerators
from guestvm import cache, image
from guestvm import kernel as kernels
from guestvm.errors import GuestDied, GuestTimeout, LabError
from guestvm.link import Link, Process, Result
from guestvm.monitor import Monitor
from guestvm.progress import Progress

QEMU = "qemu-system-x86_64"
MACHINE = "q35,kernel-irqchip=split"
MARK_PORT = 0xE9
APPEND = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable clocksource=tsc random.trust_cpu=on "
    "no_timer_check nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
)
"""The second line keeps a guest alive whose host is too busy to run it: without KVM the kernel would take
lost time for a broken timer (and panic while it boots) or for a hung CPU."""

IOMMUS = {
    "intel": (["-device", "intel-iommu,intremap=on,caching-mode=on"], "intel_iommu=on"),
    "virtio": (
        ["-device", "virtio-iommu-pci,bus=pcie.0,addr=0x1"],
        "vfio_iommu_type1.allow_unsafe_interrupts=1",
    ),
    "none": ([], ""),
}
ROOT_PORT_SLOTS = range(0x4, 0x1D)

# QEMU's parent-death signal belongs to the thread that started it: this one lives as long as the interpreter.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="guest-starter")


def default_lab(directory: Path) -> dict[str, list[str]]:
    """One virtio function of each kind, drivable through VFIO; the scratch disk's file is in `directory`."""
    scratch = directory / "scratch.img"
    with scratch.open("wb") as file:
        file.truncate(64 << 20)
    # The kernel's balloon driver refuses ACCESS_PLATFORM, so the balloon is unbound until guestpv takes it.
    modern = "disable-legacy=on,iommu_platform=on,ats=on"
    return {
        "netdevs": ["user,id=n0,restrict=on"],
        "blockdevs": [f"driver=raw,node-name=d0,file.driver=file,file.filename={scratch}"],
        "devices": [
            f"virtio-net-pci,id=net0,netdev=n0,{modern}",
            f"virtio-rng-pci,id=rng0,{modern}",
            f"virtio-blk-pci,id=blk0,drive=d0,{modern}",
            f"virtio-balloon-pci,id=balloon0,{modern}",
        ],
    }


class Machine:
    """A guest. Use it as a context manager: it is booted on entry and ended on exit.

    kernel: series, a key of guestvm.kernel.SUITES.
    devices, netdevs, blockdevs, objects: QEMU's own option strings. Without `devices` it is the default lab.
        A PCI device without `bus=` gets a pcie-root-port of its own; `bus=pcie.0` puts it on the root bus.
    spare_ports: empty root ports spare0, spare1, ... for hot-plug.
    iommu: intel, virtio or none. accel: auto (KVM where it works, else TCG), kvm or tcg.
    trace: file and names of QEMU trace events (patterns) to write there from the start.
    limit: seconds that the machine may live (0: any); then it is killed.
    boot_limit: seconds until the agent must answer.
    qemu: the QEMU program. prefix: a command that QEMU is started through (`ip netns exec NAME`).
    extra: further QEMU arguments. pass_fds: file descriptors that QEMU inherits.
    keep_log: when the serial log is kept and its path printed: failure, always or never.
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
        boot_limit: float = 60,
        qemu: str = QEMU,
        prefix: Sequence[str] = (),
        extra: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        keep_log: str = "failure",
        progress: Progress | None = None,
    ) -> None:
        if iommu not in IOMMUS:
            raise LabError(f"--iommu {iommu} is not known; known: {', '.join(IOMMUS)}")
        self.kernel, self.iommu, self.accel, self.limit = kernel, iommu, accel, limit
        self._options = {"netdev": list(netdevs), "blockdev": list(blockdevs), "object": list(objects)}
        self._devices = devices
        self._spare = [f"spare{number}" for number in range(spare_ports)]
        self._plugged: dict[str, str] = {}
        self._machine, self._memory, self._cpus, self._append = machine, memory, cpus, append
        self._trace, self._extra, self._pass_fds = trace, list(extra), tuple(pass_fds)
        self._boot_limit, self._keep_log = boot_limit, keep_log
        self._qemu, self._prefix = qemu, list(prefix)
        self._progress = progress or Progress(quiet=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._monitor: Monitor | None = None
        self._killed: str | None = None
        self._stopping = False
        self._timer: threading.Timer | None = None
        self._ports: dict[str, int] = {}
        self.directory: Path | None = None
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
        return self._home / "qmp2.sock"

    @property
    def _home(self) -> Path:
        if self.directory is None:
            raise LabError("the machine has not been started")
        return self.directory

    def start(self) -> None:
        """Build what is missing, boot and wait for the agent."""
        require_qemu(self._qemu)
        source = kernels.get(self.kernel, self._progress)
        if self.iommu == "virtio" and not kernels.closure(source, ["virtio_iommu"]):
            raise LabError(
                f"kernel {self.kernel} has no virtio-iommu driver; use --kernel 6.12 or --iommu intel"
            )
        root = image.root(source, self._progress)
        initramfs = image.initramfs(source)
        if self.accel == "auto":
            self.accel = accelerators.choose(source, self._qemu, self._progress)
        self.directory = Path(tempfile.mkdtemp(prefix="guestpv-"))
        try:
            initrd = self._home / "initrd"
            initrd.write_bytes(initramfs.read_bytes() + image.checkout())
            with self._progress.step(f"booting kernel {source.release} with {self.accel}"):
                self._boot(self.command(source.image, initrd, root))
        except BaseException:
            self.stop(failed=True)
            raise

    def command(self, kernel_image: Path, initrd: Path, root: Path) -> list[str]:
        """The QEMU command line."""
        run, options, devices = self._home, self._options, self._devices
        if devices is None:
            lab = default_lab(run)
            devices = lab["devices"]
            options = {
                **options,
                **{name: lab[f"{name}s"] + options[name] for name in ("netdev", "blockdev")},
            }
        accelerator = "tcg,thread=multi,tb-size=512" if self.accel == "tcg" else self.accel
        iommu, iommu_append = IOMMUS[self.iommu]
        append = f"{APPEND} {iommu_append} {self._append}".strip()
        line = [*self._prefix, self._qemu, "-accel", accelerator, "-machine", self._machine, *iommu]
        line += ["-cpu", "max", "-m", str(self._memory), "-smp", str(self._cpus)]
        line += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        line += ["-kernel", str(kernel_image), "-initrd", str(initrd), "-append", append]
        line += ["-chardev", f"file,id=serial,path={run / 'serial.log'}", "-serial", "chardev:serial"]
        for name in ("qmp", "qmp2"):
            line += ["-chardev", f"socket,id={name},path={run / name}.sock,server=on,wait=off"]
            line += ["-mon", f"chardev={name},mode=control"]
        line += ["-blockdev", f"driver=raw,node-name=root,read-only=on,file.driver=file,file.filename={root}"]
        line += ["-device", "virtio-blk-pci,id=root,drive=root,serial=guestroot,bus=pcie.0,addr=0x2"]
        line += ["-chardev", f"socket,id=agent,path={run / 'agent.sock'},server=on,wait=off"]
        line += ["-device", "virtio-serial-pci,id=serial0,bus=pcie.0,addr=0x3"]
        line += ["-device", "virtserialport,bus=serial0.0,chardev=agent,name=guestpv.agent"]
        line += ["-chardev", "null,id=marks", "-device", f"isa-debugcon,iobase={MARK_PORT:#x},chardev=marks"]
        for name, values in options.items():
            for value in values:
                line += [f"-{name}", value]
        slots = iter(ROOT_PORT_SLOTS)
        for device in devices:
            port, device = self._placed(device)
            if port is not None:
                line += self._root_port(port, next(slots))
            line += ["-device", device]
        for port in self._spare:
            line += self._root_port(port, next(slots))
        if self._trace is not None:
            file, events = self._trace
            line += ["-D", str(file)]
            for event in events:
                line += ["-trace", event]
        return line + self._extra

    def _root_port(self, ident: str, slot: int) -> list[str]:
        self._ports[ident] = slot
        return ["-device", f"pcie-root-port,id={ident},bus=pcie.0,addr={slot:#x},chassis={slot},slot={slot}"]

    def _placed(self, device: str) -> tuple[str | None, str]:
        """The id of the root port that `device` needs (None: it has its place) and the device on it."""
        if device.startswith("{"):
            fields = json.loads(device)
            driver, ident, placed = fields["driver"], fields.get("id"), "bus" in fields
        else:
            driver = device.partition(",")[0]
            keys = _fields(device)
            ident, placed = keys.get("id"), "bus" in keys
        if placed or driver not in _pci_devices(self._qemu):
            return None, device
        port = f"port-{ident or len(self._ports)}"
        if device.startswith("{"):
            return port, json.dumps({**fields, "bus": port})
        return port, f"{device},bus={port}"

    def _boot(self, command: list[str]) -> None:
        started = time.monotonic()
        with open(self._home / "qemu.log", "wb") as log:
            # setpriv becomes QEMU: the pid is QEMU's own, and QEMU ends when we do.
            self._process = _starter.submit(
                subprocess.Popen,
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._pass_fds,
            ).result()
        self.set_limit(self.limit)
        agent, monitor = self._connect("agent.sock"), self._connect("qmp.sock")
        self._link = Link(agent, self.kill)
        threading.Thread(target=self._watch, name="guest-watch", daemon=True).start()
        try:
            self._monitor = Monitor(monitor)
        except GuestDied:
            # QEMU's own words, which the watcher has, say more.
            self._link.wait(lambda: False, 5)
            raise
        if not self._link.wait(
            lambda: self._link is not None and self._link.ready is not None, self._boot_limit
        ):
            raise GuestTimeout(self.kill(f"the guest's agent did not answer within {self._boot_limit:g} s"))
        self.boot_seconds = time.monotonic() - started

    def set_limit(self, seconds: float) -> None:
        """Kill the machine when it still lives `seconds` from now, whatever was set before; 0 is never."""
        if self._timer is not None:
            self._timer.cancel()
        if seconds:
            self._timer = threading.Timer(seconds, self.kill, [f"time limit of {seconds:g} s passed"])
            self._timer.daemon = True
            self._timer.start()

    def _connect(self, name: str) -> socket.socket:
        deadline = time.monotonic() + 20
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(self._home / name))
                return sock
            except OSError:
                sock.close()
            assert self._process is not None
            if self._process.poll() is not None:
                raise GuestDied(f"QEMU ended with status {self._process.returncode}:\n{self._qemu_said()}")
            if time.monotonic() > deadline:
                raise LabError(self.kill("QEMU did not open its sockets within 20 s"))
            time.sleep(0.005)

    def _qemu_said(self) -> str:
        return (self._home / "qemu.log").read_text(errors="replace").strip()

    def _watch(self) -> None:
        assert self._process is not None
        assert self._link is not None
        status = self._process.wait()
        if self._killed is not None:
            self._link.died(self._killed)
        elif not self._stopping:
            said = self._qemu_said()
            self._link.died(
                f"the virtual machine ended by itself (QEMU status {status}){': ' + said if said else ''}"
            )

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
            self._process.wait(10)
        if self._monitor is not None:
            self._monitor.close()
        if self.directory is None:
            return
        serial = self.directory / "serial.log"
        wanted = self._keep_log == "always" or (self._keep_log == "failure" and (failed or self._killed))
        if wanted and serial.exists():
            self.log = _keep(serial, self.kernel)
            print(f"guest: serial log: {self.log}", file=sys.stderr, flush=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory = None

    @property
    def _agent(self) -> Link:
        if self._link is None:
            raise LabError("the machine has not been started")
        return self._link

    def run(
        self,
        command: str | Sequence[str],
        timeout: float = 60,
        *,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
        cwd: str = "/root",
        on_output: Callable[[str, bytes], None] | None = None,
    ) -> Result:
        """Run a command (a string goes through the shell) and wait for its end; see Process.wait."""
        process = self._agent.spawn(command, on_output, env=env or {}, cwd=cwd)
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
        return self._agent.spawn(command, on_output, env=env or {}, cwd=cwd, **terminal)

    def read_file(self, path: str) -> bytes:
        """A guest file's content."""
        return self._agent.call("read_file", path=path)[1]

    def write_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a guest file."""
        self._agent.call("write_file", data, path=path, mode=mode)

    def mark(self, letter: str) -> None:
        """Write one character to I/O port 0xe9: a phase mark in a trace (guestvm.accesses)."""
        self._agent.call("mark", letter.encode("ascii"), port=MARK_PORT)

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        """A QMP command and its return value; `_` in argument names stands for `-`."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._qemu_monitor.command(command, **arguments)

    def wait_event(self, name: str, timeout: float = 30, **data: Any) -> dict[str, Any]:
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
        ident = _fields(device)["id"]
        self._plugged[ident] = free[0]
        appeared = (
            f"for i in $(seq 300); do ls {self._port_path(ident)}/*:00.0 && exit; sleep 0.02; done; exit 1"
        )
        if self.run(appeared).status != 0:
            raise LabError(f"{ident} did not appear in the guest")
        return self.address(ident)

    def unplug(self, ident: str, timeout: float = 30) -> None:
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
        if port not in self._ports:
            raise LabError(f"{ident} is not a device behind a root port")
        return f"/sys/bus/pci/devices/0000:00:{self._ports[port]:02x}.0"

    def address(self, ident: str) -> str:
        """The PCI address in the guest of the device that sits behind a root port with QEMU id `ident`."""
        listing = self.run(["ls", self._port_path(ident)]).check().stdout
        found = re.findall(r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$", listing, re.MULTILINE)
        if not found:
            raise LabError(f"no device behind the root port of {ident}")
        return str(found[0])


def _fields(device: str) -> dict[str, str]:
    return dict(re.findall(r",([\w.-]+)=([^,]*)", device))


def require_qemu(program: str = QEMU) -> None:
    """LabError with what to install if QEMU is not there."""
    if shutil.which(program) is None:
        raise LabError(f"{program} is not installed; run: apt-get install qemu-system-x86")


@remembered
def _pci_devices(qemu: str) -> frozenset[str]:
    listing = subprocess.run(
        [qemu, "-device", "help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    names: set[str] = set()
    for name, alias in re.findall(r'^name "([^"]+)", bus PCI(?:, alias "([^"]+)")?', listing, re.MULTILINE):
        names |= {name, alias} - {""}
    return frozenset(names)


def _keep(serial: Path, kernel: str) -> Path:
    logs = cache.root() / "logs"
    logs.mkdir(exist_ok=True)
    kept = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{kernel}-{os.getpid()}.serial.log"
    shutil.copy(serial, kept)
    for old in sorted(logs.iterdir())[:-50]:
        old.unlink(missing_ok=True)
    return kept
