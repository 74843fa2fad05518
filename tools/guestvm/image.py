"""The guest's files: initramfs, root image and the checkout, each cached by what goes into it."""

import compileall
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from guestvm import cache, kernel
from guestvm.errors import LabError
from guestvm.progress import Progress

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE_LIST = CHECKOUT / "tools" / "lib" / "guest-packages"
CHECKOUT_PARTS = ("guestpv", "tests", "tools", "pyproject.toml")

ROOT_MODULES = ("virtio_pci", "virtio_iommu", "virtio_blk", "virtio_console", "squashfs", "overlay")
"""Loaded from the initramfs, in this order: what the root disk and the agent's port need."""

BOOT_MODULES = ("virtio_net", "virtio_rng", "virtio_balloon", "e1000", "ahci")
"""Loaded before the agent answers, as udev would on a full system."""

MODULES = (
    *ROOT_MODULES,
    *BOOT_MODULES,
    *("vfio", "vfio_iommu_type1", "vfio_pci", "iommufd"),
    *("tun", "veth", "bridge", "dummy", "vhost_net", "af_packet", "sch_netem", "sch_ingress"),
    *("nbd", "ublk_drv", "loop", "brd", "null_blk", "virtio_scsi", "nvme", "sd_mod", "sr_mod", "ata_piix"),
    *("ext4", "crc32c_generic", "crc32c_intel", "crc32c_cryptoapi", "vfat", "nls_ascii", "nls_cp437", "fuse"),
    *(
        "9p",
        "9pnet_virtio",
        "virtio_mem",
        "virtio_input",
        "virtio_pmem",
        "virtio_gpu",
        "vmw_vsock_virtio_transport",
    ),
    *("button", "e1000e", "igb", "rng_core", "uio", "uio_pci_generic", "pci_stub", "msr", "cpuid"),
)
"""Kernel modules that `modprobe` finds in the guest, with all that they need."""

PRUNED = re.compile(
    r"/(tests?|testing/tests|idlelib|tkinter|turtledemo|lib2to3|ensurepip|pydoc_data|config-3[^/]*|include|Headers"
    r"|site-packages|dist-packages)/|\.(pyi|pxd|a|h|exe)$|\.opt-[12]\.pyc$"
)

PASSWD = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"
GROUP = "root:x:0:\ntty:x:5:\nuser:x:1000:\n"


def initramfs(source: kernel.Kernel) -> Path:
    """The initramfs for `source`, without the checkout: busybox, a handful of modules and init.sh."""
    script = (Path(__file__).parent / "init.sh").read_text()
    script = script.replace("MODULES_AT_BOOT", " ".join(BOOT_MODULES))
    program = busybox().read_bytes()
    modules = kernel.closure(source, ROOT_MODULES)

    def build(work: Path) -> None:
        archive = Cpio()
        for name in ("bin", "modules"):
            archive.add(name, stat.S_IFDIR | 0o755)
        archive.add("bin/busybox", stat.S_IFREG | 0o755, program)
        archive.add("init", stat.S_IFREG | 0o755, script.encode())
        for number, path in enumerate(modules):
            name = f"modules/{number:02}-{path.name.split('.ko')[0]}.ko"
            archive.add(name, stat.S_IFREG | 0o644, kernel.read_module(source.modules / path))
        (work / "initramfs.cpio").write_bytes(archive.finish())

    key = cache.key_of([source.package, script, program, *map(str, modules)])
    return cache.entry("initramfs", key, build) / "initramfs.cpio"


def checkout(parts: Iterable[str] = CHECKOUT_PARTS) -> bytes:
    """A cpio archive, to be appended to an initramfs, that holds the checkout as checkout.tar.

    A tar inside the cpio keeps the times of the sources, so that their compiled twins are valid in the guest.
    """
    compileall.compile_dir(CHECKOUT / "guestpv", quiet=2)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for part in parts:
            if (CHECKOUT / part).exists():
                tar.add(CHECKOUT / part, part, filter=_plain)
        for info in _site_packages().glob("guestpv-*.dist-info"):
            tar.add(info, info.name, filter=_plain)
    archive = Cpio()
    archive.add("checkout.tar", stat.S_IFREG | 0o644, buffer.getvalue())
    return archive.finish()


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    stale = "__pycache__/" in member.name and f".{sys.implementation.cache_tag}.pyc" not in member.name
    if stale or re.search(r"/(\.[^/]*|build)$|\.[oc]$", member.name):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


class Cpio:
    """Writes the kernel's initramfs format (newc)."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        """Append one file or directory, owned by root."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        self._out += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._out += data
        self._pad()

    def finish(self) -> bytes:
        """The archive; padded so that another may follow it."""
        self.add("TRAILER!!!", 0)
        return bytes(self._out)

    def _pad(self) -> None:
        self._out += bytes(-len(self._out) % 4)


def root(source: kernel.Kernel, progress: Progress) -> Path:
    """The root image: Python with the run-time dependencies, tools and modules, as squashfs."""
    tree = Tree()
    _add_skeleton(tree)
    _add_python(tree)
    _add_tools(tree)
    modules = kernel.closure(source, MODULES)
    # Finding the libraries takes seconds; the loader's cache, which every library package renews, stands in.
    libraries = str(Path("/etc/ld.so.cache").stat().st_mtime_ns)
    key = cache.key_of([source.package, libraries, *map(str, modules), *tree.fingerprint()])

    def build(work: Path) -> None:
        with progress.step(f"building the root image for kernel {source.release}"):
            _add_libraries(tree)
            with tempfile.TemporaryDirectory(dir=work) as staging:
                _add_modules(tree, source, modules, Path(staging))
                tree.squash(work / "root.squashfs")

    return cache.entry("root", key, build) / "root.squashfs"


class Tree:
    """The files of the root image by their path in the guest."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, Path | bytes]] = {}

    def add(self, path: str, content: Path | bytes, mode: int = 0o644) -> None:
        """A regular file from a host file (followed if it is a link) or from bytes."""
        self._files.setdefault(self._merged(path), (stat.S_IFREG | mode, content))

    def copy(self, source: Path, target: str | None = None) -> None:
        """A host file, at its own path unless `target` says another, with its executable bits."""
        self.add(target or str(source), source, 0o755 if os.access(source, os.X_OK) else 0o644)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._files.setdefault(self._merged(path), (stat.S_IFLNK | 0o777, target.encode()))

    def directory(self, path: str, mode: int = 0o755, owner: int = 0) -> None:
        """A directory that needs a mode or owner of its own, or would not exist otherwise."""
        self._files.setdefault(path, (stat.S_IFDIR | mode, owner.to_bytes(4, "little")))

    @staticmethod
    def _merged(path: str) -> str:
        return re.sub(r"^/(bin|sbin|lib|lib64)/", r"/usr/\1/", path)

    def host_files(self) -> Iterator[Path]:
        """The host files that the image holds."""
        return (content for _, content in self._files.values() if isinstance(content, Path))

    def fingerprint(self) -> Iterator[bytes]:
        """Everything that decides the image, for its cache key."""
        for path, (mode, content) in sorted(self._files.items()):
            yield f"{path} {mode:o}".encode()
            yield content.read_bytes() if isinstance(content, Path) else content

    def squash(self, image: Path) -> None:
        """Write the tree as squashfs with zstd."""
        command = ["mksquashfs", "-", str(image), "-tar", "-quiet", "-no-progress", "-root-mode", "755"]
        command += ["-comp", "zstd", "-Xcompression-level", "3"]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
            assert process.stdin is not None
            try:
                with tarfile.open(fileobj=process.stdin, mode="w|", format=tarfile.GNU_FORMAT) as tar:
                    self._write(tar)
                process.stdin.close()
            except BrokenPipeError:
                pass
            if process.wait(timeout=300) != 0:
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()
                raise LabError("mksquashfs failed: " + " ".join(said[:3]))

    def _write(self, tar: tarfile.TarFile) -> None:
        made: set[str] = set()
        for path, (mode, content) in sorted(self._files.items()):
            for parent in reversed(Path(path).parents[:-1]):
                if str(parent) not in made and str(parent) not in self._files:
                    made.add(str(parent))
                    tar.addfile(_member(str(parent), tarfile.DIRTYPE, 0o755))
            if stat.S_ISDIR(mode):
                member = _member(path, tarfile.DIRTYPE, stat.S_IMODE(mode))
                member.uid = member.gid = (
                    int.from_bytes(content, "little") if isinstance(content, bytes) else 0
                )
                tar.addfile(member)
            elif stat.S_ISLNK(mode):
                member = _member(path, tarfile.SYMTYPE, 0o777)
                member.linkname = content.decode() if isinstance(content, bytes) else ""
                tar.addfile(member)
            else:
                member = _member(path, tarfile.REGTYPE, stat.S_IMODE(mode))
                if isinstance(content, Path):
                    member.mtime = int(content.stat().st_mtime)
                    content = content.read_bytes()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _member(path: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path.lstrip("/"))
    member.type, member.mode = kind, mode
    return member


def _add_skeleton(tree: Tree) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):
        tree.link(f"/{name}", f"usr/{name}")
        tree.directory(f"/usr/{name}")
    for name in ("dev", "proc", "sys", "run", "tmp", "src", "etc", "mnt", "var/lib", "var/log", "opt"):
        tree.directory(f"/{name}")
    tree.directory("/root", 0o700)
    tree.directory("/home/user", 0o755, owner=1000)
    tree.link("/var/run", "/run")
    tree.link("/etc/mtab", "/proc/self/mounts")
    for name, text in (
        ("passwd", PASSWD),
        ("group", GROUP),
        ("hosts", "127.0.0.1 localhost guest\n"),
        ("hostname", "guest\n"),
        ("resolv.conf", ""),
        ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
        ("ld.so.conf", ""),
        ("profile", "export PS1='guest:\\w\\$ '\n"),
    ):
        tree.add(f"/etc/{name}", text.encode())
    tree.copy(Path("/etc/os-release"))


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _add_python(tree: Tree) -> None:
    """The interpreter at /opt/python and a virtual environment on it, /opt/venv, wherever the host has it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    tree.copy(Path(os.path.realpath(sys.executable)), f"/opt/python/bin/{version}")
    for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}:
        library = Path(path) if Path(path, "os.py").exists() else Path(sys.base_prefix, "lib", version)
        for file in _python_files(library):
            tree.copy(file, f"/opt/python/lib/{version}/{file.relative_to(library)}")
    tree.link(f"/opt/venv/bin/{version}", f"/opt/python/bin/{version}")
    tree.link("/opt/venv/bin/python", version)
    tree.link("/opt/venv/bin/python3", version)
    tree.add("/opt/venv/pyvenv.cfg", b"home = /opt/python/bin\n")
    site = f"/opt/venv/lib/{version}/site-packages"
    tree.add(f"{site}/checkout.pth", b"/src\n")
    for name in ("guestpv", "pytest"):
        tree.add(f"/opt/venv/bin/{name}", f'#!/bin/sh\nexec python -m {name} "$@"\n'.encode(), 0o755)
    for name in sorted(_distributions()):
        for item in metadata.distribution(name).files or ():
            source = Path(str(item.locate()))
            if ".." not in item.parts and source.is_file() and not _pruned(f"/{item}"):
                tree.copy(source, f"{site}/{item}")


def _python_files(library: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(library):
        inside = folder.removeprefix(str(library))
        inner[:] = [name for name in inner if not _pruned(f"{inside}/{name}/")]
        for name in names:
            if not _pruned(f"{inside}/{name}"):
                yield Path(folder, name)


def _pruned(path: str) -> bool:
    return bool(PRUNED.search(path))


def _distributions() -> set[str]:
    """Names of the project's run-time dependencies, pytest, and all that these need."""
    from packaging.requirements import Requirement

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in (*project.get("dependencies", ()), "pytest")]
    found: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if wanted.name.lower() not in found:
            found.add(wanted.name.lower())
            try:
                waiting += [Requirement(text) for text in metadata.requires(wanted.name) or ()]
            except metadata.PackageNotFoundError:
                raise LabError(
                    f"{wanted.name} is not installed; run: .venv/bin/pip install -e '.[test]'"
                ) from None
    return found


def busybox() -> Path:
    """The machine's static busybox."""
    found = shutil.which("busybox", path=os.environ["PATH"] + ":/bin:/usr/bin")
    if found is None:
        raise LabError("busybox is not installed; run: apt-get install busybox-static")
    if b"/ld-linux" in Path(found).read_bytes()[:4096]:
        raise LabError(f"{found} is not statically linked; run: apt-get install busybox-static")
    return Path(found)


def guest_packages() -> list[str]:
    """Debian packages whose programs the guest has (tools/lib/guest-packages)."""
    lines = (line.partition("#")[0].strip() for line in PACKAGE_LIST.read_text().splitlines())
    return [line for line in lines if line]


def _add_tools(tree: Tree) -> None:
    for package in guest_packages():
        listing = subprocess.run(["dpkg-query", "-L", package], capture_output=True, text=True, timeout=60)
        if listing.returncode != 0:
            raise LabError(f"{package} is not installed here; run: apt-get install {package}")
        for path in map(Path, listing.stdout.splitlines()):
            if re.match(r"(/usr)?/(s?bin|lib)/", str(path)) and (path.is_symlink() or path.is_file()):
                if path.is_symlink():
                    tree.link(str(path), os.readlink(path))
                else:
                    tree.copy(path)
    tree.copy(Path("/sbin/ldconfig"))
    # Not busybox's: its shell prefers its own applets to the programs in PATH.
    tree.link("/usr/bin/sh", "dash")
    program = busybox()
    tree.copy(program, "/usr/bin/busybox")
    applets = subprocess.run([str(program), "--list-full"], capture_output=True, text=True, check=True).stdout
    for applet in applets.split():
        tree.link(f"/usr/{applet.removeprefix('usr/')}", "/usr/bin/busybox")


def _add_libraries(tree: Tree) -> None:
    """Shared libraries of everything in the tree, the dynamic loader, and what is loaded by name."""
    dynamic = [path for path in set(tree.host_files()) if _is_dynamic(path)]
    for name in ("libudev.so.1", "libgcc_s.so.1"):
        found = [Path(folder, name) for folder in ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")]
        present = [path for path in found if path.exists()]
        if not present:
            raise LabError(f"{name} is not installed here; run: apt-get install libudev1 libgcc-s1")
        dynamic.append(present[0])
        tree.copy(present[0])
    listing = subprocess.run(["ldd", *map(str, dynamic)], capture_output=True, text=True, timeout=300).stdout
    inside = {path.resolve() for path in tree.host_files()}
    for name, path in sorted(set(re.findall(r"^\s+(?:(\S+) => )?(/\S+) \(0x", listing, re.MULTILINE))):
        if Path(path).resolve() in inside and name:
            continue
        home = path if path.startswith(("/lib", "/usr/lib")) else f"/usr/lib/x86_64-linux-gnu/{name}"
        tree.copy(Path(path), home)


def _is_dynamic(path: Path) -> bool:
    if path.suffix == ".so" or ".so." in path.name:
        return True
    with path.open("rb") as file:
        return os.access(path, os.X_OK) and file.read(4) == b"\x7fELF" and path.name != "busybox"


def _add_modules(tree: Tree, source: kernel.Kernel, modules: list[Path], staging: Path) -> None:
    """The chosen modules, uncompressed, with depmod's tables for just these."""
    base = staging / "lib" / "modules" / source.release
    for path in modules:
        target = base / str(path).removesuffix(".xz").removesuffix(".zst")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(kernel.read_module(source.modules / path))
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copy(source.modules / name, base / name)
    kernel.depmod(staging, source.release)
    for file in base.rglob("*"):
        if file.is_file():
            tree.add(f"/lib/modules/{file.relative_to(staging / 'lib' / 'modules')}", file.read_bytes())
