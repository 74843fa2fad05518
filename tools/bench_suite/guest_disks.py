"""One guest, one image behind five disks, and 4 KiB random reads through whichever driver is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from guestvm import Machine
from guestvm.accesses import TRACE_EVENTS, Phase, phases

KERNEL, LIBRARY, BLK_UP, AHCI, IDE = (
    "linux virtio-blk",
    "library",
    "blk up",
    "linux AHCI",
    "linux IDE",
)
DRIVERS = (KERNEL, LIBRARY, BLK_UP, AHCI, IDE)
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
BLOCK = 4096
MODERN = "disable-legacy=on,iommu_platform=on,ats=on,num-queues=1"
REGIONS = {AHCI: ("ahci",), IDE: ("ide", "piix-bmdma", "bmdma")}
"""How the names of QEMU's memory regions begin that a driver accesses; for the others ``virtio-pci-``."""
LIMIT = 600.0

SCRIPT = """
import json, sys, time
import numpy as np
import guestpv
from guestpv.drivers.blk import Blk
PERCENTILES = json.loads(sys.argv[2])
with guestpv.open(sys.argv[1]) as transport, Blk(transport) as disk:
    memory, blocks = disk.allocate(256 * 4096), disk.capacity // 4096
    random = np.random.default_rng(1)
    def read(depth, count):
        places = random.integers(0, blocks, count, np.uint64) * np.uint64(4096)
        rows = memory[:depth * 4096]
        result = disk.read_many(places, rows, 4096, depth=depth, latencies=True)
        result.check()
        return result.latencies
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        depth, count, seconds = json.loads(line)
        seen, started = [], time.monotonic()
        while not seen or time.monotonic() < started + seconds:
            seen.append(read(depth, count or 2000))
        spent, every = time.monotonic() - started, np.concatenate(seen)
        latency = dict(zip(map(str, PERCENTILES), np.percentile(every / 1000, PERCENTILES)))
        print(f"run {number}:", json.dumps({"iops": every.size / spent, "latency": latency}), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What a run gave: requests a second, and latency in microseconds by percentile (as text)."""

    iops: float
    latency: dict[str, float]


class Disks:
    """The disks of a running ``machine_with_disks``, each in the hands of its driver."""

    def __init__(self, vm: Machine) -> None:
        self._vm = vm
        self._runs = 0
        self._addresses = {name: vm.address(ident) for name, ident in
                           ((KERNEL, "plain"), (LIBRARY, "library"), (BLK_UP, "up"))}  # fmt: skip
        self._paths = {BLK_UP: "/dev/nbd0"}
        node = f"/sys/bus/pci/devices/{self._addresses[KERNEL]}/virtio*"
        self._paths[KERNEL] = "/dev/" + vm.run(f"ls {node}/block").check().stdout.strip()
        self._virtio = Path(vm.run(f"echo {node}").check().stdout.strip()).name
        vm.run("modprobe -a ahci ata_piix sd_mod").check()
        for name, driver in ((AHCI, "ahci"), (IDE, "ata_piix")):
            self._paths[name] = "/dev/" + self._appears(
                f"/sys/bus/pci/drivers/{driver}/*/ata*/host*/target*/*/block"
            )
        vm.run(f"guestpv blk up {self._addresses[BLK_UP]} --queues 1 --detach", timeout=LIMIT).check()
        vm.run("grep -F '[none]' /sys/block/nbd0/queue/scheduler").check()
        vm.run(f"guestpv bind {self._addresses[LIBRARY]}", timeout=LIMIT).check()
        self._library = vm.spawn(["python", "-c", SCRIPT, self._addresses[LIBRARY], json.dumps(PERCENTILES)])
        self._library.wait_for("ready\n", LIMIT)

    def _appears(self, pattern: str) -> str:
        loop = f"for i in $(seq 3000); do ls {pattern} 2>/dev/null && exit 0; sleep 0.1; done; exit 1"
        return self._vm.run(loop, timeout=LIMIT).check().stdout.split()[-1]

    def run(self, driver: str, depth: int, *, count: int = 0, seconds: float = 0) -> Outcome:
        """``count`` reads, or as many as go into ``seconds``, ``depth`` at once."""
        if driver == LIBRARY:
            mark, self._runs = f"run {self._runs}:", self._runs + 1
            self._library.write(json.dumps([depth, count, seconds]).encode() + b"\n")
            self._library.wait_for(mark, LIMIT)
            text = self._library.wait_for("}}\n", LIMIT)
            line = next(line for line in text.splitlines() if line.startswith(mark))
            found = json.loads(line.removeprefix(mark))
            return Outcome(found["iops"], found["latency"])
        long = f"--time_based --runtime={seconds}" if seconds else f"--size={count * BLOCK} --norandommap"
        listed = ":".join(map(str, PERCENTILES))
        text = (
            self._vm.run(
                f"fio --name=c --filename={self._paths[driver]} --direct=1 --ioengine=libaio --rw=randread "
                f"--bs={BLOCK} --iodepth={depth} --lat_percentiles=1 --percentile_list={listed} {long} "
                "--output-format=json",
                timeout=LIMIT,
            )
            .check()
            .stdout
        )
        read = json.loads(text[text.index("{") :])["jobs"][0]["read"]
        # With the time that submitting takes: an emulated IDE disk has answered when its doorbell returns.
        seen = read["lat_ns"]["percentile"]
        return Outcome(read["iops"], {str(p): seen[f"{p:f}"] / 1000 for p in PERCENTILES})

    def interrupts(self, driver: str) -> int:
        """How many of this driver's interrupts the guest has counted since it booted."""
        ours = {
            KERNEL: f"{self._virtio}-req",
            LIBRARY: f"vfio-msix[1]({self._addresses.get(LIBRARY)})",
            BLK_UP: f"vfio-msix[1]({self._addresses.get(BLK_UP)})",
            AHCI: "ahci",
            IDE: "ata_piix",
        }[driver]
        return sum(count for name, count in self._vm.interrupts().items() if ours in name)

    def close(self) -> None:
        """End the library's process and ``blk up``."""
        self._library.close_stdin()
        self._library.wait(LIMIT).check()
        self._vm.run("guestpv blk down", timeout=LIMIT).check()


def machine_with_disks(kernel: str, image: Path, trace: Path | None = None, limit: float = 1800) -> Machine:
    """A machine for ``Disks``, not yet booted.

    Args:
        kernel: its series.
        image: what all five disks show.
        trace: where QEMU traces accesses to; doorbells are seen, which costs time.
        limit: seconds that it may live.
    """
    doorbells = ",ioeventfd=off" if trace else ""
    names = ("plain", "library", "up")
    return Machine(
        kernel,
        devices=[
            *(f"virtio-blk-pci,id={name},drive={name},{MODERN}{doorbells}" for name in names),
            "ide-hd,drive=ahci,bus=ide.0",
            "piix3-ide,id=old,bus=pcie.0,addr=0x1e",
            "ide-hd,drive=ide,bus=old.0",
        ],
        blockdevs=[
            f"driver=raw,node-name={name},file.driver=file,file.filename={image},file.locking=off"
            for name in (*names, "ahci", "ide")
        ],
        trace=(trace, TRACE_EVENTS) if trace else None,
        limit=limit,
        boot_limit=300,
    )


@dataclass(frozen=True)
class Cost:
    """For each request: accesses to device registers, and interrupts."""

    accesses: float
    interrupts: float


def costs(kernel: str, image: Path, trace: Path, counts: dict[int, int]) -> dict[tuple[str, int], Cost]:
    """Boot, and count for every driver what a request costs.

    Args:
        kernel: series of the guest's kernel.
        image: what the disks show.
        trace: a file for QEMU's trace.
        counts: reads by depth.
    """
    marks = iter("abcdefghijklmnopqrstuvw")
    of: dict[tuple[str, int], tuple[str, int]] = {}
    with machine_with_disks(kernel, image, trace) as vm:
        disks = Disks(vm)
        for driver in DRIVERS:
            for depth, count in counts.items():
                disks.run(driver, depth, count=64)
                before, mark = disks.interrupts(driver), next(marks)
                vm.mark(mark)
                disks.run(driver, depth, count=count)
                vm.mark("z")
                of[driver, depth] = mark, disks.interrupts(driver) - before
        disks.close()
    found = phases(trace)
    return {
        (driver, depth): Cost(accesses(found[mark], driver) / counts[depth], interrupts / counts[depth])
        for (driver, depth), (mark, interrupts) in of.items()
    }


def accesses(phase: Phase, driver: str) -> int:
    """Accesses to the registers of this driver's device."""
    return sum(phase.accesses(prefix) for prefix in REGIONS.get(driver, ("virtio-pci-",)))
