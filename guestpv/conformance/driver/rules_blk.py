"""Rules of block devices (5.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from ...devices.evidence import Event
from ...devices.models.blk import HEADER, Blk
from ...devices.models.blk_zoned import ZonedBlk
from ...devices.ring import Chain
from ...spec import blk
from ...spec import features as ft
from ...spec.status import Status
from .rules import Answer, Answers, Watch, exercised, presented, rule
from .rules_common import STATUS, is_config, sets

READS = (blk.T_IN, blk.T_GET_ID, blk.T_GET_LIFETIME, blk.T_ZONE_REPORT)
WRITES = (blk.T_OUT, blk.T_DISCARD, blk.T_WRITE_ZEROES, blk.T_SECURE_ERASE)
RANGES = (blk.T_DISCARD, blk.T_WRITE_ZEROES, blk.T_SECURE_ERASE)
MANAGED = (blk.T_ZONE_OPEN, blk.T_ZONE_CLOSE, blk.T_ZONE_FINISH, blk.T_ZONE_RESET)
FEATURED = (blk.T_FLUSH, blk.T_GET_LIFETIME, *RANGES)
TYPES = {blk.T_IN, blk.T_OUT, blk.T_FLUSH, blk.T_GET_ID, blk.T_GET_LIFETIME, *RANGES}
ZONED_TYPES = {*MANAGED, blk.T_ZONE_APPEND, blk.T_ZONE_REPORT, blk.T_ZONE_RESET_ALL}

Request = tuple[int, int, int]
"""Type, sector, bytes of data."""
When = Callable[[Watch, Event, Any], object]


def request(watch: Watch, chain: Chain) -> Request | None:
    """What a chain asks of a disk; None for one that is too short, or of another device."""
    if (
        not isinstance(watch.device.model, Blk)
        or chain.readable_bytes < HEADER.size
        or not chain.writable_bytes
    ):
        return None
    kind, _, sector = HEADER.unpack(chain.read(HEADER.size))
    data = chain.readable_bytes - HEADER.size if kind not in READS else chain.writable_bytes - 1
    return kind, sector, data


def of(*kinds: int, needs: int | None = None) -> When:
    """Requests of these types, where a feature was negotiated."""

    def fits(watch: Watch, event: Event, chain: Chain) -> bool:
        found = request(watch, chain)
        return found is not None and found[0] in kinds and (needs is None or watch.has(needs))

    return fits


def any_request(watch: Watch, event: Event, chain: Chain) -> bool:
    """Any request of a disk."""
    return request(watch, chain) is not None


def on_pop(*requirements: str, when: When) -> None:
    """Register requirements that requests exercise; the model finds the breach."""
    exercised(*requirements, on="pop", when=when, needs="ring")


# Configuration

LAYOUT = {"DRV-BLK-42": (0, 36), "DRV-BLK-43": (36, 60), "DRV-BLK-45": (72, 96)}


@rule(*LAYOUT, on=("read", "write"))
def fields_where_they_are(watch: Watch, event: Event, subject: Any) -> Answers:
    """An access to the configuration hits one field, or half of one."""
    if not isinstance(watch.device.model, Blk) or not is_config(watch, event):
        return None
    field = blk.CONFIG[event.name]
    for requirement, (start, end) in LAYOUT.items():
        if start <= event.offset < end:
            across = event.offset + event.width > field.end
            return {
                requirement: f"{event.width} bytes at {event.offset} go beyond {field.name}"
                if across
                else True
            }
    return None


exercised("DRV-BLK-04", on="read writeback", when=lambda w, *_: bool(w.device.features))
exercised("DRV-BLK-60", on=("read writeback", "write writeback"), when=lambda w, *_: bool(w.device.features))


@rule("DRV-BLK-41", on="write queue_enable")
def request_queues(watch: Watch, event: Event, subject: Any) -> Answer:
    """Request queues are 0 to N-1, N is 1 without MQ."""
    model = watch.device.model
    if not isinstance(model, Blk):
        return None
    count = model.num_queues if watch.has(blk.F_MQ) else 1
    return True if event.queue < count else f"queue {event.queue} of {count}"


@rule("DRV-BLK-46", on="told capacity", needs="user")
def capacity_in_sectors(watch: Watch, event: Event, subject: Any) -> Answer:
    """capacity counts 512-byte sectors, whatever blk_size says."""
    model = watch.device.model
    if model.config["blk_size"] == blk.SECTOR:
        return None
    right = model.config["capacity"]
    return True if event.value == right else f"the driver takes a capacity of {right!r} for {event.value}"


def zone_model(watch: Watch) -> int | None:
    """The zone model of the disk, None where ZONED is not offered."""
    if watch.device.model.device_type != ft.BLK or not watch.offers(blk.F_ZONED):
        return None
    return cast(int, watch.device.model.config.get("model", blk.Z_NONE))


@rule("DRV-BLK-06", on=STATUS)
def no_discard_on_host_managed_disks(watch: Watch, event: Event, subject: Any) -> Answer:
    """DISCARD is not accepted from a host-managed zoned disk."""
    if zone_model(watch) != blk.Z_HM or not watch.offers(blk.F_DISCARD):
        return None
    if not sets(watch, event, Status.FEATURES_OK):
        return None
    return "DISCARD accepted of a host-managed disk" if watch.device.accepted >> blk.F_DISCARD & 1 else True


# Requests

on_pop("DRV-BLK-13", "DRV-BLK-17", when=of(blk.T_IN, blk.T_OUT))
on_pop("DRV-BLK-15", when=of(blk.T_FLUSH))
on_pop("DRV-BLK-18", when=of(*RANGES))
on_pop("DRV-BLK-19", when=of(blk.T_GET_ID))
on_pop("DRV-BLK-20", "DRV-BLK-25", "DRV-BLK-55", when=of(blk.T_DISCARD))
on_pop("DRV-BLK-22", "DRV-BLK-54", "DRV-BLK-56", when=of(blk.T_WRITE_ZEROES))
on_pop("DRV-BLK-47", "DRV-BLK-48", when=any_request)
on_pop("DRV-BLK-51", when=of(*FEATURED))
on_pop("DRV-BLK-53", when=of(blk.T_GET_ID, *RANGES))
on_pop("DRV-BLK-57", when=of(blk.T_IN, blk.T_OUT, needs=blk.F_SIZE_MAX))
on_pop("DRV-BLK-58", when=of(blk.T_IN, blk.T_OUT, needs=blk.F_SEG_MAX))
on_pop("DRV-BLK-31", when=of(*MANAGED))
on_pop("DRV-BLK-35", when=of(blk.T_ZONE_APPEND))
presented("DRV-BLK-52", "DRV-BLK-59", needs="user")


@rule("DRV-BLK-49", on="pop", needs="ring")
def data_in_its_direction(watch: Watch, event: Event, chain: Chain) -> Answer:
    """Data that the device returns is device-writable, data that it takes device-readable."""
    found = request(watch, chain)
    if found is None:
        return None
    if found[0] in READS and chain.readable_bytes > HEADER.size:
        return f"type {found[0]} with {chain.readable_bytes - HEADER.size} device-readable bytes of data"
    if found[0] in WRITES and chain.writable_bytes > 1:
        return f"type {found[0]} with {chain.writable_bytes - 1} device-writable bytes of data"
    return True if found[0] in (*READS, *WRITES) else None


@rule("DRV-BLK-50", on="pop", needs="ring")
def known_types(watch: Watch, event: Event, chain: Chain) -> Answer:
    """A request is of a type that the standard has."""
    found = request(watch, chain)
    if found is None:
        return None
    known = found[0] in TYPES or (found[0] in ZONED_TYPES and watch.has(blk.F_ZONED))
    return True if known else f"request type {found[0]}"


# Zones


@rule(
    *("DRV-BLK-32", "DRV-BLK-33", "DRV-BLK-34", "DRV-BLK-37", "DRV-BLK-38", "DRV-BLK-39", "DRV-BLK-62"),
    on="pop",
    needs="ring",
)
def zones(watch: Watch, event: Event, chain: Chain) -> Answers:
    """Requests to sequential zones begin, end and grow as the zone allows."""
    model, found = watch.device.model, request(watch, chain)
    if not isinstance(model, ZonedBlk) or found is None:
        return None
    kind, sector, data = found
    if kind == blk.T_ZONE_RESET_ALL:
        return {"DRV-BLK-32": f"sector {sector} in ZONE_RESET_ALL" if sector else True}
    if kind not in (blk.T_OUT, blk.T_ZONE_APPEND) or sector >= model.store.sectors:
        return None
    zone = model.zones[sector // cast(int, model.config["zone_sectors"])]
    if zone.kind == blk.ZT_CONV:
        return None
    grain = cast(int, model.config["write_granularity"])
    text = f"{data} bytes at sector {sector}, granularity {grain}"
    left = (zone.start + zone.length - max(zone.pointer, sector)) * blk.SECTOR
    answers: dict[str, Answer] = {
        "DRV-BLK-37": text if data % grain else True,
        "DRV-BLK-39": f"{data} bytes where {left} are left in the zone" if data > left else True,
    }
    if kind == blk.T_OUT:
        return answers | {"DRV-BLK-38": text if sector * blk.SECTOR % grain else True}
    return answers | {
        "DRV-BLK-33": True if sector == zone.start else f"no zone begins at sector {sector}",
        "DRV-BLK-34": text if data % grain else True,
        "DRV-BLK-62": True if chain.writable_bytes == 9 else f"{chain.writable_bytes} device-writable bytes",
    }
