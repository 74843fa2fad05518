"""The one door, against the real kernel."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from guestpv.system import PAGE_SIZE, SYSTEM
from guestpv.vfio.dma import Memory

ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def mapped(pointer: int) -> bool:
    """Whether some mapping of this process starts at or spans ``pointer``."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= pointer < high:
            return True
    return False


def test_mmap_shares_a_file_and_munmap_ends_it() -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 2 * PAGE_SIZE)
    pointer = SYSTEM.mmap(PAGE_SIZE, fd=fd, offset=PAGE_SIZE)
    window = SYSTEM.window(pointer, PAGE_SIZE)
    window[3] = 77
    assert os.pread(fd, 1, PAGE_SIZE + 3) == b"\x4d"
    SYSTEM.munmap(pointer, PAGE_SIZE)
    assert not mapped(pointer)
    os.close(fd)


def test_mmap_and_munmap_raise_what_the_kernel_says() -> None:
    with pytest.raises(OSError, match="mmap of 4096 bytes") as caught:
        SYSTEM.mmap(PAGE_SIZE, fd=-1)
    assert caught.value.errno == 9
    with pytest.raises(OSError, match="munmap"):
        SYSTEM.munmap(1, PAGE_SIZE)
    with pytest.raises(OSError, match="madvise"):
        SYSTEM.madvise(1, PAGE_SIZE, mmap.MADV_DONTFORK)


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    memory = Memory(3 * PAGE_SIZE, PAGE_SIZE, SYSTEM)
    pointer = memory.pointer
    assert not memory.array.any()
    view = memory.array[PAGE_SIZE : PAGE_SIZE + 8].view(np.uint64)
    memory.array[PAGE_SIZE] = 5
    del memory
    gc.collect()
    assert view[0] == 5
    assert mapped(pointer)
    del view
    gc.collect()
    assert not mapped(pointer)


def test_memory_is_aligned_for_huge_pages() -> None:
    memory = Memory(2 << 20, 2 << 20, SYSTEM)
    assert memory.pointer % (2 << 20) == 0
    assert memory.array.shape == (2 << 20,)


def test_eventfd_and_poll() -> None:
    first, second = SYSTEM.eventfd(), SYSTEM.eventfd()
    assert SYSTEM.poll([first, second], 0) == []
    os.eventfd_write(second, 3)
    assert SYSTEM.poll([first, second], None) == [second]
    assert SYSTEM.read(second, 8) == (3).to_bytes(8, "little")
    with pytest.raises(BlockingIOError):
        SYSTEM.read(second, 8)
    SYSTEM.close(first)
    SYSTEM.close(second)


def test_flock_excludes_a_second_opener(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first, second = (SYSTEM.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    SYSTEM.flock(first)
    with pytest.raises(BlockingIOError):
        SYSTEM.flock(second)
    SYSTEM.close(first)
    SYSTEM.flock(second)
    SYSTEM.close(second)


def test_descriptors_do_not_survive_exec(tmp_path: Path) -> None:
    fd = SYSTEM.open(str(tmp_path / "file"), os.O_RDWR | os.O_CREAT)
    assert not os.get_inheritable(fd)
    SYSTEM.close(fd)


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "attribute"
    path.write_bytes(b"tag\0\n")
    assert SYSTEM.read_text(str(path)) == "tag"
    SYSTEM.write_text(str(path), "vfio-pci")
    assert SYSTEM.read_text(str(path)).startswith("vfio-pci")
    with pytest.raises(FileNotFoundError):
        SYSTEM.write_text(str(tmp_path / "missing"), "x")
    assert SYSTEM.listdir(str(tmp_path)) == ["attribute"]


def test_run_gives_status_and_output() -> None:
    assert SYSTEM.run(["sh", "-c", "echo $0; exit 3", "; rm"]) == (3, "; rm")
    with pytest.raises(FileNotFoundError):
        SYSTEM.run(["/nonexistent/program"])
    with pytest.raises(TimeoutError, match="sleep did not end"):
        SYSTEM.run(["sleep", "30"], timeout=0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="page frame numbers need CAP_SYS_ADMIN")
def test_page_frames_differ_from_page_to_page() -> None:
    memory = Memory(4 * PAGE_SIZE, PAGE_SIZE, SYSTEM)
    memory.array[: 3 * PAGE_SIZE] = 1
    frames = SYSTEM.page_frames(memory.pointer, 4)
    assert len(set(frames[:3])) == 3
    assert frames[3] == 0
    assert all(frames[:3])


def test_pci_addresses_are_those_of_sysfs() -> None:
    pytest.importorskip("pyudev", reason="pip install pyudev")
    root = Path("/sys/bus/pci/devices")
    assert SYSTEM.pci_addresses() == (sorted(os.listdir(root)) if root.exists() else [])


def test_the_machine_answers() -> None:
    assert SYSTEM.getpid() == os.getpid()
    assert SYSTEM.geteuid() == os.geteuid()
    assert SYSTEM.user_id("root") == 0
    assert SYSTEM.environ()["PATH"]
    before = SYSTEM.monotonic()
    SYSTEM.sleep(0.001)
    assert SYSTEM.monotonic() > before
