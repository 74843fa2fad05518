"""Rules of memory balloons (5.5)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, cast

from ...devices.evidence import Event
from ...devices.models.balloon import STAT, Balloon
from ...devices.ring import Chain
from ...spec import balloon as spec
from ...spec.status import Status
from .rules import Answer, Answers, Watch, exercised, rule
from .rules_common import STATUS, goes_live, is_config


def model_of(watch: Watch) -> Balloon | None:
    """The balloon, if the device is one whose queues have the standard's numbers."""
    model, features = watch.device.model, watch.device.visible_features
    if not isinstance(model, Balloon):
        return None
    queues = spec.OPTIONAL_QUEUES.items()
    plain = all(bool(model.queue_size(queue, features)) == bool(features >> bit & 1) for queue, bit in queues)
    return model if plain else None


def on_queue(number: int) -> Any:
    """Events of one of a balloon's queues."""
    return lambda watch, event, _: model_of(watch) is not None and event.queue == number


def numbers(chain: Chain) -> set[int]:
    """Page frame numbers of a request."""
    data = chain.read()
    return {int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data) - 3, 4)}


def requests(watch: Watch, event: Event) -> bool:
    """Whether an event is about inflating or deflating."""
    return model_of(watch) is not None and event.queue in (spec.INFLATEQ, spec.DEFLATEQ)


# Configuration and queues


@rule("DRV-BALLOON-45", on=("read", "write"))
def fields_where_they_are(watch: Watch, event: Event, subject: Any) -> Answer:
    """An access to the configuration hits one field."""
    if model_of(watch) is None or not is_config(watch, event):
        return None
    field = spec.CONFIG[event.name]
    return True if event.offset + event.width <= field.end else f"{event.width} bytes at {event.offset}"


exercised("DRV-BALLOON-46", on=STATUS, when=lambda w, e, s: model_of(w) and goes_live(w, e, s))


@rule("DRV-BALLOON-35", on=STATUS)
def poison_before_driver_ok(watch: Watch, event: Event, subject: Any) -> Answer:
    """With PAGE_POISON poison_val is written before DRIVER_OK."""
    if model_of(watch) is None or not watch.has(spec.F_PAGE_POISON) or not goes_live(watch, event, subject):
        return None
    return True if ("poison_val", -1) in watch.life.written else "poison_val not written before DRIVER_OK"


exercised(
    "DRV-BALLOON-36",
    on=STATUS,
    when=lambda w, e, s: model_of(w) and goes_live(w, e, s) and w.has(spec.F_PAGE_POISON),
)


@rule("DRV-BALLOON-43", on=STATUS)
def queues_have_their_numbers(watch: Watch, event: Event, subject: Any) -> Answer:
    """Queues have the standard's numbers, whatever is left out between them."""
    if model_of(watch) is None or not goes_live(watch, event, subject):
        return None
    wanted = [spec.INFLATEQ, spec.DEFLATEQ]
    wanted += [queue for queue, bit in spec.OPTIONAL_QUEUES.items() if watch.has(bit)]
    missing = [queue for queue in wanted if not watch.device.queues[queue].enabled]
    return f"queue {missing[0]} is not set up, though its feature is negotiated" if missing else True


@rule("DRV-BALLOON-44", on="write queue_enable")
def queues_with_their_features(watch: Watch, event: Event, subject: Any) -> Answer:
    """Optional queues are set up with their features only."""
    if model_of(watch) is None:
        return None
    bit = spec.OPTIONAL_QUEUES.get(event.queue)
    return True if bit is None or watch.has(bit) else f"queue {event.queue} without its feature"


# Pages

exercised("DRV-BALLOON-47", on="pop", when=lambda w, e, _: requests(w, e), needs="ring")
exercised("DRV-BALLOON-49", on="pop", when=on_queue(spec.DEFLATEQ), needs="ring")


@rule("DRV-BALLOON-13", on=("pop", "push"), needs="ring")
def only_what_was_acknowledged_is_deflated(watch: Watch, event: Event, chain: Chain) -> Answer:
    """Pages are not deflated before their inflate request came back."""
    if not requests(watch, event):
        return None
    going: dict[int, set[int]] = watch.remember("inflating", {})
    if event.queue == spec.INFLATEQ:
        if event.kind == "pop":
            going[chain.position] = numbers(chain)
        else:
            going.pop(chain.position, None)
        return None
    if event.kind == "push":
        return None
    early = numbers(chain) & set().union(*going.values())
    return f"page {min(early):#x} deflated before its inflate request came back" if early else True


@rule("DRV-BALLOON-07", on=("pop", "settled"), needs="ring")
def the_target_is_kept(watch: Watch, event: Event, chain: Chain) -> Answer:
    """Without DEFLATE_ON_OOM no page is taken back that the device still wants, but to leave altogether."""
    model = model_of(watch)
    if model is None or watch.has(spec.F_DEFLATE_ON_OOM):
        return None
    target = cast(int, model.config["num_pages"])
    if event.kind == "settled":
        short = watch.device.running and watch.remember("deflated below") and len(model.pages) < target
        return f"deflated to {len(model.pages)} pages, {target} are wanted" if short else None
    if event.queue != spec.DEFLATEQ:
        return None
    below = len(model.pages - numbers(chain)) < target
    watch.life.memo["deflated below"] = below
    return None if below else True


@rule("DRV-BALLOON-09", "DRV-BALLOON-48", on="write actual")
def actual_counts_the_pages(watch: Watch, event: Event, subject: Any) -> Answers:
    """actual is the number of pages that were inflated and not deflated, in units of 4096 bytes."""
    model = model_of(watch)
    if model is None or not watch.device.running:
        return None
    count = len(model.pages)
    text = f"actual {event.value}, {count} pages are in the balloon"
    answers: dict[str, Answer] = {"DRV-BALLOON-48": True if event.value == count else text}
    if event.value < count:
        answers["DRV-BALLOON-09"] = text
    elif watch.remember("deflated"):
        answers["DRV-BALLOON-09"] = True
    return answers


@rule("DRV-BALLOON-14", on=("pop", "write actual", "settled"))
def actual_is_updated(watch: Watch, event: Event, subject: Any) -> Answer:
    """After the balloon's size changed actual is written."""
    if model_of(watch) is None:
        return None
    if event.kind == "pop":
        if requests(watch, event):
            watch.life.memo["resized"] = 1
            watch.life.memo["deflated"] = watch.remember("deflated") or event.queue == spec.DEFLATEQ
        return None
    resized = watch.life.memo.pop("resized", 0)
    if event.kind == "write":
        return True if resized else None
    return "the balloon's size changed, actual was not written" if resized else None


# Statistics

exercised("DRV-BALLOON-16", "DRV-BALLOON-20", on="pop", when=on_queue(spec.STATSQ), needs="ring")


@rule("DRV-BALLOON-19", "DRV-BALLOON-23", "DRV-BALLOON-50", on="pop", needs="ring")
def statistics(watch: Watch, event: Event, chain: Chain) -> Answers:
    """A statistics buffer has one entry for each statistic, with tags that the standard has."""
    if model_of(watch) is None or event.queue != spec.STATSQ:
        return None
    tags = [tag for tag, _ in _entries(chain)]
    unknown = [tag for tag in tags if tag >= len(spec.Stat)]
    answers: dict[str, Answer] = {
        "DRV-BALLOON-19": True if tags and len(set(tags)) == len(tags) else f"tags {tags}",
        "DRV-BALLOON-50": f"tag {unknown[0]}" if unknown else True,
    }
    if watch.remember("statistics before"):
        answers["DRV-BALLOON-23"] = True
    watch.life.memo["statistics before"] = 1
    return answers


def _entries(chain: Chain) -> Iterator[tuple[int, int]]:
    data = chain.read()
    yield from STAT.iter_unpack(data[: len(data) // STAT.size * STAT.size])


@rule("DRV-BALLOON-17", "DRV-BALLOON-18", on=("pop", "push", "settled"), needs="ring")
def statistics_are_supplied(watch: Watch, event: Event, subject: Any) -> Answers:
    """A statistics buffer is available from the start, and again when the device used one."""
    if model_of(watch) is None or not watch.has(spec.F_STATS_VQ):
        return None
    if event.kind == "settled":
        if not watch.device.running:
            return None
        if not watch.remember("statistics"):
            return {"DRV-BALLOON-17": "no statistics buffer after the initialization"}
        return (
            {"DRV-BALLOON-18": "the statistics buffer did not come again"} if watch.remember("asked") else {}
        )
    if event.queue != spec.STATSQ:
        return None
    if event.kind == "push":
        watch.life.memo["asked"] = 1
        return None
    first = not watch.remember("statistics")
    watch.life.memo["statistics"] = 1
    asked = watch.life.memo.pop("asked", 0)
    return {"DRV-BALLOON-17": True} if first else {"DRV-BALLOON-18": True} if asked else {}


@rule("DRV-BALLOON-52", on=("kick", "pop"), needs="ring")
def statistics_are_announced_late(watch: Watch, event: Event, subject: Any) -> Answer:
    """The notification of the first statistics buffer comes after DRIVER_OK."""
    if model_of(watch) is None or event.queue != spec.STATSQ:
        return None
    if event.kind == "pop":
        return True
    live = watch.device.status & Status.DRIVER_OK
    return None if live else "the statistics queue is notified before DRIVER_OK"


# Free page hints and reports


@rule(
    *("DRV-BALLOON-24", "DRV-BALLOON-25", "DRV-BALLOON-26", "DRV-BALLOON-53", "DRV-BALLOON-54"),
    on=("pop", "read free_page_hint_cmd_id"),
    needs="ring",
)
def hints(watch: Watch, event: Event, chain: Chain) -> Answers:
    """Command ids are the device's or STOP; pages are single device-writable buffers."""
    model = model_of(watch)
    if event.kind == "read":
        watch.remember("command ids", set()).add(event.value)
        return None
    if model is None or event.queue != spec.FREE_PAGE_VQ:
        return None
    if chain.readable_bytes:
        command = int.from_bytes(chain.read(4), "little")
        known = {spec.CMD_ID_STOP, *watch.remember("command ids", set())}
        watch.life.memo["hinting"] = command >= spec.CMD_ID_FIRST
        return {
            **dict.fromkeys(("DRV-BALLOON-24", "DRV-BALLOON-25", "DRV-BALLOON-26"), True),
            "DRV-BALLOON-53": True if command in known else f"command id {command}, the driver read {known}",
        }
    single = len(chain.elements) == 1
    return {"DRV-BALLOON-54": True if single else f"a hint of {len(chain.elements)} elements"}


@rule("DRV-BALLOON-29", on=("pop", "settled"), needs="ring")
def hints_end(watch: Watch, event: Event, chain: Chain) -> Answer:
    """When there are no more pages to hint, STOP is sent."""
    if model_of(watch) is None:
        return None
    if event.kind == "settled":
        return "a round of hints without STOP at its end" if watch.remember("hinting") else None
    if event.queue != spec.FREE_PAGE_VQ or not chain.readable_bytes:
        return None
    return True if chain.read(4) == bytes(4) else None


@rule("DRV-BALLOON-38", "DRV-BALLOON-55", on="pop", needs="ring")
def reports(watch: Watch, event: Event, chain: Chain) -> Answers:
    """Reported pages are device-writable, and poisoned where that was negotiated."""
    model = model_of(watch)
    if model is None or event.queue != spec.REPORTING_VQ:
        return None
    odd = [part for part in chain.elements if not part.writable or part.length % 4096 or part.address % 4096]
    answers: dict[str, Answer] = {
        "DRV-BALLOON-55": f"{odd[0].length} bytes at {odd[0].address:#x}" if odd else True
    }
    if watch.has(spec.F_PAGE_POISON):
        poison = cast(int, model.config["poison_val"]).to_bytes(4, "little")
        clean = all(bytes(part) == poison * (len(part) // 4) for part in chain.writable)
        answers["DRV-BALLOON-38"] = True if clean else "reported pages are not filled with poison_val"
    return answers


@rule("DRV-BALLOON-39", on=("pop", "push"), needs="ring")
def reported_pages_rest(watch: Watch, event: Event, chain: Chain) -> Answer:
    """Reported pages are not used before the report came back."""
    if model_of(watch) is None or event.queue != spec.REPORTING_VQ:
        return None
    sums: dict[int, list[int]] = watch.remember("reported", {})
    now = [zlib.crc32(part) for part in chain.writable]
    if event.kind == "pop":
        sums[chain.position] = now
        return None
    return (
        True if sums.pop(chain.position, now) == now else "reported pages changed before the report came back"
    )
