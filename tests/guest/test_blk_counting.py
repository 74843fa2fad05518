"""Counted, not timed: what a disk's requests cost in register accesses and interrupts, driver by driver.

``-s`` prints the table. The kernel's virtio-blk and AHCI drivers are counted beside ours.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from guestvm import Machine
from guestvm.accesses import TRACE_EVENTS, Phase, phases

LONE, DEEP = 200, 3200
DEVICE = "virtio-blk-pci,disable-legacy=on,iommu_platform=on,ats=on,ioeventfd=off,id=disk0,drive=d0"
NULL = "driver=null-co,size=67108864,read-zeroes=on"

LIBRARY = """
import sys
import numpy as np
import guestpv
from guestpv.drivers.blk import Blk
with guestpv.open(sys.argv[1]) as transport, Blk(transport) as disk:
    memory = disk.allocate(32 * 4096)
    print("ready", flush=True)
    for word in sys.stdin:
        if word == "lone\\n":
            for number in range(int(sys.argv[2])):
                disk.read_into(4096 * number, [memory[:4096]])
        elif word == "deep\\n":
            disk.read_many(np.arange(int(sys.argv[3])) * 4096, memory, 4096, depth=32).check()
        print("done", word, flush=True)
"""


def fio(machine: Machine, path: str, count: int, depth: int) -> None:
    machine.run(
        f"fio --name=c --filename={path} --direct=1 --ioengine=libaio --rw=randread --bs=4k "
        f"--iodepth={depth} --size={count * 4096} --norandommap --output-format=terse >/dev/null",
        timeout=120,
    ).check()


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Phase]:
    """Phases by mark: kernel a b, library c d, blk up e f, AHCI g h; lone and 32 deep each."""
    trace: Path = tmp_path_factory.mktemp("counting") / "trace"
    with Machine(
        "6.1",
        devices=[DEVICE, "ide-hd,drive=d1,bus=ide.0"],
        blockdevs=[f"{NULL},node-name=d0", f"{NULL},node-name=d1"],
        trace=(trace, TRACE_EVENTS),
        limit=280,
    ) as machine:
        address = machine.address("disk0")
        name = machine.run(f"ls /sys/bus/pci/devices/{address}/virtio*/block").stdout.strip()
        there = "[ -b /dev/sda ] && exit 0"
        machine.run(
            f"modprobe ahci; modprobe sd_mod; for i in $(seq 200); do {there}; sleep 0.1; done; exit 1"
        ).check()

        def both(marks: str, path: str) -> None:
            for mark, count, depth in zip(marks, (LONE, DEEP), (1, 32), strict=True):
                fio(machine, path, 64, depth)
                machine.mark(mark)
                fio(machine, path, count, depth)
                machine.mark("z")

        both("ab", f"/dev/{name}")
        both("gh", "/dev/sda")
        machine.run(f"guestpv blk up {address} --queues 1 --detach", timeout=60).check()
        machine.run("grep -F '[none]' /sys/block/nbd0/queue/scheduler").check()
        both("ef", "/dev/nbd0")
        machine.run("guestpv blk down", timeout=60).check()
        machine.run(f"guestpv bind {address}", timeout=60).check()
        library = machine.spawn(["python", "-c", LIBRARY, address, str(LONE), str(DEEP)])
        library.wait_for("ready", 60)
        for mark, word in (("c", "lone"), ("d", "deep")):
            machine.mark(mark)
            library.write(f"{word}\n".encode())
            library.wait_for(f"done {word}", 60)
            machine.mark("z")
        library.close_stdin()
        assert library.wait(30).status == 0
    return phases(trace)


def test_requests_cost_few_register_accesses(counted: dict[str, Phase]) -> None:
    rows = {}
    for driver, marks in (("kernel", "ab"), ("library", "cd"), ("blk up", "ef"), ("AHCI", "gh")):
        for kind, mark, count in zip(("lone", "32 deep"), marks, (LONE, DEEP), strict=True):
            seen = counted[mark]
            accesses = seen.accesses("ahci" if driver == "AHCI" else "virtio-pci-")
            interrupts = seen.events["virtio_notify virtio-blk"]
            rows[driver, kind] = (accesses / count, interrupts / count)
            print(f"{driver:8} {kind:8} accesses {accesses / count:.3f}  interrupts {interrupts / count:.3f}")
    assert rows["library", "lone"][0] == 1
    assert rows["library", "32 deep"][0] < 0.15
    assert rows["blk up", "lone"][0] <= 1.1
    # How many requests the kernel has in the socket when the export looks is the scheduler's choice.
    assert rows["blk up", "32 deep"][0] <= 1.1
    assert rows["AHCI", "lone"][0] > rows["blk up", "lone"][0]
