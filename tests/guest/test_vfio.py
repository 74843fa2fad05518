"""Real functions under the real kernel: binding, opening, interrupts, and everything that can go wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest

from guestvm import Machine, Process

PRELUDE = """
import json, os, sys, time
import guestpv
from guestpv.errors import GuestpvError
from guestpv.system import SYSTEM
from guestpv.vfio.binding import bind, unbind
from guestpv.vfio.function import VfioFunction
from guestpv.vfio.survey import look_up, survey
from guestpv.drivers.rng import Rng
A = sys.argv[1]
def say(*things):
    print(*things, flush=True)
def refused(action, *arguments, **options):
    try:
        action(*arguments, **options)
    except GuestpvError as error:
        say(type(error).__name__, "|", error.where, "|", error.message, "|", error.hint)
    else:
        say("not refused")
"""
AS_USER = "import os; os.setgroups([]); os.setgid(1000); os.setuid(1000)\n"
MODERN = "disable-legacy=on,iommu_platform=on"


def guest(vm: Machine, address: str, script: str, before: str = "") -> list[str]:
    """Lines that a Python script prints in the guest; ``A`` in it is the address."""
    done = vm.run(["python", "-", address], stdin=(before + PRELUDE + script).encode())
    assert done.status == 0, done.stderr
    return done.stdout.splitlines()


def start(vm: Machine, address: str, script: str) -> Process:
    """The same in the background."""
    vm.write_file("/tmp/script.py", (PRELUDE + script).encode())
    return vm.spawn(["python", "/tmp/script.py", address])


def driver(vm: Machine, address: str) -> str:
    link = vm.run(["readlink", f"/sys/bus/pci/devices/{address}/driver"]).stdout.strip()
    return link.rpartition("/")[2]


@pytest.fixture
def rng(vm: Machine) -> Iterator[str]:
    """The shared machine's entropy function, back with the kernel afterwards."""
    address = vm.address("rng0")
    yield address
    guest(vm, address, "unbind(A, force=True)")
    assert driver(vm, address) == "virtio-pci"
    override = vm.run(["cat", f"/sys/bus/pci/devices/{address}/driver_override"]).stdout.strip()
    assert override == "(null)"
    kernel_reads = vm.run("dd if=/dev/hwrng bs=16 count=1 | wc -c", timeout=180)
    assert kernel_reads.stdout.strip() == "16", "the kernel's driver works again"


def test_survey_bind_and_unbind(vm: Machine, rng: str) -> None:
    script = """
say(json.dumps([[f.address, f.name, f.kind, f.driver, f.drivable] for f in survey()]))
bound = bind(A)
say(bound.driver, bound.changed, os.path.exists(bound.node), look_up(A).driver, bind(A).changed)
back = unbind(A)
say(back.driver, back.changed, os.path.exists(bound.node), unbind(A).changed)
"""
    listed, bound, back = guest(vm, rng, script)
    found = {address: rest for address, *rest in json.loads(listed)}
    assert found[rng] == ["rng", "modern", "virtio-pci", True]
    assert found[vm.address("net0")] == ["net", "modern", "virtio-pci", True]
    assert bound == "virtio-pci True True vfio-pci False"
    assert back == "virtio-pci True False False"


def test_registers_reset_and_memory(vm: Machine, rng: str) -> None:
    script = """
bind(A)
function = VfioFunction(A)
say("%08x" % function.config_read(0, 4), function.config_read(4, 2) & 6, function.msix_vectors)
bar = function.bar(4)
say(bar.size, bool(bar.pointer), bar.read(18, 2), bar.read(20, 1))
bar.write(20, 1, 1)
say(bar.read(20, 1), function.reset(), bar.read(20, 1), function.config_read(4, 2) & 6)
region = function.dma.map(2 << 20)
frames = SYSTEM.page_frames(region.pointer, 2)
say(region.segments[0].address > 1 << 32, all(frames), region.array.any())
view = bar.view()
say(int(view[18]))
function.close()
say(int(view[18]))
VfioFunction(A).close()
"""
    assert guest(vm, rng, script) == [
        "10441af4 6 2",
        "16384 True 1 0",
        "1 True 0 6",
        "True True False",
        "1",
        "0",
    ]


def test_huge_pages_are_used_where_there_are_some(vm: Machine, rng: str) -> None:
    script = """
def free():
    return [int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("HugePages_Free")][0]
bind(A)
function = VfioFunction(A)
before = free()
region = function.dma.map(2 << 20)
say(before - free(), region.pointer % (2 << 20), region.segments[0].address % (2 << 20))
function.close()
say(before - free())
del region
say(before - free())
"""
    vm.run("echo 1 > /proc/sys/vm/compact_memory; sysctl -qw vm.nr_hugepages=8").check()
    try:
        assert guest(vm, rng, script) == ["1 0 0", "1", "0"]
    finally:
        vm.run("sysctl -qw vm.nr_hugepages=0").check()


def test_msix_interrupts_arrive(vm: Machine, rng: str) -> None:
    script = """
bind(A)
with guestpv.open(A) as t, Rng(t) as device:
    say(t.mode, len(set(device.read(64))) > 16)
    line = [line for line in open("/proc/interrupts") if "vfio-msix" in line and A in line]
    say(len(line) >= 1, sum(int(n) for l in line for n in l.split()[1:3]) >= 1)
"""
    assert guest(vm, rng, script) == ["msix True", "True True"]


def test_a_real_function_is_traced(vm: Machine, rng: str) -> None:
    """Real registers and rings, with the interrupt that ended a real sleep."""
    script = """
from guestpv.trace import Recorder
bind(A)
recorder = Recorder()
with guestpv.open("vfio:" + A, trace=recorder) as transport:
    transport.negotiate(0)
    queue = transport.make_queue(0)
    transport.driver_ok()
    queue.add(writable=[transport.pool.allocate(16)])
    queue.enable_interrupts()
    queue.publish()
    say(queue.wait(60.0, spin_us=0), len(list(queue.completions())))
events = [event for event in recorder.events if not event.kind.startswith("config-")]
say(json.dumps([[event.kind, event.text] for event in events]))
"""
    first, told = guest(vm, rng, script)
    assert first == "True 1"
    events = json.loads(told)
    texts = [text for _, text in events]
    dance = [text.split(" = ")[1][:4] for text in texts if text.startswith("write device_status")]
    assert dance[-5:] == ["0x01", "0x03", "0x0b", "0x0f", "0x00"]
    for text in (
        "places buffer 0: 16 random bytes wanted",
        "kick needed: avail_event 0, moved 0 to 1",
        "rings queue_notify = 0x0000 queue 0",
        "interrupt, vector 1: queue 0",
        "takes back buffer 0, 16 bytes written: 16 random bytes",
    ):
        assert text in texts
    order = [kind for kind, _ in events if kind in ("add", "publish", "doorbell", "used", "reap")]
    assert order == ["add", "publish", "doorbell", "used", "reap"]


def test_intx_interrupts_arrive(vm: Machine) -> None:
    address = vm.plug(f"virtio-rng-pci,id=hot0,vectors=0,{MODERN}")
    try:
        script = """
bind(A)
with guestpv.open(A) as t, Rng(t) as device:
    say(t.mode, [len(device.read(64)) for _ in range(3)])
unbind(A)
"""
        assert guest(vm, address, script) == ["intx [64, 64, 64]"]
    finally:
        vm.unplug("hot0")


def test_an_ordinary_user_drives_it_once_root_gave_it_away(vm: Machine, rng: str) -> None:
    guest(vm, rng, "bind(A)")
    (refusal,) = guest(vm, rng, "refused(guestpv.open, A)", AS_USER)
    assert refusal.startswith("AccessDenied | /dev/vfio/")
    assert "guestpv bind --user" in refusal
    guest(vm, rng, "bind(A, user='user')")
    script = """
with guestpv.open(A) as t, Rng(t) as device:
    say(os.getuid(), len(device.read(32)))
refused(unbind, A)
"""
    drove, refusal = guest(vm, rng, script, AS_USER)
    assert drove == "1000 32"
    assert refusal.startswith(f"AccessDenied | {rng} | ")
    assert driver(vm, rng) == "vfio-pci"


def test_a_memlock_limit_that_is_too_small(vm: Machine, rng: str) -> None:
    guest(vm, rng, "bind(A, user='user')")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))\n"
    script = """
function = VfioFunction(A)
function.dma.map(4096)
refused(function.dma.map, 2 << 20)
function.close()
VfioFunction(A).close()
"""
    (refusal,) = guest(vm, rng, script, limit + AS_USER)
    assert "2.0 MiB wanted, 0.0 MiB mapped already, RLIMIT_MEMLOCK is 1.0 MiB" in refusal
    assert "prlimit --memlock=unlimited" in refusal


def test_the_root_disk_and_the_default_route_are_refused(vm: Machine) -> None:
    disk = "0000:00:02.0"
    (refusal,) = guest(vm, disk, "refused(bind, A)")
    assert re.search(r"Refused \| 0000:00:02\.0 \| in use: vd. carries the filesystem at /run/root", refusal)
    assert f"guestpv bind --force {disk}" in refusal
    net = vm.address("net0")
    name = vm.run(f"ls /sys/bus/pci/devices/{net}/virtio*/net").stdout.strip()
    vm.run(f"ip link set {name} up && ip address add 10.0.2.15/24 dev {name}").check()
    vm.run("ip route add default via 10.0.2.2").check()
    try:
        (refusal,) = guest(vm, net, "refused(bind, A)")
        assert f"in use: {name} carries the default route" in refusal
    finally:
        vm.run(f"ip address flush dev {name}; ip link set {name} down").check()
    assert driver(vm, net) == "virtio-pci"


def test_a_port_that_the_agent_has_open_is_refused(vm: Machine) -> None:
    (refusal,) = guest(vm, "0000:00:03.0", "refused(bind, A)")
    assert re.search(r"in use: vport\w+ is open in \d+ \(", refusal)


def test_a_disk_claimed_out_of_sight(vm: Machine) -> None:
    address = vm.address("blk0")
    name = vm.run(f"ls /sys/bus/pci/devices/{address}/virtio*/block").stdout.strip()
    claim = (
        f"import os, time; fd = os.open('/dev/{name}', os.O_RDONLY | os.O_EXCL);"
        "print('claimed', flush=True); time.sleep(600)"
    )
    process = vm.spawn(["python", "-c", claim])
    process.wait_for("claimed")
    (refusal,) = guest(vm, address, "refused(bind, A)")
    process.signal(9)
    process.wait()
    assert f"in use: the kernel holds {name}" in refusal


def test_the_second_owner_and_unbinding_are_refused_with_the_pid(vm: Machine, rng: str) -> None:
    process = start(vm, rng, "bind(A); function = VfioFunction(A); say('mine'); time.sleep(600)")
    process.wait_for("mine")
    refusals = guest(vm, rng, "refused(VfioFunction, A); refused(unbind, A)")
    for refusal in refusals:
        assert f"process {process.pid} drives this function already" in refusal
    vm.run(f"rm -f /run/guestpv/{rng}.lock").check()
    (refusal,) = guest(vm, rng, "refused(VfioFunction, A)")
    assert re.search(rf"IOMMU group \d+ is in use by {process.pid} \(python", refusal)
    process.signal(9)
    process.wait()


def test_after_kill_9_it_is_driven_again_and_given_back(vm: Machine, rng: str) -> None:
    script = """
bind(A)
t = guestpv.open(A)
device = Rng(t)
device.read(16)
device.queue.add(writable=[device.buffer])
say('driving')
time.sleep(600)
"""
    process = start(vm, rng, script)
    process.wait_for("driving")
    process.signal(9)
    assert process.wait().status == -9
    config = vm.run(f"hexdump -s 4 -n 2 -e '1/2 \"%04x\"' /sys/bus/pci/devices/{rng}/config").stdout
    assert int(config, 16) & 4 == 0, "the kernel took bus master away"
    again = """
say(bind(A).changed)
with guestpv.open(A) as t, Rng(t) as device:
    say(len(device.read(16)))
say(unbind(A).driver)
"""
    assert guest(vm, rng, again) == ["False", "16", "virtio-pci"]


REQUESTED = """
bind(A)
function = VfioFunction(A)
function.enable_msix(1)
function.bar(4)
function.dma.map(4096)
request = function.request_fd()
say('ready')
say(SYSTEM.poll([request], 120) == [request])
function.close()
"""


def test_unbinding_by_force_asks_the_owner_who_lets_go(vm: Machine, rng: str) -> None:
    process = start(vm, rng, REQUESTED)
    process.wait_for("ready")
    assert guest(vm, rng, "say(unbind(A, force=True).driver)") == ["virtio-pci"]
    assert process.wait().stdout.splitlines() == ["ready", "True"]


def test_hot_unplug_asks_the_owner_who_lets_go(vm: Machine) -> None:
    address = vm.plug(f"virtio-rng-pci,id=hot1,{MODERN}")
    process = start(vm, address, REQUESTED)
    process.wait_for("ready")
    vm.unplug("hot1")
    result = process.wait()
    assert (result.status, result.stdout.splitlines()) == (0, ["ready", "True"])
    (refusal,) = guest(vm, address, "refused(bind, A)")
    assert refusal.startswith(f"UsageError | {address} | no such PCI function")


def test_what_is_no_virtio_function(vm: Machine) -> None:
    (bridge,) = guest(vm, "00:00.0", "refused(bind, A)")
    assert "PCI id 8086:29c0 is not a virtio function" in bridge


@pytest.mark.parametrize("kernel", ["6.1"], indirect=True)
def test_a_group_of_several_functions_and_a_legacy_one(boot: Callable[..., Machine]) -> None:
    vm = boot(
        devices=[
            f"virtio-rng-pci,id=a,bus=pcie.0,addr=0x1d.0x0,multifunction=on,{MODERN}",
            f"virtio-rng-pci,id=b,bus=pcie.0,addr=0x1d.0x1,{MODERN}",
            "virtio-rng-pci,id=old,bus=pcie.0,addr=0x1e,disable-modern=on",
        ]
    )
    first, second = "0000:00:1d.0", "0000:00:1d.1"
    script = """
other = A[:-1] + "1"
bound = bind(A)
say([(m.address, m.command) for m in bound.blockers])
refused(VfioFunction, A)
say(bind(other).blockers)
with guestpv.open(A) as t, guestpv.open(other) as u, Rng(t) as one, Rng(u) as two:
    say(len(one.read(64)), len(two.read(64)), t.mode, u.mode)
one, two = VfioFunction(A), VfioFunction(other)
say(one.dma.map(4096).segments[0].address != two.dma.map(4096).segments[0].address)
one.close()
two.bar(4).write(20, 1, 1)
say(two.bar(4).read(20, 1))
two.close()
say(one.info.group == two.info.group, unbind(A).driver, unbind(other).driver)
"""
    blockers, refusal, rest, driven, apart, status, back = guest(vm, first, script)
    assert driven == "64 64 msix msix"
    assert blockers == str([(second, f"guestpv bind {second}")])
    assert re.match(rf"Refused \| .* not viable: the kernel still drives {second} \(virtio-rng", refusal)
    assert f"`guestpv bind {second}`" in refusal
    assert (rest, apart, status, back) == ("()", "True", "1", "True virtio-pci virtio-pci")
    (refusal,) = guest(vm, "0000:00:1e.0", "refused(bind, A, force=True)")
    assert "legacy-only" in refusal
    vm.run("modprobe -r vfio-pci && rm -r /lib/modules/$(uname -r)/kernel/drivers/vfio && depmod -a").check()
    (refusal,) = guest(vm, first, "refused(bind, A)")
    assert re.search(r"kernel module vfio-pci cannot be loaded: modprobe: ", refusal)
    assert driver(vm, first) == "virtio-pci"
