"""Other people's user-space drivers before our strict devices: libblkio's benchmark and DPDK's virtio-user.

``PYTHONPATH=tools python -m strictusers`` writes a report for each to docs/conformance.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from bench_suite.blk import build_peer
from bench_suite.contest import package_version
from bench_suite.testpmd import Testpmd
from guestpv.conformance.driver.listen import Lives
from guestpv.conformance.driver.run import Run
from guestpv.conformance.driver.scenarios import choose
from guestpv.conformance.report import now
from guestpv.devices.loopback import make_model
from guestpv.serve.vhost_user import VhostUserServer
from guestpv.spec import features as ft
from peers import tree
from strictguest import known_versions, rows_of, write_report

DEVICES: Final = {"libblkio-blk": ("blk", {"size": "64M"}), "dpdk-virtio-user-net": ("net", {"peer": "echo"})}
LIBRARY: Final = {"libblkio": "blkio", "dpdk": "libdpdk"}
"""Program -> its name for pkg-config."""
NOTE: Final = "Behind vhost-user: rings and requests were seen, registers are the front end's own."
SECONDS: Final = 1.0


def drive_blk(socket: str) -> None:
    """Random reads and writes of libblkio's own benchmark."""
    command = build_peer(tree.get("peers"))
    for way in ("randread", "randwrite"):
        words = ["--iodepth=8", f"--readwrite={way}", "--blocksize=4096", f"--runtime={int(SECONDS)}"]
        words += ["virtio-blk-vhost-user", f"path={socket}"]
        subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL, timeout=60)


def drive_net(socket: str) -> None:
    """Frames of testpmd through virtio-user, split and packed, that come back."""
    for way in ("packed_vq=0", "packed_vq=1", "packed_vq=1,in_order=1"):
        vdev = f"net_virtio_user0,path={socket},queues=1,queue_size=256,{way}"
        with Testpmd(tree.get("peers"), vdev, (0, 1), memory=400) as driver:
            driver.tell("set fwd flowgen", "start")
            time.sleep(SECONDS)
            driver.tell("stop")


def main() -> None:
    parser = argparse.ArgumentParser(prog="strictusers", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/conformance"))
    options = parser.parse_args()
    peers = tree.get("peers")
    for name, (kind, params) in DEVICES.items():
        run = Run(rows_of(kind))
        begun = now()
        with tempfile.TemporaryDirectory(prefix="strict-") as home:
            server = VhostUserServer(make_model(kind, params), f"{home}/s", offer=1 << ft.F_RING_PACKED)
            lives = Lives(server.device, None, "vhost-user", choose("plain", kind), run, lambda text: None)
            with server:
                (drive_blk if kind == "blk" else drive_net)(server.path)
            lives.finish()
        program = name.partition("-")[0]
        known = known_versions() | {program: package_version(peers, LIBRARY[program])}
        write_report(options.out, name, run, known, begun, "python -m strictusers", NOTE)


if __name__ == "__main__":
    main()
