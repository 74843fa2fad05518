"""Block drivers with one mistake (5.2)."""

from __future__ import annotations

import struct
from typing import Any

from guestpv.devices.scripted import RawQueue
from guestpv.spec import blk
from guestpv.spec import features as ft
from guestpv.spec.pci import CfgType

from .driver_bench import Bench, healthy, mutant

DISK = "blk?size=64K"
ZONED = "blk?size=256K&zoned=64K&max_append=8K&granularity=4K"
RANGES = ft.mask((blk.F_DISCARD, blk.F_WRITE_ZEROES, blk.F_FLUSH))


def ask(
    b: Bench, queue: RawQueue, kind: int, sector: int = 0, out: int = 0, room: int = 0, data: bytes = b""
) -> None:
    """One request: header, ``out`` readable and ``room`` writable bytes, status."""
    readable = [queue.buffer(16, struct.pack("<IIQ", kind, 0, sector))]
    readable += [queue.buffer(len(data) or out, data)] if out or data else []
    writable = [queue.buffer(room)] if room else []
    queue.add(readable, [*writable, queue.buffer(1)])
    queue.kick()


def pieces(*segments: tuple[int, int, int]) -> bytes:
    """Segments of a discard: sector, number of sectors, flags."""
    return b"".join(struct.pack("<QII", *segment) for segment in segments)


def asks(*breaks: str, name: str, features: int = RANGES, spec: str = DISK, **request: Any) -> None:
    """Register a driver that sends one bad request."""

    def walk(b: Bench) -> None:
        ask(b, b.start(features & b.device.offered)[0], **request)

    walk.__name__ = name
    mutant(*(f"DRV-BLK-{rule}" for rule in breaks), spec=spec)(walk)


@healthy(DISK)
def every_request(b: Bench) -> None:
    queue = b.start(RANGES | ft.mask((blk.F_SEG_MAX,)))[0]
    ask(b, queue, blk.T_OUT, out=512)
    ask(b, queue, blk.T_IN, room=512)
    ask(b, queue, blk.T_FLUSH)
    ask(b, queue, blk.T_GET_ID, room=20)
    ask(b, queue, blk.T_DISCARD, data=pieces((0, 8, 0)))
    ask(b, queue, blk.T_WRITE_ZEROES, data=pieces((0, 8, 1)))


@healthy(DISK + "&size_max=4096")
def within_size_max(b: Bench) -> None:
    ask(b, b.start(1 << blk.F_SIZE_MAX)[0], blk.T_IN, room=512)


@healthy(DISK)
def looks_at_its_configuration(b: Bench) -> None:
    b.start(ft.mask((blk.F_CONFIG_WCE, blk.F_FLUSH)))
    for offset, width in ((0, 4), (4, 4), (12, 4), (20, 4), (24, 1), (26, 2), (32, 1), (36, 4), (56, 1)):
        b.driver.read_at(CfgType.DEVICE, offset, width)
    b.driver.write_at(CfgType.DEVICE, 32, 1, 0)


@healthy("blk?size=64K&block_size=4096")
def capacity_counts_512(b: Bench) -> None:
    b.start()
    b.watch.tell("capacity", b.driver.read_at(CfgType.DEVICE, 0, 4))


@healthy(ZONED + "&offer=+discard")
def every_zone_request(b: Bench) -> None:
    queue = b.start(1 << blk.F_ZONED)[0]
    b.driver.read_at(CfgType.DEVICE, 72, 4)
    ask(b, queue, blk.T_OUT, out=4096)
    ask(b, queue, blk.T_ZONE_APPEND, out=4096, room=8)
    for kind in (blk.T_ZONE_OPEN, blk.T_ZONE_CLOSE, blk.T_ZONE_FINISH, blk.T_ZONE_RESET):
        ask(b, queue, kind, sector=128)
    ask(b, queue, blk.T_ZONE_RESET_ALL)
    ask(b, queue, blk.T_ZONE_REPORT, room=64 + 64)


asks("13", name="reads_beyond_the_end", kind=blk.T_IN, sector=128, room=512)
asks("15", name="flushes_a_sector", kind=blk.T_FLUSH, sector=1)
asks("17", name="reads_part_of_a_sector", kind=blk.T_IN, room=100)
asks("18", name="half_a_segment", kind=blk.T_DISCARD, data=bytes(8))
asks("19", name="a_short_id", kind=blk.T_GET_ID, room=10)
asks("20", name="too_many_segments", kind=blk.T_DISCARD, data=pieces(*[(0, 1, 0)] * 17))
asks("22", name="too_many_zero_segments", kind=blk.T_WRITE_ZEROES, data=pieces(*[(0, 1, 0)] * 17))
asks("25", name="unmaps_in_a_discard", kind=blk.T_DISCARD, data=pieces((0, 1, 1)))
asks("54", name="unknown_segment_flags", kind=blk.T_WRITE_ZEROES, data=pieces((0, 1, 2)))
asks("51", name="flushes_without_the_feature", kind=blk.T_FLUSH, features=0)
asks("53", name="an_id_of_a_sector", kind=blk.T_GET_ID, sector=3, room=20)
asks("57", name="a_segment_above_size_max", kind=blk.T_IN, room=1024, spec=DISK + "&size_max=512", features=2)
asks("49", name="writes_into_its_own_data", kind=blk.T_OUT, out=512, room=512)
asks("50", name="a_type_that_is_not", kind=99)
asks("50", name="a_zone_request_without_zones", kind=blk.T_ZONE_RESET_ALL)


@mutant("DRV-BLK-55", spec="blk?size=64M")
def discards_too_much(b: Bench) -> None:
    b.model.config["max_discard_sectors"] = 4
    ask(b, b.start(RANGES)[0], blk.T_DISCARD, data=pieces((0, 8, 0)))


@mutant("DRV-BLK-56", spec="blk?size=64M")
def zeroes_too_much(b: Bench) -> None:
    b.model.config["max_write_zeroes_sectors"] = 4
    ask(b, b.start(RANGES)[0], blk.T_WRITE_ZEROES, data=pieces((0, 8, 0)))


@mutant("DRV-BLK-58", spec=DISK + "&seg_max=1")
def too_many_data_segments(b: Bench) -> None:
    queue = b.start(1 << blk.F_SEG_MAX)[0]
    header = queue.buffer(16, struct.pack("<IIQ", blk.T_IN, 0, 0))
    queue.add([header], [queue.buffer(512), queue.buffer(512), queue.buffer(1)])
    queue.kick()


@mutant("DRV-BLK-47", spec=DISK)
def half_a_header(b: Bench) -> None:
    queue = b.start()[0]
    queue.add([queue.buffer(8)], [queue.buffer(1)])
    queue.kick()


@mutant("DRV-BLK-48", spec=DISK)
def no_room_for_the_status(b: Bench) -> None:
    queue = b.start(RANGES)[0]
    queue.add([queue.buffer(16, struct.pack("<IIQ", blk.T_FLUSH, 0, 0))], [])
    queue.kick()


@mutant("DRV-BLK-04", spec=DISK)
def reads_the_cache_mode_too_early(b: Bench) -> None:
    b.driver.begin()
    b.driver.read_at(CfgType.DEVICE, 32, 1)


@mutant("DRV-BLK-60", spec=DISK)
def sets_a_cache_mode_that_is_not(b: Bench) -> None:
    b.start(ft.mask((blk.F_CONFIG_WCE, blk.F_FLUSH)))
    b.driver.write_at(CfgType.DEVICE, 32, 1, 2)


@mutant("DRV-BLK-06", spec=ZONED + "&offer=+discard")
def discards_on_a_host_managed_disk(b: Bench) -> None:
    b.driver.negotiate(b.must | ft.mask((blk.F_ZONED, blk.F_DISCARD)))


@mutant("DRV-BLK-41", "DRV-PCI-66", spec=DISK)
def sets_up_a_second_queue_without_mq(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.queue(1, 8)


@mutant("DRV-BLK-46", "DRV-CONFIG-07", spec="blk?size=64K&block_size=4096")
def takes_capacity_for_blocks(b: Bench) -> None:
    b.start()
    b.watch.tell("capacity", 8 * b.driver.read_at(CfgType.DEVICE, 0, 4))


def across(rule: str, offset: int, width: int, also: str, spec: str = DISK) -> None:
    def walk(b: Bench) -> None:
        b.start(1 << blk.F_ZONED if spec == ZONED else 0)
        b.driver.read_at(CfgType.DEVICE, offset, width)

    walk.__name__ = f"reads_across_{offset}"
    mutant(f"DRV-BLK-{rule}", f"DRV-PCI-{also}", spec=spec)(walk)


across("42", 24, 4, "05")
across("43", 56, 4, "05")
across("45", 92, 4, "05", ZONED)

# Zones


def zone(*breaks: str, name: str, **request: Any) -> None:
    asks(*breaks, name=name, spec=ZONED, features=1 << blk.F_ZONED, **request)


zone("31", name="resets_within_a_zone", kind=blk.T_ZONE_RESET, sector=8)
zone("32", name="resets_all_from_a_sector", kind=blk.T_ZONE_RESET_ALL, sector=128)
zone("33", name="appends_within_a_zone", kind=blk.T_ZONE_APPEND, sector=8, out=4096, room=8)
zone("34", "37", name="appends_less_than_a_grain", kind=blk.T_ZONE_APPEND, out=512, room=8)
zone("35", name="appends_too_much", kind=blk.T_ZONE_APPEND, out=12288, room=8)
zone("37", name="writes_less_than_a_grain", kind=blk.T_OUT, out=512)
zone("38", name="writes_beside_a_grain", kind=blk.T_OUT, sector=1, out=4096)
zone("39", name="writes_over_the_end_of_a_zone", kind=blk.T_OUT, sector=120, out=8192)
zone("62", name="no_room_for_the_sector", kind=blk.T_ZONE_APPEND, out=4096)
