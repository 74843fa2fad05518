"""Debian's kernels, unpacked from their packages without being installed."""

import gzip
import lzma
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guestvm import cache
from guestvm.errors import LabError
from guestvm.progress import Progress

SUITES = {"6.1": "bookworm", "6.12": "trixie"}
"""Kernel series and the Debian suite whose linux-image-amd64 is of that series."""

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
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
    if series not in SUITES:
        raise LabError(f"kernel {series} is not known here; known: {', '.join(SUITES)}")
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
        _run(["dpkg-deb", "-x", str(package), str(tree)], "unpack the kernel's package")
        package.unlink()
        _arrange(tree, work)
        shutil.rmtree(tree)


def _download(series: str, suite: str, work: Path) -> Path:
    """Download linux-image of `suite` with apt; the machine's own sources and state stay untouched."""
    apt = work / "apt"
    for sub in ("parts", "state/lists/partial", "cache/archives/partial"):
        (apt / sub).mkdir(parents=True)
    mirror, keyring = _mirror()
    source = f"Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\nSigned-By: {keyring}\n"
    (apt / "parts" / "guestpv.sources").write_text(source)
    options = [
        "-qq",
        "-oDir::Etc::SourceList=/dev/null",
        f"-oDir::Etc::SourceParts={apt / 'parts'}",
        f"-oDir::State={apt / 'state'}",
        "-oDir::State::status=/dev/null",
        f"-oDir::Cache={apt / 'cache'}",
        "-oAcquire::Languages=none",
        "-oAcquire::Retries=3",
        # The downloads lie below a home directory, which apt's own user cannot enter.
        f"-oAPT::Sandbox::User={'root' if os.geteuid() == 0 else ''}",
    ]
    what = f"fetch the kernel {series} from {mirror} {suite}"
    _run(["apt-get", *options, "update"], what)
    depends = _run(["apt-cache", *options, "depends", "--important", "linux-image-amd64"], what)
    names = [line.split()[-1] for line in depends.splitlines() if "Depends:" in line]
    if len(names) != 1 or not names[0].startswith(f"linux-image-{series}."):
        raise LabError(
            f"cannot {what}: linux-image-amd64 there depends on {names or 'nothing'}, not on {series}"
        )
    _run(["apt-get", *options, "download", names[0]], what, cwd=work, timeout=600)
    (package,) = work.glob("*.deb")
    shutil.rmtree(apt)
    return package


def _mirror() -> tuple[str, str]:
    """URI and keyring of Debian's archive as the machine's own apt sources name it."""
    columns = "$(REPO_URI)\t$(RELEASE)\t$(SIGNED_BY)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", columns, "Created-By: Packages", "Component: main"],
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    for line in listing.splitlines():
        uri, release, keyring = line.split("\t")
        if release.strip("/") in SUITES.values():
            return uri, keyring if keyring.startswith("/") else KEYRING
    return DEFAULT_MIRROR, KEYRING


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
    _run(["depmod", "-b", str(base), release], "list the kernel modules' dependencies")


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


def _run(command: list[str], what: str, cwd: Path | None = None, timeout: float = 300) -> str:
    # Debian's ordinary users have no sbin in PATH, where depmod is.
    env = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)
    except FileNotFoundError:
        raise LabError(f"cannot {what}: {command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"cannot {what}: {command[0]} did not end within {timeout:.0f} s") from None
    if done.returncode != 0:
        raise LabError(f"cannot {what}: {' '.join(command[:2])} failed:\n{done.stderr.strip()}")
    return done.stdout
