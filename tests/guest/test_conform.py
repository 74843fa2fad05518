"""The device suite in a live guest, over VFIO."""

from __future__ import annotations

import json

import pytest

from guestvm import Machine

from .conftest import once


@once
@pytest.mark.timeout(900)
def test_a_function_of_a_live_guest_is_in_order(vm: Machine) -> None:
    address = vm.address("rng0")
    assert vm.run(["guestpv", "bind", address]).status == 0
    try:
        select = "DEV-STATUS,DEV-RESET,DEV-FEAT,DEV-PCI"
        done = vm.run(["guestpv", "conform", "device", address, "--select", select, "--json"], timeout=600)
        assert done.stdout, done.stderr
        data = json.loads(done.stdout)["data"]
        fine = ("PASS", "SKIP", "NOT_OBSERVABLE")
        bad = [(o["check"], o["seen"]) for o in data["outcomes"] if o["verdict"] not in fine]
        assert bad == []
        hidden = {o["seen"] for o in data["outcomes"] if o["verdict"] == "NOT_OBSERVABLE"}
        assert hidden == {"the kernel keeps the MSI-X table to itself"}
        assert data["counts"]["PASS"] > 40
        assert done.status == 0
    finally:
        back = vm.run(["guestpv", "unbind", "--force", address])
        assert back.status == 0, back.stderr
