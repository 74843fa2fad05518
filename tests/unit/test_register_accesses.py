"""What one statement really does to a register: a page without access rights counts the accesses.

The width shows at the page's edges: a wider access reaches into the neighbouring page and is counted
again, a narrower one could not carry the whole value in one access.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guestpv.core._core import ffi, lib

from guestpv.spec import balloon, blk, net, pci
from guestpv.spec.layout import Field, Layout
from guestpv.transport.registers import RegisterBlock
from guestpv.virtqueue.kick import Kick

PAGE = 4096
MOST = 64

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the trap page single-steps by x86-64's trap flag"
)


class Access(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_int32), ("is_write", ctypes.c_int32)]


class TrapPage:
    """``base`` is the middle one of three pages; ``watch`` counts what a call does to them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._lib = library
        library.trap_new.restype = ctypes.c_void_p
        self.base = library.trap_new() + PAGE

    def watch(self, action: Callable[[], object]) -> list[tuple[int, str]]:
        accesses = (Access * MOST)()
        self._lib.trap_arm()
        try:
            action()
        finally:
            number = self._lib.trap_disarm(accesses)
        return [(a.offset - PAGE, "write" if a.is_write else "read") for a in accesses[: min(number, MOST)]]

    def fill(self, value: int) -> None:
        ctypes.memset(self.base - PAGE, value, 3 * PAGE)

    def bytes_at(self, offset: int, size: int) -> bytes:
        return ctypes.string_at(self.base + offset, size)

    def close(self) -> None:
        self._lib.trap_free()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("trap") / "trap.so"
    source = Path(__file__).with_name("trap_page.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def page(library: ctypes.CDLL) -> Iterator[TrapPage]:
    trap = TrapPage(library)
    yield trap
    trap.close()


class MappedBar:
    """A BAR over the trap page, through the accessors that a mapped BAR uses."""

    size = PAGE

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def read(self, offset: int, width: int) -> int:
        return int({1: lib.gpv_read8, 2: lib.gpv_read16, 4: lib.gpv_read32}[width](self.pointer + offset))

    def write(self, offset: int, width: int, value: int) -> None:
        {1: lib.gpv_write8, 2: lib.gpv_write16, 4: lib.gpv_write32}[width](self.pointer + offset, value)


def test_the_trap_page_sees_a_double_store(page: TrapPage) -> None:
    def twice() -> None:
        lib.gpv_write16(page.base, 1)
        lib.gpv_write16(page.base, 1)

    assert page.watch(twice) == [(0, "write"), (0, "write")]


def test_the_trap_page_sees_an_access_that_is_too_wide(page: TrapPage) -> None:
    accesses = page.watch(lambda: lib.gpv_read32(page.base + PAGE - 2))
    assert len(accesses) == 2


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.requirement("DRV-PCI-05", "DRV-PCI-06", "DRV-PCI-07")
def test_an_accessor_is_one_access_of_its_width(page: TrapPage, width: int, place: str) -> None:
    offset = 0 if place == "start" else PAGE - width
    bar = MappedBar(page.base)
    value = int.from_bytes(bytes(range(0x11, 0x11 + width)), "little")

    page.fill(0xEE)
    assert page.watch(lambda: bar.write(offset, width, value)) == [(offset, "write")]
    assert page.bytes_at(offset - 1, width + 2) == b"\xee" + value.to_bytes(width, "little") + b"\xee"

    got: list[int] = []
    assert page.watch(lambda: got.append(bar.read(offset, width))) == [(offset, "read")]
    assert got == [value]


def fields_of(*layouts: Layout) -> list[tuple[Layout, Field]]:
    return [(layout, field) for layout in layouts for field in layout]


@pytest.mark.parametrize(
    ("layout", "field"),
    fields_of(pci.COMMON_CFG, net.CONFIG, blk.CONFIG, balloon.CONFIG),
    ids=lambda item: item.name,
)
@pytest.mark.requirement("DRV-PCI-05", "DRV-PCI-06", "DRV-PCI-07")
def test_a_field_is_accessed_by_its_own_width(page: TrapPage, layout: Layout, field: Field) -> None:
    """Each element once; a 64-bit field as two aligned 32-bit halves."""
    step = min(field.width, 4)
    places = list(range(field.offset, field.end, step))
    assert all(place % step == 0 for place in places)
    block = RegisterBlock(MappedBar(page.base), 0, layout.size, layout)
    assert page.watch(lambda: block.read_field(field)) == [(place, "read") for place in places]
    if field.writable:
        assert page.watch(lambda: block.write(field.name, 1)) == [(place, "write") for place in places]


@pytest.mark.parametrize(
    ("width", "value", "sent"), [(2, 3, b"\x03\x00"), (4, 0x8005_0003, b"\x03\x00\x05\x80")]
)
@pytest.mark.requirement("DRV-PCI-47", "DRV-PCI-48")
def test_a_doorbell_is_one_store(page: TrapPage, width: int, value: int, sent: bytes) -> None:
    kick = ffi.new("struct gpv_kick *")
    doorbell = Kick.mmio(page.base + PAGE - width, width, value & 0xFFFF)
    doorbell.fill(kick, 0)
    page.fill(0xEE)
    assert page.watch(lambda: lib.gpv_kick_send(kick, value)) == [(PAGE - width, "write")]
    assert page.bytes_at(PAGE - width - 1, width + 2) == b"\xee" + sent + b"\xee"
