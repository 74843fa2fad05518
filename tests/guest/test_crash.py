"""The process dies in the middle of its work: nothing stays mapped, the device is quiet, all go on."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from guestvm import Machine

from .conftest import once
from .test_net_up import GATEWAY, kernel_pings, wait_in_guest
from .test_vfio import driver

pytestmark = once
TIME = 600
WORK = {
    "net": f"ping -c 1 {GATEWAY}",
    # Reads until the disk is gone; one is on its way when this ends. Not direct ones: these pin memory, too.
    "blk": "(while dd if=/dev/{0} of=/dev/null bs=64k && echo 3 > /proc/sys/vm/drop_caches; do :; done) "
    ">/dev/null 2>&1 &"
    "until grep -q '[1-9]' /sys/block/{0}/inflight; do sleep 0.01; done",
    "balloon": "true",
}


def up(vm: Machine, service: str) -> dict[str, Any]:
    options = "--address 10.0.2.15/24" if service == "net" else ""
    words = f"guestpv {service} up {vm.address(f'{service}0')} {options} --detach --json"
    found: dict[str, Any] = json.loads(vm.run(words, timeout=TIME).check().stdout.splitlines()[-1])["data"]
    return found


def pinned(vm: Machine) -> int:
    """Pages that somebody keeps pinned for DMA: what VFIO has mapped."""
    words = vm.run("cat /proc/sys/vm/stat_refresh; grep nr_foll_pin /proc/vmstat").check().stdout.split()
    counts = dict(zip(words[::2], words[1::2], strict=True))
    return int(counts["nr_foll_pin_acquired"]) - int(counts["nr_foll_pin_released"])


def quiet(vm: Machine, service: str) -> bool:
    """Whether the device may not reach memory, and by QEMU's own account was reset."""
    config = f"/sys/bus/pci/devices/{vm.address(f'{service}0')}/config"
    command = int(vm.run(f"hexdump -s 4 -n 2 -e '1/2 \"%04x\"' {config}").check().stdout, 16)
    status = vm.qmp("x-query-virtio-status", path=f"/machine/peripheral/{service}0/virtio-backend")
    return not command & 4 and status["status"]["statuses"] == []


@pytest.mark.parametrize("service", WORK)
def test_killed_in_the_middle(vm: Machine, service: str) -> None:
    """By SIGKILL, started again, by SIGSEGV; then the kernel's driver has the function and works."""
    address = vm.address(f"{service}0")
    before = pinned(vm)
    names = set()
    for number in (9, 11):
        one = up(vm, service)
        names.add(one["name"])
        assert pinned(vm) > before
        vm.run(f"{WORK[service].format(one['name'])}; kill -{number} {one['pid']}", timeout=TIME).check()
        wait_in_guest(vm, f"! test -e /proc/{one['pid']}")
        assert pinned(vm) == before
        assert quiet(vm, service)
    assert len(names) == 1, "a name that was left behind is used again"
    if service == "blk":
        # The kernel still has its end of the disk, and gives it up to whoever comes next.
        assert up(vm, service)["name"] in names
        vm.run("guestpv blk down", timeout=TIME).check()
    vm.run(f"guestpv unbind {address}", timeout=TIME).check()
    assert vm.run(f"guestpv {service} status", timeout=TIME).check().stdout.startswith("Nothing is up.")
    assert driver(vm, address) == "virtio-pci"
    if service == "net":
        kernel_pings(vm, address)
    elif service == "blk":
        disk = f"/sys/bus/pci/devices/{address}/virtio*/block/vd*"
        wait_in_guest(vm, f"ls -d {disk}")
        vm.run(f"dd if=/dev/$(basename {disk}) of=/dev/null bs=64k count=16", timeout=TIME).check()
    assert vm.run("ls /run/guestpv /run/guestpv/* | grep -E 'sock|pid|json'").stdout == ""


CLOSED = """
import itertools, os, sys
import guestpv
from guestpv.drivers.rng import Rng
from guestpv.vfio.binding import bind, unbind
address = sys.argv[1]
KINDS = {"/dev/vfio/vfio": "container", "anon_inode:[vfio-device]": "device"}

def close(order):
    transport = guestpv.open(address)
    rng = Rng(transport)
    rng.read(16)
    rng.queue.add(writable=[rng.buffer])
    rng.queue.publish()
    names = {fd: f"/proc/self/fd/{fd}" for fd in range(100)}
    links = {fd: os.readlink(name) for fd, name in names.items() if os.path.lexists(name)}
    fds = {KINDS.get(link, "group"): fd for fd, link in links.items() if "vfio" in link}
    for name in order:
        os.close(fds.pop(name))
    assert not fds, fds
    os._exit(7)

bind(address)
for order in itertools.permutations(("container", "group", "device")):
    if os.fork() == 0:
        close(order)
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 7, (order, status)
    with open(f"/sys/bus/pci/devices/{address}/config", "rb") as config:
        assert not config.read(6)[4] & 4, "the kernel took bus master away"
    with guestpv.open(address) as transport, Rng(transport) as rng:
        assert len(rng.read(16)) == 16
    print(*order, flush=True)
print(unbind(address).driver)
"""


def test_descriptors_closed_in_any_order(vm: Machine) -> None:
    """Container, group and device, with a request on its way: afterwards it is opened and driven as ever."""
    before = pinned(vm)
    done = vm.run(["python", "-", vm.address("rng0")], stdin=CLOSED.encode(), timeout=TIME).check()
    orders = [" ".join(order) for order in itertools.permutations(("container", "group", "device"))]
    assert done.stdout.splitlines() == [*orders, "virtio-pci"]
    assert pinned(vm) == before
    assert vm.run("dd if=/dev/hwrng bs=16 count=1 | wc -c", timeout=TIME).stdout.strip() == "16"
