"""Crashes under ``guestpv blk up``: ext4 on what was written up to each flush, and after QEMU was killed."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestvm import GuestDied, Machine

from .conftest import once

MODERN = "disable-legacy=on,iommu_platform=on,ats=on"
SIZE = 64 << 20
FILES = 40
MOST_REPLAYS = 30
"""Flushes after which the image is checked, spread over all of them."""
KILLS = int(os.environ.get("GUESTPV_KILLS", "1"))

LOG_MAGIC = 0x6A736677736872
SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")
FLUSH, DISCARD = 1, 4

WRITER = """
modprobe ext4
mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0 || exit 1
mount -t ext4 /dev/nbd0 /mnt || exit 1
echo formatted
i=0
while [ $i -lt %d ]; do
    seq $((i * 1000)) $((i * 1000 + 5000)) | dd of=/mnt/f$i bs=64k conv=fsync 2>/dev/null || exit 1
    echo done $i
    i=$((i + 1))
done
"""


def expected(number: int) -> bytes:
    return b"".join(b"%d\n" % n for n in range(number * 1000, number * 1000 + 5001))


def sound(image: Path, work: Path) -> set[int]:
    """Let e2fsck replay the journal of a copy, then demand that nothing is wrong; returns the whole files."""
    repaired = subprocess.run(["e2fsck", "-fy", image], capture_output=True, text=True, timeout=300)
    # 1: "errors corrected" is what replaying the journal counts as.
    assert repaired.returncode in (0, 1), repaired.stdout
    assert not re.search(r"UNEXPECTED|Fix\\? yes", repaired.stdout), repaired.stdout
    again = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    subprocess.run(["debugfs", "-R", f"rdump / {work}", image], capture_output=True, check=True, timeout=300)
    whole = set()
    for path in work.rglob("f*"):
        if path.is_file() and path.read_bytes() == expected(int(path.name[1:])):
            whole.add(int(path.name[1:]))
    return whole


def entries(log: Path) -> Iterator[tuple[int, int, bytes]]:
    """(flags, byte offset, data) of every entry that QEMU's blklogwrites left."""
    with log.open("rb") as file:
        magic, version, count, sector_size = SUPER.unpack(file.read(SUPER.size))
        assert (magic, version) == (LOG_MAGIC, 1)
        position = sector_size
        for _ in range(count):
            file.seek(position)
            sector, sectors, flags, _ = ENTRY.unpack(file.read(ENTRY.size))
            file.seek(position + sector_size)
            length = 0 if flags & DISCARD else sectors * sector_size
            yield flags, sector * sector_size, file.read(length)
            position += sector_size + length


@once
def test_every_flush_leaves_a_sound_file_system(boot: Callable[..., Machine], tmp_path: Path) -> None:
    image, log = tmp_path / "disk.img", tmp_path / "log.img"
    for path in (image, log):
        with path.open("wb") as file:
            file.truncate(SIZE if path == image else 0)
    vm = boot(
        devices=[f"virtio-blk-pci,id=disk0,drive=disk,{MODERN}"],
        blockdevs=[
            f"driver=blklogwrites,node-name=disk,log-super-update-interval=1,file.driver=file,"
            f"file.filename={image},log.driver=file,log.filename={log}"
        ],
        limit=1800,
    )
    vm.run(f"guestpv blk up {vm.address('disk0')} --detach", timeout=600).check()
    vm.run(WRITER % FILES, timeout=600).check()
    vm.run("umount /mnt && guestpv blk down", timeout=600).check()
    vm.stop()

    flushes = sum(bool(flags & FLUSH) for flags, _, _ in entries(log))
    assert flushes > FILES
    chosen = set(random.Random(1).sample(range(flushes), min(MOST_REPLAYS, flushes))) | {flushes - 1}
    replay, copy = tmp_path / "replay.img", tmp_path / "copy.img"
    with replay.open("wb") as file:
        file.truncate(SIZE)
    number = writes = checked = 0
    before: set[int] = set()
    with replay.open("r+b", buffering=0) as file:
        for flags, offset, content in entries(log):
            file.seek(offset)
            file.write(content)
            writes += bool(content)
            if not flags & FLUSH:
                continue
            number += 1
            if number - 1 not in chosen or not formatted(replay):
                continue
            shutil.copyfile(replay, copy)
            whole = sound(copy, tmp_path / "files")
            assert whole == set(range(len(whole))), "a later file is there and an earlier one is not"
            assert before <= whole
            before = whole
            checked += 1
    print(f"\n{writes} writes and {flushes} flushes logged; {checked} flushes replayed, each sound")
    assert checked > 5
    assert before == set(range(FILES))


def formatted(image: Path) -> bool:
    """Whether mkfs has got so far that there is an ext4 superblock with its journal."""
    with image.open("rb") as file:
        file.seek(1024)
        block = file.read(1024)
    return block[56:58] == b"\x53\xef" and bool(struct.unpack_from("<I", block, 0x5C)[0] & 4)


@once
def test_what_was_synchronized_survives_a_killed_qemu(boot: Callable[..., Machine], tmp_path: Path) -> None:
    for attempt in range(KILLS):
        image = tmp_path / f"disk{attempt}.img"
        with image.open("wb") as file:
            file.truncate(SIZE)
        vm = boot(
            devices=[f"virtio-blk-pci,id=disk0,drive=disk,{MODERN}"],
            blockdevs=[f"driver=raw,node-name=disk,file.driver=file,file.filename={image},file.aio=threads"],
            limit=1800,
        )
        vm.run(f"guestpv blk up {vm.address('disk0')} --detach", timeout=600).check()
        writer = vm.spawn(["sh", "-c", WRITER % 100000])
        writer.wait_for(f"done {5 + 7 * attempt}", 600)
        time.sleep(0.05 * attempt)
        os.kill(vm.pid, signal.SIGKILL)
        with pytest.raises(GuestDied):
            writer.wait()
        said = writer.stdout
        acknowledged = {int(word) for word in re.findall(r"^done (\d+)$", said, re.MULTILINE)}
        assert len(acknowledged) > 5
        whole = sound(image, tmp_path / "files")
        assert acknowledged <= whole, f"lost: {sorted(acknowledged - whole)}"
