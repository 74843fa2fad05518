"""The memory balloon: queues, pages, statistics, hints and reports (5.5)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from guestpv.conformance.balloon_host import Host
from guestpv.conformance.case import Case
from guestpv.conformance.queue import Queue
from guestpv.conformance.requests import BalloonWork
from guestpv.conformance.rig import Rig
from guestpv.conformance.stimulus import change_config
from guestpv.drivers.balloon_queues import find_numbering
from guestpv.errors import DeviceViolation
from guestpv.memory import DmaBuffer
from guestpv.spec import balloon
from guestpv.spec import features as ft

pytestmark = [pytest.mark.device("balloon"), pytest.mark.formats]

POISON = 0xA5A5A5A5
UNKNOWN_TAG = 0x7FFF
VALUES = {
    balloon.Stat.MEMTOT: 0x0123_4567_89AB_C000,
    balloon.Stat.MEMFREE: 0x0011_2233_4455_6000,
    balloon.Stat.MAJFLT: 0x7766_5544_3322,
    balloon.Stat.MINFLT: 3,
}


def running(rig: Rig, ring: int, feature: int, queue: int) -> tuple[dict[int, Queue], Host]:
    """The balloon with one optional feature, running; its queues by the standard's numbers."""
    if not rig.transport.offered >> feature & 1:
        pytest.skip(f"{ft.feature_name(ft.BALLOON, feature)} is not offered")
    features = rig.features_for(ring) | 1 << feature
    rig.negotiate(features)
    numbers = find_numbering(rig.transport.offered, features, rig.transport.queue_max_size).numbers
    queues = {number: rig.queue(numbers[number]) for number in (*BalloonWork.queues, queue)}
    rig.transport.driver_ok()
    return queues, Host(rig)


@pytest.fixture
def ring(negotiated: Rig, rig: Rig) -> int:
    """Ring features of the combination; the device is reset again."""
    features = negotiated.transport.features
    rig.transport.reset(rig.limit)
    return features


def statistics(rig: Rig, entries: Sequence[tuple[int, int]]) -> DmaBuffer:
    """A buffer of statistics."""
    rows = np.array(entries, dtype=balloon.STAT)
    return rig.buffer(rows.nbytes, rows.tobytes())


def told(rig: Rig, host: Host, wanted: dict[str, int]) -> None:
    """Wait until the host knows these statistics."""

    def known() -> bool:
        found = host.statistics()
        return all(found.get(name) == value for name, value in wanted.items())

    rig.wait(known, f"statistics {wanted} at the host, which has {host.statistics()}")


WANTED = {tag.name.lower(): value for tag, value in VALUES.items()}


@pytest.mark.requirement("DEV-BALLOON-22", "DEV-BALLOON-16", "DEV-BALLOON-23")
def test_statistics_arrive_and_their_buffer_is_kept(rig: Rig, ring: int, case: Case) -> None:
    """Statistics are entries of 10 bytes, and their buffer is used when the host wants new ones."""
    queues, host = running(rig, ring, balloon.F_STATS_VQ, balloon.STATSQ)
    stats = queues[balloon.STATSQ]
    for _ in range(2):
        id = stats.add([statistics(rig, list(VALUES.items()))])
        rig.settle()
        assert stats.used() == [], "the statistics buffer came back though nobody asked for new values"
        host.ask_statistics()
        assert stats.wait() == [(id, 0)]
        told(rig, host, WANTED)


@pytest.mark.requirement("DEV-BALLOON-04")
def test_unknown_statistics_are_ignored(rig: Rig, ring: int, case: Case) -> None:
    """Tags that the device does not know change nothing."""
    queues, host = running(rig, ring, balloon.F_STATS_VQ, balloon.STATSQ)
    case.sent(f"statistics with the tag {UNKNOWN_TAG:#x} between known ones")
    entries = [(UNKNOWN_TAG, 1), *VALUES.items(), (UNKNOWN_TAG - 1, 2)]
    queues[balloon.STATSQ].add([statistics(rig, entries)])
    host.ask_statistics()
    queues[balloon.STATSQ].wait()
    told(rig, host, WANTED)


@pytest.mark.requirement("DEV-BALLOON-05")
def test_statistics_in_any_order(rig: Rig, ring: int, case: Case) -> None:
    """The entries of a statistics buffer come in any order."""
    queues, host = running(rig, ring, balloon.F_STATS_VQ, balloon.STATSQ)
    for number, entries in enumerate(itertools.islice(itertools.permutations(VALUES.items()), 0, 24, 7)):
        changed = [(tag, value + number) for tag, value in entries]
        queues[balloon.STATSQ].add([statistics(rig, changed)])
        host.ask_statistics()
        queues[balloon.STATSQ].wait()
        told(rig, host, {name: value + number for name, value in WANTED.items()})


@pytest.mark.requirement("DEV-BALLOON-15")
def test_queues_have_their_numbers(rig: Rig, ring: int, case: Case) -> None:
    """Each offered queue is where the standard puts it, or where devices without gaps do."""
    offered = rig.transport.offered
    wanted = offered & ft.mask(balloon.OPTIONAL_QUEUES.values())
    rig.negotiate(rig.features_for(ring) | wanted)
    try:
        numbering = find_numbering(offered, wanted, rig.transport.queue_max_size)
    except DeviceViolation as violation:
        raise AssertionError(violation.message) from None
    case.note(f"# queue numbers: {numbering.name}")


@pytest.mark.requirement("DEV-BALLOON-17", "DEV-BALLOON-19", "DEV-BALLOON-21")
def test_a_new_target_is_announced(rig: Rig, ring: int) -> None:
    """num_pages at offset 0 counts pages of 4096 bytes, and a change of it is notified."""
    rig.start(ring)
    rig.config_changes()
    for _ in range(2):
        field, pages = change_config(rig)
        rig.wait_config_change()
        found = rig.transport.read_config(field.offset, field.width)
        assert found == pages, f"num_pages is {found}, the host asked for {pages} pages"


@pytest.mark.requirement("DEV-BALLOON-17")
def test_actual_is_the_drivers(rig: Rig, ring: int) -> None:
    """actual at offset 4 keeps what the driver writes."""
    rig.start(ring)
    for pages in (0x00010203, 0):
        rig.transport.config_write(balloon.CONFIG["actual"], pages)
        found = rig.transport.read_config(4, 4)
        assert found == pages, f"actual reads {found:#x} after {pages:#x} was written"


@pytest.mark.requirement("DEV-BALLOON-18", "DEV-BALLOON-20")
def test_pages_go_and_come_back(rig: Rig, ring: int, case: Case) -> None:
    """An inflate request releases exactly the pages that it names; requests are used with length 0."""
    assert isinstance(rig.work, BalloonWork)
    rig.negotiate(rig.features_for(ring))
    inflate, deflate = (rig.queue(number) for number in BalloonWork.queues)
    rig.transport.driver_ok()
    host = Host(rig)
    memory = rig.buffer(8 * balloon.PAGE_BYTES, align=balloon.PAGE_BYTES)
    memory.array[:] = 0x5A
    pages = [
        memory[start : start + balloon.PAGE_BYTES] for start in range(0, memory.nbytes, balloon.PAGE_BYTES)
    ]
    chosen = [pages[5], pages[1], pages[6]]
    numbers = np.array([page.address >> balloon.PAGE_SHIFT for page in chosen], dtype=balloon.PAGE_NUMBER)
    case.sent("three pages of eight, in no order")
    request = rig.buffer(numbers.nbytes, numbers.tobytes())
    assert inflate.run([request]) == 0, "used length of an inflate request"
    for number, page in enumerate(pages):
        assert host.released(page) == any(page is one for one in chosen), f"page {number} of the eight"
    assert deflate.run([request]) == 0, "used length of a deflate request"


@pytest.mark.requirement("DEV-BALLOON-16", "DEV-BALLOON-14")
def test_reported_pages_keep_the_poison(rig: Rig, ring: int, case: Case) -> None:
    """Reports are used, and with PAGE_POISON reported pages hold the poison value afterwards."""
    if not rig.transport.offered >> balloon.F_PAGE_POISON & 1:
        pytest.skip("PAGE_POISON is not offered")
    if not rig.transport.offered >> balloon.F_PAGE_REPORTING & 1:
        pytest.skip("PAGE_REPORTING is not offered")
    features = rig.features_for(ring) | ft.mask((balloon.F_PAGE_POISON, balloon.F_PAGE_REPORTING))
    rig.negotiate(features)
    rig.transport.config_write(balloon.CONFIG["poison_val"], POISON)
    found = rig.transport.read_config(12, 4)
    assert found == POISON, f"poison_val reads {found:#x}"
    numbers = find_numbering(rig.transport.offered, features, rig.transport.queue_max_size).numbers
    queues = {number: rig.queue(numbers[number]) for number in (*BalloonWork.queues, balloon.REPORTING_VQ)}
    rig.transport.driver_ok()
    page = rig.buffer(balloon.PAGE_BYTES, align=balloon.PAGE_BYTES)
    page.array.view("<u4")[:] = POISON
    queues[balloon.REPORTING_VQ].run(writable=[page])
    assert (page.array.view("<u4") == POISON).all(), (
        "a reported page holds something else than the poison value"
    )


@pytest.mark.requirement("DEV-BALLOON-16")
def test_reports_are_used(rig: Rig, ring: int) -> None:
    """A report of free pages is acknowledged."""
    queues, _ = running(rig, ring, balloon.F_PAGE_REPORTING, balloon.REPORTING_VQ)
    for count in (1, 3):
        pages = [rig.buffer(balloon.PAGE_BYTES, align=balloon.PAGE_BYTES) for _ in range(count)]
        queues[balloon.REPORTING_VQ].run(writable=pages)


@pytest.mark.requirement("DEV-BALLOON-24", "DEV-BALLOON-25", "DEV-BALLOON-17")
def test_command_ids_are_announced(rig: Rig, ring: int) -> None:
    """Each change of free_page_hint_cmd_id is notified; a new id after STOP begins a new round."""
    _, host = running(rig, ring, balloon.F_FREE_PAGE_HINT, balloon.FREE_PAGE_VQ)
    rig.config_changes()
    for command in (2, balloon.CMD_ID_STOP, 3, balloon.CMD_ID_DONE):
        host.hint(command)
        rig.wait_config_change()
        found = rig.transport.read_config(8, 4)
        assert found == command, f"free_page_hint_cmd_id reads {found}, expected {command}"


@pytest.mark.requirement("DEV-BALLOON-08", "DEV-BALLOON-16")
def test_hints_of_another_round_do_not_count(rig: Rig, ring: int, case: Case) -> None:
    """Pages that are hinted under a command id that is over are left alone."""
    queues, host = running(rig, ring, balloon.F_FREE_PAGE_HINT, balloon.FREE_PAGE_VQ)
    hints = queues[balloon.FREE_PAGE_VQ]
    first, second = (rig.buffer(balloon.PAGE_BYTES, align=balloon.PAGE_BYTES) for _ in range(2))
    host.hint(2)
    hints.run([rig.buffer(4, (2).to_bytes(4, "little"))])
    hints.run(writable=[first])
    assert host.hinted() == [(first.address, first.nbytes)], "a hint of the present round does not count"
    host.hint(3)
    case.sent("a page under command id 2 while 3 is the present one")
    hints.run(writable=[second])
    assert (second.address, second.nbytes) not in host.hinted(), "a hint of the last round counts"
