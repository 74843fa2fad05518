"""Counted, not timed: what a disk's requests cost in register accesses and interrupts, driver by driver.

``-s`` prints the table. The kernel's virtio-blk, AHCI and IDE drivers are counted beside ours, on one image.
"""

from __future__ import annotations

from pathlib import Path

from bench_suite.guest_disks import AHCI, BLK_UP, DRIVERS, IDE, KERNEL, LIBRARY, costs

COUNTS = {1: 200, 32: 3200}


def test_requests_cost_few_register_accesses(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    found = costs("6.1", image, tmp_path / "trace", COUNTS)
    for driver in DRIVERS:
        for depth in COUNTS:
            cost = found[driver, depth]
            print(f"{driver:16} {depth:2} accesses {cost.accesses:.3f}  interrupts {cost.interrupts:.3f}")
    # fio also reads the beginning of the disk when it starts, some drivers in more than one request.
    for driver in (KERNEL, BLK_UP):
        assert 0.9 <= found[driver, 1].accesses <= 1.1
    # Less where QEMU still looked at the ring for the request before, on a machine that is busy.
    # And `blk up` beside it looks at its own device's status once a second, which is counted, too.
    assert 0.9 <= found[LIBRARY, 1].accesses <= 1.05
    # How many requests wait when a driver looks is the schedulers' choice; more than one access each is not.
    for driver in (LIBRARY, BLK_UP):
        assert found[driver, 32].accesses <= 1.1
        assert max(found[driver, depth].interrupts for depth in COUNTS) <= 1.1
    for old in (AHCI, IDE):
        assert found[old, 1].accesses > found[BLK_UP, 1].accesses
