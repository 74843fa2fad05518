"""VFIO's modules with what Debian leaves out of them: iommufd, the cdev interface and no-IOMMU.

They are built out of the tree, for the kernel as it is: from Debian's linux-source of the very version, with
linux-headers and linux-kbuild of the same, and the host's own compiler. The programs of linux-kbuild run with
the C library that they were built against, so that Debian 12 builds for Debian 13's kernel.
"""

import os
import shutil
from pathlib import Path

from guestvm import cache, kernel
from guestvm.archive import Archive
from guestvm.kernel import Kernel
from guestvm.programs import run
from guestvm.progress import Progress

FORMAT = "1"
SOURCES = ("drivers/vfio", "drivers/iommu/iommufd", "drivers/iommu/iommu-priv.h", "lib/interval_tree.c")
OPTIONS = {
    "CONFIG_IOMMUFD": "m",
    "CONFIG_VFIO_DEVICE_CDEV": "y",
    "CONFIG_VFIO_NOIOMMU": "y",
    "CONFIG_INTERVAL_TREE_SPAN_ITER": "y",
}
"""Options that Debian's configuration lacks; the rest is as it is there."""
UNSET = ("CONFIG_VFIO_MDEV", "CONFIG_DEBUG_INFO_BTF_MODULES", "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT")
"""Of no use here: the last is a flag that the compilers before GCC 14 do not have."""
PROGRAMS = {
    "scripts/basic/fixdep": "",
    "scripts/genksyms/genksyms": "",
    "scripts/mod/modpost": ".real-lsb-64",
    "tools/objtool/objtool": ".real-x86",
}
"""Programs of linux-kbuild, and how the file is called that does the work."""
LOADER = "usr/lib64/ld-linux-x86-64.so.2"


def rebuilt(series: str, source: Kernel, progress: Progress) -> Kernel:
    """The kernel `source` with VFIO's modules built anew, built unless the cache has it.

    `uapi` in its directory has the kernel's headers of VFIO and iommufd.

    Raises:
        LabError: the archive no longer has sources of that version, or they do not build.
    """
    key = cache.key_of([FORMAT, source.package, *SOURCES, *map("=".join, OPTIONS.items()), *UNSET])

    def build(work: Path) -> None:
        shutil.copytree(source.directory, work, dirs_exist_ok=True, symlinks=True, copy_function=os.link)
        (work / "package").unlink()
        (work / "package").write_text(f"{source.package} vfio {key}\n")
        tree = work / "tree"
        with progress.step(f"fetching the sources of {source.package}"):
            _fetch(source, work, tree)
        with progress.step(f"building VFIO's modules for kernel {source.release}"):
            built = _build(source, tree)
            _put_in_place(Kernel(series, work), tree, built)
        shutil.rmtree(tree)

    return Kernel(series, cache.entry("kernel-vfio", key, build))


def _fetch(source: Kernel, work: Path, tree: Path) -> None:
    """Headers, kbuild with its libraries, and the sources that are built, below `tree`."""
    version = source.package.split()[1]
    archive = Archive(work / "apt", kernel.SUITES[source.series], frozenset(kernel.SUITES.values()))
    abi = source.release.removesuffix("-amd64")
    name = f"linux-source-{source.series}"
    packages = (name, f"linux-headers-{source.release}", f"linux-headers-{abi}-common")
    archive.download([f"{package}={version}" for package in packages], work)
    archive.unpack_with_needs(f"linux-kbuild-{abi}={version}", tree)
    for package in work.glob("*.deb"):
        run(["dpkg-deb", "-x", str(package), str(tree)], f"unpack {package.name}")
        package.unlink()
    shutil.rmtree(work / "apt")
    file = tree / "usr" / "src" / f"{name}.tar.xz"
    command = ["tar", "-xf", str(file), "-C", str(tree), *(f"{name}/{part}" for part in SOURCES)]
    run(command, f"unpack {name}", timeout=900)
    file.unlink()
    (tree / name).rename(tree / "source")


def _build(source: Kernel, tree: Path) -> list[Path]:
    """The modules, built below `tree`."""
    _make_programs_run(source, tree)
    work = tree / "modules"
    shutil.copytree(tree / "source" / "drivers" / "vfio", work / "vfio")
    shutil.copytree(tree / "source" / "drivers" / "iommu", work / "iommu")
    iommufd = work / "iommu" / "iommufd"
    # The kernel has this file without the iterator that iommufd wants, and exports what is in it.
    trees = (tree / "source" / "lib" / "interval_tree.c").read_text().splitlines()
    kept = [line for line in trees if not line.startswith("EXPORT_SYMBOL")]
    (iommufd / "interval_tree.c").write_text("\n".join(kept) + "\n")
    with (iommufd / "Makefile").open("a") as makefile:
        makefile.write("iommufd-y += interval_tree.o\n")
    (work / "Kbuild").write_text("obj-m := iommu/iommufd/ vfio/\n")
    headers = tree / "usr" / "src" / f"linux-headers-{source.release}"
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{tree}/usr/src/"))
    macros = [f"-D{name}{'_MODULE' if value == 'm' else ''}=1" for name, value in OPTIONS.items()]
    command = ["make", "-C", str(headers), f"M={work}", f"-j{os.cpu_count()}", "CC=gcc", "CROSS_COMPILE="]
    command += [f"{name}={value}" for name, value in OPTIONS.items()] + [f"{name}=" for name in UNSET]
    run([*command, f"KCFLAGS={' '.join(macros)} -g0", "modules"], "build VFIO's modules", timeout=1200)
    return sorted(work.rglob("*.ko"))


def _make_programs_run(source: Kernel, tree: Path) -> None:
    """Put a script in the place of each program of linux-kbuild, which runs it with its own C library."""
    kbuild = tree / "usr" / "lib" / f"linux-kbuild-{source.release.removesuffix('-amd64')}"
    loader = f"{tree / LOADER} --library-path {tree / 'usr/lib/x86_64-linux-gnu'}"
    for name, suffix in PROGRAMS.items():
        path = kbuild / name
        program = path.with_name(path.name + (suffix or ".elf"))
        if not suffix:
            path.rename(program)
        path.unlink(missing_ok=True)
        path.write_text(f'#!/bin/sh\nexec {loader} {program} "$@"\n')
        path.chmod(0o755)


def _put_in_place(target: Kernel, tree: Path, built: list[Path]) -> None:
    """Put the modules in the place of Debian's, and the headers beside them."""
    drivers = target.modules / "kernel" / "drivers"
    for path in built:
        home = drivers / path.relative_to(tree / "modules").parent
        home.mkdir(parents=True, exist_ok=True)
        for old in home.glob(f"{path.stem}.ko*"):
            old.unlink()
        shutil.copy(path, home / path.name)
    for table in target.modules.glob("modules.*"):
        # Linked with those of the kernel that this is made of; depmod would write into both.
        text = table.read_bytes()
        table.unlink()
        table.write_bytes(text)
    kernel.depmod(target.directory, target.release)
    abi = target.release.removesuffix("-amd64")
    headers = tree / "usr" / "src" / f"linux-headers-{abi}-common" / "include" / "uapi" / "linux"
    for name in ("vfio.h", "iommufd.h"):
        (target.directory / "uapi" / "linux").mkdir(parents=True, exist_ok=True)
        shutil.copy(headers / name, target.directory / "uapi" / "linux" / name)
