"""The lab itself: what is asked of a guest happens there, comes back whole, and never hangs the host."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guestvm import GuestDied, GuestTimeout, HostFiles, LabError, Machine, cache
from guestvm.accesses import TRACE_EVENTS, phases
from guestvm.hostfiles import GUEST_URL

from .conftest import once

ROOT = Path(__file__).resolve().parents[2]
BOOTED_WITHIN = 300


def guest_command(*arguments: str, timeout: float) -> "subprocess.CompletedProcess[str]":
    """Run ./tools/guest without its set-up."""
    return subprocess.run(
        [sys.executable, "-m", "guestvm", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
    )


def test_output_and_status_come_back(vm: Machine, kernel: str) -> None:
    result = vm.run("echo out; echo err >&2; exit 7")
    assert (result.status, result.stdout, result.stderr) == (7, "out\n", "err\n")
    assert vm.run(["uname", "-r"]).stdout.startswith(f"{kernel}.")
    assert vm.run(["sh", "-c", "kill -9 $$"]).status == -9


def test_input_environment_and_directory(vm: Machine) -> None:
    data = bytes(range(256)) * 4096
    result = vm.run("cat > /tmp/in; wc -c < /tmp/in; echo $A; pwd", stdin=data, env={"A": "1 2"}, cwd="/tmp")
    assert result.stdout.split("\n") == [str(len(data)), "1 2", "/tmp", ""]
    assert vm.read_file("/tmp/in") == data
    vm.write_file("/tmp/script", b"#!/bin/sh\necho ran\n", 0o755)
    assert vm.run(["/tmp/script"]).stdout == "ran\n"


def test_a_missing_program_is_an_error(vm: Machine) -> None:
    with pytest.raises(LabError, match=r"no-such-program: .*No such file"):
        vm.run(["no-such-program"])
    with pytest.raises(LabError, match="No such file"):
        vm.read_file("/no/such/file")


@once
def test_a_program_forked_from_a_loaded_process_is_a_process_of_its_own(vm: Machine) -> None:
    script = """
import os, sys
print(os.getppid(), os.getsid(0) == os.getpid(), os.getcwd(), os.environ["WORD"], sys.argv, flush=True)
print("guestpv.opener" in sys.modules, file=sys.stderr)
sys.exit(sys.stdin.read() or 3)
"""
    done = vm.run(["python", "-", "a b"], stdin=script.encode(), env={"WORD": "x"}, cwd="/tmp")
    assert (done.status, done.stdout, done.stderr) == (3, "1 True /tmp x ['-', 'a b']\n", "True\n")
    vm.write_file("/tmp/sleep.py", b"import time; print('asleep', flush=True); time.sleep(600)")
    asleep = vm.spawn(["python", "/tmp/sleep.py"])
    asleep.wait_for("asleep")
    asleep.signal(9)
    assert asleep.wait().status == -9


def test_background_processes(vm: Machine) -> None:
    process = vm.spawn("trap 'echo stopped; exit 3' INT; echo started; while :; do sleep 0.05; done")
    process.wait_for("started")
    assert process.status is None
    assert vm.run(["kill", "-0", str(process.pid)]).status == 0
    process.signal(2)
    result = process.wait()
    assert (result.status, result.stdout) == (3, "started\nstopped\n")
    with pytest.raises(LabError, match="has ended"):
        process.signal(2)


def test_a_daemon_left_behind_does_not_hold_the_command(vm: Machine) -> None:
    result = vm.run("sleep 3600 & echo $!")
    vm.run(["kill", result.stdout.strip()]).check()


def test_a_command_over_its_limit_is_ended_and_the_machine_lives(vm: Machine) -> None:
    process = vm.spawn("echo early; sleep 1000")
    process.wait_for("early")
    with pytest.raises(GuestTimeout, match=r"time limit of 1 s passed for: echo early") as caught:
        process.wait(1)
    assert caught.value.stdout == "early\n"
    assert vm.run("ps | grep '[s]leep 1000'").status == 1


def test_the_guest_has_a_vfio_capable_iommu_and_the_checkout(vm: Machine) -> None:
    for device in ("net0", "rng0", "blk0", "balloon0"):
        address = vm.address(device)
        assert vm.run(f"ls /sys/bus/pci/devices/{address}/iommu_group/devices").stdout.split() == [address]
    assert vm.run("test -c /dev/vfio/vfio -a -c /dev/net/tun").status == 0
    assert vm.run("modprobe vfio-pci && test -d /sys/bus/pci/drivers/vfio-pci").status == 0
    assert vm.run(["python", "-c", "import guestpv; print(guestpv.__file__)"]).stdout.startswith(
        "/src/guestpv"
    )


def test_the_guest_reaches_the_host_files_and_nothing_else(vm: Machine, host_files: HostFiles) -> None:
    name = vm.run(f"ls /sys/bus/pci/devices/{vm.address('net0')}/virtio*/net").check().stdout.strip()
    vm.run(f"ip link set {name} up && ip address add 10.0.2.15/24 dev {name}").check()
    try:
        digest = vm.run(f"wget -q -O /tmp/data {GUEST_URL}/data && sha256sum /tmp/data").check().stdout
        assert digest.split()[0] == host_files.sha256
        put = (
            "import http.client; c = http.client.HTTPConnection('10.0.2.100');"
            "c.request('PUT', '/up', open('/tmp/data', 'rb').read()); print(c.getresponse().read().decode())"
        )
        assert vm.run(["python", "-c", put]).check().stdout.strip() == host_files.sha256
        assert host_files.uploads["/up"] == (host_files.size, host_files.sha256)
        assert vm.run(f"wget -q -T 3 -O /dev/null http://10.0.2.2:{host_files.port}/data").status != 0
    finally:
        vm.run(f"ip address flush dev {name}; ip link set {name} down; rm -f /tmp/data").check()


def test_link_down_is_seen_in_the_guest(vm: Machine) -> None:
    name = vm.run(f"ls /sys/bus/pci/devices/{vm.address('net0')}/virtio*/net").check().stdout.strip()
    carrier = f"cat /sys/class/net/{name}/carrier"
    vm.run(f"ip link set {name} up").check()
    try:
        assert vm.run(carrier).stdout == "1\n"
        for up in (False, True):
            vm.qmp("set_link", name="net0", up=up)
            vm.run(f"until [ $({carrier}) = {int(up)} ]; do sleep 0.02; done").check()
    finally:
        vm.run(f"ip link set {name} down")


def test_hot_plug_and_unplug_are_seen_in_the_guest(vm: Machine) -> None:
    address = vm.plug("virtio-rng-pci,id=hot0,disable-legacy=on,iommu_platform=on")
    path = f"/sys/bus/pci/devices/{address}"
    assert vm.run(f"cat {path}/vendor {path}/device").stdout.split() == ["0x1af4", "0x1044"]
    vm.unplug("hot0")
    assert vm.run(f"test -e {path}").status == 1
    with pytest.raises(LabError, match="QEMU refuses device_del"):
        vm.qmp("device_del", id="hot0")


@once
def test_doorbells_are_counted_between_marks(boot: Callable[..., Machine], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    vm = boot(
        devices=["virtio-net-pci,id=net0,netdev=n0,disable-legacy=on,iommu_platform=on,ioeventfd=off"],
        netdevs=["user,id=n0,restrict=on"],
        trace=(trace, TRACE_EVENTS),
    )
    # Nothing but the echoes may leave: no router solicitation, no ARP once the gateway's address is fixed.
    vm.run(
        "sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1 && ip link set eth0 up"
        " && ip address add 10.0.2.15/24 dev eth0 && ping -c 1 10.0.2.2"
        " && ip neigh replace 10.0.2.2 dev eth0 nud permanent"
    ).check()
    # One after the other: two that are on their way together may share a doorbell.
    vm.mark("a")
    vm.run("for i in $(seq 20); do ping -c 1 10.0.2.2 || exit 1; done").check()
    vm.mark("b")
    vm.run("true").check()
    vm.mark("c")
    counted = phases(trace)
    assert counted["a"].accesses("virtio-pci-notify-virtio-net") == 20
    assert counted["b"].accesses("virtio-pci-notify-virtio-net") == 0
    assert counted["a"].events["virtio_queue_notify"] >= 20


@once
def test_a_machine_over_its_limit_is_killed_by_its_pid(boot: Callable[..., Machine]) -> None:
    vm = boot(devices=[])
    pid = vm.pid
    vm.set_limit(2)
    with pytest.raises(
        GuestDied, match=rf"time limit of 2 s passed: killed the virtual machine \(pid {pid}\)"
    ):
        vm.run(["sleep", "600"], timeout=BOOTED_WITHIN)
    vm.stop(failed=True)
    assert vm.log is not None
    assert vm.log.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@once
def test_a_machine_that_ends_by_itself_is_reported(boot: Callable[..., Machine]) -> None:
    vm = boot(devices=[])
    with pytest.raises(GuestDied, match=r"the virtual machine ended by itself"):
        vm.run("echo c > /proc/sysrq-trigger; sleep 600", timeout=300)
    assert not vm.alive


@once
def test_a_device_that_qemu_refuses_is_reported_in_its_words(boot: Callable[..., Machine]) -> None:
    with pytest.raises(GuestDied, match="no-such-property"):
        boot(devices=["virtio-rng-pci,no-such-property=1"])


@once
def test_the_command_line_returns_output_and_status(kernel: str) -> None:
    done = guest_command("run", "--kernel", kernel, "--", "uname -r; exit 9", timeout=BOOTED_WITHIN)
    assert done.returncode == 9
    assert done.stdout.startswith(f"{kernel}.")
    assert re.search(r"accelerator: (kvm|tcg) \(.+\)", done.stderr)


@once
def test_the_command_line_says_when_it_kills_the_machine(kernel: str) -> None:
    done = guest_command(
        "run", "--kernel", kernel, "--timeout", "8", "--", "sleep 600", timeout=BOOTED_WITHIN
    )
    assert done.returncode == 124
    assert re.search(r"time limit of 8 s passed: killed the virtual machine \(pid \d+\)", done.stderr)
    (log,) = re.findall(r"serial log: (\S+)", done.stderr)
    assert Path(log).exists()


def test_phases_of_a_trace(tmp_path: Path) -> None:
    write = "memory_region_ops_write cpu 0 mr 0x1 addr 0xe9 value {} size 1 name '{}'\n"
    read = "memory_region_ops_read cpu 1 mr 0x1 addr 0x10 value 0x0 size 4 name 'virtio-pci-isr'\n"
    trace = tmp_path / "trace"
    trace.write_text(
        read
        + write.format("0x61", "isa-debugcon")
        + read
        + write.format("0x1", "virtio-pci-notify")
        + "virtio_notify vdev 0x1 vq 0x2\n"
        + write.format("0x62", "isa-debugcon")
    )
    found = phases(trace)
    assert sorted(found) == ["a", "b"]
    assert found["a"].accesses("virtio-pci") == 2
    assert found["a"].events == {"virtio_notify": 1}
    assert found["b"].accesses("") == 0


def test_the_cache_builds_once_and_keeps_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUESTPV_CACHE", str(tmp_path))
    built: list[Path] = []

    def build(work: Path) -> None:
        built.append(work)
        (work / "part").write_text("done")

    def fail(work: Path) -> None:
        (work / "part").write_text("half")
        raise LabError("out of luck")

    assert cache.entry("thing", "1", build) == cache.entry("thing", "1", build)
    assert len(built) == 1
    with pytest.raises(LabError, match="out of luck"):
        cache.entry("thing", "2", fail)
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["1"]


def test_another_distribution_gets_the_names_of_missing_packages() -> None:
    script = (
        "source tools/lib/packages.sh; is_supported_debian() { false; };"
        "package_present() { [ $1 != mksquashfs ] && [ $1 != zstd ]; };"
        "ensure_packages host guest; echo went on"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == 1
    assert re.findall(r"^  (.+)$", done.stderr, re.MULTILINE) == ["squashfs-tools", "zstd"]
    assert "went on" not in done.stdout


@pytest.mark.parametrize(("wait", "status"), [(600, 0), (0, 1)])
def test_another_apt_at_work_is_waited_for(tmp_path: Path, wait: int, status: int) -> None:
    lock = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 4711 (apt-get)"
    tries = tmp_path / "tries"
    script = f"""
        source tools/lib/packages.sh
        APT_WAIT={wait}
        sleep() {{ :; }}
        as_root() {{
            echo x >> {tries}
            [ $(wc -l < {tries}) = 3 ] || {{ echo '{lock}'; false; }}
        }}
        apt_get update 3>&2
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == status
    assert done.stderr.count("another apt is at work; waiting for it, at most 600 s") == (wait > 0)
    assert tries.read_text().count("x") == (3 if wait else 1)
    assert (lock in done.stdout) == (status != 0)
