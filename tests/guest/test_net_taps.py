"""`guestpv net up` on TAP back-ends, where QEMU offers all of its offloads: files stay whole, both ways.

One boot: each function is another set of options. The other end is a network namespace of the test's own. The
qemu tier tries more options, without a guest.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from guestvm import Machine, network

KERNEL = "6.1"
"""What is tried are the device's options: one kernel is enough."""
BASE = "virtio-net-pci,disable-legacy=on,iommu_platform=on,ats=on"
SIZE = 8 << 20
IPERF_SECONDS = 2
PATIENCE = 120.0


@dataclass(frozen=True)
class Case:
    """One function: its options, QEMU's TAP, the words for `net up`, features it must and must not have."""

    options: str = ""
    words: str = ""
    queues: int = 1
    mtu: int = 1500
    features: str = ""
    without: str = ""


CASES = {
    "offloads": Case(features="CSUM GUEST_CSUM GUEST_TSO4 GUEST_TSO6 HOST_TSO4 HOST_TSO6 HOST_ECN MRG_RXBUF"),
    "steered": Case(
        "mq=on,rss=on,hash=on,packed=on,vectors=6",
        f"--queues 2 --features +hash_report --rss-key {'6d5a56da' * 10}",
        queues=2,
        features="RSS HASH_REPORT RING_PACKED",
    ),
    "jumbo": Case("host_mtu=9000,status=off,rx_queue_size=1024", mtu=9000, features="MTU", without="STATUS"),
    "bare": Case(
        "vectors=0,ctrl_vq=off,csum=off,guest_csum=off,mrg_rxbuf=off",
        without="CTRL_VQ CSUM GUEST_CSUM HOST_TSO4 GUEST_TSO4 MRG_RXBUF",
    ),
}


class Files:
    """Sends a file to whoever connects to one port, and takes one from whoever connects to another."""

    def __init__(self) -> None:
        self.data = random.Random(1).randbytes(SIZE)
        self.digest = hashlib.sha256(self.data).hexdigest()
        self.taken: list[str] = []
        self._listeners = [
            socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) for _ in "12"
        ]
        self.download, self.upload = (one.getsockname()[1] for one in self._listeners)
        for listener, serve in zip(self._listeners, (self._give, self._take), strict=True):
            threading.Thread(target=self._serve, args=(listener, serve), daemon=True).start()

    def _serve(self, listener: socket.socket, serve: Any) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            # A client that is stuck must not stop the ones after it.
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    def _give(self, client: socket.socket) -> None:
        with client:
            client.settimeout(PATIENCE)
            client.sendall(self.data)

    def _take(self, client: socket.socket) -> None:
        digest = hashlib.sha256()
        with client:
            client.settimeout(PATIENCE)
            while part := client.recv(1 << 20):
                digest.update(part)
        self.taken.append(digest.hexdigest())

    def close(self) -> None:
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@dataclass
class Lab:
    vm: Machine
    files: Files


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with ExitStack() as stack:
        prefix = stack.enter_context(network.own_network())
        netdevs = [
            network.add_tap(f"tap{n}", n, case.queues, case.mtu) for n, case in enumerate(CASES.values())
        ]
        devices = [
            f"{BASE},id=net{n},netdev=tap{n}" + (f",{case.options}" if case.options else "")
            for n, case in enumerate(CASES.values())
        ]
        files = Files()
        stack.callback(files.close)
        iperf = subprocess.Popen(["iperf3", "-s"], stdout=subprocess.DEVNULL)
        stack.callback(iperf.wait)
        stack.callback(iperf.terminate)
        machine = Machine(KERNEL, devices=devices, netdevs=netdevs, prefix=prefix, limit=1800, warm=True)
        yield Lab(stack.enter_context(machine), files)


@pytest.mark.requirement("DRV-NET-184", "DRV-NET-178", "DRV-NET-45")
@pytest.mark.parametrize("name", CASES)
def test_files_stay_whole_both_ways(lab: Lab, name: str) -> None:
    vm, files, case, number = lab.vm, lab.files, CASES[name], list(CASES).index(name)
    address = vm.address(f"net{number}")
    up = vm.run(
        f"guestpv net up {address} --address 10.9.{number}.2/24 --detach --json {case.words}", timeout=120
    ).check()
    status = json.loads(up.stdout.splitlines()[-1])["data"]
    negotiated = set(status["features"])
    assert set(case.features.split()) <= negotiated
    assert not set(case.without.split()) & negotiated
    assert status["mtu"] == case.mtu
    try:
        vm.run(f"ip address add fd09:{number}::2/64 dev pv0 nodad").check()
        for host in (f"10.9.{number}.1", f"fd09:{number}::1"):
            down = vm.run(["bash", "-c", f"sha256sum < /dev/tcp/{host}/{files.download}"], timeout=PATIENCE)
            assert down.check().stdout.split()[0] == files.digest
            before = len(files.taken)
            script = (
                f"exec 3<>/dev/tcp/{host}/{files.upload}; head -c {SIZE // 2} /dev/urandom > /tmp/up;"
                "cat /tmp/up >&3; exec 3>&-; sha256sum /tmp/up"
            )
            sent = vm.run(["bash", "-c", script], timeout=PATIENCE).check().stdout.split()[0]
            deadline = threading.Event()
            for _ in range(600):
                if len(files.taken) > before:
                    break
                deadline.wait(0.1)
            assert files.taken[before:] == [sent]
        after = json.loads(vm.run("guestpv net status --json").check().stdout)["data"][0]
        # What the device gave was delivered; what the kernel gave was sent.
        assert after["rx"]["dropped"] == 0
        assert after["tx"]["dropped"] == 0
        assert all(queue["rx_malformed"] == 0 for queue in after["queues"])
        if case.queues > 1:
            assert all(queue["tx_packets"] for queue in after["queues"])
    finally:
        vm.run(f"guestpv net down {address}", timeout=120).check()


def test_iperf3_in_both_directions(lab: Lab) -> None:
    vm = lab.vm
    address = vm.address("net0")
    vm.run(f"guestpv net up {address} --address 10.9.0.2/24 --detach", timeout=120).check()
    try:
        for words in ("", "-R"):
            result = vm.run(f"iperf3 -c 10.9.0.1 -t {IPERF_SECONDS} {words} --json", timeout=PATIENCE).check()
            assert json.loads(result.stdout)["end"]["sum_received"]["bytes"] > 1 << 20
        (status,) = json.loads(vm.run("guestpv net status --json").check().stdout)["data"]
        assert (status["rx"]["dropped"], status["tx"]["dropped"]) == (0, 0)
    finally:
        vm.run(f"guestpv net down {address}", timeout=120).check()
