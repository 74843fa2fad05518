"""Once root has bound a function, an ordinary user does the rest; nobody else gets at it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from guestvm import Machine
from guestvm.link import Result

from .conftest import once

GATEWAY = "10.0.2.2"
AS_USER = """
import ctypes, os, resource, stat, sys
from ctypes import c_uint32
LIBC = ctypes.CDLL(None, use_errno=True)
NET_ADMIN = 12
def become(user, *capabilities):
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 20, 64 << 20))
    mask = sum(1 << one for one in capabilities)
    os.setgroups([])
    os.setgid(user)
    LIBC.prctl(8, 1, 0, 0, 0)
    os.setuid(user)
    assert LIBC.capset((c_uint32 * 2)(0x20080522, 0), (c_uint32 * 6)(mask, mask, mask, 0, 0, 0)) == 0
    for one in capabilities:
        assert LIBC.prctl(47, 2, one, 0, 0) == 0
    LIBC.prctl(38, 1, 0, 0, 0)
    os.environ.update(HOME="/tmp", USER="user")
"""


def as_user(vm: Machine, script: str, *words: str, user: int = 1000, capabilities: str = "") -> Result:
    """Run a script as an ordinary user."""
    first = f"become({user}{capabilities and ', ' + capabilities})\n"
    return vm.run(["python", "-", *words], stdin=(AS_USER + first + script).encode(), timeout=300)


def command(vm: Machine, words: str, user: int = 1000, capabilities: str = "") -> Result:
    """``guestpv`` as an ordinary user."""
    script = f"os.execvp('guestpv', ['guestpv', *{words.split()!r}])"
    return as_user(vm, script, user=user, capabilities=capabilities)


@pytest.fixture
def given(vm: Machine) -> Iterator[dict[str, str]]:
    """Address of the network function, bound and given to the ordinary user."""
    found = {name: vm.address(name) for name in ("net0",)}
    for address in found.values():
        vm.run(f"guestpv bind {address} --user user", timeout=300).check()
    yield found
    command(vm, "net down --all")
    vm.run("ip link delete pv0; rm -rf /tmp/guestpv-1000")
    for address in found.values():
        vm.run(f"guestpv unbind --force {address}", timeout=300).check()


@once
def test_a_link_that_root_lent_carries_packets_without_any_capability(
    vm: Machine, given: dict[str, str]
) -> None:
    refused = command(vm, f"net up {given['net0']} --no-address")
    assert refused.status == 4, refused.stderr
    assert "ip tuntap add pv0 mode tap user" in refused.stderr
    vm.run("ip tuntap add pv0 mode tap user user && ip address add 10.0.2.15/24 dev pv0").check()
    down = command(vm, f"net up {given['net0']} --name pv0 --no-address")
    assert (down.status, "as root: ip link set pv0 up" in down.stderr) == (4, True), down.stderr
    vm.run("ip link set pv0 up").check()
    command(vm, f"net up {given['net0']} --name pv0 --no-address --detach").check()
    vm.run(f"ping -c 3 -W 20 {GATEWAY}").check()
    (one,) = json.loads(command(vm, "net status --json").check().stdout)["data"]
    status = vm.run(f"grep -E '^(Uid|CapEff)' /proc/{one['pid']}/status").check().stdout.split()
    assert status == ["Uid:", "1000", "1000", "1000", "1000", "CapEff:", "0000000000000000"]
    modes = vm.run("stat -c '%a %F %n' /tmp/guestpv-1000 /tmp/guestpv-1000/*").check().stdout
    assert re.match(r"700 directory ", modes)
    assert {line.split()[0] for line in modes.splitlines()[1:]} == {"600"}, modes
    # Who has neither the node nor the directory gets at nothing.
    other = "import guestpv, socket\n" + (
        f"for what in (lambda: guestpv.open('{given['net0']}'),\n"
        "             lambda: socket.socket(socket.AF_UNIX).connect('/tmp/guestpv-1000/pv0.sock')):\n"
        "    try: what()\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    assert as_user(vm, other, user=1001).check().stdout.split() == ["AccessDenied", "PermissionError"]
    command(vm, "net down").check()
    vm.run("ip link show pv0").check()


@once
def test_with_net_admin_a_user_makes_the_link(vm: Machine, given: dict[str, str]) -> None:
    up = command(vm, f"net up {given['net0']} --address 10.0.2.15/24 --detach", capabilities="NET_ADMIN")
    up.check()
    vm.run(f"ping -c 3 -W 20 {GATEWAY}").check()
    command(vm, "net down").check()
    assert vm.run("ip link show pv0").status != 0


BOX = """
def mount(source, target, kind=None, flags=0):
    done = LIBC.mount(source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), None)
    assert done == 0, (target, os.strerror(ctypes.get_errno()))

BIND, RECURSIVE, REMOUNT, READ_ONLY = 0x1000, 0x4000, 0x20, 1
USER, MOUNT, NETWORK, IPC = 0x10000000, 0x20000, 0x40000000, 0x8000000
address, *nodes = sys.argv[1:]
# Who changed its user id does not own its files in /proc otherwise.
assert LIBC.prctl(4, 1, 0, 0, 0) == 0
assert LIBC.unshare(USER | MOUNT | NETWORK | IPC) == 0
for name, text in (("setgroups", "deny"), ("uid_map", "1000 1000 1"), ("gid_map", "1000 1000 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
mount("box", "/mnt", "tmpfs")
for node in nodes:
    open("/mnt/" + os.path.basename(node) + "-", "w").close()
    mount(node, "/mnt/" + os.path.basename(node) + "-", flags=BIND)
mount("box", "/dev", "tmpfs")
os.mkdir("/dev/vfio")
for node in nodes:
    open(node, "w").close()
    mount("/mnt/" + os.path.basename(node) + "-", node, flags=BIND)
mount("/sys", "/sys", flags=BIND | RECURSIVE)
mount("/sys", "/sys", flags=BIND | REMOUNT | READ_ONLY)
assert LIBC.capset((c_uint32 * 2)(0x20080522, 0), (c_uint32 * 6)()) == 0

import guestpv
from guestpv.drivers.rng import Rng
print(*sorted(os.path.join(top, name) for top, _, names in os.walk("/dev") for name in names))
with guestpv.open(address) as transport, Rng(transport) as device:
    print(os.getuid(), len(device.read(64)), transport.mode)
try:
    open(f"/sys/bus/pci/devices/{address}/remove", "w")
except OSError as error:
    print(type(error).__name__, error.errno)
"""


@once
def test_in_a_container_with_two_nodes_and_nothing_else(vm: Machine) -> None:
    address = vm.address("rng0")
    vm.run(f"guestpv bind {address} --user user", timeout=300).check()
    try:
        group = vm.run(f"basename $(readlink /sys/bus/pci/devices/{address}/iommu_group)").stdout.strip()
        nodes = ["/dev/vfio/vfio", f"/dev/vfio/{group}"]
        said = as_user(vm, BOX, address, *nodes).check().stdout.splitlines()
        assert said[0].split() == sorted(nodes)
        assert said[1:] == ["1000 64 msix", "OSError 30"]
    finally:
        vm.run(f"guestpv unbind --force {address}", timeout=300).check()
