"""One soak: a guest, its load, its bad luck, and what is looked at meanwhile."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from guestvm import LabError, Machine, Process, network

from . import judge, programs

MIB: Final = 1 << 20
DISK: Final = 64 * MIB
MEMORY: Final = 1024
HOST, GUEST, PORT = "10.9.0.1", "10.9.0.2", 7000
SERVICES: Final = ("net", "blk", "balloon")
MODERN: Final = "disable-legacy=on,iommu_platform=on,ats=on"
ANSWER: Final = 300
"""Seconds for anything on a machine that is slow and busy."""
AUDIT_EVERY: Final = 300.0
"""Seconds between audits: they are quiet times, and there is to be little quiet."""
SETTLED: Final = 0.4
"""The part of a soak after which services stay up: a process has to last if it is to be seen to grow."""
EVENTS: Final = {"flap": 4, "resize": 3, "target": 3, "break": 3, "start over": 1}
"""How often one happens in comparison with others."""
LOOKS: Final = 5
"""How often what seems to have grown is looked at again: what is on its way goes, what leaked stays."""


@dataclass
class Outcome:
    """What a soak came to.

    Attributes:
        events: how often what was done, and what happened.
        problems: what must not be; empty when all is well.
        latencies: medians in ms by kind and quarter.
        processes: what each service's process held after warming up and at the end.
        resident: KiB of memory that the processes of `net up` and `blk up` had at each audit; that of
            `balloon up` has what is in the balloon.
        restarted: seconds from a break until it was seen, and until the device went on: median and longest.
        lost: connections of the echo's client that were lost or not made, by what was going on and why.
        reasons: what the services gave as reasons for their restarts, and how often.
        seconds: how long it took.
        seed: where the random choices came from.
    """

    events: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    resident: dict[str, list[int]] = field(default_factory=dict)
    restarted: dict[str, list[float]] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    seed: int = 0

    def count(self, name: str, by: int = 1) -> None:
        """Something was done, or happened."""
        add(self.events, name, by)


def add(counts: dict[str, int], name: str, by: int = 1) -> None:
    """Count."""
    counts[name] = counts.get(name, 0) + by


class Soak:
    """A guest with all three devices.

    Args:
        stack: gives everything back.
        kernel: series.
        packed: ring format of the devices.
        directory: for the disk.
        seed: of all random choices.
        verified: bytes that a verified run of the disk's load writes and reads.
    """

    def __init__(
        self,
        stack: ExitStack,
        kernel: str,
        packed: bool,
        directory: Path,
        say: Callable[[str], None],
        seed: int,
        verified: int,
    ):
        self.outcome, self._say = Outcome(seed=seed), say
        self.choose = random.Random(seed)
        self._packed = packed
        self.doing = "start over"
        self.took: dict[str, list[float]] = {}
        self._dealt: dict[tuple[Any, ...], list[Any]] = {}
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
            warm=True,
        )
        stack.enter_context(self.vm)
        say(f"booted in {self.vm.boot_seconds:.0f} s")
        self.vm.run(
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1"
        ).check()
        # Else the kernel makes huge pages of a heap that has holes, and a process that touched nothing more
        # has up to 2 MiB more resident for each. The balloon asks for those that it wants.
        self.vm.run("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled").check()
        self.vm.write_file("/tmp/breakable.py", programs.BREAKABLE.encode())
        self.pinned_before = self.pinned()
        for service in SERVICES:
            self.up(service)
        self.lines: dict[str, list[dict[str, Any]]] = {"talk": [], "disk": []}
        self.loads: dict[str, Process] = {
            "talk": self._load("talk", ["python", "-c", programs.TALK, HOST, str(PORT)]),
            "disk": self._load("disk", programs.DISK % {"size": verified}),
        }
        self._size = DISK

    def up(self, service: str) -> None:
        """Bring a device up in the background."""
        more = f" --address {GUEST}/24" if service == "net" else ""
        words = f"{service} up {self.vm.address(f'{service}0')}{more} --restart --detach"
        self.vm.run(["python", "/tmp/breakable.py", *words.split()], timeout=ANSWER).check()
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
                self.lines[name].append(word)
                if "lost" in word:
                    add(self.outcome.lost, f"{self.doing}: {word['lost']}")

        return self.vm.spawn(command, on_output=take)

    def deal(self, *cards: Any) -> Any:
        """The next of these in a random order, as a dealer would: each comes once before one comes again."""
        left = self._dealt.setdefault(cards, [])
        if not left:
            left += self.choose.sample(cards, len(cards))
        return left.pop()

    # What is done to it.

    def flap(self) -> None:
        """The link goes away for a moment."""
        self.vm.qmp("set_link", name="net0", up=False)
        time.sleep(self.choose.uniform(0.1, 1.5))
        self.vm.qmp("set_link", name="net0", up=True)
        self.outcome.count("link flaps")

    def resize(self) -> None:
        """The disk gets another size, never less than what the load uses."""
        self._size = self.choose.randrange(DISK, 2 * DISK, MIB)
        self.vm.qmp("block_resize", node_name="d0", size=self._size)
        self.outcome.count("resizes")

    def target(self) -> None:
        """The host wants another balloon."""
        self.vm.qmp("balloon", value=self.choose.randrange(MEMORY - 384, MEMORY + 1) * MIB)
        self.outcome.count("balloon targets")

    def break_device(self) -> None:
        """A ring that cannot be, after which QEMU wants a reset; or a reset behind the driver's back."""
        service = self.deal(*SERVICES)
        malformed = not self._packed and self.deal(True, False)
        if malformed and service == "blk":
            self.rest()
        words = [service, "USR1" if malformed else "USR2"]
        done = self.vm.run(["python", "-", *words], stdin=programs.BREAK.encode(), timeout=2 * ANSWER)
        if done.status:
            self.outcome.problems.append(f"{' '.join(words)}: {done.stderr[-2000:]}")
            return
        mended = json.loads(done.stdout)
        for what in ("seen", "mended"):
            self.took.setdefault(what, []).append(mended[what])
            took = self.took[what]
            self.outcome.restarted[what] = [round(statistics.median(took), 3), round(max(took), 3)]
        self.outcome.count("breaks seen within a second", int(mended["seen"] <= judge.SEEN))
        self.outcome.count(f"{service}: {'malformed rings' if malformed else 'resets from outside'}")
        add(self.outcome.reasons, mended["reason"])

    def start_over(self) -> None:
        """Down, and up again in a new process; the disk's load rests meanwhile."""
        service = self.choose.choice(SERVICES)
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
        result = self.vm.run(["python", "-"], stdin=programs.PROBE.encode(), timeout=ANSWER).check()
        found: dict[str, Any] = json.loads(result.stdout)
        for service in SERVICES:
            if "process" not in found.get(service, {}):
                logs = self.vm.run("tail -n 20 /run/guestpv/*.log /run/guestpv/*/*.log").stdout
                raise LabError(f"{service} does not answer: {found.get(service)}\n{logs}")
        return found

    def pinned(self) -> int:
        """Pages of the guest that are pinned for DMA, by whomever."""
        words = self.vm.run("cat /proc/sys/vm/stat_refresh; grep nr_foll_pin /proc/vmstat").check()
        counts = dict(line.split() for line in words.stdout.splitlines())
        return int(counts["nr_foll_pin_acquired"]) - int(counts["nr_foll_pin_released"])

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

    def book(self) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
        """Counters at rest, ours and QEMU's or the TAP's; and what the services say."""
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
                return now, status
            before = now

    def holdings(self) -> dict[str, Any]:
        """What each process holds, at rest, where the loads stay."""
        self.rest()
        status = self.probe()
        return {
            service: {"pid": status[service]["pid"], **status[service]["process"]} for service in SERVICES
        }

    def audit(self, seconds: float) -> None:
        """A while without bad luck: what both sides counted has to be the same."""
        self.rest()
        first, _ = self.book()
        self.go_on()
        time.sleep(seconds)
        self.rest()
        last, status = self.book()
        flying = self.vm.run("cat /sys/block/nbd0/inflight").check().stdout.split()
        self.go_on()
        if flying != ["0", "0"]:
            self.outcome.problems.append(f"requests of the disk in flight at rest: {' '.join(flying)}")
        for name, (ours, theirs) in last.items():
            ours, theirs = ours - first[name][0], theirs - first[name][1]
            if ours != theirs:
                self.outcome.problems.append(f"{name}: we counted {ours}, the host {theirs}")
            self.outcome.count(f"audited {name}", ours)
        for way, queue in ((way, queue) for queue in status["net"]["queues"] for way in ("rx", "tx")):
            most = queue["rx_size"] if way == "rx" else 1
            if queue[f"{way}_outstanding"] > most:
                self.outcome.problems.append(f"{queue[f'{way}_outstanding']} {way} buffers in flight at rest")
        for service in ("net", "blk"):
            self.outcome.resident.setdefault(service, []).append(status[service]["process"]["resident_kib"])
        self.outcome.count("audits")
        self._say(f"audited: {last}")

    def loads_live(self) -> None:
        """A load ends only when something is wrong."""
        for name, load in self.loads.items():
            if load.status is not None:
                self.outcome.problems.append(
                    f"the load {name!r} ended with {load.status}: {load.stderr[-2000:]}"
                )

    def empty_balloon(self) -> None:
        """Nothing in the balloon, so that its memory can be compared."""
        self.vm.qmp("balloon", value=MEMORY * MIB)
        self.balloon_agrees()

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
    minutes: float,
    kernel: str,
    packed: bool,
    directory: Path,
    say: Callable[[str], None] = print,
    seed: int = 1,
    verified: int = 8 * MIB,
    events: Mapping[str, int] = EVENTS,
) -> Outcome:
    """Run one.

    Args:
        minutes: how long, after booting; at least until all kinds of events had their turns. 0 is a short
            one, which does not judge how fast anything was.
        kernel: series of the guest's kernel.
        packed: ring format of the devices; malformed rings are for split ones only.
        directory: for the disk's image.
        say: called with progress, in words.
        seed: of all random choices: what happens, when, and how much of it.
        verified: bytes that a verified run of the disk's load writes and reads.
        events: how often each kind happens in comparison with others.
    """
    with ExitStack() as stack:
        one = Soak(stack, kernel, packed, directory, say, seed, verified)
        outcome, choose = one.outcome, one.choose
        doings: dict[str, Callable[[], None]] = {
            "flap": one.flap,
            "resize": one.resize,
            "target": one.target,
            "break": one.break_device,
            "start over": one.start_over,
        }
        quiet = 8.0 if minutes > 1 else 3.0
        started = time.monotonic()
        end, settled = started + 60 * minutes, started + 60 * minutes * SETTLED
        one.start_over()
        if minutes:
            one.audit(quiet)
        audited = time.monotonic()
        baseline: dict[str, Any] = {}
        turns = len(cards(doings, events))
        while (now := time.monotonic()) < end or turns > 0 or not baseline:
            if not baseline and now > settled:
                one.empty_balloon()
                baseline = one.holdings()
                one.go_on()
                del doings["start over"]
                turns = len(cards(doings, events))
            one.doing = one.deal(*cards(doings, events))
            doings[one.doing]()
            turns -= 1
            time.sleep(choose.uniform(0.2, 2.5))
            look(one, say)
            if now - audited > AUDIT_EVERY:
                one.balloon_agrees()
                one.audit(quiet)
                audited = time.monotonic()
            one.loads_live()
            if outcome.problems:
                return outcome
        one.empty_balloon()
        one.audit(quiet)
        finish(one, baseline, started, timed=minutes > 0)
        return outcome


def cards(doings: Iterable[str], events: Mapping[str, int]) -> list[str]:
    """Each kind of event as often as it comes in comparison with others."""
    return [name for name in doings for _ in range(events[name])]


def look(one: Soak, say: Callable[[str], None]) -> None:
    """Tell how it goes."""
    talk, disk = one.lines["talk"], one.lines["disk"]
    if one.outcome.events.get("looks", 0) % 20 == 0:
        rounds = talk[-1].get("rounds") if talk else 0
        say(f"{rounds} echoes, {len(disk)} verified disk runs; {one.outcome.events}")
    one.outcome.count("looks")


def finish(one: Soak, baseline: dict[str, Any], started: float, timed: bool) -> None:
    """Judge, and take everything down."""
    outcome = one.outcome
    for _ in range(LOOKS):
        last = one.holdings()
        grown = judge.grown(baseline, last)
        if not grown:
            break
    outcome.problems += grown
    outcome.processes = {service: {"warm": baseline[service], "end": last[service]} for service in SERVICES}
    blk = one.probe()["blk"]
    outcome.count("disk errors", blk["errors"])
    outcome.count("disk requests done once more", blk["resubmitted"])
    if blk["errors"]:
        outcome.problems.append(f"{blk['errors']} disk requests failed")
    for name, lines in one.lines.items():
        if any("changed" in line or "failed" in line for line in lines):
            outcome.problems.append(f"{name}: what came back was not what went out")
        values = [line["ms"] for line in lines if line.get("ms") is not None]
        outcome.latencies[name] = judge.quarters(values)
        if timed:
            outcome.problems += judge.slower(name, values)
    if timed:
        outcome.problems += judge.late(one.took.get("seen", []))
    talk = one.lines["talk"]
    outcome.count("echoes", max((line.get("rounds", 0) for line in talk), default=0))
    outcome.count("connections lost", sum("lost" in line for line in talk))
    outcome.count("verified disk runs", sum("verified" in line for line in one.lines["disk"]))
    if not outcome.events["echoes"] or not outcome.events["verified disk runs"]:
        outcome.problems.append("a load did nothing")
    for service in SERVICES:
        one.vm.run(f"guestpv {service} down", timeout=ANSWER).check()
    for service in SERVICES:
        address = one.vm.address(f"{service}0")
        driver = one.vm.run(f"basename $(readlink /sys/bus/pci/devices/{address}/driver)").stdout.strip()
        if driver != "virtio-pci":
            outcome.problems.append(f"{address} was left to {driver!r}")
    outcome.count("pages pinned before", one.pinned_before)
    if (pinned := one.pinned()) != one.pinned_before:
        outcome.problems.append(f"{pinned} pages of the guest are pinned, before it were {one.pinned_before}")
    outcome.seconds = round(time.monotonic() - started, 1)
