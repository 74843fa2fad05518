"""One guest lives on, by one thing after the other, while ``net up`` and ``blk up`` are in use in it.

Memory comes and goes, and it sleeps and is woken up.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from guestvm import HostFiles, Machine, Process
from guestvm import kernel as kernels
from guestvm.hostfiles import GUEST_URL
from guestvm.link import Result
from guestvm.progress import Progress

from .conftest import MODERN, once
from .test_migration import status, wait_for_more, wait_until
from .test_net_up import wait_in_guest

pytestmark = once
TIME = 600
DISK = random.Random(1).randbytes(4 << 20)
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
