"""One guest lives on, by one thing after the other, while ``net up`` and ``blk up`` are in use in it.

Memory and a processor come and go, it sleeps and is woken up, and its kernel starts the next one.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from operator import gt

import pytest

from guestvm import HostFiles, Machine, Process
from guestvm import kernel as kernels
from guestvm.hostfiles import GUEST_URL
from guestvm.link import Result
from guestvm.progress import Progress

from .conftest import MODERN, once
from .test_migration import status, wait_for_more, wait_until
from .test_net_up import kernel_pings, wait_in_guest

pytestmark = once
TIME = 600
DISK = random.Random(1).randbytes(4 << 20)
WRITTEN = random.Random(2).randbytes(1 << 20)
CONFIGURATION = 0xB0000000
"""Where this machine has the configuration space of PCI in memory."""
COMMAND, BUS_MASTER = 4, 1 << 2
MEMORY = 128 << 20
NET_LOAD = """
while [ ! -e /tmp/enough ]; do
    [ "$(wget -q -O - {url}/data | sha256sum)" = "{sum}  -" ] || exit 1
    echo round
done
"""
DISK_LOAD = """
while [ ! -e /tmp/enough ]; do
    [ "$(dd if=/dev/nbd0 bs=64k iflag=direct 2>/dev/null | sha256sum)" = "{sum}  -" ] || exit 1
    echo round
done
"""
KEXEC = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
files = [os.open(f"/tmp/{name}", os.O_RDONLY) for name in ("vmlinuz", "initrd")]
line = open("/proc/cmdline", "rb").read().strip() + b" again"
if libc.syscall(320, *map(ctypes.c_long, files), ctypes.c_ulong(len(line) + 1), line, ctypes.c_ulong(0)):
    raise OSError(ctypes.get_errno(), "kexec_file_load")
print("loaded", flush=True)
sys.stdin.read()
# The agent has to have said what it had to say: the first process waits in epoll_wait then.
while open("/proc/1/syscall").read().split()[0] != "232":
    pass
libc.reboot(0x45584543)
"""


@pytest.fixture(scope="module")
def vm(
    kernel: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Machine]:
    """A machine with room for memory, whose network and disk are up."""
    failed_before = request.session.testsfailed
    disk = tmp_path_factory.mktemp("life") / "disk"
    disk.write_bytes(DISK)
    with ExitStack() as undo:
        files = undo.enter_context(HostFiles(1 << 20))
        machine = Machine(
            kernel,
            devices=[
                f"virtio-net-pci,id=net0,netdev=n0,{MODERN}",
                f"virtio-blk-pci,id=blk0,drive=d0,{MODERN}",
            ],
            netdevs=[files.netdev("n0")],
            blockdevs=[f"driver=raw,node-name=d0,file.driver=file,file.filename={disk}"],
            extra=[
                *("-m", "slots=1,maxmem=2G"),
                # A machine that was given an ELF image starts anew where it should wake up.
                *("-kernel", str(kernels.get(kernel, Progress()).directory / "vmlinuz")),
            ],
            append="no_console_suspend memhp_default_state=online_movable",
            limit=3600,
            warm=True,
        )
        undo.callback(lambda: machine.stop(failed=request.session.testsfailed > failed_before))
        machine.start()
        net = f"guestpv net up {machine.address('net0')} --address 10.0.2.15/24 --restart --detach"
        machine.run(net, timeout=TIME).check()
        machine.run(f"guestpv blk up {machine.address('blk0')} --restart --detach", timeout=TIME).check()
        for name, text, total in (
            ("net", NET_LOAD, files.sha256),
            ("disk", DISK_LOAD, hashlib.sha256(DISK).hexdigest()),
        ):
            machine.write_file(f"/tmp/{name}.sh", text.format(url=GUEST_URL, sum=total).encode())
        yield machine


@pytest.fixture
def load(vm: Machine) -> Iterator[list[Process]]:
    """Downloads, and reads of the disk, each compared; they go on until the end of the test, and further."""
    vm.run("rm -f /tmp/enough").check()
    loads = [vm.spawn(f"sh /tmp/{name}.sh") for name in ("net", "disk")]
    go_on(loads)
    yield loads
    go_on(loads)
    end(vm, loads)


def go_on(loads: list[Process]) -> None:
    for one in loads:
        wait_for_more(one, "round")


def end(vm: Machine, loads: list[Process]) -> None:
    vm.run("touch /tmp/enough").check()
    for one in loads:
        ended = one.wait(TIME)
        assert ended.status == 0, ended


def test_memory_comes_and_goes(vm: Machine, load: list[Process]) -> None:
    count = "cat /sys/devices/system/memory/memory*/state | grep -c online"
    before = int(vm.run(count).stdout)
    vm.qmp("object-add", qom_type="memory-backend-ram", id="more", size=MEMORY)
    vm.qmp("device_add", driver="pc-dimm", id="dimm0", memdev="more")
    wait_in_guest(vm, f"[ $({count}) -gt {before} ]")
    go_on(load)
    vm.unplug("dimm0", TIME)
    vm.qmp("object-del", id="more")
    assert int(vm.run(count).stdout) == before


def interrupts(vm: Machine, address: str, cpu: int) -> int:
    """How many interrupts of a function a processor took."""
    head, *lines = vm.read_file("/proc/interrupts").decode().splitlines()
    column = head.split().index(f"CPU{cpu}") + 1
    return sum(int(line.split()[column]) for line in lines if "vfio-msix" in line and address in line)


def test_a_processor_goes_with_their_interrupts_bound_to_it_and_comes_back(
    vm: Machine, load: list[Process]
) -> None:
    addresses = [vm.address(name) for name in ("net0", "blk0")]
    numbers = "$(sed -n '/vfio-msix/s/:.*//p' /proc/interrupts)"
    bind = f"for i in {numbers}; do echo 1 > /proc/irq/$i/smp_affinity_list || exit 1; done"

    def taken(cpu: int) -> list[int]:
        return [interrupts(vm, address, cpu) for address in addresses]

    def takes_them(cpu: int) -> None:
        before = taken(cpu)
        wait_until(
            lambda: all(map(gt, taken(cpu), before)),
            f"processor {cpu} takes the interrupts of both",
        )
        go_on(load)

    vm.run(bind).check()
    takes_them(1)
    vm.run("echo 0 > /sys/devices/system/cpu/cpu1/online").check()
    assert vm.read_file("/sys/devices/system/cpu/online") == b"0\n"
    takes_them(0)
    vm.run(f"echo 1 > /sys/devices/system/cpu/cpu1/online && {bind}").check()
    takes_them(1)


def restarts(vm: Machine, *services: str) -> list[int]:
    """How often each was restarted."""
    return [status(vm, service)[0]["restarts"]["count"] for service in services]


def disk_sum(vm: Machine) -> str:
    return vm.run("dd if=/dev/nbd0 bs=64k iflag=direct | sha256sum", timeout=TIME).check().stdout.split()[0]


@pytest.fixture
def downloads(vm: Machine) -> Iterator[Process]:
    """Downloads alone: who waits for a block cannot be frozen, and keeps the machine from going to sleep."""
    vm.run("rm -f /tmp/enough").check()
    process = vm.spawn("sh /tmp/net.sh")
    go_on([process])
    yield process
    go_on([process])
    assert disk_sum(vm) == hashlib.sha256(DISK).hexdigest()
    end(vm, [process])


def test_it_sleeps_idle_until_its_power_button_is_pressed(vm: Machine, downloads: Process) -> None:
    """The devices keep their state: nothing is restarted."""
    before = restarts(vm, "net", "blk")
    vm.run("modprobe button; dmesg -n 8; echo 1 > /sys/power/pm_debug_messages").check()
    sleeping = vm.spawn("echo freeze > /sys/power/state; dmesg -n 1")
    console = vm.run_directory / "serial.log"
    wait_until(lambda: b"suspend-to-idle" in console.read_bytes(), "it sleeps", TIME)
    vm.qmp("system_powerdown")
    assert sleeping.wait(TIME) == Result(0, "", "")
    assert restarts(vm, "net", "blk") == before


def command_register(vm: Machine, address: str) -> int:
    """A function's, as QEMU has it, whatever runs in the guest."""
    bus, device, function = (int(part, 16) for part in re.split("[:.]", address)[1:])
    register = CONFIGURATION + (bus << 20 | device << 15 | function << 12) + COMMAND
    said = vm.qmp("human-monitor-command", command_line=f"xp /1xh {register:#x}")
    return int(said.split()[1], 16)


def test_the_next_kernel_has_what_was_in_use(vm: Machine, kernel: str) -> None:
    """The old kernel takes bus master away from what is live; what a flush covered is on the disk."""
    vm.write_file("/tmp/vmlinuz", (kernels.get(kernel, Progress()).directory / "vmlinuz").read_bytes())
    vm.write_file("/tmp/initrd", (vm.run_directory / "initrd").read_bytes())
    vm.write_file("/tmp/written", WRITTEN)
    vm.run("dd if=/tmp/written of=/dev/nbd0 bs=64k conv=fsync").check()
    program = vm.spawn(["python", "-c", KEXEC])
    program.wait_for("loaded", TIME)
    vm.run("rm -f /tmp/enough; sh /tmp/net.sh > /dev/null 2>&1 &").check()
    functions = {name: vm.address(name) for name in ("net0", "blk0")}
    assert all(command_register(vm, address) & BUS_MASTER for address in functions.values())
    cut_off: set[str] = set()
    vm.link.ready = None
    program.close_stdin()
    deadline = time.monotonic() + TIME
    while vm.link.ready is None:
        assert time.monotonic() < deadline, "the next kernel came up"
        for name, address in functions.items():
            device = vm.qmp("x-query-virtio-status", path=f"/machine/peripheral/{name}/virtio-backend")
            # QEMU takes DRIVER_OK back together with bus master; a reset would leave nothing.
            kept = "FEATURES_OK" in str(device["status"]["statuses"])
            if kept and not command_register(vm, address) & BUS_MASTER:
                cut_off.add(name)
        time.sleep(0.2)
    assert cut_off == set(functions), "not reset, and without a way to memory"
    assert vm.run("cat /proc/cmdline").check().stdout.split()[-1] == "again"
    kernel_pings(vm, functions["net0"])
    disk = f"/sys/bus/pci/devices/{functions['blk0']}/virtio*/block/vd*"
    wait_in_guest(vm, f"ls -d {disk}")
    there = vm.run(f"cat /dev/$(basename {disk}) | sha256sum", timeout=TIME).check().stdout.split()[0]
    assert there == hashlib.sha256(WRITTEN + DISK[len(WRITTEN) :]).hexdigest()
    vm.run(f"guestpv net up {functions['net0']} --address 10.0.2.15/24 --detach", timeout=TIME).check()
    vm.run("ping -c 1 10.0.2.2 && guestpv net down", timeout=TIME).check()
