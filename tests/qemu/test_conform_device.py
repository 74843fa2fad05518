"""``guestpv conform device`` on QEMU's devices: valid use is in order, and one that wedges costs one case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from guestpv.pci.qemu import DEFAULT_EXECUTABLE

EXECUTABLE = os.environ.get("GUESTPV_QEMU", DEFAULT_EXECUTABLE)
LIMIT = 170


UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]


def conform(
    body: str, params: dict[str, str], *words: str, before: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Outcomes of a run; ``before``: what goes in front of the command."""
    spec = f"qtest:{quote(body)}?{urlencode({'qemu': EXECUTABLE, 'answer_limit': '30'} | params)}"
    # The suite runs pytest itself: what belongs to the pytest around it must not reach it.
    inside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*before, sys.executable, "-m", "guestpv", "conform", "device", spec, "--json", *words],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=inside,
    )
    assert done.stdout, done.stderr
    data = json.loads(done.stdout)["data"]
    assert data["versions"]["qemu"]
    outcomes: list[dict[str, Any]] = data["outcomes"]
    return outcomes


@pytest.mark.parametrize("device", ["net", "blk", "balloon"])
def test_valid_use_is_in_order(device: str, tmp_path: Path) -> None:
    """Registers, status, features, configuration, reset and interrupts of QEMU's devices."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(8 << 20))
    params = {
        "net": {"netdev": "user,id=n,restrict=on"},
        "blk": {"blockdev": f"driver=file,filename={image}"},
        "balloon": {},
    }[device]
    outcomes = conform(
        f"virtio-{device}-pci,packed=on",
        params,
        "--select",
        "DEV-STATUS,DEV-RESET,DEV-VQRESET,DEV-FEAT,DEV-CONFIG,DEV-CONF,DEV-PCI",
    )
    bad = [(o["check"], o["seen"]) for o in outcomes if o["verdict"] not in ("PASS", "SKIP")]
    assert bad == []
    assert len(outcomes) > 80
    # What the device is changed by from outside, and sees, goes through QEMU's monitor.
    changed = [o["verdict"] for o in outcomes if o["requirements"] == ["DEV-CONFIG-03"]]
    assert changed == ["PASS"]


def test_packets_go_over_a_tap_back_end() -> None:
    """Hashes, steering and segmentation of QEMU's network device, with the suite at the cable's other end."""
    outcomes = conform(
        "virtio-net-pci,packed=on,disable-legacy=on,mq=on,vectors=6,rss=on,hash=on",
        {"netdev": "tap,id=n,ifname=guestpv0,script=no,downscript=no,vhost=off,queues=2"},
        *("--select", "DEV-NET-62,DEV-NET-107,DEV-NET-121,DEV-NET-122,DEV-NET-220"),
        before=UNSHARE,
    )
    bad = [(o["check"], o["seen"]) for o in outcomes if o["verdict"] != "PASS"]
    assert bad == []
    assert len(outcomes) > 10


def test_frames_go_over_a_datagram_back_end(tmp_path: Path) -> None:
    """Without any privilege: filters and sending by datagrams, which carry no offloads."""
    ends = f"local.type=unix,local.path={tmp_path}/qemu,remote.type=unix,remote.path={tmp_path}/ours"
    outcomes = conform(
        "virtio-net-pci,packed=on,disable-legacy=on",
        {"netdev": f"dgram,id=n,{ends}"},
        *("--select", "DEV-NET-16,DEV-NET-103,DEV-NET-107,DEV-NET-109,DEV-NET-53"),
    )
    bad = [
        (o["check"], o["seen"]) for o in outcomes if o["verdict"] not in ("PASS", "NOT_OBSERVABLE", "SKIP")
    ]
    assert bad == []
    assert sum(o["verdict"] == "PASS" for o in outcomes) >= 6


def test_a_request_that_no_device_can_use_is_refused_or_costs_one_case() -> None:
    """QEMU sets DEVICE_NEEDS_RESET and works again after a reset: REJECT, with the notification it owes."""
    outcomes = conform("virtio-balloon-pci,packed=on", {}, "--hostile", "--select", "DEV-STATUS-04")
    assert [o["verdict"] for o in outcomes] == ["REJECT", "REJECT"]
    assert all("DEVICE_NEEDS_RESET" in o["seen"] for o in outcomes)
    assert all(o["evidence"] for o in outcomes)
