"""`./tools/guest compare`: `guestpv compare` in a guest with old and new devices, with QEMU's trace."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from guestvm.accesses import TRACE_EVENTS, Phase, laps
from guestvm.line import MARK_PORT
from guestvm.machine import Machine
from guestvm.progress import Progress

MODERN = "disable-legacy=on,iommu_platform=on,ats=on,ioeventfd=off"
REGIONS = {
    "e1000": ("e1000-",),
    "ahci": ("ahci",),
    "ata_piix": ("ide", "piix-bmdma", "bmdma"),
    "ata_piix PIO": ("ide", "piix-bmdma", "bmdma"),
}
"""How the names of QEMU's memory regions begin, by device; virtio's are told by their ends."""
PIO = "libata.force=8.00:pio4"
"""The second IDE channel, after the six of AHCI and the first, without DMA."""
IOMMU = "intel_iommu"
Row = dict[str, Any]


def machine(series: str, trace: Path, disk: Path, progress: Progress, accel: str = "auto") -> Machine:
    """e1000, AHCI and IDE beside virtio-net and virtio-blk; not yet booted."""
    names = ("blk", "ahci", "dma", "pio")
    return Machine(
        series,
        devices=[
            "e1000,id=old-net,netdev=n0",
            f"virtio-net-pci,id=net,netdev=n1,{MODERN}",
            f"virtio-blk-pci,id=blk,drive=blk,num-queues=1,{MODERN}",
            "ide-hd,drive=ahci,bus=ide.0",
            "piix3-ide,id=old,bus=pcie.0,addr=0x1e",
            "ide-hd,drive=dma,bus=old.0",
            "ide-hd,drive=pio,bus=old.1",
        ],
        netdevs=["user,id=n0,restrict=on", "user,id=n1,restrict=on"],
        blockdevs=[
            f"driver=raw,node-name={name},file.driver=file,file.filename={disk},file.locking=off"
            for name in names
        ],
        trace=(trace, ()),
        append=PIO,
        accel=accel,
        limit=1200,
        progress=progress,
    )


def compared(
    series: str, count: int, lone: int, progress: Progress, accel: str = "auto"
) -> tuple[list[Row], str]:
    """Boot, measure, count; rows as `guestpv compare --json` has them, and a line about the machine.

    Args:
        series: of the guest's kernel.
        count: operations that are timed; none takes half as long.
        lone: operations that are counted.
    """
    with tempfile.TemporaryDirectory() as directory:
        trace, disk = Path(directory) / "trace", Path(directory) / "disk"
        with disk.open("wb") as file:
            file.truncate(64 << 20)
        with machine(series, trace, disk, progress, accel) as vm:
            vm.run("modprobe -a sd_mod ahci && modprobe ata_piix && guestpv list", timeout=300).check()
            # Disks appear when their controller has looked for them.
            vm.run("for i in $(seq 600); do [ -b /dev/sdc ] && exit; sleep 0.1; done; exit 1").check()
            rows: list[Row] = []
            if count:
                with progress.step("timing"):
                    rows = run(vm, f"--count {count} --lone 5")
            for event in TRACE_EVENTS:
                vm.qmp("trace-event-set-state", name=event, enable=True)
            with progress.step("counting"):
                counted = run(vm, f"--count 0 --lone {lone} --mark-port {MARK_PORT:#x}")
            release = vm.run("uname -r").check().stdout.strip()
            qemu = vm.qmp("query-version")["qemu"]
            about = f"Linux {release}, QEMU {qemu['major']}.{qemu['minor']}, {vm.accel}"
        seen = laps(trace)
    return [joined(row, other, seen) for row, other in zip(rows or counted, counted, strict=True)], about


def run(vm: Machine, words: str) -> list[Row]:
    """`guestpv compare` in the guest."""
    said = vm.run(f"guestpv compare --json {words}", timeout=900).check().stdout
    rows: list[Row] = json.loads(said)["data"]["rows"]
    return rows


def joined(row: Row, counted: Row, seen: Sequence[tuple[str, Phase]]) -> Row:
    """A timed row with the counts of QEMU's trace: what most operations cost."""
    own = [phase for letter, phase in seen if letter == counted["mark"]]
    ((usual, _),) = Counter(accesses(phase, row) for phase in own).most_common(1)
    return {
        **counted,
        "microseconds": row["microseconds"],
        "accesses": usual,
        "iommu_accesses": median(phase.accesses(IOMMU) for phase in own),
        "counted_by": "trace",
    }


def accesses(phase: Phase, row: Row) -> int:
    """Accesses to registers of the row's device."""
    if row["device"] != "virtio":
        return sum(phase.accesses(prefix) for prefix in REGIONS[row["device"]])
    end = "virtio-net" if row["kind"] == "packet" else "virtio-blk"
    both = phase.reads + phase.writes
    return sum(n for name, n in both.items() if name.startswith("virtio-pci-") and name.endswith(end))
