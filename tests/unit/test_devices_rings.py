"""The device's rings against rings written by hand (2.7, 2.8)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.model import Model
from guestpv.devices.queue import DeviceQueue
from guestpv.devices.ring import Chain
from guestpv.devices.scripted import RawQueue, ScriptedDriver
from guestpv.spec import features as ft
from guestpv.spec import ring as rs
from guestpv.spec.status import Status

V1 = ft.mask((ft.F_VERSION_1, ft.F_ACCESS_PLATFORM))
ALL = ft.mask(
    (
        ft.F_INDIRECT_DESC,
        ft.F_EVENT_IDX,
        ft.F_RING_PACKED,
        ft.F_IN_ORDER,
        ft.F_NOTIFICATION_DATA,
        ft.F_NOTIF_CONFIG_DATA,
        ft.F_RING_RESET,
    )
)
SPLIT, PACKED = 0, 1 << ft.F_RING_PACKED
FORMATS = pytest.mark.parametrize("packed", [SPLIT, PACKED], ids=["split", "packed"])


class Echo(Model):
    """Copies what it can read to where it can write."""

    device_type = ft.RNG

    def handle(self, queue: DeviceQueue, chain: Chain) -> None:
        queue.complete(chain, chain.write(chain.read()))


class Bench:
    def __init__(self) -> None:
        self.function = SoftwareFunction(Echo(), name="test")
        self.function.device.offered |= ALL
        self.driver = ScriptedDriver(self.function)

    def start(self, features: int, size: int = 8) -> RawQueue:
        return self.driver.start(features | V1, {0: size})[0]

    @property
    def rules(self) -> list[str]:
        return [finding.requirement for finding in self.function.findings]

    @property
    def queue(self) -> DeviceQueue:
        return self.function.device.queues[0]

    @property
    def broken(self) -> bool:
        return bool(self.function.device.status & Status.NEEDS_RESET)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.function.close()


def request(queue: RawQueue, data: bytes = b"hello", **how: bool) -> tuple[int, np.ndarray]:
    out = queue.buffer(max(len(data), 1), data)
    into = queue.buffer(max(len(data), 1))
    return queue.add([out], [into], **how), into.array


@FORMATS
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.requirement("DEV-SPLIT-29", "DEV-SPLIT-36", "DEV-PACKED-14", "DEV-PACKED-15", "DEV-PACKED-19")
def test_requests_over_many_wraps(bench: Bench, packed: int, indirect: bool) -> None:
    size = 7 if packed else 8
    queue = bench.start(packed | (1 << ft.F_INDIRECT_DESC if indirect else 0), size)
    for turn in range(70):
        data = bytes([turn]) * (turn + 1)
        id, into = request(queue, data, indirect=indirect)
        queue.kick()
        assert queue.used() == [(id, len(data))]
        assert into.tobytes() == data
    assert bench.rules == []


@pytest.mark.requirement("DEV-SPLIT-33", "DEV-SPLIT-36")
def test_split_index_passes_65535(bench: Bench) -> None:
    queue = bench.start(0, 256)
    into = queue.buffer(1)
    for _ in range(257):
        ids = [queue.add([], [into]) for _ in range(256)]
        queue.kick()
        assert [id for id, _ in queue.used()] == ids
    assert int(queue.rings.used["idx"]) == 257 * 256 & 0xFFFF
    assert bench.rules == []


@FORMATS
@pytest.mark.requirement("DEV-SPLIT-01", "DEV-PACKED-08")
def test_framing_does_not_matter(bench: Bench, packed: int) -> None:
    queue = bench.start(packed, 16)
    out = [queue.buffer(size, bytes([65 + place]) * size) for place, size in enumerate((1, 2, 3))]
    into = [queue.buffer(size) for size in (2, 1, 4)]
    queue.add(out, into)
    queue.kick()
    assert queue.used()[0][1] == 6
    assert b"".join(part.array.tobytes() for part in into) == b"ABBCCC\0"


@FORMATS
@pytest.mark.requirement("DEV-SPLIT-37", "DEV-PACKED-20")
def test_completion_out_of_order(bench: Bench, packed: int) -> None:
    queue = bench.start(packed, 8)
    bench.function.device.hold = True
    ids = [request(queue, bytes(place + 1))[0] for place in range(3)]
    queue.kick()
    assert queue.used() == []
    assert bench.function.device.release(order=lambda place: -place) == 3
    assert queue.used() == [(ids[2], 3), (ids[1], 2), (ids[0], 1)]


@FORMATS
@pytest.mark.requirement("DEV-FEAT-10", "DEV-SPLIT-41", "DEV-PACKED-24")
def test_in_order_waits_and_batches(bench: Bench, packed: int) -> None:
    queue = bench.start(packed | 1 << ft.F_IN_ORDER, 8)
    bench.function.device.hold = True
    ids = [request(queue, bytes(4))[0] for _ in range(4)]
    queue.kick()
    bench.function.device.release(3, order=lambda place: -place)
    assert queue.used() == []
    bench.function.device.release()
    if packed:
        queue.skip[ids[3]] = 8
        assert queue.used() == [(ids[3], 4)]
    else:
        assert int(queue.rings.used["idx"]) == 4
        element = queue.rings.used["ring"][0]
        assert (int(element["id"]), int(element["len"])) == (ids[3], 4)
    assert bench.rules == []


@FORMATS
@pytest.mark.requirement("DEV-SPLIT-41", "DEV-PACKED-24")
def test_in_order_does_not_skip_a_partly_written_buffer(bench: Bench, packed: int) -> None:
    queue = bench.start(packed | 1 << ft.F_IN_ORDER, 8)
    bench.function.device.hold = True
    out, into = queue.buffer(2, b"ab"), queue.buffer(4)
    ids = [queue.add([out], [into]) for _ in range(2)]
    queue.kick()
    bench.function.device.release()
    assert queue.used() == [(ids[0], 2), (ids[1], 2)]


@FORMATS
@pytest.mark.requirement("DEV-SPLIT-10", "DEV-SPLIT-11", "DEV-PACKED-29", "DEV-PACKED-30")
def test_interrupts_off_and_on(bench: Bench, packed: int) -> None:
    queue = bench.start(packed)
    event = queue.rings.driver if packed else queue.rings.avail
    event["flags"] = 1
    request(queue)
    queue.kick()
    assert bench.queue.interrupts == 0
    event["flags"] = 0
    request(queue)
    queue.kick()
    assert bench.queue.interrupts == 1


@pytest.mark.requirement("DEV-SPLIT-13", "DEV-SPLIT-14", "DEV-SPLIT-39")
@pytest.mark.parametrize("event", range(6))
def test_split_used_event(bench: Bench, event: int) -> None:
    queue = bench.start(1 << ft.F_EVENT_IDX, 4)
    queue.rings.avail["used_event"] = event
    for turn in range(5):
        request(queue)
        queue.kick()
        assert bench.queue.interrupts == int(turn >= event)
    assert bench.rules == []


@pytest.mark.requirement("DEV-PACKED-31")
@pytest.mark.parametrize("event", range(10))
def test_packed_event_position(bench: Bench, event: int) -> None:
    queue = bench.start(PACKED | 1 << ft.F_EVENT_IDX, 5)
    queue.rings.driver["desc"] = event % 5 | (1 - event // 5) << 15
    queue.rings.driver["flags"] = rs.EVENT_FLAGS_DESC
    for turn in range(5):
        request(queue)
        queue.kick()
        assert bench.queue.interrupts == int(event <= 2 * turn + 1)
    assert bench.rules == []


@FORMATS
@pytest.mark.requirement("DEV-SPLIT-18", "DEV-SPLIT-20", "DEV-SPLIT-40", "DEV-PACKED-27")
@pytest.mark.parametrize("event_idx", [0, 1 << ft.F_EVENT_IDX], ids=["flags", "event_idx"])
def test_device_says_which_kick_it_wants(bench: Bench, packed: int, event_idx: int) -> None:
    queue = bench.start(packed | event_idx, 8)
    request(queue)
    queue.kick()
    if packed and event_idx:
        assert int(queue.rings.device["flags"]) == rs.EVENT_FLAGS_DESC
        assert int(queue.rings.device["desc"]) == 2 | 1 << 15
    elif event_idx:
        assert int(queue.rings.used["avail_event"]) == 1
        assert int(queue.rings.used["flags"]) == 0
    bench.queue.ask_for_kicks = False
    request(queue)
    queue.kick()
    if packed:
        assert int(queue.rings.device["flags"]) == rs.EVENT_FLAGS_DISABLE
    elif not event_idx:
        assert int(queue.rings.used["flags"]) == rs.USED_F_NO_NOTIFY
    else:
        assert int(queue.rings.used["avail_event"]) == 1
    request(queue)
    bench.function.device.poll()
    assert len(queue.used()) == 3


@FORMATS
@pytest.mark.requirement("DEV-PCI-92", "DEV-SPLIT-42", "DRV-SPLIT-58", "DRV-PACKED-46", "DRV-PACKED-06")
def test_notification_data(bench: Bench, packed: int) -> None:
    queue = bench.start(packed | 1 << ft.F_NOTIFICATION_DATA, 4)
    for _ in range(5):
        id, _ = request(queue)
        queue.kick()
        queue.kick()
        assert queue.used() == [(id, 5)]
    assert bench.rules == []
    queue.kick((queue.notification_data() + 1) << 16)
    assert bench.rules == ["DRV-PACKED-06" if packed else "DRV-SPLIT-58"]


@pytest.mark.requirement("DRV-PCI-51", "DRV-PCI-52", "DEV-PCI-93")
def test_notif_config_data_names_the_queue(bench: Bench) -> None:
    queue = bench.start(1 << ft.F_NOTIF_CONFIG_DATA, 4)
    id, _ = request(queue)
    queue.kick()
    assert queue.used() == [(id, 5)]
    queue.kick(0)
    assert bench.rules == ["DRV-PCI-51"]


@pytest.mark.requirement("DEV-SPLIT-08", "DEV-SPLIT-07")
def test_split_direct_descriptors_then_a_table(bench: Bench) -> None:
    queue = bench.start(1 << ft.F_INDIRECT_DESC, 4)
    out, into = queue.buffer(2, b"ab"), queue.buffer(4)
    table = queue.buffer(32)
    records = table.array.view(rs.SPLIT_DESC)
    records[0] = (out.address, 2, rs.DESC_F_NEXT, 1)
    records[1] = (into.address, 4, rs.DESC_F_WRITE, 0)
    queue.rings.desc[0] = (out.address, 2, rs.DESC_F_NEXT, 2)
    queue.rings.desc[2] = (table.address, 32, rs.DESC_F_INDIRECT | rs.DESC_F_WRITE, 0)
    queue.rings.avail["idx"] = 1
    queue.kick()
    assert queue.used() == [(0, 4)]
    assert into.array.tobytes() == b"abab"


def break_split(queue: RawQueue, rule: str) -> None:
    """Make one buffer available that breaks the rule."""
    desc, avail = queue.rings.desc, queue.rings.avail
    memory = queue.buffer(64)
    at = memory.address
    table = queue.buffer(64)
    inner = table.array.view(rs.SPLIT_DESC)
    desc[0] = (at, 8, 0, 0)
    avail["idx"] = 1
    match rule:
        case "DRV-SPLIT-04":
            desc[0] = (at, 8, rs.DESC_F_WRITE | rs.DESC_F_NEXT, 1)
            desc[1] = (at, 8, 0, 0)
        case "DRV-SPLIT-06":
            desc[0] = (at, 0xFFFFFFFF, rs.DESC_F_NEXT, 1)
            desc[1] = (at, 0xFFFFFFFF, 0, 0)
        case "DRV-SPLIT-07":
            desc[0] = (at, 8, rs.DESC_F_NEXT, 1)
            desc[1] = (at, 8, rs.DESC_F_NEXT, 0)
        case "DRV-SPLIT-08":
            desc[0] = (at, 8, rs.DESC_F_NEXT, 2)
            desc[2] = (at, 8, 0, 0)
        case "DRV-SPLIT-09" | "DRV-SPLIT-43":
            desc[0] = (at, 8, rs.DESC_F_INDIRECT, 0)
        case "DRV-SPLIT-10":
            inner[0] = (at, 16, rs.DESC_F_INDIRECT, 0)
            desc[0] = (table.address, 64, rs.DESC_F_INDIRECT, 0)
        case "DRV-SPLIT-11":
            inner[:3] = [(at, 1, rs.DESC_F_NEXT, place + 1) for place in range(3)]
            desc[0] = (table.address, 64, rs.DESC_F_INDIRECT, 0)
            queue.rings.desc[0]["len"] = 64
            inner[3] = (at, 1, rs.DESC_F_NEXT, 0)
        case "DRV-SPLIT-12":
            desc[0] = (table.address, 64, rs.DESC_F_INDIRECT | rs.DESC_F_NEXT, 1)
        case "DRV-SPLIT-13":
            inner[0] = (at, 1, rs.DESC_F_NEXT, 2)
            desc[0] = (table.address, 64, rs.DESC_F_INDIRECT, 0)
        case "DRV-SPLIT-14":
            avail["idx"] = 0xFFFF
        case "DRV-SPLIT-41":
            desc[0] = (at, 8, rs.DESC_F_NEXT, 400)
        case "DRV-SPLIT-42":
            avail["ring"][0] = 1
        case "DRV-SPLIT-44":
            inner[0] = (at, 1, rs.DESC_F_NEXT, 4)
            desc[0] = (table.address, 64, rs.DESC_F_INDIRECT, 0)
        case "DRV-SPLIT-48":
            avail["ring"][0] = queue.size
        case "DRV-SPLIT-50":
            avail["idx"] = queue.size + 1
        case "DRV-FEAT-18":
            desc[0] = (at + (64 << 20), 8, 0, 0)


SPLIT_RULES = {
    "DRV-SPLIT-04": 0,
    "DRV-SPLIT-06": 0,
    "DRV-SPLIT-07": 0,
    "DRV-SPLIT-08": 1 << ft.F_IN_ORDER,
    "DRV-SPLIT-09": 0,
    "DRV-SPLIT-10": 1 << ft.F_INDIRECT_DESC,
    "DRV-SPLIT-12": 1 << ft.F_INDIRECT_DESC,
    "DRV-SPLIT-13": ft.mask((ft.F_INDIRECT_DESC, ft.F_IN_ORDER)),
    "DRV-SPLIT-14": 0,
    "DRV-SPLIT-41": 0,
    "DRV-SPLIT-42": 1 << ft.F_IN_ORDER,
    "DRV-SPLIT-43": 1 << ft.F_INDIRECT_DESC,
    "DRV-SPLIT-44": 1 << ft.F_INDIRECT_DESC,
    "DRV-SPLIT-48": 0,
    "DRV-SPLIT-50": 0,
    "DRV-FEAT-18": 0,
}


@pytest.mark.requirement(*SPLIT_RULES, "DEV-STATUS-03", "DEV-STATUS-04")
@pytest.mark.parametrize("rule", SPLIT_RULES)
def test_split_breach_is_named_and_breaks_the_device(bench: Bench, rule: str) -> None:
    queue = bench.start(SPLIT_RULES[rule], 8)
    break_split(queue, rule)
    queue.kick()
    assert bench.rules == [rule]
    assert bench.function.findings[0].fatal
    assert bench.function.findings[0].evidence
    assert bench.broken
    assert queue.used() == []
    queue = bench.start(0, 8)
    id, _ = request(queue)
    queue.kick()
    assert queue.used() == [(id, 5)]


@pytest.mark.requirement("DRV-SPLIT-11")
def test_split_chain_longer_than_the_queue(bench: Bench) -> None:
    queue = bench.start(1 << ft.F_INDIRECT_DESC, 2)
    queue.add([queue.buffer(1)] * 2, [queue.buffer(1)], indirect=True)
    queue.kick()
    assert bench.rules == ["DRV-SPLIT-11"]


@pytest.mark.requirement("DRV-SPLIT-07")
def test_split_loop_in_an_indirect_table_ends(bench: Bench) -> None:
    queue = bench.start(1 << ft.F_INDIRECT_DESC, 8)
    table = queue.buffer(32)
    table.array.view(rs.SPLIT_DESC)[:] = [(table.address, 1, rs.DESC_F_NEXT, 1), (table.address, 1, 1, 0)]
    queue.rings.desc[0] = (table.address, 32, rs.DESC_F_INDIRECT, 0)
    queue.rings.avail["idx"] = 1
    queue.kick()
    assert bench.rules == ["DRV-SPLIT-07"]


@pytest.mark.requirement("DRV-SPLIT-50")
def test_split_descriptor_of_two_chains(bench: Bench) -> None:
    queue = bench.start(0, 8)
    bench.function.device.hold = True
    request(queue)
    queue.rings.avail["ring"][1] = 1
    queue.rings.avail["idx"] = 2
    queue.kick()
    assert bench.rules == ["DRV-SPLIT-50"]


def break_packed(queue: RawQueue, rule: str) -> None:
    """Make one list available that breaks the rule."""
    desc = queue.rings.desc
    at = queue.buffer(256).address
    table = queue.buffer(256)
    avail = rs.PACKED_DESC_F_AVAIL
    desc[0] = (at, 8, 0, avail)
    match rule:
        case "DRV-PACKED-09":
            for slot in range(queue.size):
                desc[slot] = (at, 8, 0, avail | rs.DESC_F_NEXT)
        case "DRV-PACKED-10":
            desc[0] = (at, 8, 0, avail | rs.DESC_F_NEXT | rs.DESC_F_WRITE)
            desc[1] = (at, 8, 0, avail)
        case "DRV-PACKED-13":
            desc[0] = (at, 8, 0, avail | rs.DESC_F_NEXT)
        case "DRV-PACKED-14" | "DRV-PACKED-38":
            desc[0] = (at, 8, 0, avail | rs.DESC_F_INDIRECT)
        case "DRV-PACKED-16":
            desc[0] = (table.address, 256, 0, avail | rs.DESC_F_INDIRECT)
        case "DRV-PACKED-17":
            desc[0] = (at, 8, 0, avail | rs.DESC_F_NEXT)
            desc[1] = (table.address, 16, 0, avail | rs.DESC_F_INDIRECT)
        case "DRV-PACKED-34":
            desc[1] = (at, 8, 0, avail)
        case "DRV-FEAT-18":
            desc[0] = (at + (64 << 20), 8, 0, avail)


PACKED_RULES = {
    "DRV-PACKED-09": 0,
    "DRV-PACKED-10": 0,
    "DRV-PACKED-13": 0,
    "DRV-PACKED-14": 0,
    "DRV-PACKED-16": 1 << ft.F_INDIRECT_DESC,
    "DRV-PACKED-17": 1 << ft.F_INDIRECT_DESC,
    "DRV-PACKED-34": 0,
    "DRV-PACKED-38": 1 << ft.F_INDIRECT_DESC,
    "DRV-FEAT-18": 0,
}


@pytest.mark.requirement(*PACKED_RULES)
@pytest.mark.parametrize("rule", PACKED_RULES)
def test_packed_breach_is_named_and_breaks_the_device(bench: Bench, rule: str) -> None:
    queue = bench.start(PACKED | PACKED_RULES[rule], 7)
    bench.function.device.hold = True
    break_packed(queue, rule)
    queue.kick()
    if rule == "DRV-PACKED-09":
        assert bench.rules in (["DRV-PACKED-09"], ["DRV-PACKED-08"], ["DRV-PACKED-13"])
    else:
        assert bench.rules == [rule]
    assert bench.broken


@pytest.mark.requirement("DRV-PACKED-12", "DRV-PACKED-04")
def test_packed_list_over_unused_descriptors(bench: Bench) -> None:
    queue = bench.start(PACKED, 4)
    bench.function.device.hold = True
    request(queue)
    request(queue)
    queue.kick()
    queue.position = 4
    request(queue)
    queue.kick()
    assert bench.rules == ["DRV-PACKED-12"]


@pytest.mark.requirement("DRV-PACKED-15", "DEV-PACKED-22", "DEV-PACKED-23")
def test_packed_table_flags_are_ignored_and_noted(bench: Bench) -> None:
    queue = bench.start(PACKED | 1 << ft.F_INDIRECT_DESC, 4)
    out, into = queue.buffer(2, b"ab"), queue.buffer(2)
    table = queue.buffer(32)
    table.array.view(rs.PACKED_DESC)[:] = [
        (out.address, 2, 9, rs.DESC_F_NEXT),
        (into.address, 2, 9, rs.DESC_F_WRITE),
    ]
    flags = rs.PACKED_DESC_F_AVAIL | rs.DESC_F_INDIRECT | rs.DESC_F_WRITE
    queue.rings.desc[0] = (table.address, 32, 3, flags)
    queue.skip[3] = 1
    queue.kick()
    assert queue.used() == [(3, 2)]
    assert bench.rules == ["DRV-PACKED-15"]
    assert not bench.broken


@FORMATS
@pytest.mark.requirement("DRV-SPLIT-15", "DRV-SPLIT-17", "DRV-PACKED-41", "DRV-PACKED-40")
def test_bad_suppression_words_are_noted(bench: Bench, packed: int) -> None:
    queue = bench.start(packed)
    (queue.rings.driver if packed else queue.rings.avail)["flags"] = 2
    request(queue)
    queue.kick()
    assert bench.rules == ["DRV-PACKED-41" if packed else "DRV-SPLIT-15"]
    queue = bench.start(packed | 1 << ft.F_EVENT_IDX)
    (queue.rings.driver if packed else queue.rings.avail)["flags"] = 3 if packed else 1
    request(queue)
    queue.kick()
    assert bench.rules[1:] == ["DRV-PACKED-40" if packed else "DRV-SPLIT-17"]


@FORMATS
@pytest.mark.requirement("DEV-PACKED-21", "DEV-SPLIT-38")
def test_nothing_written_is_said_so(bench: Bench, packed: int) -> None:
    queue = bench.start(packed)
    id = queue.add([queue.buffer(4)], [])
    queue.kick()
    assert queue.used() == [(id, 0)]
    if packed:
        assert not int(queue.rings.desc[0]["flags"]) & rs.DESC_F_WRITE


@FORMATS
def test_zero_length_elements_are_empty(bench: Bench, packed: int) -> None:
    queue = bench.start(packed)
    out, into = queue.buffer(4, b"abcd"), queue.buffer(4)
    id = queue.add([out[:0], out], [into])
    parts = [(out.address, 0, False), (out.address, 4, False), (into.address, 4, True)]
    assert id == 0
    queue = bench.start(packed)
    id = (queue._add_packed if packed else queue._add_split)(parts, False, True, None)
    queue.kick()
    assert queue.used() == [(id, 4)]


@FORMATS
@pytest.mark.requirement("DEV-VQRESET-01", "DEV-VQRESET-03", "DEV-VQRESET-04")
def test_a_chain_from_before_a_reset_is_dropped(bench: Bench, packed: int) -> None:
    queue = bench.start(packed)
    bench.function.device.hold = True
    request(queue)
    queue.kick()
    ((chain, length),) = bench.queue.held[0]
    queue = bench.start(packed)
    bench.queue.push(chain, length)
    bench.queue.publish()
    assert queue.used() == []


@FORMATS
def test_random_ring_memory_never_hangs_or_raises(bench: Bench, packed: int) -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        queue = bench.start(packed | ft.mask((ft.F_INDIRECT_DESC, ft.F_EVENT_IDX)), 8)
        queue.memory.array[:] = random.integers(0, 256, queue.memory.nbytes, dtype=np.uint8)
        if not packed:
            queue.rings.avail["idx"] = random.integers(0, 9)
            queue.rings.avail["ring"] = random.integers(0, 8, 8)
        for slot in range(8):
            if random.integers(2):
                queue.rings.desc[slot]["addr"] = queue.memory.address
                queue.rings.desc[slot]["len"] = random.integers(0, 129)
                queue.rings.desc[slot]["flags"] &= 0x80 | 7
                if not packed:
                    queue.rings.desc[slot]["next"] = random.integers(0, 9)
        queue.kick()
        queue.driver.pool.free(queue.memory)


@FORMATS
@pytest.mark.parametrize("event_idx", [0, 1 << ft.F_EVENT_IDX], ids=["flags", "event_idx"])
@pytest.mark.requirement("DEV-SPLIT-24", "DEV-PACKED-11")
def test_rearming_sees_buffers_that_came_meanwhile(bench: Bench, packed: int, event_idx: int) -> None:
    queue = bench.start(packed | event_idx)
    assert not bench.queue.rearm()
    request(queue)
    assert bench.queue.rearm()
    queue.kick()
    assert not bench.queue.rearm()
