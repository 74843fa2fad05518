"""The NBD export over our own disk, with a client of the test's own at the other end of the socket."""

from __future__ import annotations

import errno
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guestpv.devices.loopback import open_function
from guestpv.devices.models.blk import Blk as Model
from guestpv.devices.ring import Chain
from guestpv.drivers.blk import Blk
from guestpv.errors import DeviceViolation, GuestpvError, Refused
from guestpv.services.nbd import Export
from guestpv.spec import blk as spec
from guestpv.transport.pci import PciTransport
from guestpv.wire import nbd as wire

SIZE = 8 << 20
RANDOM = np.random.default_rng(3)


class Client:
    """What the kernel is to an export: requests out, answers in whatever order, each once."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.settimeout(60)
        self._handles = itertools.count(1)
        self._reads: dict[bytes, int] = {}

    def ask(self, command: int, offset: int = 0, data: bytes | int = b"", flags: int = 0) -> bytes:
        """Send a request; ``data`` is what to write, or a length."""
        handle = next(self._handles).to_bytes(8, "big")
        length = data if isinstance(data, int) else len(data)
        if command == wire.CMD_READ:
            self._reads[handle] = length
        head = wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, handle, offset, length)
        self._socket.sendall(head + (b"" if isinstance(data, int) else data))
        return handle

    def answer(self) -> tuple[bytes, int, bytes]:
        """The next answer: handle, error, data."""
        magic, error, handle = wire.REPLY.unpack(self._take(wire.REPLY.size))
        assert magic == wire.REPLY_MAGIC
        return handle, error, b"" if error else self._take(self._reads.pop(handle, 0))

    def call(
        self, command: int, offset: int = 0, data: bytes | int = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """A request and its answer: error, data."""
        asked = self.ask(command, offset, data, flags)
        handle, error, content = self.answer()
        assert handle == asked
        return error, content

    def _take(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            part = self._socket.recv(size - len(got))
            assert part, "hung up"
            got += part
        return got


class Bench:
    """An export, its client, and the model at the far end."""

    def __init__(
        self, config: dict[str, int] | None = None, spin_us: int = 0, begin: bool = True, **params: Any
    ) -> None:
        self.function = open_function(
            "blk", {"size": str(SIZE), "threaded": "on"} | {k: str(v) for k, v in params.items()}
        )
        assert isinstance(self.function.model, Model)
        self.model = self.function.model
        self.model.config |= config or {}
        self.blk = Blk(PciTransport(self.function))
        self.export = Export(self.blk, 0, spin_us=spin_us)
        self.client = Client(self.export.client)
        if begin:
            self.export.start()

    def close(self) -> None:
        self.export.stop()
        self.blk.transport.close()
        self.export.close()


Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    benches: list[Bench] = []
    honest: list[bool] = []

    def start(*, findings: bool = False, **params: Any) -> Bench:
        benches.append(Bench(**params))
        honest.append(not findings)
        return benches[-1]

    yield start
    for bench, clean in zip(benches, honest, strict=True):
        bench.close()
        if clean:
            assert [str(finding) for finding in bench.function.findings] == []


VARIANTS: list[dict[str, Any]] = [
    {},
    {"packed": "on"},
    {"indirect_desc": "off", "event_idx": "off", "queue_size": 16},
    {"seg_max": 1, "size_max": 4096},
    {"block_size": 4096},
    {"msix": "off"},
    {"segment": 65536},
]


@pytest.mark.parametrize(
    "params", VARIANTS, ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "plain"
)
def test_what_was_written_is_read(make: Make, params: dict[str, Any]) -> None:
    bench = make(**params)
    client = bench.client
    disk = bytearray(SIZE)
    most = bench.export.largest
    for number in range(60):
        length = min(4096 << number % 8, most)
        offset = int(RANDOM.integers(0, (SIZE - length) // 4096)) * 4096
        data = RANDOM.bytes(length)
        assert client.call(wire.CMD_WRITE, offset, data) == (0, b"")
        disk[offset : offset + length] = data
    assert client.call(wire.CMD_FLUSH) == (0, b"")
    assert bench.model.flushes == 1
    for offset in range(0, SIZE, step := min(1 << 20, most // 4096 * 4096)):
        length = min(step, SIZE - offset)
        error, data = client.call(wire.CMD_READ, offset, length)
        assert (error, data == disk[offset : offset + length]) == (0, True)
    counters = bench.export.counters()
    assert (counters["writes"], counters["flushes"], counters["errors"]) == (60, 1, 0)


def test_many_at_once_are_each_answered_once(make: Make) -> None:
    bench = make()
    client, disk, asked = bench.client, bytearray(SIZE), {}
    for number in range(400):
        offset = int(RANDOM.permutation(SIZE // 8192)[0]) * 8192 + 4096 * (number % 2)
        if number % 2:
            data = RANDOM.bytes(4096)
            disk[offset : offset + 4096] = data
            asked[client.ask(wire.CMD_WRITE, offset, data)] = b""
        else:
            asked[client.ask(wire.CMD_READ, offset, 4096)] = bytes(4096)
    for _ in range(400):
        handle, error, data = client.answer()
        assert error == 0
        assert data == asked.pop(handle)
    assert asked == {}
    counters = bench.export.counters()
    assert (counters["reads"], counters["writes"], counters["requests"]) == (200, 200, 400)
    assert counters["kicks"] <= 400


def test_what_has_arrived_together_is_one_notification(make: Make) -> None:
    bench = make(begin=False)
    for number in range(32):
        bench.client.ask(wire.CMD_READ, 4096 * number, 4096)
    bench.export.start()
    assert [bench.client.answer()[1] for _ in range(32)] == [0] * 32
    assert bench.export.counters()["kicks"] == 1


class Hoard:
    """Makes a disk keep what it is given until ``release``; requests reach it, and notifications go on."""

    def __init__(self, model: Model) -> None:
        self._model, self._honest = model, model.handle
        self._kept: list[tuple[Any, Chain]] = []
        model.handle = lambda queue, chain: self._kept.append((queue, chain))  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self._kept)

    def forget(self) -> None:
        del self._kept[:]

    def release(self) -> None:
        with self._model.device.executor:
            self._model.handle = self._honest  # type: ignore[method-assign]
            for queue, chain in self._kept:
                self._honest(queue, chain)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def holds(hoard: Hoard, number: int) -> bool:
    return len(hoard) == number


FOR_EVER = 3600_000_000


def busy(make: Make, depth: int, spin_us: int = FOR_EVER, **params: Any) -> tuple[Bench, Hoard]:
    """An export whose device has so many reads, and that looks for more without ever giving up."""
    bench = make(begin=False, spin_us=spin_us, **params)
    hoard = Hoard(bench.model)
    for number in range(depth):
        bench.client.ask(wire.CMD_READ, 4096 * number, 4096)
    bench.export.start()
    until(partial(holds, hoard, depth))
    return bench, hoard


def trickle(bench: Bench, number: int) -> None:
    """So many more reads, the next one not before the export has the one before."""
    for _ in range(number):
        wanted = bench.export.counters()["reads"] + 1
        bench.client.ask(wire.CMD_READ, 0, 4096)
        until(partial(begun, bench, wanted))


def begun(bench: Bench, reads: int) -> bool:
    return bench.export.counters()["reads"] == reads


def finish(bench: Bench, hoard: Hoard, number: int) -> None:
    hoard.release()
    assert [bench.client.answer()[1] for _ in range(number)] == [0] * number


@pytest.mark.parametrize("packed", ["off", "on"])
def test_an_idle_device_gets_half_of_a_clients_requests_at_once(make: Make, packed: str) -> None:
    bench, hoard = busy(make, 8, packed=packed)
    finish(bench, hoard, 8)
    hoard, kicks = Hoard(bench.model), bench.export.counters()["kicks"]
    trickle(bench, 3)
    assert (len(hoard), bench.export.counters()["kicks"]) == (0, kicks)
    trickle(bench, 1)
    until(partial(holds, hoard, 4))
    assert bench.export.counters()["kicks"] <= kicks + 1
    finish(bench, hoard, 4)


def test_from_a_busy_device_a_quarter_is_kept_at_most(make: Make) -> None:
    bench, hoard = busy(make, 24)
    trickle(bench, 6)
    assert (len(hoard), bench.export.counters()["kicks"]) == (24, 1)
    trickle(bench, 1)
    until(partial(holds, hoard, 31))
    finish(bench, hoard, 31)


def test_of_few_none_waits_for_a_busy_device(make: Make) -> None:
    bench, hoard = busy(make, 1)
    for number in range(2, 8):
        trickle(bench, 1)
        until(partial(holds, hoard, number))
    finish(bench, hoard, 7)


@pytest.mark.parametrize("spin_us", [0, 20_000])
def test_gathering_ends_when_nothing_more_comes(make: Make, spin_us: int) -> None:
    bench, hoard = busy(make, 24, spin_us)
    for number in range(25, 28):
        trickle(bench, 1)
        until(partial(holds, hoard, number))
    finish(bench, hoard, 27)
    for number in range(5):
        assert bench.client.call(wire.CMD_WRITE, 4096 * number, bytes(4096)) == (0, b"")


@pytest.mark.parametrize(("command", "reach"), [(wire.CMD_FLUSH, 27), (wire.CMD_DISC, 26)])
def test_a_flush_and_a_goodbye_take_with_them_what_was_gathered(make: Make, command: int, reach: int) -> None:
    bench, hoard = busy(make, 24)
    trickle(bench, 2)
    assert len(hoard) == 24
    bench.client.ask(command)
    until(partial(holds, hoard, reach))
    finish(bench, hoard, reach)


def test_nothing_is_gathered_when_there_is_no_room_for_more(make: Make) -> None:
    bench, hoard = busy(make, 60)
    trickle(bench, 4)
    assert len(hoard) == 60
    bench.client.ask(wire.CMD_READ, 0, 4096)
    until(partial(holds, hoard, 64))
    finish(bench, hoard, 64)


def test_what_was_gathered_outlives_a_restart(make: Make) -> None:
    bench, hoard = busy(make, 24)
    trickle(bench, 2)
    bench.export.pause()
    bench.blk.restart(settle=False)
    hoard.forget()
    bench.export.resume()
    finish(bench, hoard, 26)
    assert bench.export.counters()["resubmitted"] == 26


def test_fua_is_a_write_and_a_flush(make: Make) -> None:
    bench = make()
    assert bench.client.call(wire.CMD_WRITE, 0, bytes(512), wire.CMD_FLAG_FUA) == (0, b"")
    assert bench.model.flushes == 1
    assert bench.client.call(wire.CMD_TRIM, 0, 4096, wire.CMD_FLAG_FUA) == (0, b"")
    assert bench.model.flushes == 2
    assert bench.client.call(wire.CMD_READ, 0, 512, wire.CMD_FLAG_FUA)[0] == 0
    assert bench.model.flushes == 2


def test_without_a_volatile_cache_nothing_is_flushed(make: Make) -> None:
    bench = make(offer="-flush,-config_wce")
    assert bench.client.call(wire.CMD_WRITE, 0, bytes(512), wire.CMD_FLAG_FUA) == (0, b"")
    assert bench.client.call(wire.CMD_FLUSH) == (0, b"")
    assert bench.model.requests == 1


def test_ranges_are_cut_to_the_devices_limits(make: Make) -> None:
    bench = make(
        config={
            "max_discard_sectors": 64,
            "max_discard_seg": 2,
            "max_write_zeroes_sectors": 100,
            "max_write_zeroes_seg": 50,
        }
    )
    client = bench.client
    assert client.call(wire.CMD_WRITE, 0, b"x" * (1 << 20)) == (0, b"")
    assert client.call(wire.CMD_TRIM, 512, SIZE - 512) == (0, b"")
    assert bench.model.discarded[0] == (1, 64)
    assert sum(count for _, count in bench.model.discarded) == SIZE // 512 - 1
    assert client.call(wire.CMD_WRITE_ZEROES, 512, (1 << 20) - 1024) == (0, b"")
    error, data = client.call(wire.CMD_READ, 0, 1 << 20)
    assert (error, data) == (0, b"x" * 512 + bytes((1 << 20) - 1024) + b"x" * 512)


@pytest.mark.parametrize(
    ("command", "offset", "data", "code"),
    [
        (wire.CMD_READ, SIZE, 512, errno.EINVAL),
        (wire.CMD_WRITE, SIZE - 512, bytes(1024), errno.ENOSPC),
        (wire.CMD_WRITE, (1 << 64) - 512, bytes(512), errno.ENOSPC),
        (wire.CMD_READ, 3, 512, errno.EINVAL),
        (wire.CMD_READ, 0, 0, errno.EINVAL),
        (wire.CMD_READ, 0, 1 << 31, errno.EINVAL),
        (wire.CMD_WRITE, 0, bytes(5 << 20), errno.EINVAL),
        (5, 0, 512, errno.EINVAL),
        (99, 0, b"", errno.EINVAL),
    ],
)
def test_requests_that_make_no_sense(make: Make, command: int, offset: int, data: Any, code: int) -> None:
    bench = make()
    before = bench.model.requests
    assert bench.client.call(command, offset, data) == (code, b"")
    assert bench.model.requests == before
    assert bench.client.call(wire.CMD_READ, 0, 512) == (0, bytes(512))


def test_read_only_and_unsupported(make: Make) -> None:
    bench = make(ro="on")
    assert bench.client.call(wire.CMD_WRITE, 0, bytes(512))[0] == errno.EPERM
    assert bench.client.call(wire.CMD_READ, 0, 512)[0] == 0
    bench = make(offer="-discard")
    assert bench.client.call(wire.CMD_TRIM, 0, 512)[0] == errno.EOPNOTSUPP


def test_the_devices_errors_reach_the_client(make: Make) -> None:
    bench = make()
    bench.model.fail_next = [spec.S_IOERR, spec.S_UNSUPP, 77]
    codes = [bench.client.call(wire.CMD_READ, 0, 512)[0] for _ in range(4)]
    assert codes == [errno.EIO, errno.EOPNOTSUPP, errno.EIO, 0]


def test_a_failed_write_with_fua_is_not_flushed(make: Make) -> None:
    bench = make()
    bench.model.fail_next = [spec.S_IOERR]
    assert bench.client.call(wire.CMD_WRITE, 0, bytes(512), wire.CMD_FLAG_FUA)[0] == errno.EIO
    assert bench.model.flushes == 0


def test_a_disk_that_grows(make: Make) -> None:
    bench = make()
    bench.model.resize(2 * SIZE)
    assert bench.client.call(wire.CMD_WRITE, SIZE, b"x" * 512)[0] == errno.ENOSPC
    bench.export.resize(2 * SIZE)
    assert bench.client.call(wire.CMD_WRITE, SIZE, b"x" * 512) == (0, b"")


def test_it_looks_before_it_sleeps_and_sleeps_when_nobody_asks(make: Make) -> None:
    bench = make(spin_us=20_000)
    status = Path(f"/proc/self/task/{bench.export._thread.native_id}/stat")
    for number in range(3):
        content = RANDOM.bytes(4096)
        assert bench.client.call(wire.CMD_WRITE, 4096 * number, content) == (0, b"")
        assert bench.client.call(wire.CMD_READ, 4096 * number, 4096) == (0, content)
        # Each loop of the search is too short to sleep; only a thread that has given up is seen sleeping.
        deadline = time.monotonic() + 60
        while status.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline, "it still looks"
            time.sleep(0.001)


def test_disconnect_answers_what_was_begun(make: Make) -> None:
    bench = make()
    for number in range(20):
        bench.client.ask(wire.CMD_WRITE, 4096 * number, bytes(4096))
    bench.client.ask(wire.CMD_DISC)
    for _ in range(20):
        assert bench.client.answer()[1] == 0
    bench.export._thread.join(60)
    assert bench.export.over
    bench.export.check()


def test_a_device_that_lies_leaves_nobody_waiting(make: Make) -> None:
    bench = make(findings=True)
    honest = bench.model.handle

    def lie(queue: Any, chain: Chain) -> None:
        if bench.model.requests >= 5:
            queue.complete(chain, chain.writable_bytes + 9)
        else:
            honest(queue, chain)

    bench.model.handle = lie  # type: ignore[method-assign]
    with bench.function.executor:
        # The device does nothing until all of them are on their way.
        for number in range(10):
            bench.client.ask(wire.CMD_WRITE, 4096 * number, bytes(4096))
    errors = [bench.client.answer()[1] for _ in range(10)]
    assert errors[:5] == [0] * 5
    assert set(errors[5:]) <= {0, errno.EIO}
    assert errno.EIO in errors
    bench.export._thread.join(60)
    with pytest.raises(DeviceViolation, match="used length"):
        bench.export.check()


def test_garbage_ends_the_export_with_a_message(make: Make) -> None:
    bench = make()
    bench.export.client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    deadline = time.monotonic() + 60
    while not bench.export.over and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(GuestpvError, match="does not speak NBD"):
        bench.export.check()


def test_a_segment_that_cannot_hold_a_block_is_refused() -> None:
    function = open_function("blk", {"size_max": "2048", "block_size": "4096"})
    with Blk(PciTransport(function)) as disk, pytest.raises(Refused, match="size_max is 2048"):
        Export(disk, 0)
