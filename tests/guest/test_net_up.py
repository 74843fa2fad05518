"""``guestpv net up`` in a real guest: it works, and bad luck costs one clear message and nothing else."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guestvm import Machine
from guestvm.link import Result

GATEWAY = "10.0.2.2"
NET = "virtio-net-pci,id=net0,netdev=n0,disable-legacy=on,iommu_platform=on,ats=on"
USER_NET = "user,id=n0,restrict=on"
HOT_NET = "user,id=h0,restrict=on"


def gpv(vm: Machine, words: str, timeout: float = 300) -> Result:
    return vm.run(f"guestpv {words}", timeout=timeout)


def data(result: Result) -> Any:
    """The data of the last line of JSON, which reports success."""
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["ok"], answer
    return answer["data"]


def driver(vm: Machine, address: str) -> str:
    return vm.run(f"basename $(readlink /sys/bus/pci/devices/{address}/driver)").stdout.strip()


def links(vm: Machine) -> set[str]:
    return set(vm.run("ls /sys/class/net").stdout.split())


LEFT = """
basename $(readlink /sys/bus/pci/devices/{0}/driver)
cat /sys/bus/pci/devices/{0}/driver_override
ls /sys/class/net | grep ^pv
ls /run/guestpv | grep -E 'sock|{0}.json'
grep guestpv /etc/resolv.conf
ls -l /proc/[0-9]*/fd 2>/dev/null | grep -E 'vfio|net/tun'
true
"""


def assert_untouched(vm: Machine, address: str) -> None:
    """Nothing is lost or left: function, link, lock, socket, name servers, open file."""
    assert vm.run(LEFT.format(address)).stdout == "virtio-pci\n(null)\n"


def wait_in_guest(vm: Machine, condition: str, seconds: int = 120) -> None:
    """Wait until a shell command succeeds in the guest."""
    loop = f"for i in $(seq {seconds * 50}); do {condition} && exit 0; sleep 0.02; done; exit 1"
    assert vm.run(loop, timeout=seconds * 3).status == 0, f"never came true: {condition}"


@pytest.fixture
def net0(vm: Machine) -> Iterator[str]:
    """Address of the shared machine's network function, which the kernel has before and after."""
    address = vm.address("net0")
    assert_untouched(vm, address)
    yield address
    if vm.run("ls -A /run/guestpv").stdout:
        vm.run("guestpv net down --all", timeout=300)
        vm.run("rm -f /run/guestpv/*.sock").check()
    if driver(vm, address) != "virtio-pci":
        vm.run(f"guestpv unbind --force {address}", timeout=300)


def kernel_pings(vm: Machine, address: str) -> None:
    """The kernel's own driver works on the function."""
    wait_in_guest(vm, f"ls /sys/bus/pci/devices/{address}/virtio*/net/*")
    name = vm.run(f"ls /sys/bus/pci/devices/{address}/virtio*/net").stdout.strip()
    vm.run(f"ip link set {name} up && ip address add 10.0.2.15/24 dev {name}").check()
    try:
        vm.run(f"ping -c 2 -I {name} {GATEWAY}").check()
    finally:
        vm.run(f"ip address flush dev {name}; ip link set {name} down").check()


# It works.


def test_up_status_down(vm: Machine, net0: str) -> None:
    up = gpv(vm, "net up --detach").check()
    assert "ACCESS_PLATFORM" in up.stdout
    assert "10.0.2.15/24 by DHCP from 10.0.2.2" in up.stdout
    assert driver(vm, net0) == "vfio-pci"
    assert links(vm) == {"lo", "pv0"}
    ping = vm.run(f"ping -c 5 -i 0.2 {GATEWAY}").check()
    assert " 0% packet loss" in ping.stdout
    (status,) = data(gpv(vm, "net status pv0 --json"))
    assert status["function"] == net0
    assert status["mode"] == "msix"
    assert status["link"] == "up"
    assert status["rx"]["packets"] >= 5
    assert status["tx"]["packets"] >= 5
    assert status["mac"] == vm.run("cat /sys/class/net/pv0/address").stdout.strip()
    assert {"VERSION_1", "ACCESS_PLATFORM", "MAC"} <= set(status["features"])
    assert [status] == [
        s | {key: status[key] for key in ("rx", "tx", "queues")}
        for s in data(gpv(vm, f"net status {net0} --json"))
    ]
    down = gpv(vm, "net down").check()
    assert down.stdout == f"pv0 is down; virtio-pci has {net0} again.\n"
    assert_untouched(vm, net0)
    kernel_pings(vm, net0)
    assert gpv(vm, "net status").stdout.startswith("Nothing is up.")


def test_a_person_watches_counters(vm: Machine, net0: str) -> None:
    process = vm.spawn(["guestpv", "net", "up", net0, "--no-address", "--name", "lan0"], pty=(24, 80))
    process.wait_for("Ctrl-C gives the function back")
    vm.run("ip address add 10.0.2.15/24 dev lan0").check()
    vm.run(f"ping -c 1 {GATEWAY}").check()
    process.wait_for("lan0 up  rx ")
    process.write(b"\x03")
    result = process.wait()
    assert result.status == 0, result
    assert f"{net0} given back to virtio-pci" in result.stdout
    assert_untouched(vm, net0)


def test_polling_and_left_out_features(vm: Machine, net0: str) -> None:
    up = data(
        gpv(
            vm, f"net up vfio:{net0} --detach --poll --no-address --features -event_idx,-indirect_desc --json"
        )
    )
    assert up["mode"] == "poll"
    assert not {"EVENT_IDX", "INDIRECT_DESC"} & set(up["features"])
    vm.run("ip address add 10.0.2.15/24 dev pv0").check()
    vm.run(f"ping -c 3 -i 0.2 {GATEWAY}").check()
    gpv(vm, f"net down {net0}").check()
    assert_untouched(vm, net0)


def test_a_given_address_with_gateway_and_name_server(vm: Machine, net0: str) -> None:
    before = vm.run("cat /etc/resolv.conf").stdout
    gpv(vm, "net up --detach --address 10.0.2.77/24 --gateway 10.0.2.2 --dns 10.0.2.3").check()
    assert re.search(r"default via 10\.0\.2\.2 dev pv0 .*metric 1024", vm.run("ip route").stdout)
    assert "nameserver 10.0.2.3" in vm.run("cat /etc/resolv.conf").stdout
    vm.run(f"ping -c 1 {GATEWAY}").check()
    gpv(vm, "net down").check()
    assert vm.run("cat /etc/resolv.conf").stdout == before
    assert vm.run("ip route").stdout == ""
    assert_untouched(vm, net0)


def test_what_was_bound_by_hand_stays_bound(vm: Machine, net0: str) -> None:
    gpv(vm, f"bind {net0}").check()
    shown = data(gpv(vm, f"info {net0} --json"))
    assert [queue["max_size"] for queue in shown["queues"]] == [256, 256, 64]
    assert shown["config"]["status"] == 1
    gpv(vm, "net up --detach --no-address").check()
    assert "stays bound" in gpv(vm, "net down").check().stdout
    assert driver(vm, net0) == "vfio-pci"
    gpv(vm, f"unbind {net0}").check()
    assert_untouched(vm, net0)


def test_list_and_doctor_find_all_well(vm: Machine, net0: str) -> None:
    listed = {function["address"]: function for function in data(gpv(vm, "list --json"))}
    assert listed[net0]["drivable"]
    assert listed[net0]["kind"] == "modern"
    assert {function["name"] for function in listed.values()} >= {"net", "rng", "blk", "balloon", "console"}
    checks = data(gpv(vm, "doctor --json"))
    assert {check["name"] for check in checks} >= {"IOMMU", "interrupt remapping", "VFIO modules", "TUN"}
    # Of the other functions the root disk, for one, is in use: a warning.
    of_others = {check["name"] for check in checks if re.match(r"[0-9a-f]{4}:", check["name"])}
    of_others -= {name for name in of_others if name.startswith(net0)}
    assert {check["verdict"] for check in checks if check["name"] not in of_others} == {"ok"}
    assert "fail" not in {check["verdict"] for check in checks}
    lines = vm.run("guestpv list | cat").stdout.splitlines()
    assert any(line.split()[:4] == [net0, "net", "modern", "virtio-pci"] for line in lines)


def test_the_fallback_dhcp_client(vm: Machine, net0: str) -> None:
    gpv(vm, "net up --detach --no-address").check()
    program = """
import time
from guestpv.services.addressing import Addressing, KernelLink
from guestpv.services.dhcp import Udhcpc
from guestpv.services.resolver import Resolver
addressing = Addressing(KernelLink("pv0"), None, Resolver("pv0"), clients=(Udhcpc,))
while not addressing.ready:
    addressing.poll()
    time.sleep(0.05)
print(addressing.settings.address, addressing.settings.server)
addressing.close()
"""
    assert vm.run(["python", "-c", program], timeout=300).check().stdout == "10.0.2.15/24 10.0.2.2\n"
    assert "inet " not in vm.run("ip address show pv0").stdout
    assert vm.run("ps | grep '[u]dhcpc'").stdout == ""
    gpv(vm, "net down").check()
    assert_untouched(vm, net0)


# Bad input.


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("net up 0000:77:00.0", 2, "no such PCI function"),
        ("net up 0000:00:00.0", 2, "is not a virtio function"),
        ("net up nonsense", 2, "neither a PCI address nor"),
        ("net up {rng}", 2, "it is a virtio rng device, no network device"),
        ("net up {net} --features +bogus", 2, "no feature is called 'bogus'"),
        ("net up {net} --features +mq", 3, "the device does not offer MQ"),
        ("net up {net} --features -version_1", 3, "VERSION_1 cannot be left out"),
        ("net up {net} --address 300.1.2.3/24", 2, "300.1.2.3"),
        ("net up {net} --address 10.0.2.9", 2, "no prefix length"),
        ("net up {net} --no-address --name a-name-that-is-too-long", 2, "is no interface name"),
        ("net up {net} --no-address --name lo", 2, "cannot make the TAP link lo"),
        ("net up {net} --queues 4", 2, "4 queue pairs asked for, the device has 1"),
        ("net up {net} --detach --features +mq", 3, "the device does not offer MQ"),
        ("net status pv7", 2, "pv7 is not up"),
        ("net down", 2, "nothing is up"),
        ("bind 0000:77:00.0", 2, "no such PCI function"),
        ("bind 0000:00:00.0", 2, "is not a virtio function"),
        ("bind {net} --user nobody-of-this-name", 2, "no such user"),
        ("bind 0000:00:02.0", 3, "in use: vda carries"),
        ("info 0000:77:00.0", 2, "no such PCI function"),
    ],
)
def test_bad_input(vm: Machine, net0: str, words: str, status: int, says: str) -> None:
    words = words.format(net=net0, rng=vm.address("rng0"))
    result = gpv(vm, f"{words} --json")
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert (result.status, says in error["message"]) == (status, True), error
    assert error["hint"] or "cannot be left out" in says or "interface name" in says
    assert driver(vm, vm.address("rng0")) == "virtio-pci"
    assert_untouched(vm, net0)


def test_a_function_in_use_as_default_route_is_refused_without_force(vm: Machine, net0: str) -> None:
    name = vm.run(f"ls /sys/bus/pci/devices/{net0}/virtio*/net").stdout.strip()
    vm.run(
        f"ip link set {name} up && ip address add 10.0.2.15/24 dev {name} && "
        f"ip route add default via {GATEWAY}"
    ).check()
    try:
        for words in ("net up", f"net up {net0}", f"bind {net0}"):
            refused = gpv(vm, words)
            assert refused.status == 3
            assert f"{name} carries the default route" in refused.stderr
            assert "--force" in refused.stderr
        assert driver(vm, net0) == "virtio-pci"
        gpv(vm, f"net up {net0} --force --detach").check()
        vm.run(f"ping -c 1 {GATEWAY}").check()
        gpv(vm, "net down").check()
    finally:
        kernels = "$(ls /sys/class/net | grep -v lo)"
        vm.run(f"for link in {kernels}; do ip address flush dev $link; ip link set $link down; done")
    assert_untouched(vm, net0)


def test_without_permission(vm: Machine, net0: str) -> None:
    for words in (f"bind {net0}", f"net up {net0}"):
        denied = vm.run(f"su user -c 'guestpv {words}'", timeout=300)
        assert denied.status == 4, denied
        assert "no permission" in denied.stderr
        assert "sudo" in denied.stderr
    assert_untouched(vm, net0)


def test_a_user_drives_what_root_gave_him(vm: Machine, net0: str) -> None:
    gpv(vm, f"bind {net0} --user user").check()
    shown = data(vm.run(f"su user -c 'guestpv info {net0} --json'", timeout=300))
    assert shown["config"]["mac"] == "52:54:00:12:34:56"
    denied = vm.run(f"su user -c 'guestpv net up {net0} --no-address'", timeout=300)
    assert denied.status == 4
    assert "not allowed to make the TAP link" in denied.stderr
    small = vm.run(f"su user -c 'ulimit -l 64; guestpv net up {net0} --no-address'", timeout=300)
    assert small.status == 1
    assert "RLIMIT_MEMLOCK" in small.stderr
    assert "prlimit --memlock" in small.stderr
    limits = json.loads(vm.run("su user -c 'ulimit -l 64; guestpv doctor --json'", timeout=300).stdout)[
        "data"
    ]
    assert {check["name"]: check["verdict"] for check in limits}["locked memory"] == "fail"
    gpv(vm, f"unbind {net0}").check()
    assert_untouched(vm, net0)


def test_without_the_vfio_modules(vm: Machine, net0: str) -> None:
    hidden = "/lib/modules/$(uname -r)/kernel/drivers/vfio"
    vm.run(f"modprobe -r vfio-pci vfio_iommu_type1; mount -t tmpfs none {hidden}").check()
    try:
        failed = gpv(vm, "net up")
        assert failed.status == 1
        assert "kernel module vfio-pci cannot be loaded" in failed.stderr
    finally:
        vm.run(f"umount {hidden}").check()
    assert_untouched(vm, net0)


def test_a_device_without_access_platform_is_refused(vm: Machine, net0: str) -> None:
    address = vm.plug("virtio-net-pci,id=hot0,netdev=h0,disable-legacy=on", netdev=HOT_NET)
    try:
        wait_in_guest(vm, f"test -e /sys/bus/pci/devices/{address}/driver")
        refused = gpv(vm, f"net up {address}")
        assert refused.status == 3
        assert "does not offer ACCESS_PLATFORM" in refused.stderr
        assert "iommu_platform=on" in refused.stderr
        doctor = gpv(vm, f"doctor {address}")
        assert doctor.status == 1
        assert "iommu_platform=on" in doctor.stdout
        assert_untouched(vm, address)
        several = gpv(vm, "net up")
        assert several.status == 2
        assert address in several.stderr
        assert net0 in several.stderr
    finally:
        vm.unplug("hot0")
        vm.qmp("netdev_del", id="h0")


def test_a_machine_without_iommu(boot: Callable[..., Machine]) -> None:
    vm = boot(devices=[NET], netdevs=[USER_NET], iommu="none")
    refused = gpv(vm, "net up")
    assert refused.status == 3
    assert "no IOMMU group" in refused.stderr
    assert "-device intel-iommu" in refused.stderr
    forced = gpv(vm, f"bind --force {vm.address('net0')}")
    assert forced.status == 3
    assert "no IOMMU group" in forced.stderr
    assert "intel_iommu=on" in forced.stderr
    doctor = gpv(vm, "doctor")
    assert doctor.status == 1
    assert re.search(r"fail +IOMMU", doctor.stdout)
    assert_untouched(vm, vm.address("net0"))


def test_a_group_that_is_not_viable(boot: Callable[..., Machine]) -> None:
    modern = "disable-legacy=on,iommu_platform=on"
    vm = boot(
        devices=[
            f"virtio-net-pci,netdev=n0,bus=pcie.0,addr=0x10.0,multifunction=on,{modern}",
            f"virtio-rng-pci,bus=pcie.0,addr=0x10.1,{modern}",
        ],
        netdevs=[USER_NET],
    )
    net, rng = "0000:00:10.0", "0000:00:10.1"
    for words in ("net up", f"net up {net}"):
        refused = gpv(vm, words)
        assert refused.status == 3
        assert "is not viable" in refused.stderr
        assert f"guestpv bind {rng}" in refused.stderr
        assert_untouched(vm, net)
    assert re.search(rf"group .*not viable.*{re.escape(rng)}", gpv(vm, "doctor").stdout)
    gpv(vm, f"bind {rng}").check()
    gpv(vm, "net up --detach").check()
    vm.run(f"ping -c 1 {GATEWAY}").check()
    gpv(vm, "net down").check()
    gpv(vm, f"unbind {rng}").check()
    assert driver(vm, rng) == "virtio-pci"
    assert_untouched(vm, net)


# Bad luck.


def test_a_second_one_on_the_same_function_is_refused(vm: Machine, net0: str) -> None:
    pid = data(gpv(vm, "net up --detach --no-address --json"))["pid"]
    for words in (f"net up {net0}", f"net up {net0} --detach", f"unbind {net0}", f"info {net0}"):
        refused = gpv(vm, words)
        assert refused.status == 3, words
        assert f"process {pid} drives this function" in refused.stderr
        assert "guestpv net" in refused.stderr
    assert data(gpv(vm, "net status --json"))[0]["pid"] == pid
    gpv(vm, "net down").check()
    assert_untouched(vm, net0)


POINTS = {
    "the override is written": "[ $(cat /sys/bus/pci/devices/{address}/driver_override) = vfio-pci ]",
    "vfio-pci has it": "[ -e /sys/bus/pci/drivers/vfio-pci/{address} ]",
    "the lock is held": "[ -e /run/guestpv/{address}.lock ]",
    "the link is there": "[ -e /sys/class/net/pv0 ]",
    "the socket is there": "[ -e /run/guestpv/pv0.sock ]",
    "it is up": "",
}


@pytest.mark.parametrize("detach", ["", " --detach"], ids=["foreground", "detach"])
@pytest.mark.parametrize(("number", "pause"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.15)])
def test_signals_at_any_point(vm: Machine, net0: str, number: int, pause: float, detach: str) -> None:
    name = signal.Signals(number).name
    for point, condition in POINTS.items():
        if detach and not condition:
            continue
        vm.run("rm -f /run/guestpv/*.lock /tmp/pid; mkfifo /tmp/pid").check()
        # It looks before there is anything to be seen.
        there = condition.format(address=net0) or "false"
        watcher = vm.spawn(
            f"read p < /tmp/pid; until {there}; do kill -0 $p || exit; done; sleep {pause}; kill -{number} $p"
        )
        up = vm.spawn(f"guestpv net up{detach}")
        vm.write_file("/tmp/pid", f"{up.pid}\n".encode())
        if not condition:
            up.wait_for("Up")
            time.sleep(pause)
            up.signal(number)
        result = up.wait(300)
        watcher.wait(300)
        came_up = re.search(r"^Up", result.stdout, re.MULTILINE) is not None
        assert result.status == (0 if came_up else 1), (point, result)
        if not came_up:
            said = result.stdout + result.stderr
            assert f"stopped by {'SIGTERM' if detach else name} before it was up" in said
        if detach and came_up:
            gpv(vm, "net down").check()
        assert_untouched(vm, net0)
    kernel_pings(vm, net0)


def test_kill_9_is_survived(vm: Machine, net0: str) -> None:
    pid = data(gpv(vm, "net up --detach --json"))["pid"]
    vm.run(f"ping -c 1 {GATEWAY} && kill -9 {pid}").check()
    wait_in_guest(vm, f"! test -e /proc/{pid}")
    assert not {name for name in links(vm) if name.startswith("pv")}
    assert gpv(vm, "net status").stdout.startswith("Nothing is up.")
    again = data(gpv(vm, "net up --detach --json"))
    assert again["stays_bound"]
    vm.run(f"ping -c 1 {GATEWAY} && kill -9 {again['pid']}").check()
    wait_in_guest(vm, f"! test -e /proc/{again['pid']}")
    gpv(vm, f"unbind {net0}").check()
    assert driver(vm, net0) == "virtio-pci"
    kernel_pings(vm, net0)
    assert gpv(vm, "net status").stdout.startswith("Nothing is up.")
    assert_untouched(vm, net0)


def test_carrier_lost_and_back(vm: Machine, net0: str) -> None:
    gpv(vm, "net up --detach").check()
    carrier = "[ $(cat /sys/class/net/pv0/carrier) = {} ]"
    wait_in_guest(vm, carrier.format(1))
    vm.qmp("set_link", name="net0", up=False)
    try:
        wait_in_guest(vm, carrier.format(0))
        assert data(gpv(vm, "net status --json"))[0]["link"] == "down"
    finally:
        vm.qmp("set_link", name="net0", up=True)
    wait_in_guest(vm, carrier.format(1))
    vm.run(f"ping -c 1 {GATEWAY}").check()
    events = [event["event"] for event in data(gpv(vm, "net status --json"))[0]["events"]]
    assert events[-2:] == ["link down", "link up"]
    gpv(vm, "net down").check()
    assert_untouched(vm, net0)


def test_without_carrier_there_is_no_address_and_a_clear_message(vm: Machine, net0: str) -> None:
    vm.qmp("set_link", name="net0", up=False)
    try:
        process = vm.spawn(["guestpv", "net", "up"])
        process.wait_for("link down")
        result = process.wait(600)
        assert result.status == 6
        assert "no DHCP server answered within 30 s" in result.stderr
        assert "the link has no carrier" in result.stderr
        assert "--no-address" in result.stderr
    finally:
        vm.qmp("set_link", name="net0", up=True)
    assert_untouched(vm, net0)


def test_hot_unplug_while_up_and_legacy_interrupts(vm: Machine, net0: str) -> None:
    address = vm.plug(
        "virtio-net-pci,id=hot0,netdev=h0,vectors=0,disable-legacy=on,iommu_platform=on", netdev=HOT_NET
    )
    wait_in_guest(vm, f"test -e /sys/bus/pci/devices/{address}/driver")
    process = vm.spawn(["guestpv", "net", "up", address])
    try:
        process.wait_for("Ctrl-C gives")
        vm.run(f"ping -c 2 -I pv0 {GATEWAY}").check()
        (status,) = data(gpv(vm, "net status --json"))
        assert status["mode"] == "intx"
        assert status["rx"]["interrupts"] > 0
    finally:
        vm.unplug("hot0")
        vm.qmp("netdev_del", id="h0")
    result = process.wait()
    assert result.status == 1
    assert f"{address}: the kernel asked for the function back" in result.stderr
    assert not vm.run(f"ls /sys/bus/pci/devices/{address}").stdout
    assert_untouched(vm, net0)


def test_unbind_by_force_while_up(vm: Machine, net0: str) -> None:
    process = vm.spawn(["guestpv", "net", "up", "--json"])
    process.wait_for('"lease_seconds"')
    gpv(vm, f"unbind --force {net0}").check()
    result = process.wait()
    assert result.status == 1
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert error["code"] == "device-gone"
    assert "asked for the function back" in error["message"]
    assert_untouched(vm, net0)
    kernel_pings(vm, net0)


def test_the_link_is_deleted_while_up(vm: Machine, net0: str) -> None:
    process = vm.spawn(["guestpv", "net", "up", "--no-address"])
    process.wait_for("Ctrl-C gives")
    vm.run("ip link delete pv0").check()
    result = process.wait()
    assert result.status == 1
    assert "the TAP link" in result.stderr
    assert_untouched(vm, net0)


def test_a_stale_socket_is_cleaned_away(vm: Machine, net0: str) -> None:
    vm.run(
        ["python", "-c", "import socket; socket.socket(socket.AF_UNIX).bind('/run/guestpv/pv0.sock')"]
    ).check()
    assert gpv(vm, "net status").stdout.startswith("Nothing is up.")
    assert vm.run("ls /run/guestpv/*.sock").stdout == ""
    vm.run(
        ["python", "-c", "import socket; socket.socket(socket.AF_UNIX).bind('/run/guestpv/pv0.sock')"]
    ).check()
    gpv(vm, "net up --detach --no-address").check()
    assert [status["name"] for status in data(gpv(vm, "net status --json"))] == ["pv0"]
    gpv(vm, "net down").check()
    assert_untouched(vm, net0)
