"""``guestpv net up`` on a QEMU device without a guest, in a network namespace of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

GPV = f"{sys.executable} -m guestpv"
SPEC = "'qtest:virtio-net-pci,disable-legacy=on{more}?netdev=user,restrict=on'"
UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


def isolated(runtime: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a network of its own."""
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [*UNSHARE, "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=runtime.parent,
        env=os.environ | {"RUNTIME_DIRECTORY": str(runtime), "PYTHONPATH": str(root)},
    )


def reports(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def alive(pid: int) -> bool:
    """Whether a process runs, or has ended and was not collected yet."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


@pytest.mark.parametrize("packed", ["off", "on"])
def test_a_whole_session(runtime: Path, packed: str) -> None:
    spec = SPEC.format(more=f",packed={packed}")
    done = isolated(
        runtime,
        f"{GPV} net up {spec} --detach --json && ip -j address show pv0 && {GPV} net status --json &&"
        f"{GPV} net down --json && ip -j link",
    )
    assert done.returncode == 0, done.stderr
    up, addresses, status, down, links = reports(done)
    assert ("RING_PACKED" in up["data"]["features"]) == (packed == "on")
    assert up["data"]["address"]["address"] == "10.0.2.15/24"
    assert up["data"]["address"]["by"] == "dhcp"
    assert up["data"]["mode"] == "msix"
    assert "10.0.2.15" in [info["local"] for info in addresses[0]["addr_info"]]  # type: ignore[index]
    assert status["data"][0]["rx"]["packets"] >= 2
    assert down["data"] == [{"name": "pv0", "function": "qtest:virtio-net-pci", "driver": None}]
    assert [link["ifname"] for link in links] == ["lo"]  # type: ignore[index]
    assert sorted(path.name for path in runtime.iterdir()) == ["pv0.log"]
    assert "going down: guestpv net down" in (runtime / "pv0.log").read_text()
    # It says that it is over just before it ends.
    deadline = time.monotonic() + 60
    while alive(up["data"]["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_given_address_and_route(runtime: Path) -> None:
    done = isolated(
        runtime,
        f"{GPV} net up {SPEC.format(more='')} --detach --json --address 10.0.2.9/24 --gateway 10.0.2.2 &&"
        f"ip -j route show default && {GPV} net down --json",
    )
    assert done.returncode == 0, done.stderr
    _, (route,), _ = reports(done)
    assert (route["gateway"], route["dev"], route["metric"]) == ("10.0.2.2", "pv0", 1024)  # type: ignore[index]


def test_a_device_that_refuses_features_ok(runtime: Path) -> None:
    """QEMU insists on ACCESS_PLATFORM where the device has it (6.1)."""
    spec = SPEC.format(more=",iommu_platform=on")
    done = isolated(runtime, f"{GPV} net up {spec} --no-address --features -access_platform")
    assert done.returncode == 1
    assert "the device did not keep FEATURES_OK" in done.stderr
    assert "--features -NAME" in done.stderr
    assert list(runtime.iterdir()) == []


def test_a_device_of_another_type(runtime: Path) -> None:
    done = isolated(runtime, f"{GPV} net up 'qtest:virtio-rng-pci,disable-legacy=on' --json")
    assert done.returncode == 2
    assert "virtio rng device, no network device" in reports(done)[-1]["error"]["message"]


def test_a_qemu_that_dies_ends_it(runtime: Path) -> None:
    spec = SPEC.format(more="")
    done = isolated(
        runtime,
        f"{GPV} net up {spec} --no-address > out & up=$!; until grep -q ^Up out; do sleep 0.05; done;"
        "for child in $(cat /proc/$up/task/*/children); do"
        " grep -q qemu-system /proc/$child/comm && kill -9 $child; done; wait $up",
    )
    assert done.returncode == 1
    assert "what emulates it has ended" in done.stderr
