"""A kernel in a box, behind ``System``: sysfs, the VFIO ioctls as a state machine, real eventfds and memory.

Regions of a device file are a sparse memfd at VFIO's own offsets, so that mapping them, reading and writing
them are the real calls. What leaks can be counted: descriptors, mappings, DMA mappings.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import socket
import stat
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guestpv.system import System
from guestpv.vfio import abi, guardian
from guestpv.vfio.ways import PARAMETER

BAR_SIZES = {1: 4096, 4: 16384}
CONFIG_SIZE = 4096
REGION_SHIFT = 40
MEMLOCK = 8 << 20
USER = 1000


def os_error(number: int, what: str = "") -> OSError:
    return OSError(number, os.strerror(number), what)


@dataclass(eq=False)
class FakeFunction:
    address: str
    device: int
    group: int | None
    driver: str | None
    home: str | None
    """Driver that matches it without an override."""
    config: bytearray
    flags: int
    memory: int
    """The memfd behind its device file."""
    irqs: dict[int, tuple[int, int]]
    """Interrupt index -> (count, flags)."""
    vendor: int = 0x1AF4
    bars: dict[int, int] = field(default_factory=lambda: dict(BAR_SIZES))
    cdev: str | None = None
    """Name of its character device, while vfio-pci has it."""
    iommufd: FakeIommufd | None = None
    made_up: int | None = None
    """The group that VFIO made for it in no-IOMMU mode."""
    sparse: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    unmappable: set[int] = field(default_factory=set)
    override: str = ""
    triggers: dict[int, list[int]] = field(default_factory=dict)
    """Interrupt index -> our duplicates of the eventfds."""
    resets: int = 0


@dataclass(eq=False)
class FakeContainer:
    group: int | None = None
    kind: int | None = None
    maps: dict[int, tuple[int, int]] = field(default_factory=dict)
    """I/O virtual address -> (CPU address, size)."""


@dataclass(eq=False)
class FakeIommufd:
    ioas: int = 0
    maps: dict[int, tuple[int, int]] = field(default_factory=dict)


class FakeKernel(System):
    """See the module. Tests change its public attributes to make machines and failures."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {
            "/proc/self/mountinfo": "",
            "/proc/swaps": "Filename",
            "/proc/net/route": "x",
        }
        self.links: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.functions: dict[str, FakeFunction] = {}
        self.drivers = {"virtio-pci", "vfio-pci", "pcieport", "e1000"}
        self.loadable: set[str] = set()
        """Modules that are not loaded, but can be."""
        self.absent = {"iommufd"}
        """Modules that the machine does not have."""
        self.user = 0
        self.env: dict[str, str] = {}
        self.users = {"alice": USER}
        self.owners: dict[str, int] = {}
        self.memlock = MEMLOCK
        self.ranges = [(0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)]
        self.page_sizes = 0x40201000
        self.dma_limit = 65535
        self.huge_pages = 0
        self.has_cdevs = False
        """Whether it has iommufd and a character device for each function."""
        self.frames_shown = True
        self.raw_io = True
        self.guardians: list[threading.Thread] = []
        self.interrupt_remapping = True
        self.extensions = {abi.TYPE1_IOMMU, abi.TYPE1v2_IOMMU}
        self.api_version = abi.API_VERSION
        self.slow_driver = 0
        """How many looks at the clock pass until a driver is bound by a probe."""
        self.vfio_takes = True
        self.busy_disks: set[str] = set()
        self.device_numbers: dict[str, tuple[int, int]] = {}
        self.log: list[str] = []
        self.commands: list[list[str]] = []
        self.nodes = {"/dev/vfio/vfio": 0}
        """Device node -> owner."""
        self.open_fds: dict[int, tuple[str, Any]] = {}
        self.mappings: dict[int, tuple[int, FakeFunction | None]] = {}
        self.clock = 0.0
        self._directories = {"/run", "/tmp"}
        self._locks: dict[str, int] = {}

    # Making a machine

    def add(
        self,
        address: str,
        device: int = 0x1041,
        *,
        group: int | None = 7,
        driver: str | None = "virtio-pci",
        reset: bool = True,
        msix: int = 4,
        vendor: int = 0x1AF4,
        class_code: int = 0x020000,
        legacy: bool = False,
        home: str | None = "virtio-pci",
    ) -> FakeFunction:
        """A virtio function (or another one, by ``vendor``), bound to ``driver``."""
        config = bytearray(CONFIG_SIZE)
        config[0:4] = vendor.to_bytes(2, "little") + device.to_bytes(2, "little")
        config[0x3D] = 1
        if not legacy:
            config[0x06] = 0x10
            config[0x34] = 0x40
            for number, kind in enumerate((1, 2, 3, 4)):
                at = 0x40 + 0x14 * number
                following = at + 0x14 if kind < 4 else 0
                config[at : at + 5] = bytes((9, following, 20 if kind == 2 else 16, kind, 4))
                config[at + 8 : at + 16] = (0x1000 * number).to_bytes(4, "little") + (0x1000).to_bytes(
                    4, "little"
                )
        intx = abi.IRQ_INFO_EVENTFD | abi.IRQ_INFO_MASKABLE | abi.IRQ_INFO_AUTOMASKED
        msi = abi.IRQ_INFO_EVENTFD | abi.IRQ_INFO_NORESIZE
        memory = os.memfd_create(address)
        os.ftruncate(memory, 9 << REGION_SHIFT)
        function = FakeFunction(
            address,
            device,
            group,
            None,
            home,
            config,
            abi.DEVICE_FLAGS_PCI | (abi.DEVICE_FLAGS_RESET if reset else 0),
            memory,
            {0: (1, intx), 1: (0, msi), 2: (msix, msi), 3: (1, msi), 4: (1, msi)},
            vendor,
        )
        os.pwrite(memory, config, abi.PCI_CONFIG_REGION_INDEX << REGION_SHIFT)
        self.functions[address] = function
        root = f"/sys/bus/pci/devices/{address}"
        for name, value in (
            ("vendor", vendor),
            ("device", device),
            ("subsystem_device", 0x1100 if device >= 0x1040 else 1),
            ("class", class_code),
        ):
            self.files[f"{root}/{name}"] = f"{value:#06x}"
        self.files[f"{root}/driver_override"] = "(null)"
        self.blobs[f"{root}/config"] = bytes(config[:256])
        if group is not None:
            self.links[f"{root}/iommu_group"] = f"../../../kernel/iommu_groups/{group}"
            self.links[f"/sys/kernel/iommu_groups/{group}/devices/{address}"] = f"../../../{address}"
        if driver:
            self._attach(function, driver)
        return function

    def fire(self, address: str, index: int, vector: int = 0) -> None:
        """The device raises an interrupt."""
        os.eventfd_write(self.functions[address].triggers[index][vector], 1)

    def containers(self) -> list[FakeContainer]:
        return [thing for kind, thing in self.open_fds.values() if kind == "container"]

    def iommufds(self) -> list[FakeIommufd]:
        return [thing for kind, thing in self.open_fds.values() if kind == "iommufd"]

    def dma_maps(self) -> dict[int, tuple[int, int]]:
        spaces = [*self.containers(), *self.iommufds()]
        return {iova: where for space in spaces for iova, where in space.maps.items()}

    def add_iommufd(self) -> None:
        """From now on it is a kernel with iommufd and VFIO_DEVICE_CDEV."""
        self.has_cdevs = True
        self.absent.discard("iommufd")
        self.nodes["/dev/iommu"] = 0
        for function in self.functions.values():
            if function.driver == "vfio-pci":
                self._make_nodes(function)

    def add_noiommu(self, enabled: bool = True) -> None:
        """From now on it is a kernel with VFIO_NOIOMMU."""
        self.files[PARAMETER] = "Y" if enabled else "N"

    def leaks(self) -> dict[str, Any]:
        """What is still held; all empty after everything was closed."""
        return {
            "descriptors": [kind for kind, _ in self.open_fds.values()],
            "mappings": list(self.mappings),
            "dma": self.dma_maps(),
        }

    def die(self) -> None:
        """``kill -9`` for whoever used this kernel: every descriptor and mapping goes."""
        for fd in list(self.open_fds):
            self.close(fd)
        for pointer, (size, function) in list(self.mappings.items()):
            if function is not None:
                self.munmap(pointer, size)

    # Drivers

    def _attach(self, function: FakeFunction, driver: str) -> None:
        function.driver = driver
        self.links[f"/sys/bus/pci/devices/{function.address}/driver"] = (
            f"../../../../bus/pci/drivers/{driver}"
        )
        if driver == "vfio-pci":
            self._make_nodes(function)
        self.log.append(f"{driver} takes {function.address}")

    def _make_nodes(self, function: FakeFunction) -> None:
        """What VFIO makes when it takes a function."""
        number = int(function.address[-4:-2], 16) * 8 + int(function.address[-1])
        root = f"/sys/bus/pci/devices/{function.address}"
        if function.group is not None:
            self.nodes.setdefault(f"/dev/vfio/{function.group}", 0)
        elif self.files.get(PARAMETER) == "Y":
            group = function.made_up = 100 + number
            self.links[f"{root}/iommu_group"] = f"../../../kernel/iommu_groups/{group}"
            groups = f"/sys/kernel/iommu_groups/{group}"
            self.links[f"{groups}/devices/{function.address}"] = f"../../../{function.address}"
            self.files[f"{groups}/name"] = "vfio-noiommu"
            self.nodes[f"/dev/vfio/noiommu-{group}"] = 0
        if self.has_cdevs and function.group is not None:
            function.cdev = f"vfio{number}"
            self.files[f"{root}/vfio-dev/{function.cdev}/dev"] = f"243:{number}"
            self.nodes[f"/dev/vfio/devices/{function.cdev}"] = 0

    def _drop_nodes(self, function: FakeFunction) -> None:
        root = f"/sys/bus/pci/devices/{function.address}"
        if function.cdev is not None:
            del self.files[f"{root}/vfio-dev/{function.cdev}/dev"]
            del self.nodes[f"/dev/vfio/devices/{function.cdev}"]
            function.cdev = None
        if function.made_up is not None:
            groups = f"/sys/kernel/iommu_groups/{function.made_up}"
            del self.links[f"{root}/iommu_group"], self.links[f"{groups}/devices/{function.address}"]
            del self.files[f"{groups}/name"], self.nodes[f"/dev/vfio/noiommu-{function.made_up}"]
            function.made_up = None

    def remove(self, address: str) -> None:
        """Hot-unplug a function."""
        self._detach(self.functions.pop(address))
        root = f"/sys/bus/pci/devices/{address}"
        for table in (self.files, self.links, self.blobs):
            for path in [path for path in table if path == root or path.startswith(f"{root}/")]:
                del table[path]

    def _detach(self, function: FakeFunction) -> None:
        if function.driver is None:
            return
        self.log.append(f"{function.driver} loses {function.address}")
        function.driver = None
        del self.links[f"/sys/bus/pci/devices/{function.address}/driver"]
        self._drop_nodes(function)
        others = [f for f in self.functions.values() if f.group == function.group and f.driver == "vfio-pci"]
        if not others:
            self.nodes.pop(f"/dev/vfio/{function.group}", None)

    def _probe(self, function: FakeFunction) -> None:
        wanted = function.override or function.home
        if function.driver or wanted is None or wanted not in self.drivers:
            return
        if wanted == "vfio-pci" and not self.vfio_takes:
            return
        if wanted != "vfio-pci" and self.slow_driver:
            return
        self._attach(function, wanted)

    def write_text(self, path: str, text: str) -> None:
        parts = path.split("/")
        if path.startswith("/sys") and self.user != 0:
            raise os_error(errno.EACCES, path)
        if path == "/sys/bus/pci/drivers_probe":
            self._probe(self.functions[text])
        elif parts[-1] == "driver_override":
            function = self.functions[parts[-2]]
            function.override = text.strip()
            self.files[path] = function.override or "(null)"
        elif parts[-1] == "unbind":
            function = self.functions[text]
            driver = parts[-2] if parts[-2] != "driver" else function.driver
            if function.driver is None or function.driver != driver:
                raise os_error(errno.ENODEV, path)
            if any(kind == "device" and thing is function for kind, thing in self.open_fds.values()):
                raise AssertionError("unbinding a function whose device file is open hangs for ever")
            self._detach(function)
        else:
            raise os_error(errno.ENOENT, path)

    # Paths

    def _is_directory(self, path: str) -> bool:
        known = [*self.files, *self.links, *self.blobs, *self.nodes]
        return path in self._directories or any(name.startswith(path + "/") for name in known)

    def exists(self, path: str) -> bool:
        if path.startswith("/sys/bus/pci/drivers/"):
            return path.rpartition("/")[2] in self.drivers
        if path.startswith("/sys/module/"):
            return path.rpartition("/")[2] not in self.loadable | self.absent
        return path in self.files or path in self.links or path in self.nodes or self._is_directory(path)

    def read_text(self, path: str) -> str:
        if path not in self.files:
            raise os_error(errno.ENOENT, path)
        return self.files[path].rstrip()

    def listdir(self, path: str) -> list[str]:
        if not self._is_directory(path):
            raise os_error(errno.ENOENT, path)
        known = (*self.files, *self.links, *self.blobs, *self.nodes)
        return sorted({name[len(path) + 1 :].split("/")[0] for name in known if name.startswith(path + "/")})

    def readlink(self, path: str) -> str:
        if path not in self.links:
            raise os_error(errno.ENOENT, path)
        return self.links[path]

    def stat(self, path: str) -> os.stat_result:
        if path in self._directories:
            return os.stat_result((stat.S_IFDIR | 0o700, 0, 0, 2, self.owners.get(path, 0), 0, 0, 0, 0, 0))
        if path not in self.device_numbers:
            raise os_error(errno.ENOENT, path)
        return types.SimpleNamespace(st_rdev=os.makedev(*self.device_numbers[path]))  # type: ignore[return-value]

    def mkdir(self, path: str, mode: int) -> None:
        assert mode == 0o700
        if path in self._directories:
            raise os_error(errno.EEXIST, path)
        parent = path.rpartition("/")[0]
        if self.user and parent == "/run":
            raise os_error(errno.EACCES, path)
        self._directories.add(path)
        self.owners[path] = self.user

    def rename(self, source: str, target: str) -> None:
        self.files[target] = self.files.pop(source)

    def unlink(self, path: str) -> None:
        if path not in self.files:
            raise os_error(errno.ENOENT, path)
        del self.files[path]

    def chown(self, path: str, uid: int) -> None:
        if path not in self.nodes:
            raise os_error(errno.ENOENT, path)
        if self.user:
            raise os_error(errno.EPERM, path)
        self.nodes[path] = uid

    # Descriptors

    def _new(self, kind: str, thing: Any, fd: int | None = None) -> int:
        fd = os.memfd_create(kind) if fd is None else fd
        self.open_fds[fd] = (kind, thing)
        return fd

    def open(self, path: str, flags: int = os.O_RDWR, mode: int = 0o600) -> int:
        if path in self.blobs:
            fd = self._new("file", path)
            os.write(fd, self.blobs[path] if self.user == 0 else self.blobs[path][:64])
            return fd
        if path.startswith("/dev/") and path not in self.nodes:
            if flags & os.O_EXCL and path[5:] in self.busy_disks:
                raise os_error(errno.EBUSY, path)
            raise os_error(errno.ENOENT, path)
        if path == "/dev/vfio/vfio":
            return self._new("container", FakeContainer())
        if path == "/dev/iommu" or path.startswith("/dev/vfio/devices/"):
            if self.nodes[path] != self.user != 0:
                raise os_error(errno.EACCES, path)
            if path == "/dev/iommu":
                return self._new("iommufd", FakeIommufd())
            function = next(f for f in self.functions.values() if path.endswith(f"/{f.cdev}"))
            return self._new("device", function, os.dup(function.memory))
        if path.startswith("/dev/vfio/noiommu-"):
            group = int(path.rpartition("-")[2])
            if not self.raw_io:
                raise os_error(errno.EPERM, path)
            if any(kind == "group" and thing == group for kind, thing in self.open_fds.values()):
                raise os_error(errno.EBUSY, path)
            return self._new("group", group)
        if path.startswith("/dev/vfio/"):
            group = int(path.rpartition("/")[2])
            if self.nodes[path] != self.user != 0:
                raise os_error(errno.EACCES, path)
            if self._group_is_busy(group):
                raise os_error(errno.EBUSY, path)
            return self._new("group", group)
        if flags & os.O_CREAT:
            if path.rpartition("/")[0] not in self._directories:
                raise os_error(errno.ENOENT, path)
            assert mode == 0o600
            fd = self._new("state", path)
            self.pwrite(fd, b"" if flags & os.O_TRUNC else self.files.get(path, "").encode(), 0)
            return fd
        raise os_error(errno.ENOENT, path)

    def _group_is_busy(self, group: int) -> bool:
        for kind, thing in self.open_fds.values():
            if (kind == "group" and thing == group) or (kind == "device" and thing.group == group):
                return True
        return any(function is not None and function.group == group for _, function in self.mappings.values())

    def close(self, fd: int) -> None:
        kind, thing = self.open_fds.pop(fd)
        if kind == "device":
            self._release(thing)
        if kind == "state":
            self._locks = {path: holder for path, holder in self._locks.items() if holder != fd}
        os.close(fd)

    def _release(self, function: FakeFunction) -> None:
        function.iommufd = None
        for fds in function.triggers.values():
            for fd in fds:
                os.close(fd)
        function.triggers.clear()
        self._set_command(function, self.command(function.address) & ~0x4)
        self.log.append(f"released {function.address}")

    def command(self, address: str) -> int:
        """The PCI command register."""
        raw = os.pread(self.functions[address].memory, 2, (abi.PCI_CONFIG_REGION_INDEX << REGION_SHIFT) + 4)
        return int.from_bytes(raw, "little")

    def _set_command(self, function: FakeFunction, value: int) -> None:
        os.pwrite(
            function.memory, value.to_bytes(2, "little"), (abi.PCI_CONFIG_REGION_INDEX << REGION_SHIFT) + 4
        )

    def write(self, fd: int, data: bytes) -> int:
        return self.pwrite(fd, data, 0)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        done = super().pwrite(fd, data, offset)
        kind, path = self.open_fds[fd]
        if kind == "state":
            self.files[path] = os.pread(fd, 4096, 0).decode()
        return done

    def flock(self, fd: int) -> None:
        path = self.open_fds[fd][1]
        if path in self._locks:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked", path)
        self._locks[path] = fd

    def eventfd(self) -> int:
        return self._new("eventfd", None, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    # Memory

    def mmap(
        self,
        size: int,
        *,
        fd: int = -1,
        offset: int = 0,
        protection: int = mmap.PROT_READ | mmap.PROT_WRITE,
        flags: int = mmap.MAP_SHARED,
        address: int = 0,
    ) -> int:
        if flags & 0x40000:
            if self.huge_pages * (2 << 20) < size:
                raise os_error(errno.ENOMEM, "no huge pages")
            # A stand-in for a huge page has to be aligned like one.
            whole = super().mmap(size + (2 << 20), protection=protection, flags=flags & 0xFFFF & ~0x40000)
            pointer = -(-whole // (2 << 20)) * (2 << 20)
            self.mappings[pointer] = (size, None)
            return pointer
        pointer = super().mmap(
            size, fd=fd, offset=offset, protection=protection, flags=flags, address=address
        )
        self.mappings[pointer] = (size, self.open_fds[fd][1] if fd >= 0 else None)
        return pointer

    def huge_file(self, size: int) -> int:
        if self.huge_pages * (2 << 20) < size:
            raise os_error(errno.ENOMEM, "no huge pages")
        fd = self._new("huge", None)
        os.ftruncate(fd, size)
        return fd

    def page_frames(self, pointer: int, count: int) -> NDArray[np.uint64]:
        """No two huge pages are neighbours."""
        number = np.arange(count, dtype=np.uint64)
        first = np.uint64(0x100000 + (pointer >> 12) % 0x10000 * 1024)
        frames = first + number + number // np.uint64(512) * np.uint64(512)
        return frames if self.frames_shown else np.zeros(count, np.uint64)

    def start_daemon(self, command: Sequence[str], fd: int) -> None:
        """The guardian, as a thread of ours, which looks at the fake's command register."""
        assert command[-2] == guardian.__file__
        address = command[-1]
        theirs = socket.socket(fileno=os.dup(fd))

        def is_quiet() -> bool:
            return address not in self.functions or not self.command(address) & 4

        thread = threading.Thread(target=guardian.serve, args=(theirs, is_quiet, 0.001))
        thread.start()
        self.guardians.append(thread)

    def munmap(self, pointer: int, size: int) -> None:
        assert self.mappings[pointer][0] == size
        for start, length in self.dma_maps().values():
            assert not pointer <= start < pointer + size, "memory freed under the device"
            assert length
        super().munmap(pointer, size)
        del self.mappings[pointer]

    # Process

    def getrlimit(self, limit: int) -> tuple[int, int]:
        return (self.memlock, resource.RLIM_INFINITY) if limit == resource.RLIMIT_MEMLOCK else (0, 0)

    def getpid(self) -> int:
        return 4321

    def geteuid(self) -> int:
        return self.user

    def environ(self) -> Mapping[str, str]:
        return self.env

    def user_id(self, name: str) -> int:
        return self.users[name]

    def monotonic(self) -> float:
        self.clock += 0.5
        if self.slow_driver:
            self.slow_driver -= 1
            if not self.slow_driver:
                for function in self.functions.values():
                    self._probe(function)
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.clock += seconds

    def run(self, command: Sequence[str], timeout: float = 30.0) -> tuple[int, str]:
        self.commands.append(list(command))
        module = command[-1]
        if module not in self.loadable:
            return 1, f"modprobe: FATAL: Module {module} not found"
        self.loadable.discard(module)
        self.drivers.add(module)
        return 0, ""

    def pci_addresses(self) -> list[str]:
        return sorted(self.functions)

    # VFIO

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        kind, thing = self.open_fds[fd]
        name = f"_{kind}_{request - abi.GET_API_VERSION}"
        handler = getattr(self, name, None)
        if handler is None:
            raise os_error(errno.ENOTTY, name)
        return handler(thing, argument) or 0

    def _container_0(self, container: FakeContainer, argument: int) -> int:
        return self.api_version

    def _container_1(self, container: FakeContainer, extension: int) -> int:
        return int(extension in self.extensions)

    def _container_2(self, container: FakeContainer, kind: int) -> None:
        if container.group is None:
            raise os_error(errno.ENODEV)
        if kind == abi.NOIOMMU_IOMMU:
            assert any(f.made_up == container.group for f in self.functions.values())
            container.kind = kind
            return
        if not self.interrupt_remapping:
            raise os_error(errno.EPERM)
        assert kind in self.extensions
        container.kind = kind

    def _container_12(self, container: FakeContainer, reply: bytearray) -> None:
        assert container.kind is not None
        ranges = b"".join(bytes(abi.IovaRange.pack(start=low, end=high)) for low, high in self.ranges)
        size = abi.Type1Info.size + 4
        has_ranges = bool(self.ranges)
        first = bytes(abi.DmaAvail.pack(**{"header.id": abi.IOMMU_TYPE1_INFO_DMA_AVAIL, "header.version": 1,
                                           "header.next": size + 12 if has_ranges else 0,
                                           "avail": self.dma_limit}))  # fmt: skip
        second = bytes(
            abi.IovaRanges.pack(**{"header.id": 1, "header.version": 1, "nr_iovas": len(self.ranges)})
        )
        tail = bytes(4) + first + (second + ranges if has_ranges else b"")
        whole = abi.Type1Info.pack(
            tail,
            flags=abi.IOMMU_INFO_PGSIZES | abi.IOMMU_INFO_CAPS,
            iova_pgsizes=self.page_sizes,
            cap_offset=size,
        )
        self._answer(reply, whole, abi.Type1Info)

    def _answer(self, reply: bytearray, whole: bytearray, layout: abi.CStruct) -> None:
        room = abi.CStruct.unpack(layout, reply)["argsz"]
        assert room == len(reply)
        reply[:] = whole[:room]

    def _container_13(self, container: FakeContainer, request: bytearray) -> None:
        values = abi.DmaMap.unpack(request)
        iova, size, vaddr = values["iova"], values["size"], values["vaddr"]
        assert values["argsz"] == len(request)
        assert values["flags"] == abi.DMA_MAP_FLAG_READ | abi.DMA_MAP_FLAG_WRITE
        granule = self.page_sizes & -self.page_sizes
        if not size or (iova | size | vaddr) % granule:
            raise os_error(errno.EINVAL)
        if any(
            iova < start + length and start < iova + size for start, (_, length) in container.maps.items()
        ):
            raise os_error(errno.EEXIST)
        if self.ranges and not any(low <= iova and iova + size - 1 <= high for low, high in self.ranges):
            raise os_error(errno.EINVAL)
        if sum(length for _, length in container.maps.values()) + size > self.memlock and self.user:
            raise os_error(errno.ENOMEM)
        if len(container.maps) >= self.dma_limit:
            raise os_error(errno.ENOSPC)
        container.maps[iova] = (vaddr, size)
        self.log.append(f"map {size}")

    def _container_14(self, container: FakeContainer, request: bytearray) -> None:
        values = abi.DmaUnmap.unpack(request)
        done = container.maps.pop(values["iova"], (0, 0))[1]
        assert done in (0, values["size"])
        for function in self.functions.values():
            if function.group == container.group and function.triggers.get(abi.PCI_MSIX_IRQ_INDEX):
                self.log.append("unmap under live interrupts")
        masters = [
            f for f in self.functions.values() if f.group == container.group and self.command(f.address) & 4
        ]
        self.log.append("unmap under bus master" if masters else "unmap")
        request[:] = abi.DmaUnmap.pack(iova=values["iova"], size=done)

    def _group_3(self, group: int, status: bytearray) -> None:
        viable = all(
            f.driver in (None, "vfio-pci", "pcieport") for f in self.functions.values() if f.group == group
        )
        status[:] = abi.GroupStatus.pack(flags=abi.GROUP_FLAGS_VIABLE if viable else 0)

    def _group_4(self, group: int, container: bytearray) -> None:
        kind, thing = self.open_fds[int.from_bytes(container, "little")]
        assert kind == "container"
        thing.group = group

    def _group_6(self, group: int, name: bytearray) -> int:
        function = self.functions[name.rstrip(b"\0").decode()]
        if function.driver != "vfio-pci":
            raise os_error(errno.ENODEV)
        assert any(c.group == group and c.kind is not None for c in self.containers())
        return self._new("device", function, os.dup(function.memory))

    # iommufd's requests are numbered in the same row as VFIO's.

    def _iommufd_29(self, iommufd: FakeIommufd, request: bytearray) -> None:
        iommufd.ioas = 3
        request[:] = abi.IoasAlloc.pack(out_ioas_id=3)

    def _iommufd_32(self, iommufd: FakeIommufd, request: bytearray) -> None:
        values = abi.IoasIovaRanges.unpack(request)
        assert values["ioas_id"] == iommufd.ioas
        flat = [number for pair in self.ranges for number in pair]
        assert values["num_iovas"] >= len(self.ranges)
        (ctypes.c_uint64 * len(flat)).from_address(values["allowed_iovas"])[:] = flat
        granule = self.page_sizes & -self.page_sizes
        values |= {"num_iovas": len(self.ranges), "out_iova_alignment": granule}
        request[:] = abi.IoasIovaRanges.pack(**values)

    def _iommufd_33(self, iommufd: FakeIommufd, request: bytearray) -> None:
        values = abi.IoasMap.unpack(request)
        assert (values["flags"], values["ioas_id"], values["size"]) == (7, iommufd.ioas, len(request))
        iova, size = values["iova"], values["length"]
        if any(iova < start + length and start < iova + size for start, (_, length) in iommufd.maps.items()):
            raise os_error(errno.EEXIST)
        if sum(length for _, length in iommufd.maps.values()) + size > self.memlock and self.user:
            raise os_error(errno.ENOMEM)
        iommufd.maps[iova] = (values["user_va"], size)
        self.log.append(f"map {size}")

    def _iommufd_34(self, iommufd: FakeIommufd, request: bytearray) -> None:
        values = abi.IoasUnmap.unpack(request)
        done = iommufd.maps.pop(values["iova"], (0, 0))[1]
        if not done:
            raise os_error(errno.ENOENT)
        masters = [f for f in self.functions.values() if f.iommufd is iommufd and self.command(f.address) & 4]
        self.log.append("unmap under bus master" if masters else "unmap")
        request[:] = abi.IoasUnmap.pack(ioas_id=values["ioas_id"], iova=values["iova"], length=done)

    def _device_18(self, function: FakeFunction, request: bytearray) -> None:
        kind, iommufd = self.open_fds[abi.BindIommufd.unpack(request)["iommufd"]]
        assert kind == "iommufd"
        if function.iommufd is not None:
            raise os_error(errno.EINVAL)
        group = [f for f in self.functions.values() if f.group == function.group]
        if any(f.driver not in (None, "vfio-pci", "pcieport") for f in group) or not self.interrupt_remapping:
            raise os_error(errno.EPERM)
        if any(kind == "group" and thing == function.group for kind, thing in self.open_fds.values()):
            raise os_error(errno.EBUSY)
        if any(f.iommufd not in (None, iommufd) for f in group):
            raise os_error(errno.EPERM)
        function.iommufd = iommufd

    def _device_19(self, function: FakeFunction, request: bytearray) -> None:
        assert function.iommufd is not None
        assert abi.AttachIommufd.unpack(request)["pt_id"] == function.iommufd.ioas

    def _device_7(self, function: FakeFunction, reply: bytearray) -> None:
        self._answer(
            reply, abi.DeviceInfo.pack(flags=function.flags, num_regions=9, num_irqs=5), abi.DeviceInfo
        )

    def _device_8(self, function: FakeFunction, reply: bytearray) -> None:
        index = abi.RegionInfo.unpack(reply)["index"]
        if index >= 9:
            raise os_error(errno.EINVAL)
        size = CONFIG_SIZE if index == abi.PCI_CONFIG_REGION_INDEX else function.bars.get(index, 0)
        flags = abi.REGION_INFO_FLAG_READ | abi.REGION_INFO_FLAG_WRITE
        if index in function.bars and index not in function.unmappable:
            flags |= abi.REGION_INFO_FLAG_MMAP
        tail = b""
        if index in function.sparse:
            flags |= abi.REGION_INFO_FLAG_CAPS
            areas = function.sparse[index]
            tail = bytes(abi.SparseMmap.pack(**{"header.id": 1, "header.version": 1, "nr_areas": len(areas)}))
            tail += b"".join(
                bytes(abi.SparseMmapArea.pack(offset=start, size=length)) for start, length in areas
            )
        whole = abi.RegionInfo.pack(
            tail,
            flags=flags,
            index=index,
            size=size,
            offset=index << REGION_SHIFT,
            cap_offset=abi.RegionInfo.size if tail else 0,
        )
        self._answer(reply, whole, abi.RegionInfo)

    def _device_9(self, function: FakeFunction, reply: bytearray) -> None:
        index = abi.IrqInfo.unpack(reply)["index"]
        if index not in function.irqs:
            raise os_error(errno.EINVAL)
        count, flags = function.irqs[index]
        reply[:] = abi.IrqInfo.pack(index=index, count=count, flags=flags)

    def _device_10(self, function: FakeFunction, request: bytearray) -> None:
        values = abi.IrqSet.unpack(request)
        assert values["argsz"] == len(request)
        index, count, flags = values["index"], values["count"], values["flags"]
        exclusive = {abi.PCI_INTX_IRQ_INDEX, abi.PCI_MSIX_IRQ_INDEX}
        if index in exclusive and function.triggers.keys() & (exclusive - {index}):
            raise os_error(errno.EINVAL, "another interrupt type is active")
        if flags == abi.IRQ_SET_DATA_NONE | abi.IRQ_SET_ACTION_TRIGGER and not count:
            for fd in function.triggers.pop(index, []):
                os.close(fd)
        elif flags == abi.IRQ_SET_DATA_EVENTFD | abi.IRQ_SET_ACTION_TRIGGER:
            assert count <= function.irqs[index][0]
            data = request[abi.IrqSet.size :]
            fds = [int.from_bytes(data[i : i + 4], "little") for i in range(0, 4 * count, 4)]
            assert all(self.open_fds[fd][0] == "eventfd" for fd in fds)
            function.triggers[index] = [os.dup(fd) for fd in fds]
        elif flags == abi.IRQ_SET_DATA_NONE | abi.IRQ_SET_ACTION_UNMASK:
            self.log.append(f"unmask {index}")
        else:
            raise os_error(errno.EINVAL)

    def _device_11(self, function: FakeFunction, argument: int) -> None:
        if not function.flags & abi.DEVICE_FLAGS_RESET:
            raise os_error(errno.EINVAL)
        function.resets += 1


RELEASING = {"close", "munmap"}
"""Calls that take effect even where they report an error."""


class Faulty:
    """A system whose call number ``fail_at`` (from 0) raises ``error()``; ``calls`` names them all."""

    def __init__(self, kernel: FakeKernel, fail_at: int, error: Callable[[], BaseException]) -> None:
        self._kernel = kernel
        self._fail_at = fail_at
        self._error = error
        self.calls: list[str] = []

    @property
    def failed(self) -> str:
        """The call that failed, or an empty string."""
        return self.calls[self._fail_at] if self._fail_at < len(self.calls) else ""

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._kernel, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._fail_at:
                if name in RELEASING:
                    real(*arguments, **options)
                raise self._error()
            return real(*arguments, **options)

        return call
