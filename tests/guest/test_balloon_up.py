"""``guestpv balloon up`` in a real guest: the host really gets memory, and the guest always comes first.

``actual`` is a field that the driver writes and proves nothing; QEMU's resident memory does.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guestvm import Machine
from guestvm.link import Result
from peers import tree

from .conftest import once

BALLOON = (
    "virtio-balloon-pci,id=balloon0,disable-legacy=on,iommu_platform=on,ats=on,deflate-on-oom=on,"
    "free-page-reporting=on,free-page-hint=on,iothread=thread"
)
GIB = 1 << 30
PAGES = 256
"""Pages of a MiB."""

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def big(kernel: str, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine with 2 GiB and a balloon."""
    failed_before = request.session.testsfailed
    machine = Machine(
        kernel,
        devices=[BALLOON],
        objects=["iothread,id=thread"],
        # PCI Express's own hot-plug at the root ports; other machines have ACPI's there.
        extra=["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"],
        memory=2048,
        limit=3600,
        warm=True,
    )
    machine.start()
    yield machine
    machine.stop(failed=request.session.testsfailed > failed_before)


@pytest.fixture
def vm(big: Machine) -> Iterator[Machine]:
    """The machine with nothing up, before and after."""
    yield big
    big.qmp("balloon", value=2 * GIB)
    big.run("guestpv balloon down --all", timeout=300)
    address = big.address("balloon0")
    big.run(f"guestpv unbind --force {address}", timeout=300)


def gpv(vm: Machine, words: str, timeout: float = 300) -> Result:
    return vm.run(f"guestpv {words}", timeout=timeout)


def data(result: Result) -> Any:
    """The data of the last line of JSON, which reports success."""
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["ok"], answer
    return answer["data"]


def status(vm: Machine) -> Any:
    (one,) = data(gpv(vm, "balloon status --json"))
    return one


def resident(vm: Machine) -> int:
    """MiB of host memory that QEMU takes."""
    pid = vm._process.pid  # type: ignore[union-attr]
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) >> 10
    raise AssertionError("QEMU is gone")


def given(vm: Machine) -> float:
    """MiB that the guest has, as QEMU believes its driver."""
    return float(vm.qmp("query-balloon")["actual"]) / (1 << 20)


def wait_until(condition: Callable[[], bool], seconds: float, state: Callable[[], Any]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, state()
        time.sleep(0.2)


def ask_for(vm: Machine, mib: int, seconds: float = 600) -> None:
    """Set the target to so many MiB for the guest and wait until QEMU is told that it was met."""
    vm.qmp("balloon", value=mib << 20)
    wait_until(lambda: given(vm) == mib, seconds, lambda: (given(vm), gpv(vm, "balloon status -v").stdout))


USER = """
import mmap, sys
size = int(sys.argv[1]) << 20
memory, piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), b"\\xa5" * (1 << 20)
for start in range(0, size, 1 << 20):
    memory[start : start + (1 << 20)] = piece
assert memory[:: 4096] == b"\\xa5" * (size >> 12)
"""


def use_memory(vm: Machine, mib: int) -> None:
    """Write so many MiB of the guest's memory, look that it keeps what was written, and free it again."""
    vm.run(["python", "-c", USER, str(mib)], timeout=600).check()


def test_the_host_gets_a_gigabyte_and_the_guest_gets_it_back(vm: Machine) -> None:
    use_memory(vm, 1600)
    full = resident(vm)
    assert full > 1700
    up = gpv(vm, "balloon up --detach --rate 1G").check()
    assert "ACCESS_PLATFORM" in up.stdout
    assert "interrupts: intx" in up.stdout
    ask_for(vm, 1024)
    small = resident(vm)
    # Of the 1024 MiB some had never been written to, and took no memory of the host.
    assert full - small > 700, (full, small)
    one = status(vm)
    assert (one["pages"], one["target_pages"], one["actual_pages"]) == (1024 * PAGES,) * 3
    assert one["pool"]["bytes"] == one["pool"]["huge_bytes"] + one["pool"]["small_bytes"] == GIB
    assert one["pool"]["huge_bytes"] > GIB // 2
    ask_for(vm, 2048)
    one = status(vm)
    assert (one["pages"], one["free_pages"], one["pool"]["bytes"]) == (0, 0, 0)
    before = resident(vm)
    use_memory(vm, 1600)
    again = resident(vm)
    assert again - before > 700, (before, again)
    down = gpv(vm, "balloon down").check()
    assert "the balloon is down; virtio-pci has" in down.stdout
    print(f"resident: {full} -> {small} -> {again} MiB")


@once
def test_statistics_arrive_at_the_host(vm: Machine) -> None:
    place = {"path": "/machine/peripheral/balloon0"}
    gpv(vm, "balloon up --detach").check()
    vm.qmp("qom-set", **place, property="guest-stats-polling-interval", value=1)
    try:
        wait_until(lambda: status(vm)["counters"]["statistics"] >= 3, 300, lambda: status(vm))
        stats = vm.qmp("qom-get", **place, property="guest-stats")["stats"]
    finally:
        vm.qmp("qom-set", **place, property="guest-stats-polling-interval", value=0)
    info = dict(line.split()[:2] for line in vm.run("cat /proc/meminfo").stdout.splitlines())
    assert stats["stat-total-memory"] == int(info["MemTotal:"]) << 10
    assert abs(stats["stat-available-memory"] - (int(info["MemAvailable:"]) << 10)) < 100 << 20
    assert abs(stats["stat-disk-caches"] - (int(info["Cached:"]) << 10)) < 100 << 20
    assert stats["stat-minor-faults"] > stats["stat-major-faults"] > 0
    assert len(stats) == 10


HOG = """
import mmap, sys, time
block = []
for number in range(int(sys.argv[1])):
    one = mmap.mmap(-1, 10 << 20)
    one[:] = bytes([number]) * (10 << 20)
    block.append(one)
    time.sleep(0.1)
assert all(one[4096 * 77] == number for number, one in enumerate(block))
print("fed")
"""


@once
def test_a_memory_hog_makes_the_balloon_shrink_before_anybody_is_killed(vm: Machine) -> None:
    gpv(vm, "balloon up --detach --rate 1G --keep-free 128M").check()
    ask_for(vm, 1024)
    # 1200 MiB at less than 100 MiB a second, where less than 800 MiB are available.
    available = status(vm)["memory"]["available_bytes"]
    assert available < 900 << 20
    hog = vm.run(["python", "-c", HOG, "120"], timeout=600)
    assert (hog.status, hog.stdout) == (0, "fed\n"), hog
    one = status(vm)
    assert one["counters"]["given_back"] > 200 * PAGES
    assert "memory is short" in " ".join(event["event"] for event in one["events"])
    assert "Killed process" not in vm.run("dmesg").stdout
    # The hog has gone, and the host gets its memory after all.
    wait_until(lambda: given(vm) == 1024, 600, lambda: status(vm))
    gpv(vm, "balloon down").check()
    use_memory(vm, 1500)


@pytest.fixture
def cgroup(vm: Machine) -> Iterator[str]:
    """A memory cgroup of the guest, whose children count memory, too."""
    path = "/sys/fs/cgroup/lab"
    vm.run(
        "grep -q cgroup2 /proc/mounts || mount -t cgroup2 none /sys/fs/cgroup; "
        "echo +memory > /sys/fs/cgroup/cgroup.subtree_control; "
        f"mkdir {path} && echo +memory > {path}/cgroup.subtree_control && mkdir {path}/balloon {path}/hog"
    ).check()
    yield path
    # Busy until its last process is gone.
    every = f"{path}/hog {path}/balloon {path}"
    vm.run(f"for one in {every}; do until rmdir $one; do sleep 0.1; done; done", timeout=300).check()


@once
def test_the_limit_of_a_memory_cgroup_is_met_by_the_balloon_and_not_by_its_neighbours(
    vm: Machine, cgroup: str
) -> None:
    vm.run(f"echo 500M > {cgroup}/memory.high").check()
    try:
        up = "guestpv balloon up --detach --rate 1G --keep-free 100M"
        vm.run(f"echo $$ > {cgroup}/balloon/cgroup.procs; exec {up}", timeout=300).check()
        vm.qmp("balloon", value=1024 << 20)
        wait_until(lambda: f"below the limit of {cgroup}" in status(vm)["held"], 600, lambda: status(vm))
        one = status(vm)
        assert one["memory"]["limited_by"] == cgroup
        assert 200 * PAGES < one["pages"] < 400 * PAGES
        hog = vm.run(
            f"echo $$ > {cgroup}/hog/cgroup.procs; exec python -c {shlex.quote(HOG)} 15", timeout=600
        )
        assert (hog.status, hog.stdout) == (0, "fed\n"), hog
        assert status(vm)["counters"]["given_back"] > 50 * PAGES
        assert "oom_kill 0" in vm.run(f"cat {cgroup}/memory.events").stdout
    finally:
        gpv(vm, "balloon down")


EVENTS = """
import select, subprocess, sys, time
HOG = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); b'x' * (200 << 20)"
from guestpv.services.memory_cgroup import MemoryCgroups
groups, poll = MemoryCgroups(), select.poll()
for fd in groups.fds:
    poll.register(fd, select.POLLPRI)
groups.settle()
print(len(groups.fds), len(poll.poll(0)))
with subprocess.Popen([sys.executable, "-c", HOG, f"{sys.argv[1]}/hog/cgroup.procs"]) as process:
    print(len(poll.poll(300_000)))
    process.kill()
deadline = time.monotonic() + 60
while poll.poll(0) and time.monotonic() < deadline:
    groups.settle()
print(len(poll.poll(0)))
"""


@once
def test_events_of_a_memory_cgroup_are_seen_until_they_are_settled(vm: Machine, cgroup: str) -> None:
    vm.run(f"echo 30M > {cgroup}/hog/memory.high").check()
    enter = f"echo $$ > {cgroup}/balloon/cgroup.procs"
    seen = vm.run(f"{enter}; exec python -c {shlex.quote(EVENTS)} {cgroup}", timeout=600).check().stdout
    # Its own and the one above have events; the limit that was met was below the one above.
    assert seen.split() == ["2", "0", "1", "0"]


@once
def test_a_thousand_random_targets_end_with_every_page_accounted_for(vm: Machine) -> None:
    gpv(vm, "balloon up --detach --rate 1G").check()
    choose = random.Random(7)
    for _ in range(1000):
        vm.qmp("balloon", value=(2048 - choose.randrange(256)) << 20)
        time.sleep(0.01)
    ask_for(vm, 2000)
    one = status(vm)
    assert one["pages"] == one["actual_pages"] == one["target_pages"] == 48 * PAGES
    assert one["pool"]["bytes"] == (one["pages"] + one["free_pages"]) * 4096
    assert one["counters"]["inflated"] - one["counters"]["deflated"] == one["pages"]
    assert one["counters"]["inflated"] > 48 * PAGES, "it followed some on the way"
    ask_for(vm, 2048)
    gpv(vm, "balloon down").check()
    use_memory(vm, 1500)


ZEROES = """
import guestpv, numpy, sys
from guestpv.drivers.balloon import Balloon
from guestpv.drivers.balloon_pages import PageSource
take = PageSource.take
def written(source):
    chunk = take(source)
    chunk.buffer.array[:] = 0xA5
    return chunk
with guestpv.open(sys.argv[1]) as t, Balloon(t) as balloon:
    PageSource.take = written
    bystander = numpy.full(64 << 20, 0x5A, numpy.uint8)
    balloon.inflate(16 * 512)
    numbers = balloon.page_numbers()
    assert len(numpy.unique(numbers)) == 16 * 512
    memory = [chunk.buffer.array for chunk in balloon._chunks]
    zeroes = [not one.any() for one in memory]
    assert all(zeroes), zeroes
    assert (bystander == 0x5A).all()
    del memory
print(balloon.numbering, "zero")
"""


@once
def test_pages_in_the_balloon_read_as_zero_and_no_others(vm: Machine) -> None:
    address = vm.address("balloon0")
    gpv(vm, f"bind {address}").check()
    assert vm.run(["python", "-c", ZEROES, address], timeout=300).check().stdout == "standard zero\n"


@once
def test_single_pages_do_where_there_are_no_huge_ones(vm: Machine) -> None:
    switch = "/sys/kernel/mm/transparent_hugepage/enabled"
    before = vm.run(f"sed 's/.*\\[\\(.*\\)\\].*/\\1/' {switch}").check().stdout.strip()
    vm.run(f"echo never > {switch}").check()
    try:
        use_memory(vm, 1700)
        full = resident(vm)
        gpv(vm, "balloon up --detach --rate 1G").check()
        ask_for(vm, 1792)
        pool = status(vm)["pool"]
        assert pool["bytes"] == pool["huge_bytes"] + pool["small_bytes"] == 256 << 20
        assert pool["small_bytes"] > 128 << 20
        # Some of these pages had never been written to, and took no host memory.
        assert full - resident(vm) > 100
        gpv(vm, "balloon down").check()
    finally:
        vm.run(f"echo {before} > {switch}").check()
    use_memory(vm, 1500)


def test_kill_9_leaves_the_guest_with_working_memory(vm: Machine) -> None:
    pid = data(gpv(vm, "balloon up --detach --rate 1G --json"))["pid"]
    ask_for(vm, 1536)
    vm.run(f"kill -9 {pid}; while [ -e /proc/{pid} ]; do sleep 0.1; done", timeout=300).check()
    use_memory(vm, 1500)
    vm.qmp("balloon", value=2 * GIB)
    again = data(gpv(vm, "balloon up --detach --json"))
    assert again["stays_bound"]
    wait_until(lambda: given(vm) == 2048, 300, lambda: given(vm))
    gpv(vm, "balloon down").check()


@once
@pytest.mark.parametrize("number", ["TERM", "INT"])
def test_a_signal_gives_everything_back(vm: Machine, number: str) -> None:
    process = vm.spawn(["guestpv", "balloon", "up", "--rate", "1G"])
    process.wait_for("Ctrl-C takes all memory back")
    ask_for(vm, 1792)
    vm.run(f"kill -{number} {status(vm)['pid']}").check()
    result = process.wait()
    assert result.status == 0, result
    assert "given back to virtio-pci" in result.stdout
    assert given(vm) == 2048
    use_memory(vm, 1500)


@once
def test_a_person_watches(vm: Machine) -> None:
    process = vm.spawn(["guestpv", "balloon", "up", "--rate", "1G"], pty=(24, 110))
    process.wait_for("Ctrl-C takes all memory back")
    ask_for(vm, 2000)
    process.wait_for("target 48.0 MiB  actual 48.0 MiB  host sees 48.0 MiB")
    process.write(b"\x03")
    assert process.wait().status == 0


@once
def test_without_the_privilege_it_is_refused_and_explained(vm: Machine) -> None:
    address = vm.address("balloon0")
    gpv(vm, f"bind {address} --user user").check()
    # The limit is root's to raise: an ordinary user's hard limit is the kernel's 8 MiB.
    refused = vm.run(f"ulimit -l unlimited; su user -c 'guestpv balloon up {address}'", timeout=300)
    assert refused.status == 3, refused
    assert "page number 0" in refused.stderr
    assert "CAP_SYS_ADMIN" in refused.stderr


BOUND = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
kept = {"CAP_DAC_OVERRIDE": 1, "CAP_IPC_LOCK": 14, "CAP_SYS_MODULE": 16, "CAP_SYS_ADMIN": 21}
keep = {kept[name] for name in sys.argv[1].split()}
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
for number in range(int(open("/proc/sys/kernel/cap_last_cap").read()) + 1):
    assert number in keep or libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
os.execvp("guestpv", ["guestpv", "balloon", "up", "--detach", "--rate", "1G", "--json"])
"""


@once
def test_the_capabilities_of_the_service_are_enough(vm: Machine) -> None:
    unit = (Path(__file__).parents[2] / "docs" / "systemd" / "guestpv-balloon.service").read_text()
    (capabilities,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    up = data(vm.run(["python", "-c", BOUND, capabilities], timeout=300).check())
    lines = vm.read_file(f"/proc/{up['pid']}/status").decode().splitlines()
    (bounding,) = (int(line.split()[1], 16) for line in lines if line.startswith("CapBnd:"))
    assert bounding.bit_count() == len(capabilities.split())
    ask_for(vm, 1920)
    gpv(vm, "balloon down").check()


@once
def test_a_second_one_is_refused(vm: Machine) -> None:
    pid = data(gpv(vm, "balloon up --detach --json"))["pid"]
    refused = gpv(vm, f"balloon up {vm.address('balloon0')}")
    assert refused.status == 3
    assert f"process {pid} drives this function" in refused.stderr
    assert gpv(vm, "net status").stdout.startswith("Nothing is up.")
    gpv(vm, "balloon down").check()
    assert gpv(vm, "balloon status").stdout.startswith("Nothing is up.")
    assert gpv(vm, "balloon down").status == 2


@once
def test_free_pages_are_hinted_while_the_guest_migrates(vm: Machine) -> None:
    gpv(vm, "balloon up --detach").check()
    ask_for(vm, 2047)
    vm.qmp("migrate-set-parameters", max_bandwidth=4 << 20)
    vm.qmp("migrate", uri="exec:cat > /dev/null")
    try:
        wait_until(
            lambda: status(vm)["counters"]["hinted"] > 0, 600, lambda: (status(vm), vm.qmp("query-migrate"))
        )
    finally:
        vm.qmp("migrate_cancel")
    wait_until(
        lambda: vm.qmp("query-migrate")["status"] in ("cancelled", "completed"),
        300,
        lambda: vm.qmp("query-migrate"),
    )
    ask_for(vm, 2048)
    gpv(vm, "balloon down").check()
    use_memory(vm, 1500)


def test_unplugged_with_memory_in_the_balloon(big: Machine) -> None:
    """Last: the machine has no balloon afterwards."""
    vm = big
    process = vm.spawn(["guestpv", "balloon", "up", "--rate", "1G"])
    process.wait_for("Ctrl-C takes all memory back")
    ask_for(vm, 1900)
    vm.unplug("balloon0")
    assert "pciehp" in vm.run("cat /proc/interrupts").stdout
    result = process.wait()
    assert result.status == 1
    assert "the kernel asked for the function back" in result.stderr
    use_memory(vm, 1500)


@pytest.fixture(scope="module")
def newest_qemu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that runs the newest QEMU of Debian's backports, unpacked beside the machine's own."""
    return tree.get("qemu").qemu(tmp_path_factory.mktemp("qemu"))


@once
@pytest.mark.timeout(1800)
def test_with_msix_on_the_newest_qemu(newest_qemu: Path, boot: Callable[..., Machine]) -> None:
    vm = boot(
        qemu=str(newest_qemu),
        devices=[BALLOON + ",vectors=6,bus=pcie.0,addr=0x10"],
        objects=["iothread,id=thread"],
    )
    use_memory(vm, 700)
    full = resident(vm)
    up = gpv(vm, "balloon up --detach --rate 1G").check()
    assert "interrupts: msix" in up.stdout
    ask_for(vm, 512)
    small = resident(vm)
    assert full - small > 300, (full, small)
    place = {"path": "/machine/peripheral/balloon0"}
    vm.qmp("qom-set", **place, property="guest-stats-polling-interval", value=1)
    wait_until(lambda: status(vm)["counters"]["statistics"] >= 2, 300, lambda: status(vm))
    stats = vm.qmp("qom-get", **place, property="guest-stats")["stats"]
    assert stats["stat-total-memory"] > 900 << 20
    ask_for(vm, 1024)
    one = status(vm)
    assert (one["pages"], one["pool"]["bytes"]) == (0, 0)
    gpv(vm, "balloon down").check()
    use_memory(vm, 700)
    print(f"resident: {full} -> {small} -> {resident(vm)} MiB")
