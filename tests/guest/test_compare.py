"""Paravirtualization's argument as one command: the counts that are the same in every run."""

from __future__ import annotations

from typing import Any

import pytest

from guestvm.comparison import compared
from guestvm.progress import Progress

LONE = 20
ACCESSES = {
    ("packet", "e1000", "kernel", ""): 7,
    ("packet", "virtio", "kernel", ""): 1,
    ("packet", "virtio", "guestpv", "msix"): 1,
    ("packet", "virtio", "guestpv", "poll"): 1,
    ("block", "ata_piix PIO", "kernel", ""): 1043,
    ("block", "ata_piix", "kernel", ""): 26,
    ("block", "ahci", "kernel", ""): 7,
    ("block", "virtio", "kernel", ""): 1,
    ("block", "virtio", "guestpv", "msix"): 1,
    ("block", "virtio", "guestpv", "poll"): 1,
}


@pytest.mark.parametrize("kernel", ["6.1"], indirect=True)
def test_what_a_packet_and_a_block_cost(kernel: str) -> None:
    rows, _ = compared(kernel, 0, LONE, Progress(quiet=True))

    def by(column: str) -> dict[Any, Any]:
        return {(row["kind"], row["device"], row["driver"], row["mode"]): row[column] for row in rows}

    assert by("accesses") == ACCESSES
    polling = {key: count for key, count in by("interrupts").items() if key[3] == "poll"}
    assert set(polling.values()) == {0}
    assert all(row["iommu_accesses"] == 0 for row in rows if row["driver"] == "guestpv")
