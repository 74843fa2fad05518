"""QEMU's balloon: every queue, both numberings, and memory that is really gone from the RAM file."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from guestpv.cli.main import main
from guestpv.drivers.balloon import Balloon
from guestpv.drivers.balloon_pages import Chunk, PageSource
from guestpv.pci.qtest import QtestFunction
from guestpv.services.balloon import BalloonService
from guestpv.spec import balloon as spec
from guestpv.transport.pci import PciTransport

Device = Callable[..., PciTransport]

MIB = 256
"""Pages."""
RAM = 128
"""MiB of guest RAM."""
UNKNOWN = (1 << 64) - 1
"""What QEMU shows for a statistic that the driver did not give."""
MODERN = "virtio-balloon-pci,disable-legacy=on"
ALL = f"{MODERN},deflate-on-oom=on,free-page-reporting=on,free-page-hint=on,iothread=thread"


class Host:
    """QEMU as the one who asks for memory."""

    def __init__(self, transport: PciTransport) -> None:
        assert isinstance(transport.function, QtestFunction)
        self._transport = transport
        self.qemu = transport.function.machine.qemu
        self.qmp = self.qemu.qmp

    def want(self, mib: int) -> None:
        """Ask the guest to have so many MiB: the rest belongs into the balloon."""
        self.qmp.execute("balloon", {"value": mib << 20})

    @property
    def actual(self) -> float:
        """MiB that the guest has, as QEMU sees it once it carried out every write to a register."""
        self._transport.read_status()
        answer: dict[str, int] = self.qmp.execute("query-balloon")
        return answer["actual"] / (1 << 20)

    @property
    def resident(self) -> int:
        """Bytes of the guest's RAM that take host memory: what is not a hole in the file."""
        return os.fstat(self.qemu.ram.fd).st_blocks * 512

    def resident_page(self, number: int) -> bool:
        """Whether a page of the guest takes host memory."""
        fd, offset = self.qemu.ram.fd, number << spec.PAGE_SHIFT
        try:
            return os.lseek(fd, offset, os.SEEK_DATA) == offset
        except OSError:  # no data up to the end of the file
            return False


@pytest.fixture
def dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory that goes into a balloon was written to before."""
    take = PageSource.take

    def written(source: PageSource) -> Chunk:
        chunk = take(source)
        chunk.buffer.array[:] = 0xA5
        return chunk

    monkeypatch.setattr(PageSource, "take", written)


@pytest.mark.usefixtures("dirty")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("mode", ["intx", "poll"])
@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_memory_is_really_given_and_reads_as_zero_when_it_comes_back(
    device: Device, machine: str, mode: str, packed: bool
) -> None:
    transport = device(MODERN + (",packed=on" if packed else ""), machine=machine, mode=mode, memory=str(RAM))
    host = Host(transport)
    with Balloon(transport) as balloon:
        host.want(RAM - 64)
        assert balloon.target == 64 * MIB
        balloon.inflate(balloon.target)
        assert host.actual == RAM - 64
        numbers = balloon.page_numbers()
        assert not any(map(host.resident_page, numbers.tolist()))
        balloon.inflate(100)
        chunk = balloon._chunks[-1]
        balloon.deflate(100 + 32 * MIB)
        assert host.actual == RAM - 32
        assert not chunk.buffer.array[: 100 * spec.PAGE_BYTES].any()
        assert (chunk.buffer.array[100 * spec.PAGE_BYTES :] == 0xA5).all()
        del chunk
        balloon.deflate(balloon.pages)
        assert host.actual == RAM


@pytest.mark.usefixtures("dirty")
def test_holes_in_the_ram_file_are_counted(device: Device) -> None:
    transport = device(MODERN, memory=str(RAM))
    host = Host(transport)
    with Balloon(transport) as balloon:
        chunks = [balloon._source.take() for _ in range(20)]
        full = host.resident
        assert full >= 40 << 20
        for chunk in chunks:
            chunk.inside = len(chunk.numbers)
            balloon._requests.send(balloon._inflateq, chunk.numbers)
        balloon._requests.finish(balloon._inflateq)
        assert full - host.resident == 40 << 20


def test_scattered_pages_in_one_request(device: Device) -> None:
    transport = device(MODERN, memory=str(RAM))
    host = Host(transport)
    with Balloon(transport) as balloon:
        chunk = balloon._source.take()
        chunk.buffer.array[:] = 1
        odd = chunk.numbers[1::2]
        balloon._requests.send(balloon._inflateq, odd)
        balloon._requests.finish(balloon._inflateq)
        pages = chunk.buffer.array.reshape(-1, spec.PAGE_BYTES)
        assert [host.resident_page(n) for n in chunk.numbers.tolist()] == [True, False] * (len(pages) // 2)
        assert pages[0::2].all()
        assert not pages[1::2].any()


@pytest.mark.requirement("DRV-BALLOON-43")
@pytest.mark.parametrize(
    ("body", "numbering", "numbers"),
    [
        (MODERN, "standard", {0: 0, 1: 1, 2: 2}),
        (f"{MODERN},free-page-reporting=on", "dense", {0: 0, 1: 1, 2: 2, 4: 3}),
        (ALL, "standard", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}),
    ],
    ids=["plain", "reporting", "all"],
)
def test_qemus_numbers_of_queues(device: Device, body: str, numbering: str, numbers: dict[int, int]) -> None:
    options = {"object": "iothread,id=thread"} if "thread" in body else {}
    with Balloon(device(body, **options)) as balloon:
        assert balloon.numbering == numbering
        assert {which: queue.index for which, queue in balloon.queues.items()} == numbers


def test_info_names_the_quirk() -> None:
    command = ["info", f"qtest:{MODERN},free-page-reporting=on"]
    shown = CliRunner().invoke(main, command).output
    assert "inflateq 0, deflateq 1, statsq 2, reporting_vq 3" in shown
    assert re.search("quirk +queues numbered without gaps", shown)
    found = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["data"]["balloon_queues"]
    assert (found["numbering"], found["quirk"]) == ("dense", "queues numbered without gaps")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_free_pages_of_the_pool_are_reported(device: Device, packed: bool) -> None:
    transport = device(f"{MODERN},free-page-reporting=on" + (",packed=on" if packed else ""), memory=str(RAM))
    host = Host(transport)
    with Balloon(transport) as balloon:
        balloon.inflate(100)
        (chunk,) = balloon._chunks
        chunk.buffer.array[100 * spec.PAGE_BYTES :] = 0xA5
        before = host.resident
        assert balloon.report_free() == 412
        assert before - host.resident == 412 * spec.PAGE_BYTES
        assert not chunk.buffer.array.any()
        chunk.buffer.array[:] = 1
        balloon.inflate(412)
        assert balloon.pages == 512
        del chunk


def test_statistics_arrive_at_the_monitor(device: Device) -> None:
    transport = device(MODERN)
    host = Host(transport)
    place = {"path": "/machine/peripheral/dev"}
    service = BalloonService(transport, keep_free=0)
    host.qmp.execute("qom-set", {**place, "property": "guest-stats-polling-interval", "value": 1})
    seen: list[dict[str, Any]] = []
    deadline = time.monotonic() + 120
    while service.balloon.answered < 3 and time.monotonic() < deadline:
        service.watch(0.2)
        seen.append(host.qmp.execute("qom-get", {**place, "property": "guest-stats"}))
    assert service.balloon.answered >= 3
    assert len({one["last-update"] for one in seen}) >= 2
    stats = seen[-1]["stats"]
    told = [name for name, value in stats.items() if value not in (-1, UNKNOWN)]
    assert len(told) >= 10, "the ten that QEMU 7.2 knows; newer ones know more"
    with open("/proc/meminfo", encoding="ascii") as file:
        assert stats["stat-total-memory"] == int(file.readline().split()[1]) << 10
    assert 0 < stats["stat-available-memory"] < stats["stat-total-memory"]
    assert stats["stat-minor-faults"] > stats["stat-major-faults"] > 0
    service.close()


@pytest.mark.usefixtures("dirty")
def test_a_thousand_targets_in_a_row(device: Device) -> None:
    transport = device(f"{MODERN},deflate-on-oom=on", memory=str(RAM))
    host = Host(transport)
    service = BalloonService(transport, keep_free=0, rate=1 << 40)
    choose = random.Random(6)
    for number in range(1000):
        host.want(RAM - choose.randrange(4))
        if number % 100:
            service.watch(0.001)
        else:
            _settle(service)
    host.want(RAM - 8)
    _settle(service)
    balloon = service.balloon
    assert balloon.pages == 8 * MIB
    assert host.actual == RAM - 8
    numbers = balloon.page_numbers()
    assert len(np.unique(numbers)) == len(numbers) == 8 * MIB
    assert not any(map(host.resident_page, numbers.tolist()))
    host.want(RAM)
    _settle(service)
    assert (balloon.pages, balloon.free_pages, host.actual) == (0, 0, RAM)
    assert balloon.inflated == balloon.deflated
    service.close()


def _settle(service: BalloonService) -> None:
    deadline = time.monotonic() + 120
    while True:
        service.watch(0.005)
        service.target = service.balloon.target
        if service.balloon.pages == service.target:
            return
        assert time.monotonic() < deadline


def test_more_than_there_is_is_followed_as_far_as_it_goes(device: Device) -> None:
    transport = device(MODERN, memory="64")
    host = Host(transport)
    service = BalloonService(transport, keep_free=0, rate=1 << 40)
    host.want(1)
    events: list[str] = []
    deadline = time.monotonic() + 120
    while not any("held" in event for event in events):
        assert time.monotonic() < deadline
        events += service.watch(0.2)
    assert 40 * MIB < service.balloon.pages < 63 * MIB
    assert host.actual == 64 - service.balloon.pages / MIB
    assert "RAM" in service.stats()["held"]
    service.close()


def test_a_reset_ends_the_balloon_and_it_can_be_driven_again(device: Device) -> None:
    transport = device(MODERN, memory=str(RAM))
    host = Host(transport)
    first = Balloon(transport)
    first.inflate(1000)
    transport.reset()
    second = Balloon(transport)
    assert (second.pages, second.actual, host.actual) == (0, 0, RAM)
    second.inflate(10 * MIB)
    assert host.actual == RAM - 10
    second.close()
