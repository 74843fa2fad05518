"""The block driver on disks of QEMU and its storage daemon: formats, errors on given sectors, growth."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guestpv
from guestpv.drivers.blk import Blk
from guestpv.drivers.blk_errors import BlkIoError
from guestpv.drivers.blk_queue import Outcome
from guestpv.errors import DeviceGone, GuestpvError, Refused
from guestpv.pci.qtest import QtestFunction
from guestpv.spec import blk as spec
from guestpv.transport.pci import PciTransport
from peers.backend import Backend, storage_daemon
from worlds.ledger import Ledger, Writer

Device = Callable[..., PciTransport]
RANDOM = np.random.default_rng(11)
SIZE = 16 << 20
KILLS = int(os.environ.get("GUESTPV_KILLS", "3"))
NULL = f"driver=null-co,size={SIZE},read-zeroes=on"


def noise(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return RANDOM.integers(0, 256, nbytes, dtype=np.uint8)


def raw(path: Path, size: int = SIZE) -> str:
    with path.open("wb") as file:
        file.truncate(size)
    return f"driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename={path},file.aio=threads"


def qcow2(path: Path) -> str:
    if shutil.which("qemu-img") is None:
        pytest.fail("qemu-img is missing: apt install qemu-utils", pytrace=False)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
    return f"driver=qcow2,node-name=disk,file.driver=file,file.filename={path}"


@pytest.fixture
def kill_qemu() -> Callable[[PciTransport], None]:
    def kill(transport: PciTransport) -> None:
        assert isinstance(transport.function, QtestFunction)
        os.kill(transport.function.machine.qemu.pid, signal.SIGKILL)

    return kill


@pytest.mark.parametrize("packed", ["on", "off"])
@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["msix", "poll"])
def test_content(device: Device, tmp_path: Path, form: str, packed: str, mode: str) -> None:
    node = {"raw": raw, "qcow2": qcow2}[form](tmp_path / "disk")
    transport = device(f"virtio-blk-pci,disable-legacy=on,packed={packed}", blockdev=node, mode=mode)
    with Blk(transport) as disk:
        data = noise(3 << 20)
        disk.write(4096, data, fua=True)
        assert np.array_equal(disk.read(4096, data.nbytes), data)
        rows = disk.allocate(256 * 4096)
        rows.array[:] = noise(rows.nbytes)
        places = RANDOM.permutation(1024)[:256] * 4096 + (8 << 20)
        disk.write_many(places, rows, 4096, depth=32).check()
        back = disk.allocate(256 * 4096)
        disk.read_many(places, back, 4096, depth=32).check()
        assert np.array_equal(back.array, rows.array)
        disk.write_zeroes(4096, 1 << 20, unmap=True)
        assert not disk.read(4096, 1 << 20).any()
        disk.discard(2 << 20, 1 << 20)
        disk.flush()
        kept = disk.read(3 << 20, 4096)
        assert np.array_equal(kept, data[(3 << 20) - 4096 : 3 << 20])
    if form == "raw":
        image = (tmp_path / "disk").read_bytes()
        assert image[4096 : 4096 + (1 << 20)] == bytes(1 << 20)
        assert image[3 << 20 : (3 << 20) + 4096] == bytes(kept)
        assert (tmp_path / "disk").stat().st_blocks * 512 < SIZE


def test_identity_and_limits(device: Device) -> None:
    with Blk(
        device("virtio-blk-pci,serial=abc123,logical_block_size=4096,physical_block_size=4096", blockdev=NULL)
    ) as disk:
        assert (disk.get_id(), disk.capacity, disk.block_size) == ("abc123", SIZE, 4096)
        assert disk.limits.seg_max == 254
        assert disk.limits.discard.refusal == ""
        assert disk.volatile_cache
    with Blk(device("virtio-blk-pci,seg-max-adjust=off", blockdev=f"{NULL},read-only=on")) as disk:
        assert disk.read_only
        with pytest.raises(Refused, match="read-only"):
            disk.write(0, bytes(512))


def test_the_cache_is_switched(device: Device) -> None:
    with Blk(device("virtio-blk-pci", blockdev=NULL)) as disk:
        disk.set_writeback(False)
        assert not disk.volatile_cache
        disk.restart()
        disk.set_writeback(True)
        assert disk.volatile_cache


def test_several_queues(device: Device) -> None:
    with Blk(device("virtio-blk-pci,num-queues=4", blockdev=NULL), queues=4) as disk:
        for queue in range(4):
            assert not disk.read(0, 65536, queue=queue).any()
            disk.read_many(np.zeros(64), disk.allocate(512), 512, queue=queue).check()


def test_a_throttled_disk_is_waited_for(device: Device) -> None:
    transport = device(
        "virtio-blk-pci,request-merging=off",
        object="throttle-group,id=slow,x-iops-total=100",
        blockdev=f"driver=throttle,throttle-group=slow,file.driver=null-co,file.size={SIZE}",
    )
    with Blk(transport) as disk:
        result = disk.read_many(np.arange(150) * 512, disk.allocate(512), 512, latencies=True)
        result.check()
        assert result.latencies.max() > 100_000_000


def test_injected_errors_hit_exactly_those_requests(device: Device) -> None:
    bad = {"read": (80, 160), "write": (240,)}
    rules = "".join(
        f",inject-error.{number}.event=none,inject-error.{number}.iotype={kind},"
        f"inject-error.{number}.sector={sector},inject-error.{number}.errno=5"
        for number, (kind, sector) in enumerate((k, s) for k, sectors in bad.items() for s in sectors)
    )
    transport = device(
        "virtio-blk-pci,werror=report,rerror=report,request-merging=off",
        blockdev=f"driver=blkdebug,image.driver=null-co,image.size={SIZE},image.read-zeroes=on{rules}",
    )
    with Blk(transport) as disk:
        memory = disk.allocate(512)
        for many, kind in ((disk.read_many, "read"), (disk.write_many, "write")):
            result = many(np.arange(512) * 512, memory, 512, depth=32)
            assert tuple(np.flatnonzero(~result.done)) == bad[kind]
            assert {int(result.statuses[sector]) for sector in bad[kind]} == {spec.S_IOERR}
        with pytest.raises(BlkIoError, match="read of 4096 bytes at sector 80"):
            disk.read(80 * 512, 4096)
        assert not disk.read(88 * 512, 4096).any()


def test_a_disk_grows_by_qmp(device: Device, tmp_path: Path) -> None:
    transport = device("virtio-blk-pci", blockdev=raw(tmp_path / "disk"))
    with Blk(transport) as disk:
        assert isinstance(transport.function, QtestFunction)
        assert not disk.changed()
        transport.function.machine.qemu.qmp.execute("block_resize", {"node-name": "disk", "size": 2 * SIZE})
        assert disk.changed(60)
        disk.write(2 * SIZE - 512, b"e" * 512, fua=True)
    assert (tmp_path / "disk").read_bytes()[-512:] == b"e" * 512


def test_what_was_flushed_survives_a_killed_qemu(
    device: Device, tmp_path: Path, kill_qemu: Callable[[PciTransport], None]
) -> None:
    ledger = Ledger(256, np.random.default_rng(4))
    image = tmp_path / "disk"
    node = raw(image, ledger.sectors * spec.SECTOR)
    flushes = in_flight = 0
    for _ in range(KILLS):
        transport = device("virtio-blk-pci,num-queues=1", blockdev=node)
        # Nothing says that QEMU is gone to one who only waits for an interrupt.
        writer = Writer(Blk(transport, timeout=0.5), ledger)
        killer = threading.Timer(float(ledger.random.random()) / 5, kill_qemu, [transport])
        killer.start()
        with pytest.raises(GuestpvError):
            writer.live_on()
        killer.join()
        writer.disk.close()
        assert {request.outcome for request in writer.sent} <= {Outcome.DONE, Outcome.UNKNOWN}
        in_flight += sum(request.outcome is Outcome.UNKNOWN for request in writer.sent)
        flushes += writer.flushes
        ledger.check(np.fromfile(image, np.uint8))
    print(
        f"\n{KILLS} QEMUs killed: {ledger.version} writes and {flushes} flushes; {in_flight} requests "
        f"were in flight; {ledger.checked} sectors checked"
    )


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Callable[..., Backend]]:
    backends: list[Backend] = []

    def run(node: str, **options: Any) -> Backend:
        backends.append(storage_daemon(tmp_path / f"blk{len(backends)}.sock", node, **options).start())
        return backends[-1]

    yield run
    for one in backends:
        one.close()


@pytest.mark.parametrize("features", ["", "?features=-event_idx", "?features=-indirect_desc"])
def test_vhost_user(backend: Callable[..., Backend], tmp_path: Path, features: str) -> None:
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(SIZE)
    daemon = backend(f"driver=file,filename={tmp_path / 'disk'},aio=threads")
    with guestpv.open(f"vhost-user:blk:{daemon.socket}{features}") as transport, Blk(transport) as disk:
        data = noise(4 << 20)
        disk.write(512, data, fua=True)
        assert np.array_equal(disk.read(512, data.nbytes), data)
        disk.write_zeroes(1 << 20, 1 << 20)
        assert not disk.read(1 << 20, 1 << 20).any()
        rows = disk.allocate(256 * 4096)
        result = disk.read_many(np.arange(4096) % 4096 * 4096, rows, 4096, latencies=True)
        result.check()
        queue = disk.queues[0].queue
        before = queue.kicks
        disk.read_many(RANDOM.integers(0, 4096, 20000) * 4096, rows, 4096, depth=32).check()
        # A burst of 32 is one kick; how many come back together after it is the back end's choice.
        assert queue.kicks - before < 20000 or features


def test_a_vhost_user_back_end_that_is_killed_and_started_again(
    backend: Callable[..., Backend], tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    daemon = backend(
        f"driver=throttle,throttle-group=slow,file.driver=file,file.filename={path},file.aio=threads",
        options=["--object", "throttle-group,id=slow,x-iops-total=100"],
    )
    with guestpv.open(f"vhost-user:blk:{daemon.socket}") as transport, Blk(transport) as disk:
        requests = disk.queues[0]
        memory = disk.allocate(128 * 4096)
        memory.array[:] = noise(memory.nbytes)
        places = RANDOM.permutation(SIZE // 4096)[:128] * 4096
        ended: list[int] = []
        for round_ in range(2):
            sent = []
            for row, place in enumerate(places):
                part = memory[4096 * row : 4096 * row + 4096]
                (request,) = disk.submit(spec.T_OUT, int(place), [part])
                request.on_end = lambda one: ended.append(one.sector)
                sent.append(request)
            requests.publish()
            while requests.in_flight > 128 - 5 * (round_ + 1):
                requests.reap()
            daemon.kill()
            with pytest.raises(DeviceGone):
                requests.wait(sent, 60)
            daemon.start()
            again = disk.reconnect()
            assert {request.outcome for request in again} <= {None}
            requests.wait(sent, 60)
            for request in sent:
                request.check()
            assert sorted(ended) == sorted(int(place) // 512 for place in places)
            ended.clear()
            disk.flush()
            image = path.read_bytes()
            for row, place in enumerate(places):
                assert image[place : place + 4096] == bytes(memory.array[4096 * row : 4096 * row + 4096])
            memory.array[:] = noise(memory.nbytes)
