"""Pages a second into and out of the balloon: guestpv and the kernel's driver, in turns in one guest.

The host asks, and looks at ``actual`` until it was done. Also counted: accesses to device registers, and what
guestpv needs of the guest's memory for itself.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from guestvm import Machine
from guestvm.accesses import TRACE_EVENTS, Phase, phases

from .report import Row, median, sample

KERNEL = "6.12"
MEMORY = 2048
"""MiB of the guest."""
MOVED = 512
"""MiB that go into the balloon and out again."""
PAGES = MOVED << 8
DEVICE = "virtio-balloon-pci,disable-legacy=on,deflate-on-oom=on"
PEER = "linux"
OVERHEAD_LIMIT = 0.005
REGIONS = "virtio-pci-"
LOOK = 0.005
FILLED = 1600
"""MiB that are written to before each measurement."""
FILL = """
import mmap, sys
size = int(sys.argv[1]) << 20
memory, piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), b"\\xa5" * (1 << 20)
for start in range(0, size, 1 << 20):
    memory[start : start + (1 << 20)] = piece
"""


def ask(vm: Machine, mib: int) -> float:
    """Set the target to so many MiB for the guest; pages a second until it was met."""
    before = vm.qmp("query-balloon")["actual"] >> 20
    started = time.monotonic()
    vm.qmp("balloon", value=mib << 20)
    while vm.qmp("query-balloon")["actual"] >> 20 != mib:
        if time.monotonic() - started > 120:
            raise RuntimeError(f"the guest did not get from {before} to {mib} MiB within 120 s")
        time.sleep(LOOK)
    return (abs(mib - before) << 8) / (time.monotonic() - started)


def plug(vm: Machine, ours: bool) -> None:
    """Give the guest a balloon, driven by us or by the kernel (which refuses ACCESS_PLATFORM)."""
    vm.plug(f"{DEVICE},id=balloon0" + (",iommu_platform=on,ats=on" if ours else ""))
    if ours:
        vm.run("guestpv balloon up --detach --rate 1T --keep-free 64M", timeout=90).check()
    else:
        vm.run(
            "for i in $(seq 100); do grep -q DRIVER=virtio_balloon /sys/bus/virtio/devices/*/uevent && exit; "
            "sleep 0.1; done; exit 1"
        ).check()


def unplug(vm: Machine, ours: bool) -> None:
    if ours:
        vm.run("guestpv balloon down", timeout=90).check()
    vm.unplug("balloon0")


def taken(vm: Machine) -> int:
    """Bytes that the process takes, its page tables with it; of them the balloon is a part."""
    (one,) = json.loads(vm.run("guestpv balloon status --json", timeout=60).check().stdout)["data"]
    lines = vm.read_file(f"/proc/{one['pid']}/status").decode().splitlines()
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    pool: int = one["pool"]["bytes"]
    return sum(int(sizes[name][0]) << 10 for name in ("VmRSS", "VmSwap", "VmPTE")) - pool


def trace(vm: Machine, on: bool) -> None:
    for name in TRACE_EVENTS:
        vm.qmp("trace-event-set-state", name=name, enable=on)


def fill(vm: Machine) -> None:
    """Write to most of the guest's memory, so that the host has something to gain."""
    vm.run(["python", "-c", FILL, str(FILLED)], timeout=180).check()


def run(quick: bool) -> tuple[dict[str, str], list[Row]]:
    """All measurements."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "trace"
        with Machine(
            KERNEL, devices=[], memory=MEMORY, limit=1500, boot_limit=120, trace=(log, TRACE_EVENTS)
        ) as vm:
            trace(vm, False)
            rows = race(vm, 1 if quick else 5)
            for ours in (True, False):
                count(vm, ours)
            rows.append(overhead(vm))
        found = phases(log)
    mine, peer = (1000 * accesses(found[letter]) / (2 * PAGES) for letter in "ok")
    rows.append(Row("in and out", "accesses_per_1000_pages", mine, PEER, peer, mine / peer, limit=1.0))
    return {"kernel": KERNEL, "accelerator": vm.accel}, rows


def race(vm: Machine, rounds: int) -> list[Row]:
    """Pages a second by both drivers in turns; what goes in was written to before."""
    samples: dict[tuple[str, bool], list[tuple[float, bool]]] = {}
    for _ in range(rounds):
        for ours in (True, False):
            plug(vm, ours)
            fill(vm)
            for way, mib in (("inflate", MEMORY - MOVED), ("deflate", MEMORY)):
                pace = sample(lambda mib=mib: ask(vm, mib))  # type: ignore[misc]
                samples.setdefault((way, ours), []).append(pace)
            unplug(vm, ours)
    rows = []
    for way in ("inflate", "deflate"):
        (mine, dropped), (peer, _) = (median(samples[way, ours]) for ours in (True, False))
        rows.append(Row(way, "pages_per_s", mine, PEER, peer, mine / peer, rounds, dropped))
    return rows


def count(vm: Machine, ours: bool) -> None:
    """Once in and out while QEMU writes down every access."""
    plug(vm, ours)
    trace(vm, True)
    vm.mark("o" if ours else "k")
    for mib in (MEMORY - MOVED, MEMORY):
        ask(vm, mib)
    vm.mark("x")
    trace(vm, False)
    unplug(vm, ours)


def accesses(phase: Phase) -> int:
    """Accesses to the registers of modern virtio functions: common, notify, ISR and device structure."""
    both = phase.reads + phase.writes
    return sum(count for name, count in both.items() if name.startswith(REGIONS) and "balloon" in name)


def overhead(vm: Machine) -> Row:
    """What a ballooned byte takes besides itself: our bookkeeping and page tables.

    Not by MemFree: the kernel's lists of free pages for each CPU are not in it and hold more than this.
    """
    plug(vm, True)
    sizes = []
    for balloon in (64, 64 + MOVED):
        ask(vm, MEMORY - balloon)
        # Until the process has looked again at how it stands, and has nothing left to do.
        time.sleep(2)
        sizes.append(taken(vm))
    unplug(vm, True)
    value = (sizes[1] - sizes[0]) / (MOVED << 20)
    ratio = value / OVERHEAD_LIMIT
    return Row(
        "memory besides the balloon", "bytes_per_byte", value, "budget", OVERHEAD_LIMIT, ratio, limit=1.0
    )
