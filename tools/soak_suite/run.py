"""One soak: a guest, its load, its bad luck, and what is looked at meanwhile."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from guestvm import Machine, Process, network

from . import programs

MIB: Final = 1 << 20
DISK: Final = 64 * MIB
MEMORY: Final = 1024
HOST, GUEST, PORT = "10.9.0.1", "10.9.0.2", 7000
SERVICES: Final = ("net", "blk", "balloon")
MODERN: Final = "disable-legacy=on,iommu_platform=on,ats=on"
ANSWER: Final = 300
"""Seconds for anything on a machine that is slow and busy."""
BREAK_EVERY: Final = 170.0
"""Seconds between breaks of one device: no more than its restarts are allowed to be."""
GROWTH: Final = {"descriptors": 0, "threads": 0, "mappings": 16, "resident_kib": 6144, "pinned_kib": 0}
"""How much more than after warming up a process may hold at the end."""
SLOWER: Final = 3.0
"""The last quarter's median latency over that of the first, at most: the host has other work, too."""


@dataclass
class Outcome:
    """What a soak came to.

    Attributes:
        events: how often what was done, and what happened.
        problems: what must not be; empty when all is well.
        latencies: medians in ms by kind and quarter.
        processes: what each service's process held after warming up and at the end.
        seconds: how long it took.
    """

    events: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, name: str, by: int = 1) -> None:
        """Something was done, or happened."""
        self.events[name] = self.events.get(name, 0) + by


class Soak:
    """A guest with all three devices.

    Args:
        stack: gives everything back.
        kernel: series.
        packed: ring format of the devices.
        directory: for the disk.
    """

    def __init__(
        self, stack: ExitStack, kernel: str, packed: bool, directory: Path, say: Callable[[str], None]
    ):
        self.outcome, self._say = Outcome(), say
        self._choose = random.Random(1)
        self._packed = packed
        prefix = stack.enter_context(network.own_network())
        tap = network.add_tap("tap0", 0)
        subprocess.run(["sysctl", "-qw", "net.ipv6.conf.tap0.disable_ipv6=1"], check=True)
        server = subprocess.Popen(
            [sys.executable, "-c", programs.ECHO, HOST, str(PORT)], stdout=subprocess.PIPE, text=True
        )
        stack.callback(server.wait, 10)
        stack.callback(server.kill)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        disk = directory / "disk.img"
        with disk.open("wb") as file:
            file.truncate(DISK)
        options = f"{MODERN},packed={'on' if packed else 'off'}"
        self.vm = Machine(
            kernel,
            devices=[
                f"virtio-net-pci,id=net0,netdev=tap0,{options}",
                f"virtio-blk-pci,id=blk0,drive=d0,request-merging=off,{options}",
                f"virtio-balloon-pci,id=balloon0,deflate-on-oom=on,{options}",
            ],
            netdevs=[tap],
            blockdevs=[f"driver=raw,node-name=d0,file.driver=file,file.filename={disk}"],
            memory=MEMORY,
            prefix=prefix,
            limit=0,
        )
        stack.enter_context(self.vm)
        say(f"booted in {self.vm.boot_seconds:.0f} s")
        self.vm.run(
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1"
        ).check()
        self.vm.write_file("/tmp/breakable.py", programs.BREAKABLE.encode())
        for service in SERVICES:
            self.up(service)
        self.lines: dict[str, list[dict[str, Any]]] = {"talk": [], "disk": []}
        self.loads: dict[str, Process] = {
            "talk": self._load("talk", ["python", "-c", programs.TALK, HOST, str(PORT)]),
            "disk": self._load("disk", programs.DISK),
        }
        self._size = DISK

    def up(self, service: str) -> None:
        """Bring a device up in the background."""
        more = f"--address {GUEST}/24" if service == "net" else ""
        words = f"{service} up {self.vm.address(f'{service}0')} {more} --restart --detach"
        self.vm.run(f"python /tmp/breakable.py {words}", timeout=ANSWER).check()
        self._say(f"{service} is up")

    def _load(self, name: str, command: Any) -> Process:
        rest = b""

        def take(stream: str, data: bytes) -> None:
            nonlocal rest
            if stream != "stdout":
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                word = json.loads(line)
                self.lines[name].append(word | {"at": time.monotonic()})

        return self.vm.spawn(command, on_output=take)

    # What is done to it.

    def flap(self) -> None:
        """The link goes away for a moment."""
        self.vm.qmp("set_link", name="net0", up=False)
        time.sleep(self._choose.uniform(0.1, 1.5))
        self.vm.qmp("set_link", name="net0", up=True)
        self.outcome.count("link flaps")

    def resize(self) -> None:
        """The disk gets another size, never less than what the load uses."""
        self._size = self._choose.randrange(DISK, 2 * DISK, MIB)
        self.vm.qmp("block_resize", node_name="d0", size=self._size)
        self.outcome.count("resizes")

    def target(self) -> None:
        """The host wants another balloon."""
        self.vm.qmp("balloon", value=self._choose.randrange(MEMORY - 384, MEMORY + 1) * MIB)
        self.outcome.count("balloon targets")

    def break_device(self, service: str) -> None:
        """A ring that cannot be, after which QEMU wants a reset; or a reset behind the driver's back."""
        number = "USR2" if self._packed or self._choose.random() < 0.5 else "USR1"
        pid = self.probe()[service].get("pid")
        if pid is None:
            self.outcome.problems.append(f"{service} is not up")
            return
        self.vm.run(f"kill -{number} {pid}").check()
        self.outcome.count(f"{service}: {'malformed rings' if number == 'USR1' else 'resets from outside'}")

    def start_over(self, service: str) -> None:
        """Down, and up again in a new process; the disk's load rests meanwhile."""
        if service == "blk":
            self.rest()
        self.vm.run(f"guestpv {service} down", timeout=ANSWER).check()
        self.up(service)
        if service == "blk":
            self.go_on()
        self.outcome.count(f"{service}: down and up")

    # What is looked at.

    def probe(self) -> dict[str, Any]:
        """Status and holdings of each service."""
        result = self.vm.run(["python", "-c", programs.PROBE], timeout=ANSWER).check()
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def rest(self) -> None:
        """The loads pause, with nothing in flight."""
        self.vm.run("touch /tmp/rest").check()
        both = "[ -e /tmp/talk-rests ] && [ -e /tmp/disk-rests ]"
        wait = f"for i in $(seq 3000); do {both} && exit 0; sleep 0.1; done; exit 1"
        if self.vm.run(wait, timeout=2 * ANSWER).status:
            self.outcome.problems.append("a load did not come to rest")

    def go_on(self) -> None:
        """The loads go on."""
        self.vm.run("rm -f /tmp/rest").check()

    def book(self) -> dict[str, tuple[int, int]]:
        """Counters at rest: ours, and QEMU's or the TAP's."""
        before: Any = None
        while True:
            status = self.probe()
            net, blk = status["net"], status["blk"]
            tap = json.loads(
                subprocess.run(
                    ["ip", "-s", "-j", "link", "show", "tap0"], check=True, capture_output=True, text=True
                ).stdout
            )[0]["stats64"]
            stats = next(
                one["stats"] for one in self.vm.qmp("query-blockstats") if "blk0" in str(one.get("qdev"))
            )
            operations = sum(stats[f"{kind}_operations"] for kind in ("rd", "wr", "flush"))
            now = {
                "frames to the guest": (net["rx"]["packets"] + net["rx"]["dropped"], tap["tx"]["packets"]),
                "frames from the guest": (net["tx"]["packets"], tap["rx"]["packets"]),
                "disk requests": (blk["requests"], operations),
                "bytes read": (blk["bytes_read"], stats["rd_bytes"]),
                "bytes written": (blk["bytes_written"], stats["wr_bytes"]),
            }
            if now == before:
                return now
            before = now

    def audit(self) -> None:
        """A while without bad luck: what both sides counted has to be the same."""
        self.rest()
        first = self.book()
        self.go_on()
        time.sleep(8)
        self.rest()
        last = self.book()
        self.go_on()
        for name, (ours, theirs) in last.items():
            ours, theirs = ours - first[name][0], theirs - first[name][1]
            if ours != theirs:
                self.outcome.problems.append(f"{name}: we counted {ours}, the host {theirs}")
            self.outcome.count(f"audited {name}", ours)
        status = self.probe()
        for way, queue in ((way, queue) for queue in status["net"]["queues"] for way in ("rx", "tx")):
            most = queue["rx_size"] if way == "rx" else 1
            if queue[f"{way}_outstanding"] > most:
                self.outcome.problems.append(f"{queue[f'{way}_outstanding']} {way} buffers in flight at rest")
        self.outcome.count("audits")
        self._say(f"audited: {last}")

    def balloon_agrees(self) -> None:
        """The host sees what is in the balloon."""
        deadline = time.monotonic() + ANSWER
        while time.monotonic() < deadline:
            pages = self.probe()["balloon"].get("pages")
            actual = self.vm.qmp("query-balloon")["actual"]
            if pages is not None and actual == MEMORY * MIB - pages * 4096:
                return
        self.outcome.problems.append(f"the balloon holds {pages} pages, the host sees {actual} bytes left")


def soak(
    minutes: float, kernel: str, packed: bool, directory: Path, say: Callable[[str], None] = print
) -> Outcome:
    """Run one.

    Args:
        minutes: how long, after booting.
        kernel: series of the guest's kernel.
        packed: ring format of the devices; malformed rings are for split ones only.
        directory: for the disk's image.
        say: called with progress, in words.
    """
    with ExitStack() as stack:
        one = Soak(stack, kernel, packed, directory, say)
        outcome, choose = one.outcome, random.Random(2)
        started = time.monotonic()
        end, warm = started + 60 * minutes, started + 15 * minutes
        for service in SERVICES:
            one.start_over(service)
        one.audit()
        baseline: dict[str, Any] = {}
        breaks = dict(zip(SERVICES, (started + 5.0, started + 10.0, started + 15.0), strict=True))
        while (now := time.monotonic()) < end:
            due = [service for service, at in breaks.items() if at <= now]
            if due:
                one.break_device(due[0])
                breaks[due[0]] = now + BREAK_EVERY * choose.uniform(1.0, 1.3)
            choose.choice((one.flap, one.resize, one.target, one.target))()
            time.sleep(choose.uniform(0.5, 3.0))
            look(one, say)
            if not baseline and now > warm and len(outcome.events) >= 6:
                baseline = holdings(one)
            if outcome.problems or any(load.status is not None for load in one.loads.values()):
                break
        one.vm.qmp("set_link", name="net0", up=True)
        one.vm.qmp("balloon", value=MEMORY * MIB)
        one.balloon_agrees()
        one.audit()
        finish(one, baseline, started)
        return outcome


def holdings(one: Soak) -> dict[str, Any]:
    """What each process holds, at rest."""
    one.rest()
    status = one.probe()
    one.go_on()
    return {service: {"pid": status[service]["pid"], **status[service]["process"]} for service in SERVICES}


def look(one: Soak, say: Callable[[str], None]) -> None:
    """Tell how it goes."""
    talk, disk = one.lines["talk"], one.lines["disk"]
    if one.outcome.events.get("looks", 0) % 20 == 0:
        rounds = talk[-1].get("rounds") if talk else 0
        say(f"{rounds} echoes, {len(disk)} verified disk runs; {one.outcome.events}")
    one.outcome.count("looks")


def finish(one: Soak, baseline: dict[str, Any], started: float) -> None:
    """Judge, and take everything down."""
    outcome = one.outcome
    for name, load in one.loads.items():
        if load.status is not None:
            outcome.problems.append(f"the load {name!r} ended with {load.status}: {load.stderr[-2000:]}")
    last, status = holdings(one), one.probe()
    for service in SERVICES:
        before, after = baseline.get(service), last[service]
        outcome.processes[service] = {"warm": before, "end": after}
        outcome.count(f"{service}: restarts", status[service]["restarts"]["count"])
        if before is None:
            continue
        if before["pid"] != after["pid"]:
            outcome.problems.append(f"{service} is another process")
        for name, most in GROWTH.items():
            # Pinned memory of a balloon is what it holds, and it holds nothing now.
            if after[name] - before[name] > most:
                outcome.problems.append(f"{service}: {name} grew from {before[name]} to {after[name]}")
    outcome.count("disk errors", status["blk"]["errors"])
    outcome.count("disk requests done once more", status["blk"]["resubmitted"])
    if status["blk"]["errors"]:
        outcome.problems.append(f"{status['blk']['errors']} disk requests failed")
    for name, lines in one.lines.items():
        values = [line["ms"] for line in lines if line.get("ms") is not None]
        if any("changed" in line or "failed" in line for line in lines):
            outcome.problems.append(f"{name}: what came back was not what went out")
        quarter = max(1, len(values) // 4)
        parts = [values[at : at + quarter] for at in range(0, 4 * quarter, quarter)]
        outcome.latencies[name] = [round(statistics.median(part), 3) for part in parts if part]
        medians = outcome.latencies[name]
        if len(values) >= 40 and medians[3] > SLOWER * medians[0]:
            outcome.problems.append(f"{name}: latency went from {medians[0]} to {medians[3]} ms")
    talk = one.lines["talk"]
    outcome.count("echoes", max((line.get("rounds", 0) for line in talk), default=0))
    outcome.count("connections lost", sum("lost" in line for line in talk))
    outcome.count("verified disk runs", sum("verified" in line for line in one.lines["disk"]))
    if not outcome.events["echoes"] or not outcome.events["verified disk runs"]:
        outcome.problems.append("a load did nothing")
    one.rest()
    for service in SERVICES:
        one.vm.run(f"guestpv {service} down", timeout=ANSWER).check()
    for service in SERVICES:
        address = one.vm.address(f"{service}0")
        driver = one.vm.run(f"basename $(readlink /sys/bus/pci/devices/{address}/driver)").stdout.strip()
        if driver != "virtio-pci":
            outcome.problems.append(f"{address} was left to {driver!r}")
    outcome.seconds = round(time.monotonic() - started, 1)
