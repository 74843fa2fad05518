"""Checks of the doctor: what it finds on machines of all kinds, and that it always says how to mend it."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from guestpv.cli import checks
from guestpv.cli.checks import Check, examine, sysfs_features
from guestpv.cli.main import main
from guestpv.errors import GuestpvError, Refused, UsageError

from .fake_kernel import FakeKernel, os_error

NET = "0000:00:03.0"
BLK = "0000:00:04.0"
RELEASE = "6.1.0-50-amd64"
FEATURES = 1 << 5 | 1 << 32 | 1 << 33


def bits(mask: int) -> str:
    return "".join(str(mask >> bit & 1) for bit in range(64))


class Machine(FakeKernel):
    """A guest in which nothing is missing, until a test takes it away."""

    def __init__(self) -> None:
        super().__init__()
        self.files |= {
            "/proc/sys/kernel/osrelease": RELEASE,
            "/proc/cmdline": "quiet intel_iommu=on",
            "/proc/interrupts": " 24: 0 IR-PCI-MSI 1048576-edge virtio0",
            "/proc/self/status": "Name:\tx\nCapEff:\t000001ffffffffff\n",
            "/sys/class/iommu/dmar0/name": "dmar0",
            "/sys/firmware/acpi/tables/APIC": "",
            "/sys/firmware/acpi/tables/DMAR": "",
        }
        self.nodes["/dev/net/tun"] = 0
        self.refused: dict[str, int] = {}

    def offer(self, address: str, mask: int) -> None:
        self.files[f"/sys/bus/pci/devices/{address}/virtio0/features"] = bits(mask)

    def open(self, path: str, flags: int = 2, mode: int = 0o600) -> int:
        if path in self.refused:
            raise os_error(self.refused[path], path)
        if path == "/dev/net/tun" and path in self.nodes:
            return self._new("file", path)
        return super().open(path, flags, mode)


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    machine.add(NET)
    machine.offer(NET, FEATURES)
    yield machine
    assert machine.open_fds == {}


def found(machine: Machine, spec: str | None = None) -> dict[str, Check]:
    result = {check.name: check for check in examine(spec, machine)}
    for check in result.values():
        assert bool(check.mend) == (check.verdict != "ok"), check
    return result


def test_nothing_is_missing(machine: Machine) -> None:
    result = found(machine)
    assert {check.verdict for check in result.values()} == {"ok"}
    assert set(result) == {
        *("kernel", "IOMMU", "interrupt remapping", "VFIO modules", "VFIO back-ends", "VFIO node"),
        *("locked memory", "TUN"),
        "live migration",
        *(f"{NET} net", f"{NET} net group", f"{NET} net ACCESS_PLATFORM"),
    }
    assert found(machine, NET) == result
    assert found(machine, f"vfio:{NET}") == result


@pytest.mark.parametrize(
    ("release", "verdict"), [("5.4.0", "ok"), ("5.3.9", "warn"), ("4.19", "warn"), ("7.0", "ok")]
)
def test_kernels(machine: Machine, release: str, verdict: str) -> None:
    machine.files["/proc/sys/kernel/osrelease"] = release
    assert found(machine)["kernel"].verdict == verdict


def test_an_iommu_that_the_kernel_leaves_alone(machine: Machine) -> None:
    del machine.files["/sys/class/iommu/dmar0/name"]
    check = found(machine)["IOMMU"]
    assert check.verdict == "fail"
    assert "update-grub" in check.mend
    assert "-device" not in check.mend


def test_no_iommu(machine: Machine) -> None:
    del machine.files["/sys/class/iommu/dmar0/name"]
    del machine.files["/sys/firmware/acpi/tables/DMAR"]
    check = found(machine)["IOMMU"]
    assert check.verdict == "fail"
    assert "intel_iommu=on is given" in check.text
    assert "-device intel-iommu" in check.mend
    assert "<iommu model='intel'>" in check.mend
    machine.files["/proc/cmdline"] = "quiet"
    check = found(machine)["IOMMU"]
    assert "-device intel-iommu" in check.mend
    assert "update-grub" in check.mend


def test_interrupts_that_are_not_remapped(machine: Machine) -> None:
    machine.files["/proc/interrupts"] = " 24: 0 PCI-MSI 1048576-edge virtio0"
    check = found(machine)["interrupt remapping"]
    assert check.verdict == "fail"
    assert "intremap=on" in check.mend
    assert "modprobe vfio_iommu_type1 allow_unsafe_interrupts=1" in check.mend
    machine.files["/proc/cmdline"] = "quiet vfio_iommu_type1.allow_unsafe_interrupts=1"
    assert found(machine)["interrupt remapping"].verdict == "warn"
    machine.files["/proc/cmdline"] = "quiet"
    machine.files["/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"] = "Y"
    assert found(machine)["interrupt remapping"].verdict == "warn"
    del machine.files["/sys/firmware/acpi/tables/APIC"]
    assert found(machine)["interrupt remapping"].verdict == "ok"


@pytest.mark.parametrize(
    ("files", "said", "mend"),
    [
        (
            {"/proc/self/mountinfo": "22 1 0:5 / / rw - ext4 vda rw\n40 22 0:9 / /mnt/host rw - 9p host rw"},
            "/mnt/host is a 9p share",
            "umount /mnt/host",
        ),
        ({"/sys/class/iommu/ivhd0/uevent": ""}, "amd-iommu does not migrate", "intel-iommu"),
        (
            {
                "/sys/bus/pci/devices/0000:05:00.0/vendor": "0x1b36",
                "/sys/bus/pci/devices/0000:05:00.0/device": "0x0010",
            },
            "0000:05:00.0 is an NVMe controller",
            "device_del",
        ),
    ],
)
def test_what_stands_in_the_way_of_a_migration(
    machine: Machine, files: dict[str, str], said: str, mend: str
) -> None:
    assert checks.migration(machine).verdict == "ok"
    assert "vfio-user" in checks.migration(machine).text
    machine.files |= files
    found = checks.migration(machine)
    assert (found.verdict, said in found.text, mend in found.mend) == ("warn", True, True), found


def test_modules(machine: Machine) -> None:
    machine.loadable = {"vfio_pci", "vfio_iommu_type1"}
    missing = found(machine)["VFIO modules"]
    assert missing.verdict == "fail"
    assert f"kernel {RELEASE} has no module vfio-pci and vfio_iommu_type1" in missing.text
    assert "apt install linux-image-amd64" in missing.mend
    machine.files[f"/lib/modules/{RELEASE}/modules.dep"] = "kernel/drivers/vfio/pci/vfio-pci.ko: x.ko"
    assert found(machine)["VFIO modules"].verdict == "fail"
    machine.files[f"/lib/modules/{RELEASE}/modules.builtin"] = "kernel/drivers/vfio/vfio_iommu_type1.ko"
    loadable = found(machine)["VFIO modules"]
    assert (loadable.verdict, "not loaded yet" in loadable.text) == ("ok", True)


@pytest.mark.parametrize(
    ("number", "verdict", "mend"),
    [
        (errno.ENOENT, "warn", "modprobe"),
        (errno.ENODEV, "warn", "modprobe"),
        (errno.EACCES, "fail", "chmod"),
        (errno.EIO, "fail", "modprobe"),
    ],
)
@pytest.mark.parametrize(("name", "node"), [("VFIO node", "/dev/vfio/vfio"), ("TUN", "/dev/net/tun")])
def test_nodes(machine: Machine, name: str, node: str, number: int, verdict: str, mend: str) -> None:
    machine.refused[node] = number
    check = found(machine)[name]
    assert check.verdict == verdict
    assert mend in check.mend
    assert node in check.text


def test_a_user_without_capabilities(machine: Machine) -> None:
    machine.files["/proc/self/status"] = "CapEff:\t0000000000000000\n"
    result = found(machine)
    assert result["TUN"].verdict == "warn"
    assert "sudo" in result["TUN"].mend
    assert result["locked memory"].verdict == "ok"
    machine.memlock = 64 << 10
    short = found(machine)["locked memory"]
    assert short.verdict == "fail"
    assert "64 KiB" in short.text
    assert "limits.d" in short.mend
    assert "LimitMEMLOCK" in short.mend
    machine.memlock = resource.RLIM_INFINITY
    assert found(machine)["locked memory"].verdict == "ok"


# One function.


def test_a_function_without_access_platform(machine: Machine) -> None:
    machine.offer(NET, FEATURES & ~(1 << 33))
    check = found(machine, NET)[f"{NET} net ACCESS_PLATFORM"]
    assert check.verdict == "fail"
    assert "iommu_platform=on" in check.mend
    assert "<driver iommu='on'/>" in check.mend


def test_a_function_without_driver_cannot_be_asked(machine: Machine) -> None:
    machine.add("0000:00:05.0", 0x1044, group=9, driver=None)
    check = found(machine, "0000:00:05.0")["0000:00:05.0 rng ACCESS_PLATFORM"]
    assert check.verdict == "warn"
    assert check.mend == "guestpv bind 0000:00:05.0"
    assert sysfs_features("0000:00:05.0", machine) is None


def test_a_legacy_function(machine: Machine) -> None:
    machine.add("0000:00:05.0", 0x1000, group=9, legacy=True)
    check = found(machine, "0000:00:05.0")["0000:00:05.0 net"]
    assert check.verdict == "fail"
    assert "disable-modern=off" in check.mend


def test_a_group_that_is_not_viable(machine: Machine) -> None:
    machine.add(BLK, 0x1042, group=7)
    check = found(machine, NET)[f"{NET} net group"]
    assert check.verdict == "fail"
    assert f"guestpv bind {BLK}" in check.mend


def test_a_function_in_use(machine: Machine) -> None:
    machine.links["/sys/class/net/eth0"] = f"../../devices/pci0000:00/{NET}/virtio0/net/eth0"
    machine.files["/proc/net/route"] = "Iface\neth0 00000000 0202000A 0003 0 0 0 00000000 0 0 0"
    check = found(machine, NET)[f"{NET} net"]
    assert check.verdict == "warn"
    assert "eth0 carries the default route" in check.text
    assert "--force" in check.mend


def opening(monkeypatch: pytest.MonkeyPatch, answer: int | GuestpvError) -> None:
    @contextmanager
    def fake(spec: str) -> Iterator[SimpleNamespace]:
        if isinstance(answer, GuestpvError):
            raise answer
        yield SimpleNamespace(offered=answer, device_type=1)

    monkeypatch.setattr(checks, "open_transport", fake)


def test_a_bound_function_is_opened_and_asked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add("0000:00:05.0", group=9, driver="vfio-pci")
    name = "0000:00:05.0 net ACCESS_PLATFORM"
    for answer, verdict in (
        (FEATURES, "ok"),
        (1 << 32, "fail"),
        (Refused("process 7 drives it"), "ok"),
        (GuestpvError("it does not open", hint="look"), "warn"),
    ):
        opening(monkeypatch, answer)
        assert found(machine, "0000:00:05.0")[name].verdict == verdict
    machine.refused["/dev/vfio/9"] = errno.EACCES
    node = found(machine, "0000:00:05.0")["0000:00:05.0 net node"]
    assert (node.verdict, "--user NAME" in node.mend) == ("fail", True)
    machine.refused["/dev/vfio/9"] = errno.EBUSY
    node = found(machine, "0000:00:05.0")["0000:00:05.0 net node"]
    assert (node.verdict, "in use" in node.text) == ("ok", True)


# Which functions.


def test_a_machine_without_virtio() -> None:
    result = found(Machine())
    assert result["functions"].verdict == "fail"
    assert "-device virtio-net-pci" in result["functions"].mend


def test_none_can_be_driven(machine: Machine) -> None:
    machine.offer(NET, 1 << 32)
    result = found(machine)
    assert result["functions"].verdict == "fail"
    assert result[f"{NET} net ACCESS_PLATFORM"].verdict == "fail"


def test_one_good_function_is_enough(machine: Machine) -> None:
    machine.add("0000:00:05.0", group=9)
    machine.offer("0000:00:05.0", 1 << 32)
    result = found(machine)
    assert "functions" not in result
    assert result["0000:00:05.0 net ACCESS_PLATFORM"].verdict == "warn"
    assert result[f"{NET} net ACCESS_PLATFORM"].verdict == "ok"


def test_functions_without_a_driver_here_do_not_matter(machine: Machine) -> None:
    machine.add("0000:00:05.0", 0x1053, group=9)
    assert not any(name.startswith("0000:00:05.0") for name in found(machine))


@pytest.mark.parametrize("spec", ["bogus", "0000:00:1f.0", "vfio:nonsense"])
def test_a_spec_that_names_nothing(machine: Machine, spec: str) -> None:
    with pytest.raises(UsageError):
        examine(spec, machine)


def test_other_schemes_are_just_opened(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch, FEATURES)
    assert [check.verdict for check in examine("loopback:net", machine)] == ["ok"]
    opening(monkeypatch, GuestpvError("no"))
    assert [check.verdict for check in examine("loopback:net", machine)] == ["fail"]


# The verb.


def test_the_verb_shows_each_check_and_what_mends_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checks.examine
    monkeypatch.setattr(checks, "examine", lambda spec: original(spec, machine))
    well = CliRunner().invoke(main, ["doctor"])
    assert well.exit_code == 0
    assert well.output.splitlines()[-1] == "All is well."
    machine.nodes.pop("/dev/vfio/vfio")
    warned = CliRunner().invoke(main, ["doctor"])
    assert (warned.exit_code, warned.output.splitlines()[-1]) == (0, "Nothing is missing.")
    assert "-> as root: modprobe vfio-pci" in warned.output
    machine.offer(NET, 1 << 32)
    sick = CliRunner().invoke(main, ["doctor", NET])
    assert sick.exit_code == 1
    assert "checks failed: 0000:00:03.0 net ACCESS_PLATFORM" in sick.stderr
    as_json = CliRunner().invoke(main, ["doctor", NET, "--json"])
    answer = json.loads(as_json.stdout)
    assert (as_json.exit_code, answer["ok"], answer["error"]["code"]) == (1, False, "failed")
    assert {check["verdict"] for check in answer["data"]} == {"ok", "warn", "fail"}


def test_ways_into_vfio(machine: Machine) -> None:
    assert found(machine)["VFIO back-ends"].text == "type1"
    machine.add_iommufd()
    assert "without nodes for functions" in found(machine)["VFIO back-ends"].text
    machine.files["/proc/devices"] = "Character devices:\n243 vfio-dev\n"
    assert found(machine)["VFIO back-ends"].text == "type1, iommufd"
    machine.add_noiommu(enabled=False)
    assert found(machine)["VFIO back-ends"].verdict == "ok"
    machine.add_noiommu()
    check = found(machine)["VFIO back-ends"]
    assert (check.verdict, "can overwrite any memory" in check.text) == ("warn", True)
    machine.absent |= {"vfio", "vfio_iommu_type1"}
    assert "not known" in found(machine)["VFIO back-ends"].text


def test_what_no_iommu_mode_needs(machine: Machine) -> None:
    spec = f"{NET}?backend=noiommu"
    assert "behind an IOMMU" in found(machine, spec)[f"{NET} net no-IOMMU mode"].text
    machine.remove(NET)
    machine.add(NET, group=None)
    result = found(machine, spec)
    assert "IOMMU" not in result, "nobody asks for one"
    assert "this kernel has none" in result[f"{NET} net no-IOMMU mode"].text
    assert result[f"{NET} net huge pages"].verdict == "fail"
    machine.add_noiommu(enabled=False)
    assert "echo 1 > " in found(machine, spec)[f"{NET} net no-IOMMU mode"].mend
    machine.add_noiommu()
    machine.files["/proc/meminfo"] = "HugePages_Total:       8\nHugePages_Free:        8\n"
    result = found(machine, spec)
    assert "guestpv bind --vfio-backend noiommu" in result[f"{NET} net no-IOMMU mode"].mend
    assert {check.verdict for check in result.values()} == {"ok", "warn"}


def test_lockdown_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.files["/sys/kernel/security/lockdown"] = "[none] integrity confidentiality"
    assert "kernel lockdown" not in found(machine)
    machine.files["/sys/kernel/security/lockdown"] = "none [integrity] confidentiality"
    assert found(machine)["kernel lockdown"].text.startswith("lockdown=integrity: ")
    machine.absent |= {"vfio", "vfio_pci"}
    assert found(machine)["kernel lockdown"].verdict == "ok", "the kernel has no such module"
    machine.files[f"/lib/modules/{RELEASE}/modules.dep"] = "a/vfio/vfio.ko:\na/vfio/pci/vfio-pci.ko.xz: x.ko"
    signers = {"vfio": "Debian", "vfio-pci": "Debian"}
    monkeypatch.setattr(machine, "run", lambda command: (0, signers[command[-1]]))
    assert found(machine)["kernel lockdown"].verdict == "ok"
    signers["vfio-pci"] = ""
    check = found(machine)["kernel lockdown"]
    assert (check.verdict, check.text.rpartition(": ")[2]) == ("fail", "vfio-pci")
