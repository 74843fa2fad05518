"""TCP from one guest over TAP back ends: ``net up`` against the kernel's virtio-net and an emulated e1000.

The drivers take turns. Beside throughput and processor time: register accesses and interrupts for each MiB,
counted in a second boot in which QEMU traces.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import guestpv
from guestvm import Machine, network
from guestvm import kernel as kernels
from guestvm.accesses import TRACE_EVENTS, phases
from guestvm.progress import Progress

from .blk import version
from .contest import Contender, Run, duel, race
from .guest_blk import Processors
from .report import Row

SERIES = "6.1"
FOREIGN = 0.2
"""Share of one processor that others than guest and server may use in a run that counts."""
LEAST = 0.8
VIRTIO = "virtio-net-pci,disable-legacy=on,iommu_platform=on,ats=on,ioeventfd=off"
DEVICES = {"split": f"{VIRTIO},packed=off", "packed": f"{VIRTIO},packed=on", "e1000": "e1000"}
OURS, KERNEL, E1000 = "net up", "kernel", "e1000"
DRIVERS = [(ring, who) for ring in ("split", "packed") for who in (OURS, KERNEL)] + [("e1000", E1000)]
WAYS = {"send": "", "receive": "-R"}
REGIONS = {"split": "virtio-pci-", "packed": "virtio-pci-", "e1000": "e1000-"}
COUNTED_MIB = 64


@dataclass(frozen=True)
class NetRun(Run):
    """Both ways of one driver.

    Attributes:
        rates: bit/s by way.
        costs: seconds of the virtual machine's processor time per GiB, by way.
    """

    rates: dict[str, float]
    costs: dict[str, float]


class Links:
    """A guest whose functions are TAPs of one network namespace, with an iperf3 server at the other end."""

    def __init__(self, vm: Machine, server: int) -> None:
        self.vm, self.server = vm, server

    @contextmanager
    def up(self, device: str, who: str) -> Iterator[str]:
        """Drive a function as a link; yields the other end's address."""
        number = list(DEVICES).index(device)
        ours, other = f"10.9.{number}.2/24", f"10.9.{number}.1"
        address = self.vm.address(device)
        if who == OURS:
            self.vm.run(f"guestpv net up {address} --address {ours} --detach", timeout=120).check()
            try:
                yield other
            finally:
                self.vm.run(f"guestpv net down {address}", timeout=120).check()
            return
        pattern = f"/sys/bus/pci/devices/{address}/{'' if who == E1000 else 'virtio*/'}net"
        wait = f"for i in $(seq 200); do ls {pattern} 2>&- && break; sleep 0.05; done"
        name = self.vm.run(wait).check().stdout.split()[-1]
        self.vm.run(f"ip link set {name} up && ip address add {ours} dev {name}").check()
        try:
            yield other
        finally:
            self.vm.run(f"ip address flush dev {name}; ip link set {name} down").check()

    def iperf(self, other: str, words: str) -> float:
        """Bit/s that the receiver saw."""
        result = self.vm.run(f"iperf3 -c {other} --json {words}", timeout=300).check()
        return float(json.loads(result.stdout)["end"]["sum_received"]["bits_per_second"])

    def interrupts(self) -> int:
        """Interrupts of network functions so far."""
        text = self.vm.run("cat /proc/interrupts").check().stdout
        lines = [
            line for line in text.splitlines() if re.search(r"vfio-|virtio\d+-(in|out)put|eth\d+$", line)
        ]
        return sum(int(word) for line in lines for word in line.split()[1:] if word.isdigit())


@contextmanager
def machine_with_links(trace: Path | None = None) -> Iterator[Links]:
    """Boot."""
    with ExitStack() as stack:
        prefix = stack.enter_context(network.own_network())
        netdevs = [network.add_tap(f"tap{n}", n) for n, _ in enumerate(DEVICES)]
        devices = [f"{words},id={name},netdev=tap{n}" for n, (name, words) in enumerate(DEVICES.items())]
        server = subprocess.Popen(["iperf3", "-s"], stdout=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        vm = Machine(
            SERIES,
            devices=devices,
            netdevs=netdevs,
            prefix=prefix,
            trace=(trace, TRACE_EVENTS) if trace else None,
            append="net.ifnames=0",
            limit=1800,
        )
        yield Links(stack.enter_context(vm), server.pid)


def iperf_version() -> str:
    """Such as ``3.12``."""
    return subprocess.run(["iperf3", "--version"], capture_output=True, text=True).stdout.split()[1]


def used(pid: int) -> float:
    """Seconds of processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one_run(links: Links, device: str, who: str, seconds: float) -> NetRun:
    """Both ways through one driver."""
    rates, costs, quiet = {}, {}, True
    with links.up(device, who) as other:
        for way, words in WAYS.items():
            watch, served = Processors(links.vm.pid), used(links.server)
            rates[way] = links.iperf(other, f"-t {seconds} {words}")
            cpu, foreign = watch.since()
            foreign -= (used(links.server) - served) / seconds
            costs[way] = cpu / (rates[way] * seconds / 8 / (1 << 30))
            quiet = quiet and foreign < FOREIGN
    return NetRun(rates["send"], costs["send"], None, quiet, rates, costs)


def rows_of(runs: dict[str, list[Run]]) -> list[Row]:
    """Throughput and processor time against the kernel's driver on the same function."""
    rows = []

    def figure(of: Callable[[NetRun], dict[str, float]], way: str) -> Callable[[Run], float]:
        return lambda run: of(cast(NetRun, run))[way]

    for way in WAYS:
        for device, who in DRIVERS:
            if who == KERNEL:
                continue
            peer = f"{device}/{KERNEL}" if who == OURS else f"split/{KERNEL}"
            pairs = duel(runs, f"{device}/{who}", peer)
            case, least = f"{way} {device}/{who}", LEAST if who == OURS else None
            rows.append(
                pairs.row(case, "throughput", KERNEL, figure(lambda run: run.rates, way), least=least)
            )
            rows.append(pairs.row(case, "cpu_s_per_gib", KERNEL, figure(lambda run: run.costs, way)))
    return rows


def counted(trace: Path) -> list[Row]:
    """Boot, and count what a MiB costs."""
    marks = iter("abcdefghijklmnopqrstuvw")
    of: dict[tuple[str, str, str], tuple[str, int]] = {}
    with machine_with_links(trace) as links:
        for device, who in DRIVERS:
            with links.up(device, who) as other:
                links.iperf(other, "-n 1M")
                for way, words in WAYS.items():
                    before, mark = links.interrupts(), next(marks)
                    links.vm.mark(mark)
                    links.iperf(other, f"-n {COUNTED_MIB}M {words}")
                    links.vm.mark("z")
                    of[way, device, who] = mark, links.interrupts() - before
    found = phases(trace)
    rows = []
    for (way, device, who), (mark, interrupts) in of.items():
        case = f"{way} {device}/{who}"
        accesses = found[mark].accesses(REGIONS[device])
        rows.append(Row(case, "accesses_per_mib", accesses / COUNTED_MIB))
        rows.append(Row(case, "interrupts_per_mib", interrupts / COUNTED_MIB))
    return [compared(row, rows) for row in rows]


def compared(row: Row, rows: list[Row]) -> Row:
    """Ours beside the kernel's: no more register accesses, that is the aim."""
    if OURS not in row.case:
        return row
    peer = next(r for r in rows if r.metric == row.metric and r.case == row.case.replace(OURS, KERNEL))
    limit = 1.0 if row.metric == "accesses_per_mib" else None
    ratio = row.value / peer.value if peer.value else None
    return Row(row.case, row.metric, row.value, KERNEL, peer.value, ratio, limit=limit)


def run(quick: bool) -> tuple[dict[str, str], list[Row]]:
    """Measure; versions and rows for the report."""
    rounds, seconds = (1, 1.0) if quick else (3, 2.0)
    with machine_with_links() as links:
        contenders: dict[str, Contender] = {
            f"{device}/{who}": partial(one_run, links, device, who, seconds) for device, who in DRIVERS
        }
        rows = rows_of(race(contenders, rounds))
        accel = links.vm.accel
    with tempfile.TemporaryDirectory() as directory:
        rows += counted(Path(directory) / "trace")
    return {
        "python": platform.python_version(),
        "guestpv": guestpv.__version__,
        "QEMU": version(["qemu-system-x86_64"]),
        "iperf3": iperf_version(),
        "accelerator": accel,
        "guest": kernels.get(SERIES, Progress(quiet=True)).release,
    }, rows
