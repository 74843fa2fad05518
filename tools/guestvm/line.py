"""The QEMU command line of a machine: its options, and a root port of its own for each PCI function."""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache as remembered
from pathlib import Path

from guestvm.errors import LabError

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
        "vfio_iommu_type1.allow_unsafe_interrupts=1 iommufd.allow_unsafe_interrupts=1",
    ),
    # Without dma-remap, which QEMU has from 10.2 on, devices behind it do not see what Linux maps.
    "amd": (["-device", "amd-iommu,intremap=on,dma-remap=on"], ""),
    "none": ([], ""),
}
ROOT_PORT_SLOTS = range(0x4, 0x1D)


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


@dataclass
class Line:
    """What a machine is made of; the options are those of `Machine`.

    ports: slot on the root bus of each root port, by its id; filled by `words`.
    """

    qemu: str
    machine: str
    iommu: str
    memory: int
    cpus: int
    append: str
    devices: Sequence[str] | None
    options: dict[str, list[str]]
    spare: Sequence[str]
    trace: tuple[Path, Sequence[str]] | None
    extra: Sequence[str]
    prefix: Sequence[str]
    ports: dict[str, int] = field(default_factory=dict)

    def words(self, accel: str, kernel_image: Path, initrd: Path, root: Path, run: Path) -> list[str]:
        """The command line of a machine whose sockets and logs are in the directory `run`."""
        options, devices = self.options, self.devices
        if devices is None:
            lab = default_lab(run)
            devices = lab["devices"]
            options = {
                **options,
                **{name: lab[f"{name}s"] + options[name] for name in ("netdev", "blockdev")},
            }
        accelerator = "tcg,thread=multi,tb-size=512" if accel == "tcg" else accel
        iommu, iommu_append = IOMMUS[self.iommu]
        append = f"{APPEND} {iommu_append} {self.append}".strip()
        line = [*self.prefix, self.qemu, "-accel", accelerator, "-machine", self.machine, *iommu]
        line += ["-cpu", "max", "-m", str(self.memory), "-smp", str(self.cpus)]
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
        for port in self.spare:
            line += self._root_port(port, next(slots))
        if self.trace is not None:
            file, events = self.trace
            line += ["-D", str(file)]
            for event in events:
                line += ["-trace", event]
        return [*line, *self.extra]

    def _root_port(self, ident: str, slot: int) -> list[str]:
        self.ports[ident] = slot
        return ["-device", f"pcie-root-port,id={ident},bus=pcie.0,addr={slot:#x},chassis={slot},slot={slot}"]

    def _placed(self, device: str) -> tuple[str | None, str]:
        """The id of the root port that `device` needs (None: it has its place) and the device on it."""
        if device.startswith("{"):
            fields = json.loads(device)
            driver, ident, placed = fields["driver"], fields.get("id"), "bus" in fields
        else:
            driver = device.partition(",")[0]
            keys = option_fields(device)
            ident, placed = keys.get("id"), "bus" in keys
        if placed or not _is_pci(self.qemu, driver):
            return None, device
        port = f"port-{ident or len(self.ports)}"
        if device.startswith("{"):
            return port, json.dumps({**fields, "bus": port})
        return port, f"{device},bus={port}"


def option_fields(device: str) -> dict[str, str]:
    """The key=value parts of an option string of QEMU's."""
    return dict(re.findall(r",([\w.-]+)=([^,]*)", device))


def check_iommu(name: str) -> None:
    """LabError unless `name` is one of IOMMUS."""
    if name not in IOMMUS:
        raise LabError(f"--iommu {name} is not known; known: {', '.join(IOMMUS)}")


@remembered
def _is_pci(qemu: str, driver: str) -> bool:
    """Whether a device goes on a PCI bus: whether it has an address there.

    Only this one is asked about: for a list of all, QEMU loads each of its modules, and one that runs from
    an unpacked tree meets those of the machine's own and aborts.
    """
    said = subprocess.run(
        [qemu, "-device", f"{driver},help"], capture_output=True, text=True, timeout=60, check=False
    ).stdout
    return re.search(r"^\s+addr=", said, re.MULTILINE) is not None
