"""Every way into VFIO under a real kernel: iommufd and no-IOMMU, which Debian's lack, and other IOMMUs.

One machine for each IOMMU, with VFIO's modules built anew (guestvm.modules).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from unit import test_abi

import strictguest
from guestpv.vfio.ways import RISK
from guestvm import LabError, Machine, line
from guestvm import kernel as kernels
from guestvm.progress import Progress
from worlds import bodies
from worlds.schemes import DISK, QUEUES, Returner

from .conftest import MODERN
from .test_vfio import AS_USER, REQUESTED, driver, guest, start

SERIES = "6.12+vfio"
HUGE_PAGES = 24
LEGACY_SLOT, TRANSITIONAL_SLOT = "0x1d", "0x1e"
LEGACY, TRANSITIONAL = "0000:00:1d.0", "0000:00:1e.0"
GUARDIANS = "grep -q '[v]fio/guardian.py' /proc/[0-9]*/cmdline 2>/dev/null"
"""A shell command that succeeds while there is one; it does not find itself."""
BODIES = """
import sys
sys.path.insert(0, "/tmp")
import bodies, guestpv
from guestpv.vfio.binding import bind
address, way, kind, queues = sys.argv[1:]
bind(address, noiommu=way == "noiommu")
for body in bodies.BODIES[kind]:
    body(bodies.Place(lambda: guestpv.open(f"vfio:{address}?backend={way}"), queues=int(queues)))
    print(body.__name__, flush=True)
"""
ECHO = """
import socket, sys
frame = b"\\xff" * 6 + bytes(6) + b"\\x88\\xb5" + bytes(range(200))
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as link:
    link.bind((sys.argv[1], 0x88B5))
    link.settimeout(120)
    link.send(frame)
    print(link.recv(2048) == frame)
"""
DRIVING = """
bind(A, noiommu=WAY == "noiommu")
t = guestpv.open(f"{A}?backend={WAY}")
device = Rng(t)
device.read(16)
device.queue.add(writable=[device.buffer])
say('driving', t.function.backend, t.mode)
time.sleep(600)
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of every way run for those that a machine has."""
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", metafunc.cls.ways)


@pytest.fixture(scope="class")
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with the IOMMU that the class names."""
    iommu: str = request.cls.iommu
    modern = MODERN if iommu != "none" else "disable-legacy=on"
    conventional = modern.removesuffix(",ats=on")
    folder = tmp_path_factory.mktemp(iommu)
    disk = folder / "disk"
    disk.write_bytes(bytes(DISK))
    failed_before = request.session.testsfailed
    with ExitStack() as undo:
        cable = Returner(folder)
        undo.callback(cable.close)
        # A conventional bridge makes one group of what is behind it.
        bridged = ["pcie-pci-bridge,id=bridge"]
        bridged += [f"virtio-rng-pci,id=b{slot},bus=bridge,addr={slot:#x},{conventional}" for slot in (1, 2)]
        try:
            vm = Machine(
                SERIES,
                devices=[
                    f"virtio-rng-pci,id=rng0,{modern}",
                    f"virtio-net-pci,id=net0,netdev=net,{modern}",
                    f"virtio-blk-pci,id=blk0,drive=disk,num-queues={QUEUES},{modern}",
                    f"virtio-rng-pci,id=old,bus=pcie.0,addr={LEGACY_SLOT},disable-modern=on",
                    f"virtio-rng-pci,id=both,bus=pcie.0,addr={TRANSITIONAL_SLOT}",
                    *bridged,
                ],
                netdevs=[cable.netdev],
                blockdevs=[f"driver=file,filename={disk},node-name=disk"],
                iommu=iommu,
                limit=3600,
                # The machine's own may be too old for it.
                qemu=str(strictguest.newest_qemu(folder)) if iommu == "amd" else line.QEMU,
                warm=True,
            )
            vm.start()
        except LabError as error:
            pytest.fail(str(error), pytrace=False)
        undo.callback(lambda: vm.stop(failed=request.session.testsfailed > failed_before))
        vm.write_file("/tmp/bodies.py", Path(bodies.__file__).read_bytes())
        if iommu == "none":
            vm.run(
                "modprobe vfio enable_unsafe_noiommu_mode=1 && modprobe -a vfio-pci vfio_iommu_type1"
            ).check()
            # What works locked down works without, too. Modules without a signature are loaded before.
            vm.run("mount -t securityfs none /sys/kernel/security").check()
            vm.run("echo confidentiality > /sys/kernel/security/lockdown").check()
            vm.run(f"echo 1 > /proc/sys/vm/compact_memory; sysctl -qw vm.nr_hugepages={HUGE_PAGES}").check()
        yield vm


def free_huge_pages(vm: Machine) -> int:
    found = re.search(r"HugePages_Free: +(\d+)", vm.read_file("/proc/meminfo").decode())
    assert found
    return int(found[1])


def wait_until_nothing_is_kept(vm: Machine) -> None:
    """No guardian lives any more, and all huge pages are free again."""
    loop = f"for i in $(seq 3000); do {GUARDIANS} || exit 0; sleep 0.02; done; exit 1"
    assert vm.run(loop, timeout=300).status == 0, "a guardian stays"
    assert free_huge_pages(vm) == int(vm.read_file("/proc/sys/vm/nr_hugepages"))


def give_back(vm: Machine, address: str) -> None:
    done = vm.run(["guestpv", "unbind", "--force", address])
    assert done.status == 0, done.stderr
    assert driver(vm, address) == "virtio-pci"
    wait_until_nothing_is_kept(vm)


def drive(vm: Machine, backend: str, kind: str) -> None:
    """All that drivers do in every other world, too."""
    address = vm.address(f"{kind}0")
    words = ["python", "-", address, backend, kind, str(QUEUES)]
    done = vm.run(words, stdin=BODIES.encode(), timeout=900)
    assert done.status == 0, done.stderr
    assert done.stdout.split() == [body.__name__ for body in bodies.BODIES[kind]]
    give_back(vm, address)


@contextmanager
def going_down(vm: Machine, verb: str, address: str) -> Iterator[None]:
    """At the end it goes down, the kernel's driver has the function back, and nothing stays behind."""
    try:
        yield
        down = vm.run(f"guestpv {verb} down", timeout=300)
        assert down.status == 0, down.stderr
        assert driver(vm, address) == "virtio-pci"
        wait_until_nothing_is_kept(vm)
    except BaseException:
        # What failed leaves nothing to the next test.
        if vm.alive:
            vm.run(f"guestpv {verb} down --all", timeout=300)
            vm.run(f"guestpv unbind --force {address}", timeout=300)
        raise


def echoes(vm: Machine) -> bool:
    """Whether a frame that goes out through the link comes back."""
    return vm.run(["python", "-", "pv0"], stdin=ECHO.encode(), timeout=300).check().stdout == "True\n"


class Ways:
    """What holds for every way, on a machine with one kind of IOMMU.

    Attributes:
        iommu: as ``Machine`` calls it.
        ways: back-ends that are tried there.
    """

    iommu: str
    ways: tuple[str, ...]

    @pytest.mark.parametrize("kind", ["rng", "net", "blk"])
    def test_what_drivers_do_everywhere_else(self, machine: Machine, way: str, kind: str) -> None:
        drive(machine, way, kind)

    def test_after_kill_9_it_is_driven_again_and_given_back(self, machine: Machine, way: str) -> None:
        address = machine.address("rng0")
        process = start(machine, address, f"WAY = {way!r}\n{DRIVING}")
        process.wait_for(f"driving {way} msix")
        kept = free_huge_pages(machine), machine.run(GUARDIANS).status
        process.signal(9)
        assert process.wait().status == -9
        if way == "noiommu":
            assert kept == (HUGE_PAGES - 1, 0), "a huge page, and its guardian"
        config = machine.run(
            f"hexdump -s 4 -n 2 -e '1/2 \"%04x\"' /sys/bus/pci/devices/{address}/config"
        ).stdout
        assert int(config, 16) & 4 == 0, "the kernel took bus master away"
        wait_until_nothing_is_kept(machine)
        script = """
with guestpv.open(f"{A}?backend={WAY}") as t, Rng(t) as device:
    say(len(device.read(16)))
"""
        assert guest(machine, address, f"WAY = {way!r}\n{script}") == ["16"]
        give_back(machine, address)

    def test_hot_unplug_asks_the_owner_who_lets_go(self, machine: Machine, way: str) -> None:
        modern = MODERN if way != "noiommu" else "disable-legacy=on"
        address = machine.plug(f"virtio-rng-pci,id=hot0,{modern}")
        script = REQUESTED.replace("bind(A)", f"bind(A, noiommu={way == 'noiommu'})")
        process = start(
            machine, address, script.replace("VfioFunction(A)", f"VfioFunction(A, backend={way!r})")
        )
        process.wait_for("ready")
        machine.unplug("hot0")
        result = process.wait()
        assert (result.status, result.stdout.splitlines()) == (0, ["ready", "True"]), result.stderr
        wait_until_nothing_is_kept(machine)

    def test_the_modern_part_of_a_transitional_function_and_none_of_a_legacy_one(
        self, machine: Machine, way: str
    ) -> None:
        """QEMU gives a transitional function no vIOMMU; it is driven where there is none."""
        flag = f"noiommu={way == 'noiommu'}"
        script = f"""
say(look_up(A).kind, bind(A, {flag}).driver)
try:
    with guestpv.open(f"{{A}}?backend={way}") as t, Rng(t) as device:
        say(len(device.read(64)), t.offered >> 32 & 1)
except GuestpvError as error:
    say(type(error).__name__, error.message)
say(unbind(A).driver)
"""
        kind, rest, back = guest(machine, TRANSITIONAL, script)
        assert (kind, back) == ("transitional virtio-pci", "virtio-pci")
        if way == "noiommu":
            assert rest == "64 1"
        else:
            assert rest.startswith("Refused the device does not offer ACCESS_PLATFORM")
        wait_until_nothing_is_kept(machine)
        option = " --vfio-backend noiommu" if way == "noiommu" else ""
        refused = machine.run(f"guestpv bind {LEGACY}{option} --force")
        assert refused.status == 3
        assert f"{LEGACY}: a legacy-only function" in refused.stderr
        assert "disable-modern=off" in refused.stderr
        assert driver(machine, LEGACY) == "virtio-pci"


class TestIntel(Ways):
    iommu = "intel"
    ways = ("iommufd",)

    @pytest.mark.parametrize("backend", ["type1", "iommufd"])
    def test_functions_behind_a_bridge_are_driven_together(self, machine: Machine, backend: str) -> None:
        listed = json.loads(machine.run(["guestpv", "list", "--json"]).check().stdout)["data"]
        (first, second) = (
            one["address"] for one in listed if one["members"] and one["address"] != machine.address("rng0")
        )
        script = f"""
other, way = {second!r}, {backend!r}
bound = bind(A)
say([member.address for member in bound.blockers])
refused(VfioFunction, A, backend=way)
bind(other)
with guestpv.open(f"{{A}}?backend={{way}}") as t, guestpv.open(f"{{other}}?backend={{way}}") as u:
    with Rng(t) as one, Rng(u) as two:
        say(len(one.read(64)), len(two.read(64)), t.function.info.group == u.function.info.group)
        refused(VfioFunction, A, backend="type1" if way == "iommufd" else "iommufd")
unbind(A), unbind(other)
"""
        blockers, not_viable, rest, twice = guest(machine, first, script)
        assert blockers == str([second])
        assert re.match(
            rf"Refused \| .* not viable: the kernel still drives {second} \(virtio-rng", not_viable
        )
        assert rest == "64 64 True"
        assert "drives this function already" in twice

    def test_an_ordinary_user_and_a_second_way_in(self, machine: Machine) -> None:
        address = machine.address("rng0")
        guest(machine, address, "bind(A, user='user')")
        (refusal,) = guest(machine, address, "refused(VfioFunction, A, backend='iommufd')", AS_USER)
        assert refusal.startswith("AccessDenied | /dev/iommu | no permission | as root: chmod 666 /dev/iommu")
        machine.run("chmod 666 /dev/iommu").check()
        script = """
with guestpv.open(f"{A}?backend=iommufd") as t, Rng(t) as device:
    say(os.getuid(), len(device.read(32)), t.function.backend)
"""
        assert guest(machine, address, script, AS_USER) == ["1000 32 iommufd"]
        limit = "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))\n"
        script = "function = VfioFunction(A, backend='iommufd'); refused(function.dma.map, 2 << 20)"
        (refusal,) = guest(machine, address, script, limit + AS_USER)
        assert "2.0 MiB wanted, 0.0 MiB mapped already, RLIMIT_MEMLOCK is 1.0 MiB" in refusal
        # Whoever has the group keeps it from the function's own node, and the other way round.
        script = "function = VfioFunction(A, backend='{}'); say('mine'); time.sleep(600)"
        for mine, theirs in (("type1", "iommufd"), ("iommufd", "type1")):
            process = start(machine, address, script.format(mine))
            process.wait_for("mine")
            machine.run(f"rm -f /run/guestpv/{address}.lock").check()
            (refusal,) = guest(machine, address, f"refused(VfioFunction, A, backend='{theirs}')")
            assert re.search(rf"IOMMU group \d+ is in use by {process.pid} \(python", refusal)
            process.signal(9)
            process.wait()
        give_back(machine, address)

    def test_the_commands_with_iommufd(self, machine: Machine) -> None:
        net = machine.address("net0")
        machine.run("modprobe vfio-pci").check()
        doctor = machine.run(["guestpv", "doctor", net]).stdout
        up = machine.run(f"guestpv net up {net} --vfio-backend iommufd --no-address --detach")
        assert up.status == 0, up.stderr
        status = machine.run("guestpv net status --json").check().stdout
        assert f'"spec": "{net}?backend=iommufd"' in status
        machine.run("guestpv net down").check()
        assert driver(machine, net) == "virtio-pci"
        assert "type1, iommufd, noiommu (not enabled)" in doctor
        wrong = machine.run(f"guestpv net up {net}?backend=type1 --vfio-backend iommufd")
        assert (wrong.status, "does not go with this device" in wrong.stderr) == (2, True)
        guest(machine, net, "bind(A)")
        shown = json.loads(machine.run(f"guestpv info {net}?backend=iommufd --json").check().stdout)["data"]
        assert shown["vfio_backend"] == "iommufd"
        refused = machine.run(f"guestpv info {net}?backend=noiommu")
        assert (refused.status, "behind an IOMMU" in refused.stderr) == (3, True)
        give_back(machine, net)


class Translates:
    """What is tried with an IOMMU that hides behind the same ways as Intel's."""

    @pytest.mark.parametrize("backend", ["type1", "iommufd"])
    def test_it_translates(self, machine: Machine, backend: str) -> None:
        drive(machine, backend, "rng")


class TestVirtio(Translates):
    """It remaps no interrupts; the machine's kernel is told to do without."""

    iommu = "virtio"


class TestAmd(Translates):
    """With a QEMU that translates for devices behind it: 10.2 or newer."""

    iommu = "amd"

    def test_net_up_and_what_doctor_says(self, machine: Machine) -> None:
        net = machine.address("net0")
        doctor = machine.run(["guestpv", "doctor", net]).stdout
        assert re.search(r"^ok +IOMMU +ivhd0", doctor, re.MULTILINE)
        assert re.search(r"^ok +interrupt remapping +on", doctor, re.MULTILINE)
        assert "QEMU's amd-iommu does not migrate" in " ".join(doctor.split())
        with going_down(machine, "net", net):
            machine.run(f"guestpv net up {net} --no-address --detach").check()
            assert echoes(machine)


class TestNone(Ways):
    """Under the strictest lockdown of the kernel."""

    iommu = "none"
    ways = ("noiommu",)

    def test_net_up_with_the_explicit_flag_only(self, machine: Machine) -> None:
        net = machine.address("net0")
        plain = machine.run(f"guestpv net up {net} --no-address --detach")
        assert (plain.status, "no IOMMU group" in plain.stderr) == (3, True)
        with going_down(machine, "net", net):
            up = machine.run("guestpv net up --vfio-backend noiommu --no-address --detach")
            assert up.status == 0, up.stderr
            assert f"warning: {RISK}" in up.stderr
            assert echoes(machine)
            (one,) = json.loads(machine.run("guestpv net status --json").check().stdout)["data"]
            assert one["spec"] == f"vfio:{net}?backend=noiommu"
            assert f"WARNING: {RISK}" in machine.read_file("/run/guestpv/pv0.log").decode()

    def test_blk_up_with_the_explicit_flag_only(self, machine: Machine) -> None:
        blk = machine.address("blk0")
        plain = machine.run(f"guestpv blk up {blk} --detach")
        assert (plain.status, "no IOMMU group" in plain.stderr) == (3, True)
        with going_down(machine, "blk", blk):
            up = machine.run(f"guestpv blk up {blk} --vfio-backend noiommu --detach --json")
            assert up.status == 0, up.stderr
            assert f"warning: {RISK}" in up.stderr
            path = json.loads(up.stdout)["data"]["path"]
            written = machine.run(f"dd if=/dev/urandom bs=64k of={path}; sync {path}; md5sum < {path}").stdout
        # What went through us is on the disk: the kernel's own driver reads the same.
        name = machine.run(f"ls /sys/bus/pci/devices/{blk}/virtio*/block").check().stdout.strip()
        assert machine.run(f"md5sum < /dev/{name}").check().stdout == written

    def test_bind_list_and_doctor(self, machine: Machine) -> None:
        net = machine.address("net0")
        bound = machine.run(f"guestpv bind {net} --vfio-backend noiommu")
        assert (bound.status, f"warning: {RISK}" in bound.stderr) == (0, True), bound.stderr
        assert re.search(rf"{net} .* noiommu-\d+ ", machine.run("guestpv list").stdout)
        info = machine.run(f"guestpv info {net}?backend=noiommu")
        assert (info.status, info.stderr.count(RISK)) == (0, 1), info.stderr
        doctor = machine.run(["guestpv", "doctor", f"{net}?backend=noiommu"])
        assert doctor.status == 0, doctor.stdout
        assert re.search(rf"^warn +{net} net no-IOMMU mode ", doctor.stdout, re.MULTILINE)
        assert re.search(r"^ok +kernel lockdown +lockdown=confidentiality", doctor.stdout, re.MULTILINE)
        give_back(machine, net)

    def test_what_is_missing(self, machine: Machine) -> None:
        address = machine.address("rng0")
        enabled = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
        script = f"""
def enable(value):
    with open({enabled!r}, "w") as file:
        file.write(value)
enable("0")
refused(bind, A, noiommu=True)
enable("1")
bind(A, noiommu=True, user="user")
function = VfioFunction(A, backend="noiommu")
refused(function.dma.map, 1 << 30)
function.close()
"""
        off, pages = guest(machine, address, script)
        assert f"VFIO's no-IOMMU mode is not enabled | as root: echo 1 > {enabled}" in off
        assert "no 1024 MiB of reserved huge pages" in pages
        (refusal,) = guest(machine, address, "refused(VfioFunction, A, backend='noiommu')", AS_USER)
        assert refusal.startswith("AccessDenied | /dev/vfio/noiommu-")
        assert "CAP_SYS_RAWIO" in refusal
        give_back(machine, address)


def test_our_table_of_the_kernels_interface_is_that_of_new_headers(tmp_path: Path) -> None:
    include = str(kernels.get(SERIES, Progress()).directory / "uapi")
    test_abi.compare_constants(tmp_path, test_abi.CONSTANTS, test_abi.IOMMUFD, include)
    for layout in test_abi.STRUCTS:
        test_abi.compare_layout(tmp_path, layout, test_abi.IOMMUFD, include)
