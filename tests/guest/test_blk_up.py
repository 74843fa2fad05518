"""``guestpv blk up`` in a real guest: a file system, fio's verification, fstrim and growth over /dev/nbdN."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from guestvm import Machine
from guestvm.link import Result

from .conftest import once

MODERN = "disable-legacy=on,iommu_platform=on,ats=on"
FIO_MIB = int(os.environ.get("GUESTPV_FIO_MIB", "128"))
"""What fio reads, writes and verifies: 128 MiB, or 2048 in the long run."""
SIZE = max(512, FIO_MIB) << 20


def gpv(vm: Machine, words: str, timeout: float = 300) -> Result:
    return vm.run(f"guestpv {words}", timeout=timeout)


def data(result: Result) -> Any:
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["ok"], answer
    return answer["data"]


@dataclass
class Lab:
    """A machine with one disk, and its image on the host."""

    vm: Machine
    address: str
    image: Path


@pytest.fixture(scope="module")
def lab(
    kernel: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Lab]:
    failed_before = request.session.testsfailed
    image = tmp_path_factory.mktemp("blk") / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    vm = Machine(
        kernel,
        devices=[f"virtio-blk-pci,id=disk0,drive=disk,num-queues=4,{MODERN}"],
        blockdevs=[
            f"driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename={image},file.aio=threads"
        ],
        cpus=4,
        limit=3600,
        warm=True,
    )
    vm.start()
    yield Lab(vm, vm.address("disk0"), image)
    vm.stop(failed=request.session.testsfailed > failed_before)


def test_a_file_system_fio_trim_and_growth(lab: Lab) -> None:
    vm = lab.vm
    up = data(gpv(vm, f"blk up {lab.address} --queues 4 --detach --json").check())
    assert (up["path"], up["capacity"], up["connections"], up["cache"]) == (
        "/dev/nbd0",
        SIZE,
        4,
        "write-back",
    )

    vm.run(
        "modprobe ext4; mkfs.ext4 -q -E nodiscard /dev/nbd0 && mount -t ext4 /dev/nbd0 /mnt", timeout=600
    ).check()
    vm.run("cp -a /opt/venv/lib/python3*/site-packages/numpy /mnt/tree && sync", timeout=600).check()
    vm.run("cd /mnt && find tree -type f | sort | xargs sha256sum > /tmp/sums", timeout=600).check()

    busy = gpv(vm, "blk down")
    assert busy.status == 3
    assert "/dev/nbd0 is in use" in busy.stderr
    (status,) = data(gpv(vm, "blk status --json"))
    assert status["writes"] > 0
    assert status["flushes"] > 0
    assert status["errors"] == 0

    vm.run("umount /mnt && echo 3 > /proc/sys/vm/drop_caches && fsck.ext4 -fn /dev/nbd0", timeout=600).check()
    vm.run("mount -t ext4 /dev/nbd0 /mnt && cd /mnt && sha256sum -c -s /tmp/sums", timeout=600).check()

    # A file that goes away leaves a hole in the image on the host.
    vm.run(
        "dd if=/dev/urandom of=/mnt/big bs=1M count=64 && sync && rm /mnt/big && sync", timeout=600
    ).check()
    before = lab.image.stat().st_blocks
    vm.run("fstrim -v /mnt", timeout=600).check()
    assert before - lab.image.stat().st_blocks > (48 << 20) // 512
    assert data(gpv(vm, "blk status --json"))[0]["discards"] > 0

    # The disk grows under the mounted file system.
    vm.qmp("block_resize", **{"node-name": "disk", "size": 2 * SIZE})
    grown = f"[ $(blockdev --getsize64 /dev/nbd0) = {2 * SIZE} ]"
    vm.run(f"until {grown}; do sleep 0.05; done", timeout=300).check()
    vm.run("resize2fs /dev/nbd0", timeout=600).check()
    assert int(vm.run("df -k /mnt | tail -1 | awk '{print $2}'").stdout) > SIZE // 1024
    vm.run("cd /mnt && sha256sum -c -s /tmp/sums", timeout=600).check()
    vm.run("umount /mnt && fsck.ext4 -fn /dev/nbd0", timeout=600).check()

    down = gpv(vm, "blk down").check()
    assert down.stdout == f"nbd0 is down; virtio-pci has {lab.address} again.\n"
    name = vm.run(f"ls /sys/bus/pci/devices/{lab.address}/virtio*/block").stdout.strip()
    vm.run(f"fsck.ext4 -fn /dev/{name} && mount -t ext4 /dev/{name} /mnt", timeout=600).check()
    vm.run("cd /mnt && sha256sum -c -s /tmp/sums && cd / && umount /mnt", timeout=600).check()


@once
def test_fio_verifies_what_it_wrote(lab: Lab) -> None:
    vm = lab.vm
    data(gpv(vm, f"blk up {lab.address} --queues 4 --detach --json").check())
    result = vm.run(
        "fio --name=verify --filename=/dev/nbd0 --direct=1 --ioengine=libaio --rw=randrw --bs=4k "
        f"--numjobs=4 --iodepth=32 --size={FIO_MIB // 4}m --offset_increment={FIO_MIB // 4}m --verify=crc32c "
        # A job for each processor, and so for each of the kernel's queues.
        "--cpus_allowed=0-3 --cpus_allowed_policy=split "
        "--verify_fatal=1 --group_reporting --output-format=json",
        timeout=1800,
    ).check()
    (job,) = json.loads(result.stdout[result.stdout.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["write"]["io_bytes"] > (FIO_MIB << 20) // 3
    assert job["read"]["io_bytes"] > (FIO_MIB << 20) // 3
    (status,) = data(gpv(vm, "blk status --json"))
    assert status["errors"] == 0
    assert all(queue["writes"] > 0 for queue in status["queues"])
    gpv(vm, "blk down").check()
