"""Debian's kernels, unpacked from their packages without being installed."""

import gzip
import lzma
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guestvm import cache
from guestvm.archive import Archive
from guestvm.errors import LabError
from guestvm.programs import run
from guestvm.progress import Progress

SUITES = {"6.1": "bookworm", "6.12": "trixie"}
"""Kernel series and the Debian suite whose linux-image-amd64 is of that series."""

REBUILT = {"6.12+vfio": "6.12"}
"""The series with VFIO built anew, with what Debian leaves out (guestvm.modules), and the series it is."""

SERIES = (*SUITES, *REBUILT)
UNPACK_FORMAT = "1"


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel: the image that QEMU boots and the tree that its modules are in."""

    series: str
    directory: Path

    @property
    def image(self) -> Path:
        """The uncompressed ELF image if it could be extracted (boots faster), else the bzImage."""
        elf = self.directory / "vmlinux"
        return elf if elf.exists() else self.directory / "vmlinuz"

    @property
    def release(self) -> str:
        """What `uname -r` prints in the guest."""
        return (self.directory / "release").read_text().strip()

    @property
    def package(self) -> str:
        """Debian package and version."""
        return (self.directory / "package").read_text().strip()

    @property
    def modules(self) -> Path:
        """The tree lib/modules/RELEASE, with depmod's tables."""
        return self.directory / "lib" / "modules" / self.release


def get(series: str, progress: Progress, refresh: bool = False) -> Kernel:
    """The kernel of `series`, fetched and unpacked unless the cache has it.

    `refresh` looks in the archive for a newer package first. Raises LabError when the series is unknown or
    the package cannot be had.
    """
    if series in REBUILT:
        from guestvm import modules

        return modules.rebuilt(series, get(REBUILT[series], progress, refresh), progress)
    if series not in SUITES:
        raise LabError(f"kernel {series} is not known here; known: {', '.join(SERIES)}")
    if platform.machine() != "x86_64":
        raise LabError(f"the guest lab boots x86-64 kernels; this machine is {platform.machine()}")
    key = f"{series}-{UNPACK_FORMAT}"
    if refresh:
        shutil.rmtree(cache.root() / "kernel" / key, ignore_errors=True)
    return Kernel(series, cache.entry("kernel", key, lambda work: _fetch(series, work, progress)))


def _fetch(series: str, work: Path, progress: Progress) -> None:
    with progress.step(f"fetching Debian's kernel {series}"):
        package = _download(series, SUITES[series], work)
    with progress.step(f"unpacking {package.name}"):
        (work / "package").write_text(package.stem.replace("_", " ").rsplit(" ", 1)[0] + "\n")
        tree = work / "tree"
        run(["dpkg-deb", "-x", str(package), str(tree)], "unpack the kernel's package")
        package.unlink()
        _arrange(tree, work)
        shutil.rmtree(tree)


def _download(series: str, suite: str, work: Path) -> Path:
    """Download linux-image of `suite`."""
    archive = Archive(work / "apt", suite, frozenset(SUITES.values()))
    names = archive.depends("linux-image-amd64")
    if len(names) != 1 or not names[0].startswith(f"linux-image-{series}."):
        raise LabError(
            f"cannot fetch the kernel {series} from {archive.name}: linux-image-amd64 there depends on "
            f"{names or 'nothing'}"
        )
    archive.download(names, work)
    (package,) = work.glob("*.deb")
    shutil.rmtree(work / "apt")
    return package


def _arrange(tree: Path, work: Path) -> None:
    (image,) = (tree / "boot").glob("vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    (work / "release").write_text(release + "\n")
    shutil.move(image, work / "vmlinuz")
    elf = extract_vmlinux((work / "vmlinuz").read_bytes())
    if elf is not None:
        (work / "vmlinux").write_bytes(elf)
    modules = next(p for p in (tree / "lib/modules", tree / "usr/lib/modules") if p.is_dir()) / release
    for part in ("drivers/gpu", "drivers/media", "drivers/infiniband", "drivers/net/wireless", "sound"):
        shutil.rmtree(modules / "kernel" / part, ignore_errors=True)
    (work / "lib" / "modules").mkdir(parents=True)
    shutil.move(modules, work / "lib" / "modules" / release)
    depmod(work, release)


def extract_vmlinux(image: bytes) -> bytes | None:
    """The ELF kernel inside a bzImage, or None if its compression is not one of xz, gzip and zstd.

    The setup header (Linux x86 boot protocol 2.08) gives the payload's place: setup_sects at 0x1f1,
    payload_offset at 0x248 and payload_length at 0x24c, both relative to the protected-mode code.
    """
    if image[0x202:0x206] != b"HdrS":
        return None
    start = ((image[0x1F1] or 4) + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    payload = image[start : start + int.from_bytes(image[0x24C:0x250], "little")]
    if payload.startswith(b"\xfd7zXZ\0"):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        elf = gzip.decompress(payload[:-4])
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        # The last four bytes are the kernel's own record of the length and no part of the zstd stream.
        elf = subprocess.run(["zstd", "-dcq"], input=payload[:-4], capture_output=True, check=True).stdout
    else:
        return None
    return elf if elf.startswith(b"\x7fELF") else None


def depmod(base: Path, release: str) -> None:
    """Write modules.dep and its companions for base/lib/modules/RELEASE."""
    run(["depmod", "-b", str(base), release], "list the kernel modules' dependencies")


def closure(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    """Module files for `names` and all they need, each after what it needs, relative to the modules tree.

    A name that is built into the kernel, or that this kernel does not have, adds nothing.
    """
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        by_name[Path(path).name.split(".ko")[0].replace("-", "_")] = path
    ordered: dict[str, None] = {}

    def add(path: str) -> None:
        if path not in ordered:
            for needed in needs[path]:
                add(needed)
            ordered[path] = None

    for name in names:
        if name.replace("-", "_") in by_name:
            add(by_name[name.replace("-", "_")])
    return [Path(path) for path in ordered]


def read_module(path: Path) -> bytes:
    """A module's ELF file, decompressed where Debian ships it compressed."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=True).stdout
    return data
