"""Which functions there are, who uses them, and whether they can be driven."""

from __future__ import annotations

import pytest

from guestpv.errors import AccessDenied, GuestpvError, Refused, UsageError
from guestpv.vfio.lock import FunctionLock, holders, runtime_directory
from guestpv.vfio.survey import look_up, survey

from .fake_kernel import FakeKernel

NET = "0000:00:03.0"
BLK = "0000:00:04.0"


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


def add_disk(kernel: FakeKernel, address: str = BLK, *names: str) -> None:
    kernel.add(address, 0x1042)
    for minor, name in enumerate(names or ("vda", "vda1", "vda2")):
        tail = name if name == "vda" else f"vda/{name}"
        kernel.links[f"/sys/class/block/{name}"] = f"../../devices/pci0000:00/{address}/virtio1/block/{tail}"
        kernel.files[f"/sys/class/block/{name}/dev"] = f"254:{minor}"


def add_link(kernel: FakeKernel, name: str, address: str = NET) -> None:
    kernel.links[f"/sys/class/net/{name}"] = f"../../devices/pci0000:00/{address}/virtio0/net/{name}"


def mount(kernel: FakeKernel, number: str, point: str, kind: str, source: str) -> None:
    line = f"22 1 {number} / {point} rw,relatime shared:1 - {kind} {source} rw\n"
    kernel.files["/proc/self/mountinfo"] += line


def test_survey_finds_the_virtio_functions_only(kernel: FakeKernel) -> None:
    kernel.add(NET)
    kernel.add("0000:00:05.0", 0x1000, group=8)
    kernel.add("0000:00:06.0", 0x10D3, vendor=0x8086, group=9, driver="e1000")
    kernel.add("0000:00:07.0", 0x1110, group=10)
    found = survey(kernel)
    assert [(f.address, f.name, f.kind, f.driver, f.group) for f in found] == [
        (NET, "net", "modern", "virtio-pci", 7),
        ("0000:00:05.0", "net", "transitional", "virtio-pci", 8),
    ]
    assert all(f.drivable for f in found)


def test_a_function_unplugged_during_the_survey_is_left_out(kernel: FakeKernel) -> None:
    kernel.add(NET)
    kernel.functions["0000:00:09.0"] = kernel.functions[NET]
    assert [f.address for f in survey(kernel)] == [NET]


def test_missing_libudev_is_said(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> list[str]:
        raise ImportError("No library named udev")

    monkeypatch.setattr(kernel, "pci_addresses", absent)
    with pytest.raises(GuestpvError, match="udev"):
        survey(kernel)


@pytest.mark.parametrize("text", ["00:03.0", "0000:00:03.0", "00:03.0".upper()])
def test_look_up_completes_an_address(kernel: FakeKernel, text: str) -> None:
    kernel.add(NET)
    assert look_up(text, kernel).address == NET


@pytest.mark.parametrize("text", ["", "eth0", "00:03", "00:03.8", "00:23.0", "../../etc", "0000:00:03.0\n"])
def test_look_up_refuses_what_is_no_address(kernel: FakeKernel, text: str) -> None:
    with pytest.raises(UsageError, match="is not a PCI address"):
        look_up(text, kernel)


def test_look_up_names_what_is_missing_or_foreign(kernel: FakeKernel) -> None:
    kernel.add("0000:00:06.0", 0x10D3, vendor=0x8086, driver="e1000")
    with pytest.raises(UsageError, match="no such PCI function") as caught:
        look_up("00:1f.0", kernel)
    assert caught.value.where == "0000:00:1f.0"
    with pytest.raises(UsageError, match="8086:10d3 is not a virtio function"):
        look_up("00:06.0", kernel)


def test_a_legacy_function_cannot_be_driven(kernel: FakeKernel) -> None:
    kernel.add(NET, 0x1000, legacy=True)
    function = look_up(NET, kernel)
    assert function.kind == "legacy"
    assert "legacy-only" in function.problem
    kernel.user = 1000
    assert look_up(NET, kernel).kind == "transitional", "64 bytes of configuration space do not tell"


def test_a_transitional_id_without_a_table_entry_takes_its_type_from_the_subsystem(
    kernel: FakeKernel,
) -> None:
    kernel.add(NET, 0x1030)
    kernel.files[f"/sys/bus/pci/devices/{NET}/subsystem_device"] = "0x0004"
    assert look_up(NET, kernel).name == "rng"


def test_no_iommu(kernel: FakeKernel) -> None:
    kernel.add(NET, group=None)
    function = look_up(NET, kernel)
    assert function.group is None
    assert "no IOMMU group" in function.problem
    assert "intel_iommu=on" in function.hint


def test_the_iommu_is_left_to_the_kernel(kernel: FakeKernel) -> None:
    kernel.add(NET, 0x1040 + 23, group=None)
    assert "the IOMMU itself" in look_up(NET, kernel).problem


def test_a_group_made_up_by_vfio_is_no_iommu(kernel: FakeKernel) -> None:
    kernel.add(NET)
    kernel.files["/sys/kernel/iommu_groups/7/name"] = "vfio-noiommu"
    assert look_up(NET, kernel).group is None


def test_blockers_are_named_with_the_commands_that_free_the_group(kernel: FakeKernel) -> None:
    kernel.add(NET)
    kernel.add("0000:00:03.1", 0x1044)
    kernel.add("0000:00:03.2", 0x10D3, vendor=0x8086, driver="e1000")
    kernel.add("0000:00:01.0", 0x000C, vendor=0x1B36, driver="pcieport", class_code=0x060400)
    kernel.add("0000:00:03.3", 0x1044, driver=None)
    function = look_up(NET, kernel)
    assert not function.drivable
    assert "0000:00:03.1 (virtio-rng, driver virtio-pci)" in function.problem
    assert "0000:00:03.2 (8086:10d3, driver e1000)" in function.problem
    assert "`guestpv bind 0000:00:03.1`" in function.hint
    assert "`driverctl set-override 0000:00:03.2 vfio-pci`" in function.hint
    assert [m.address for m in function.blockers] == ["0000:00:03.1", "0000:00:03.2"]
    assert {m.what for m in function.members} == {"virtio-rng", "8086:10d3", "bridge"}


def test_root_filesystem_on_a_partition(kernel: FakeKernel) -> None:
    add_disk(kernel)
    mount(kernel, "254:1", "/", "ext4", "/dev/root")
    function = look_up(BLK, kernel)
    assert [(use.kind, use.detail) for use in function.uses] == [("root", "vda1 carries the root filesystem")]
    assert "vda1 carries the root filesystem" in function.problem
    assert f"guestpv bind --force {BLK}" in function.hint


def test_mount_through_device_mapper_and_with_spaces(kernel: FakeKernel) -> None:
    add_disk(kernel)
    kernel.links["/sys/class/block/vda2/holders/dm-0"] = "../../dm-0"
    kernel.files["/sys/class/block/dm-0/dev"] = "253:0"
    kernel.links["/sys/class/block/dm-0/holders/dm-1"] = "../../dm-1"
    kernel.files["/sys/class/block/dm-1/dev"] = "253:1"
    mount(kernel, "253:1", "/srv/my\\040data", "ext4", "/dev/mapper/x")
    assert [use.detail for use in look_up(BLK, kernel).uses] == [
        "dm-1 carries the filesystem at /srv/my data"
    ]


def test_mount_with_a_number_of_its_own_is_found_by_its_source(kernel: FakeKernel) -> None:
    add_disk(kernel)
    mount(kernel, "0:41", "/home", "btrfs", "/dev/vda2")
    mount(kernel, "0:42", "/other", "btrfs", "/dev/vdb2")
    assert [use.kind for use in look_up(BLK, kernel).uses] == ["mount"]


def test_swap(kernel: FakeKernel) -> None:
    add_disk(kernel)
    kernel.files["/proc/swaps"] = "Filename Type Size\n/dev/vda2 partition 1024\n/swapfile file 12\n"
    kernel.device_numbers["/dev/vda2"] = (254, 2)
    assert [use.kind for use in look_up(BLK, kernel).uses] == ["swap"]


def test_a_disk_that_the_kernel_claims_out_of_sight(kernel: FakeKernel) -> None:
    add_disk(kernel)
    assert look_up(BLK, kernel).uses == ()
    kernel.busy_disks.add("vda")
    assert [use.kind for use in look_up(BLK, kernel).uses] == ["claimed"]


def test_another_disk_is_not_ours(kernel: FakeKernel) -> None:
    add_disk(kernel)
    mount(kernel, "8:1", "/", "ext4", "/dev/sda1")
    assert look_up(BLK, kernel).drivable


@pytest.mark.parametrize("upper", [False, True])
def test_default_route(kernel: FakeKernel, upper: bool) -> None:
    kernel.add(NET)
    add_link(kernel, "eth0")
    name = "eth0"
    if upper:
        kernel.links["/sys/class/net/eth0/upper_br0"] = "../br0"
        name = "br0"
    kernel.files["/proc/net/route"] = (
        f"Iface Destination Gateway\nlo 0000007F 0 1 0 0 0 000000FF 0 0 0\n"
        f"{name} 00000000 0202000A 0003 0 0 0 00000000 0 0 0\n"
    )
    assert [use.detail for use in look_up(NET, kernel).uses] == [f"{name} carries the default route"]


def test_default_route_of_ipv6(kernel: FakeKernel) -> None:
    kernel.add(NET)
    add_link(kernel, "eth0")
    zero = "0" * 32
    kernel.files["/proc/net/ipv6_route"] = (
        f"{zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200 lo\n"
        f"{zero} 00 {zero} 00 fe80{'0' * 28} 00000400 1 0 3 eth0\n"
    )
    assert [use.kind for use in look_up(NET, kernel).uses] == ["route"]


def test_an_ordinary_route_is_no_use(kernel: FakeKernel) -> None:
    kernel.add(NET)
    add_link(kernel, "eth0")
    kernel.files["/proc/net/route"] = "Iface\neth0 0000000A 0 1 0 0 0 00FFFFFF 0 0 0\n"
    assert look_up(NET, kernel).drivable


def test_a_function_without_kernel_driver_is_not_asked_for_uses(kernel: FakeKernel) -> None:
    add_disk(kernel)
    mount(kernel, "254:1", "/", "ext4", "/dev/vda1")
    kernel.functions[BLK].driver = None
    del kernel.links[f"/sys/bus/pci/devices/{BLK}/driver"]
    assert look_up(BLK, kernel).uses == ()


def test_9p_shares_are_told_apart_by_their_tag(kernel: FakeKernel) -> None:
    kernel.add(NET, 0x1049)
    kernel.files[f"/sys/bus/pci/devices/{NET}/virtio0/mount_tag"] = "work"
    mount(kernel, "0:31", "/mnt", "9p", "other")
    assert look_up(NET, kernel).uses == ()
    mount(kernel, "0:32", "/w", "9p", "work")
    assert [use.kind for use in look_up(NET, kernel).uses] == ["mount"]


def test_a_share_may_be_a_layer_of_an_overlay_root(kernel: FakeKernel) -> None:
    kernel.add(NET, 0x105A)
    mount(kernel, "0:30", "/", "overlay", "overlay")
    assert [use.kind for use in look_up(NET, kernel).uses] == ["root"]


def test_the_console(kernel: FakeKernel) -> None:
    kernel.add(NET, 0x1043)
    kernel.files["/sys/class/tty/console/active"] = "ttyS0"
    assert look_up(NET, kernel).uses == ()
    kernel.files["/sys/class/tty/console/active"] = "ttyS0 hvc0"
    assert [use.kind for use in look_up(NET, kernel).uses] == ["console"]


def test_a_port_that_a_process_has_open(kernel: FakeKernel) -> None:
    kernel.add(NET, 0x1043)
    link = f"../../devices/pci0000:00/{NET}/virtio0/virtio-ports/vport0p1"
    kernel.links["/sys/class/virtio-ports/vport0p1"] = link
    kernel.links["/proc/33/fd/3"] = "/dev/null"
    assert look_up(NET, kernel).uses == ()
    kernel.links["/proc/33/fd/4"] = "/dev/vport0p1"
    kernel.files["/proc/33/comm"] = "qemu-ga"
    assert [use.detail for use in look_up(NET, kernel).uses] == ["vport0p1 is open in 33 (qemu-ga)"]


# One owner


def test_runtime_directory_is_chosen_by_user_and_environment(kernel: FakeKernel) -> None:
    assert runtime_directory(kernel) == "/run/guestpv"
    kernel.env["RUNTIME_DIRECTORY"] = "/tmp/unit:/tmp/other"
    assert runtime_directory(kernel) == "/tmp/unit"
    kernel.env = {"XDG_RUNTIME_DIR": "/tmp/user"}
    kernel.mkdir("/tmp/user", 0o700)
    kernel.user = 1000
    assert runtime_directory(kernel) == "/tmp/user/guestpv"
    kernel.env = {}
    assert runtime_directory(kernel) == "/tmp/guestpv-1000"


def test_a_runtime_directory_of_somebody_else_is_refused(kernel: FakeKernel) -> None:
    kernel.user = 1001
    kernel.mkdir("/tmp/guestpv-1000", 0o700)
    kernel.user = 1000
    with pytest.raises(AccessDenied, match="must be a directory of yours"):
        runtime_directory(kernel)
    kernel.env["RUNTIME_DIRECTORY"] = "/run/x"
    with pytest.raises(AccessDenied, match="cannot make"):
        runtime_directory(kernel)


def test_a_second_owner_is_refused_with_the_pid_of_the_first(kernel: FakeKernel) -> None:
    first = FunctionLock(NET, system=kernel)
    with pytest.raises(Refused, match="process 4321 drives this function already"):
        FunctionLock(NET, system=kernel)
    FunctionLock(BLK, system=kernel).close()
    first.close()
    first.close()
    FunctionLock(NET, system=kernel).close()
    assert kernel.leaks()["descriptors"] == []


def test_a_stale_lock_file_is_harmless(kernel: FakeKernel) -> None:
    FunctionLock(NET, system=kernel)
    kernel.die()
    FunctionLock(NET, system=kernel).close()


def test_holders_of_a_node(kernel: FakeKernel) -> None:
    for pid, node in ((12, "/dev/vfio/7"), (13, "/dev/null")):
        kernel.links[f"/proc/{pid}/fd/3"] = node
        kernel.links[f"/proc/{pid}/fd/4"] = "/dev/tty"
        kernel.files[f"/proc/{pid}/comm"] = "python3"
    assert holders("/dev/vfio/7", kernel) == ["12 (python3)"]
