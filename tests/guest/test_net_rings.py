"""`guestpv net up` over every ring format and option that QEMU's device offers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product

import pytest

from guestvm import HostFiles, Machine
from guestvm.hostfiles import GUEST_URL

KERNEL = "6.1"
"""The rings are ours and QEMU's: one kernel is enough."""
BASE = "virtio-net-pci,disable-legacy=on,iommu_platform=on,ats=on"
FEATURES = {"packed": "RING_PACKED", "event_idx": "EVENT_IDX", "indirect_desc": "INDIRECT_DESC"}
CASES = [dict(zip(FEATURES, options, strict=True)) for options in product(("off", "on"), repeat=3)]


def label(case: dict[str, str]) -> str:
    return "-".join(name for name, value in case.items() if value == "on") or "plain"


@pytest.fixture(scope="module")
def machine() -> Iterator[tuple[Machine, HostFiles]]:
    """One boot with a network function for every combination."""
    with ExitStack() as stack:
        files = stack.enter_context(HostFiles(4 << 20))
        devices = [
            f"{BASE},id=net{n},netdev=n{n}," + ",".join(f"{name}={value}" for name, value in case.items())
            for n, case in enumerate(CASES)
        ]
        booted = Machine(
            KERNEL,
            devices=devices,
            netdevs=[files.netdev(f"n{n}") for n in range(len(CASES))],
            limit=1800,
            warm=True,
        )
        yield stack.enter_context(booted), files


@pytest.mark.parametrize("number", range(len(CASES)), ids=[label(case) for case in CASES])
def test_a_download_is_whole_over_every_ring(machine: tuple[Machine, HostFiles], number: int) -> None:
    vm, files = machine
    address = vm.address(f"net{number}")
    up = vm.run(f"guestpv net up {address} --address 10.0.2.15/24 --detach", timeout=300).check().stdout
    try:
        negotiated = up.split()
        for option, feature in FEATURES.items():
            assert (feature in negotiated) == (CASES[number][option] == "on"), up
        assert " 0% packet loss" in vm.run("ping -c 2 10.0.2.2", timeout=300).stdout
        digest = vm.run(f"wget -q -O - {GUEST_URL}/data | sha256sum", timeout=300).check().stdout
        assert digest.split()[0] == files.sha256
    finally:
        vm.run(f"guestpv net down {address}", timeout=300).check()
    assert vm.run(f"readlink /sys/bus/pci/devices/{address}/driver").stdout.strip().endswith("/virtio-pci")
