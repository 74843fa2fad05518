"""Our models as devices of a real guest: QEMU attaches them by vfio-user, the guest's own drivers use them.

The client is the newest QEMU of Debian's backports, unpacked beside the machine's own.
"""

import hashlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import strictguest
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.balloon import Balloon
from guestpv.devices.models.net import Net
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestvm import Machine
from strictguest import BACKEND, GUEST_ADDRESS, MEMORY, OUR_ADDRESS, Neighbour, attachment

# The first time a tree is downloaded and images are built.
pytestmark = pytest.mark.timeout(1800)

SLOTS = {"blk": 0x1A, "net": 0x1B, "rng": 0x1C, "balloon": 0x1D}
DISK_SIZE = 64 << 20
FILE_SIZE = 24 << 20
in_each_world = pytest.mark.parametrize(
    ("kernel", "world"),
    [("6.1", ("none", "off")), ("6.12", ("intel", "on"))],
    ids=lambda value: value if isinstance(value, str) else "iommu={}-packed={}".format(*value),
    indirect=True,
)
"""Kernel, vIOMMU, packed rings."""


@pytest.fixture(scope="module")
def newest_qemu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest QEMU of Debian's backports."""
    return strictguest.newest_qemu(tmp_path_factory.mktemp("qemu"))


class World:
    """A guest whose block, network, entropy and balloon device are ours."""

    def __init__(
        self, vm: Machine, iommu: str, functions: dict[str, SoftwareFunction], neighbour: Neighbour
    ) -> None:
        self.vm = vm
        self.iommu = iommu
        self.functions = functions
        self.neighbour = neighbour

    def address(self, name: str) -> str:
        """PCI address in the guest."""
        return f"0000:00:{SLOTS[name]:02x}.0"

    def sh(self, script: str, timeout: float = 300) -> str:
        """Run a shell script in the guest; what it printed."""
        return self.vm.run(f"set -e\n{script}", timeout).check().stdout

    def restart_driver(self, name: str) -> None:
        """Let the guest's driver begin anew, so that nothing the firmware did is on record."""
        driver = "/sys/bus/pci/drivers/virtio-pci/"
        self.sh(f"echo {self.address(name)} > {driver}unbind")
        self.functions[name].journal.clear()
        self.sh(f"echo {self.address(name)} > {driver}bind")

    def device(self, name: str, kind: str) -> str:
        """Name of the block device or network link."""
        return self.sh(f"ls /sys/bus/pci/devices/{self.address(name)}/virtio*/{kind}").strip()

    def findings(self, name: str) -> list[str]:
        """What the guest's driver did wrong since it was restarted."""
        return [str(finding) for finding in self.functions[name].findings]


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, kernel: str, newest_qemu: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    iommu, packed = request.param
    home = tmp_path_factory.mktemp("world")
    disk = home / "disk"
    disk.touch()
    models = {
        "blk": f"blk?file={disk}&size={DISK_SIZE}&packed={packed}",
        "net": f"net?packed={packed}",
        "rng": f"rng?msix=off&packed={packed}",
        # Linux numbers the balloon's queues densely and so looks for this feature's at a wrong place.
        "balloon": f"balloon?packed={packed}&offer=-page_reporting",
    }
    functions = {name: make_function(device) for name, device in models.items()}
    model = functions["net"].model
    assert isinstance(model, Net)
    neighbour = Neighbour(model)
    with ExitStack() as stack:
        devices = []
        for name, function in functions.items():
            server = stack.enter_context(VfioUserServer(function, str(home / f"{name}.sock")))
            devices.append(attachment(server.path, SLOTS[name]))
        vm = stack.enter_context(
            Machine(
                kernel,
                devices=devices,
                objects=[BACKEND],
                machine="q35,kernel-irqchip=split,memory-backend=ram",
                memory=MEMORY,
                iommu=iommu,
                qemu=str(newest_qemu),
                limit=3600,
            )
        )
        yield World(vm, iommu, functions, neighbour)


def push_tools(vm: Machine) -> str:
    """Give the guest this machine's mkfs.ext4 and e2fsck; the words to put before their names."""
    programs = [shutil.which(name, path="/usr/sbin:/sbin") for name in ("mkfs.ext4", "e2fsck")]
    assert all(programs), "mkfs.ext4 or e2fsck is missing: apt-get install e2fsprogs"
    listing = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=True).stdout
    libraries = sorted(set(re.findall(r"=> (/\S+/lib(?:blkid|com_err|e2p|ext2fs|uuid)\S*)", listing)))
    vm.run("mkdir -p /tmp/tools").check()
    for path in map(Path, [*map(str, programs), *libraries]):
        vm.write_file(f"/tmp/tools/{path.name}", path.read_bytes(), 0o755)
    return "LD_LIBRARY_PATH=/tmp/tools /tmp/tools/"


@in_each_world
def test_a_filesystem_on_our_disk(world: World) -> None:
    tools = push_tools(world.vm)
    world.restart_driver("blk")
    disk = f"/dev/{world.device('blk', 'block')}"
    content = hashlib.sha256(b"guestpv").digest() * (FILE_SIZE // 32)
    world.vm.write_file("/tmp/content", content)
    world.sh(
        f"""
        {tools}mkfs.ext4 -q {disk}
        mkdir -p /mnt
        mount -t ext4 {disk} /mnt
        cp /tmp/content /mnt/one
        mkdir /mnt/many
        for n in $(seq 200); do head -c $((n * 100)) /tmp/content > /mnt/many/$n; done
        rm /mnt/many/1*
        umount /mnt
        """,
        600,
    )
    assert "clean" in world.sh(f"{tools}e2fsck -f -n {disk} 2>&1 && echo clean")
    world.restart_driver("blk")
    sums = world.sh(
        f"mount -t ext4 {disk} /mnt; sha256sum /mnt/one /mnt/many/99; ls /mnt/many | wc -l; umount /mnt"
    )
    one, many, count = sums.splitlines()
    assert one.split()[0] == hashlib.sha256(content).hexdigest()
    assert many.split()[0] == hashlib.sha256(content[:9900]).hexdigest()
    assert int(count) == 200 - len([n for n in range(1, 201) if str(n).startswith("1")])
    interrupts = world.sh("cat /proc/interrupts")
    assert re.search(r"PCI-MSI.*virtio\d+-req\.0", interrupts)
    assert world.findings("blk") == []


@in_each_world
def test_ping_over_our_network(world: World) -> None:
    world.restart_driver("net")
    link = world.device("net", "net")
    world.sh(f"ip link set {link} up; ip address add {GUEST_ADDRESS}/24 dev {link}")
    before = world.neighbour.answered
    said = world.sh(f"ping -c 20 -i 0.05 -s 1400 {OUR_ADDRESS}; ping -c 3 -s 9 {OUR_ADDRESS}")
    assert said.count(" 0% packet loss") == 2
    assert world.neighbour.answered == before + 23
    world.sh(f"ip address flush dev {link}; ip link set {link} down")
    assert world.findings("net") == []


@in_each_world
def test_entropy_by_intx(world: World) -> None:
    world.restart_driver("rng")
    data = world.sh("dd if=/dev/hwrng bs=512 count=8 2>/dev/null | hexdump -v -e '1/1 \"%02x\"'")
    assert len(data) == 2 * 4096
    assert len(set(re.findall("..", data))) > 200
    assert world.functions["rng"].device.queues[0].interrupts > 0
    assert not world.functions["rng"].interrupts.enabled
    assert world.findings("rng") == []


EARLY_KICK = "queue 2: DRV-INIT-13: notification before DRIVER_OK"
"""What Linux's balloon driver does with its statistics queue."""


@in_each_world
def test_the_balloon_follows_its_target_or_reaches_nothing(world: World) -> None:
    world.restart_driver("balloon")
    model = world.functions["balloon"].model
    assert isinstance(model, Balloon)
    if world.iommu != "none":
        # Linux does without ACCESS_PLATFORM here, so it uses physical addresses where there is an IOMMU.
        model.set_target(4096)
        wait_for(lambda: any("not mapped for this device" in text for text in world.findings("balloon")), 300)
        assert not model.pages
        return
    for target in (4096, 0):
        model.set_target(target)
        wait_for(lambda: model.config["actual"] == target, 300)  # noqa: B023
        assert len(model.pages) == target
    assert all(text.endswith(EARLY_KICK) for text in world.findings("balloon"))


@in_each_world
def test_a_function_level_reset_from_the_guest(world: World) -> None:
    address = world.address("rng")
    function = world.functions["rng"]
    world.sh(f"echo {address} > /sys/bus/pci/drivers/virtio-pci/unbind")
    function.journal.clear()
    world.sh(f"echo 1 > /sys/bus/pci/devices/{address}/reset")
    assert function.device.status == 0
    world.sh(f"echo {address} > /sys/bus/pci/drivers/virtio-pci/bind")
    assert len(world.sh("dd if=/dev/hwrng bs=16 count=1 2>/dev/null | hexdump -v -e '1/1 \"%02x\"'")) == 32


BOOT_SECTOR = bytes.fromhex(
    "b80102"  # mov ax, 0x0201: read one sector
    "b90200"  # mov cx, 2: cylinder 0, sector 2
    "b600"  # mov dh, 0
    "31db"  # xor bx, bx
    "8ec3"  # mov es, bx
    "8edb"  # mov ds, bx
    "bb007e"  # mov bx, 0x7e00
    "cd13"  # int 0x13
    "be007e"  # mov si, 0x7e00
    "ac"  # lodsb
    "84c0"  # test al, al
    "7404"  # jz to the end
    "e6e9"  # out 0xe9, al
    "ebf7"  # jmp to lodsb
    "f4"  # hlt
    "ebfd"  # jmp to hlt
)
GREETING = b"the second sector came from our disk\n"


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


def test_firmware_boots_from_our_disk_again_and_again(newest_qemu: Path, tmp_path: Path) -> None:
    """SeaBIOS has RAM mapped in other pieces while its ring lives, then reads on; each QEMU is killed."""
    disk = tmp_path / "disk"
    sector = BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa"
    disk.write_bytes((sector + GREETING).ljust(1 << 20, b"\0"))
    said: list[str] = []
    function = make_function(f"blk?file={disk}")
    console = tmp_path / "console"
    with VfioUserServer(function, str(tmp_path / "disk.sock"), tell=said.append) as server:
        for _ in range(2):
            console.unlink(missing_ok=True)
            line = [
                str(newest_qemu),
                "-accel",
                "tcg",
                "-machine",
                "q35,memory-backend=ram",
                "-m",
                f"{MEMORY}M",
            ]
            line += ["-object", BACKEND, "-nodefaults", "-display", "none", "-no-reboot"]
            line += ["-device", attachment(server.path, 5, bootindex=1)]
            line += ["-chardev", f"file,id=console,path={console}"]
            line += ["-device", "isa-debugcon,iobase=0xe9,chardev=console"]
            qemu = subprocess.Popen(line, stdin=subprocess.DEVNULL)
            try:
                wait_for(lambda: console.exists() and console.read_bytes() == GREETING, 300)
            finally:
                qemu.kill()
                qemu.wait()
            wait_for(lambda: server.connection is None, 120)
            assert function.device.status == 0
            assert function.dma.windows() == ()
    assert any("goes on: its memory is mapped again" in text for text in said)
