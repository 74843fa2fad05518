"""The table of VFIO constants and structures against the kernel's own headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from guestpv import system
from guestpv.vfio import abi

STRUCTS = [thing for thing in vars(abi).values() if isinstance(thing, abi.CStruct)]
CONSTANTS = {
    name if name.startswith("IOMMU_IOAS") else f"VFIO_{name}": value
    for name, value in vars(abi).items()
    if name[0].isupper() and isinstance(value, int)
}
NEWER = {name: value for name, value in CONSTANTS.items() if "IOAS" in name or "IOMMUFD" in name}
"""What Linux 6.6 has, and the headers of Debian 12 have not."""
OLD_HEADERS = "these kernel headers have no iommufd (Linux 6.6): the guest tier compares with newer ones"
MEMORY = {name: getattr(system, name) for name in ("MAP_FIXED", "MAP_HUGETLB", "MAP_HUGE_2MB")}
HEADERS = "#define _GNU_SOURCE\n" + "".join(
    f"#include <{name}.h>\n" for name in ("stddef", "stdio", "sys/mman", "linux/mman", "linux/vfio")
)


IOMMUFD = "\n#include <linux/iommufd.h>\n"


def has_iommufd() -> bool:
    """Whether the headers are new enough, asked of the file that tells most plainly."""
    return "DEVICE_ATTACH_IOMMUFD_PT" in Path("/usr/include/linux/vfio.h").read_text()


def _compile(folder: Path, body: str, more: str = "", include: str = "/usr/include") -> str | None:
    """What a C program with these statements prints, or None where it does not compile."""
    source = folder / "abi.c"
    source.write_text(f"{HEADERS}{more}int main(void) {{\n{body}\nreturn 0;\n}}\n")
    # Headers that were not installed still have the kernel's own mark in front of pointers.
    command = ["cc", "-D__user=", "-I", include, "-o", folder / "abi", source]
    built = subprocess.run(command, capture_output=True, check=False)
    if built.returncode:
        return None
    return subprocess.run([folder / "abi"], capture_output=True, check=True, text=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("abi")
    if not shutil.which("cc") or not Path("/usr/include/linux/vfio.h").exists():
        pytest.skip("no C compiler or no kernel headers: apt install gcc linux-libc-dev")
    return path


def compare_constants(
    folder: Path, ours: dict[str, int], more: str = "", include: str = "/usr/include"
) -> None:
    """The headers give every constant the same value."""
    printed = _compile(
        folder,
        "\n".join(f'printf("{name} %llu\\n", (unsigned long long){name});' for name in ours),
        more,
        include,
    )
    assert printed is not None, "the headers lack one of the constants"
    theirs = {name: int(value) for name, value in map(str.split, printed.splitlines())}
    assert theirs == ours


def compare_layout(folder: Path, layout: abi.CStruct, more: str = "", include: str = "/usr/include") -> None:
    """The headers put every field of a structure at the same place."""

    def offset(name: str) -> str:
        return f'printf("{name} %zu\\n", offsetof(struct {layout.name}, {name}));'

    size = f'printf("sizeof %zu\\n", sizeof(struct {layout.name}));'
    printed = _compile(folder, "\n".join([size, *map(offset, layout.offsets)]), more, include)
    assert printed is not None, f"the headers lack struct {layout.name} or one of its fields"
    theirs = {name: int(value) for name, value in map(str.split, printed.splitlines())}
    room = theirs.pop("sizeof")
    assert theirs == layout.offsets
    # The compiler, or a later header, pads the end to the alignment of 8.
    assert layout.size <= room < layout.size + 8


def is_newer(layout: abi.CStruct) -> bool:
    """Whether a structure came with iommufd."""
    return layout.name.startswith("iommu_") or "iommufd" in layout.name


def test_every_constant_has_the_headers_value(folder: Path) -> None:
    ours = {name: value for name, value in CONSTANTS.items() if name not in NEWER} | MEMORY
    assert len(ours) > 45
    assert len(NEWER) >= 9
    compare_constants(folder, ours)


def test_every_constant_of_iommufd_has_the_headers_value(folder: Path) -> None:
    if not has_iommufd():
        pytest.skip(OLD_HEADERS)
    compare_constants(folder, NEWER, IOMMUFD)


@pytest.mark.parametrize("layout", STRUCTS, ids=lambda layout: layout.name)
def test_every_structure_has_the_headers_layout(folder: Path, layout: abi.CStruct) -> None:
    if is_newer(layout) and not has_iommufd():
        pytest.skip(OLD_HEADERS)
    compare_layout(folder, layout, IOMMUFD if is_newer(layout) else "")


def test_pack_fills_in_argsz_and_zeros() -> None:
    packed = abi.IrqSet.pack(b"\1\2\3\4", index=2, count=1)
    assert len(packed) == abi.IrqSet.size + 4
    assert abi.IrqSet.unpack(packed) == {"argsz": 24, "flags": 0, "index": 2, "start": 0, "count": 1}


def test_a_looping_capability_chain_ends() -> None:
    chain = abi.CapHeader.pack(id=1, next=8) + abi.CapHeader.pack(id=2, next=8)
    assert list(abi.capabilities(chain, 8)) == [(2, 8)]


def test_a_capability_beyond_the_reply_is_ignored() -> None:
    assert list(abi.capabilities(bytearray(16), 12)) == []
    assert abi.array(bytearray(20), 4, abi.IovaRange, 5) == [{"start": 0, "end": 0}]
