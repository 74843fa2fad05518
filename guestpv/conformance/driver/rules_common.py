"""Rules of status, features, initialization, configuration and cleanup (2.1, 2.2, 2.5, 2.6, 3, 6)."""

from __future__ import annotations

from typing import Any

from ...devices.device import known_features
from ...devices.evidence import Event
from ...spec import features as ft
from ...spec.status import Status
from .rules import Answer, Answers, Watch, exercised, presented, rule

STATUS = "write device_status"
SETUP = tuple(f"write queue_{name}" for name in ("size", "msix_vector", "desc", "driver", "device", "enable"))
RESERVED = sum(1 << bit for bit in (*range(44, 50), *range(128, 256)))


def sets(watch: Watch, event: Event, bit: Status) -> bool:
    """Whether a write of device_status sets this bit for the first time since the reset."""
    return bool(event.value & bit and not watch.life.status & bit)


def goes_live(watch: Watch, event: Event, subject: Any) -> bool:
    """Whether a write of device_status sets DRIVER_OK."""
    return sets(watch, event, Status.DRIVER_OK)


def begins(watch: Watch, event: Event, subject: Any) -> bool:
    """Whether a write of device_status sets ACKNOWLEDGE."""
    return sets(watch, event, Status.ACKNOWLEDGE)


# Status and initialization

exercised("DRV-STATUS-02", "DRV-STATUS-05", "DRV-INIT-13", on=STATUS, when=goes_live)
exercised("DRV-INIT-01", on=STATUS, when=begins)
exercised(
    "DRV-STATUS-03", on=STATUS, when=lambda watch, event, _: not event.value and watch.memo.pop("failed", 0)
)


@rule("DRV-STATUS-01", on=STATUS)
def a_bit_for_each_step(watch: Watch, event: Event, subject: Any) -> Answer:
    """FEATURES_OK and DRIVER_OK tell of steps that come one after the other, with a look in between."""
    if event.value & Status.FAILED:
        watch.memo["failed"] = 1
    new = Status(event.value & 0xFF & ~watch.life.status)
    late = new & (Status.FEATURES_OK | Status.DRIVER_OK)
    if late and new & ~late | late & Status.FEATURES_OK and late & Status.DRIVER_OK:
        return f"{new!r} set at once"
    return True if late & Status.DRIVER_OK else None


@rule("DRV-INIT-02", on=STATUS)
def acknowledge_then_driver(watch: Watch, event: Event, subject: Any) -> Answer:
    """ACKNOWLEDGE, then DRIVER, both before features are touched."""
    if not sets(watch, event, Status.DRIVER):
        return None
    if sets(watch, event, Status.ACKNOWLEDGE):
        return "ACKNOWLEDGE and DRIVER set at once"
    if ("driver_feature", -1) in watch.life.written:
        return "driver_feature written before DRIVER"
    return True


@rule("DRV-INIT-03", on=STATUS)
def features_are_read_and_written(watch: Watch, event: Event, subject: Any) -> Answer:
    """Between DRIVER and FEATURES_OK the offered features are read and the accepted ones written."""
    if not sets(watch, event, Status.FEATURES_OK) or not watch.life.status & Status.DRIVER:
        return None
    log = watch.life.log
    start = next(
        (n for n, e in enumerate(log) if e.name == "device_status" and e.value & Status.DRIVER), len(log)
    )
    seen = {(e.kind, e.name) for e in log[start:]}
    if ("read", "device_feature") not in seen:
        return "FEATURES_OK without a read of device_feature after DRIVER"
    if ("write", "driver_feature") not in seen:
        return "FEATURES_OK without a write of driver_feature after DRIVER"
    return True


exercised("DRV-INIT-05", "DRV-INIT-07", "DRV-INIT-09", on=STATUS, when=goes_live)


@rule("DRV-INIT-06", on=STATUS)
def features_ok_before_driver_ok(watch: Watch, event: Event, subject: Any) -> Answer:
    """Features are settled by FEATURES_OK before the driver goes on."""
    if not goes_live(watch, event, subject):
        return None
    return True if (watch.life.status | event.value) & Status.FEATURES_OK else "DRIVER_OK without FEATURES_OK"


@rule("DRV-INIT-08", on=("write queue_enable", STATUS))
def features_ok_is_read_back(watch: Watch, event: Event, subject: Any) -> Answer:
    """After FEATURES_OK the status is read before anything is built on it."""
    if event.name == "device_status" and not goes_live(watch, event, subject):
        return None
    if not watch.life.status & Status.FEATURES_OK or watch.remember("read back"):
        return None
    watch.life.memo["read back"] = 1
    log = watch.life.log
    for entry in reversed([entry for entry in log if entry.name == "device_status"]):
        if entry.kind == "read":
            return True
        if entry.value & Status.FEATURES_OK:
            break
    return f"{event.name} written before device_status was read back"


@rule("DRV-INIT-09", on=SETUP[:-1])
def queues_after_features(watch: Watch, event: Event, subject: Any) -> Answer:
    """Queues are set up after FEATURES_OK."""
    # Before ACKNOWLEDGE a driver may be taking the former life's setup down.
    if watch.life.status & Status.FEATURES_OK or not watch.life.status & Status.ACKNOWLEDGE:
        return None
    return f"{event.name} written before FEATURES_OK"


@rule("DRV-INIT-10", on=("write queue_enable", STATUS))
def driver_ok_is_the_last_step(watch: Watch, event: Event, subject: Any) -> Answer:
    """No queue is set up after DRIVER_OK, but one that was reset."""
    if event.name == "device_status":
        return True if goes_live(watch, event, subject) else None
    if watch.life.status & Status.DRIVER_OK and ("queue_reset", event.queue) not in watch.life.written:
        return "queue enabled after DRIVER_OK"
    return None


@rule("DRV-INIT-12", on=(STATUS, "write driver_feature", *SETUP, "kick"))
def nothing_after_a_failure(watch: Watch, event: Event, subject: Any) -> Answers:
    """After FAILED, or FEATURES_OK that did not stay, only a reset leads on."""
    if event.name == "device_status":
        if event.value == 0:
            return True if watch.remember("gave up") else None
        if event.value & Status.FAILED:
            watch.life.memo["gave up"] = 1
            return None
        if watch.remember("gave up"):
            return None  # DRV-STATUS-03
        return _refused(watch) if goes_live(watch, event, subject) else None
    if watch.remember("gave up"):
        return f"{event.name} touched after FAILED"
    return _refused(watch)


def _refused(watch: Watch) -> Answer:
    if watch.life.status & Status.FEATURES_OK and not watch.device.status & Status.FEATURES_OK:
        return "the driver goes on although FEATURES_OK did not stay"
    return None


# Features

exercised("DRV-FEAT-01", "DRV-FEAT-15", on=STATUS, when=lambda w, e, _: sets(w, e, Status.FEATURES_OK))


@rule("DRV-FEAT-02", "DRV-FEAT-03", on=STATUS)
def dependencies(watch: Watch, event: Event, subject: Any) -> Answers:
    """The accepted set is closed; more so when the offered one is not."""
    if not sets(watch, event, Status.FEATURES_OK):
        return None
    kind = watch.device.model.device_type
    offered, accepted = watch.device.offered, watch.device.accepted
    if ft.close_dependencies(kind, offered) == offered:
        return {"DRV-FEAT-02": True}
    if ft.unmet(kind, accepted & offered):
        return {"DRV-FEAT-03": "features taken as offered, without what they require"}
    return True


def undefined(watch: Watch) -> dict[str, tuple[str, str, int]]:
    """Kinds of bits that are not for this driver: the mask among those offered, ignore rule, accept rule."""
    kind = watch.device.model.device_type
    foreign = sum(1 << bit for bit in (*range(24), *range(50, 128)))
    strange = watch.device.offered & ~known_features(kind)
    legacy = ft.mask((24, 27))
    return {
        "reserved": ("DRV-FEAT-05", "DRV-FEAT-09", strange & RESERVED),
        "not described": ("DRV-FEAT-04", "DRV-FEAT-08", strange & ~RESERVED & ~foreign & ~legacy),
        "of no use to this device type": ("DRV-FEAT-07", "DRV-FEAT-11", strange & foreign),
    }


@rule(
    *(
        "DRV-FEAT-04",
        "DRV-FEAT-05",
        "DRV-FEAT-07",
        "DRV-FEAT-08",
        "DRV-FEAT-09",
        "DRV-FEAT-11",
        "DRV-FEAT-14",
    ),
    "DRV-FEAT-29",
    on=STATUS,
)
def bits_that_mean_nothing(watch: Watch, event: Event, subject: Any) -> Answers:
    """Bits that mean nothing to a driver are neither accepted nor a reason to fail."""
    offered = {what: entry for what, entry in undefined(watch).items() if entry[2]}
    if not offered:
        return None
    answers: dict[str, Answer] = {}
    failed = event.value & Status.FAILED and not watch.life.status & Status.FEATURES_OK
    if failed and watch.device.offered >> ft.F_VERSION_1 & 1 and not watch.refuses:
        for what, (ignored, _, _) in offered.items():
            answers[ignored] = f"FAILED after bits were offered that are {what}"
        return answers | {"DRV-FEAT-14": "FAILED after unknown features were offered"}
    if not goes_live(watch, event, subject):
        if sets(watch, event, Status.FEATURES_OK) and watch.device.accepted & RESERVED:
            return {"DRV-FEAT-29": "a reserved bit was accepted"}
        return None
    for ignored, accepted, _ in offered.values():
        answers |= {ignored: True, accepted: True, "DRV-FEAT-14": True}
    if "reserved" in offered:
        answers["DRV-FEAT-29"] = True
    return answers


presented("DRV-FEAT-13", needs="registers")


@rule("DRV-FEAT-13", on=(STATUS, "end"))
def failed_is_set(watch: Watch, event: Event, subject: Any) -> Answer:
    """A driver that cannot work with what is offered says so."""
    if "DRV-FEAT-13" not in watch.refuses or not watch.life.status & Status.DRIVER:
        return None
    if event.kind == "write" and event.value:
        return None
    if watch.life.status & (Status.FAILED | Status.DRIVER_OK):
        return None
    return "the driver gave up without FAILED"


@rule("DRV-FEAT-24", on=STATUS)
def sr_iov_needs_its_capability(watch: Watch, event: Event, subject: Any) -> Answer:
    """SR_IOV is not negotiated for a device without the capability."""
    if not watch.offers(ft.F_SR_IOV) or not sets(watch, event, Status.FEATURES_OK):
        return None
    return "SR_IOV accepted" if watch.device.accepted >> ft.F_SR_IOV & 1 else True


@rule("DRV-FEAT-30", on=("write driver_feature", STATUS))
def new_features_after_a_reset(watch: Watch, event: Event, subject: Any) -> Answer:
    """Another feature set is negotiated after a reset only."""
    if event.name == "device_status":
        known = watch.memo.get("negotiated")
        if sets(watch, event, Status.FEATURES_OK):
            watch.memo["negotiated"] = watch.device.accepted
            return True if known not in (None, watch.device.accepted) else None
        return None
    if not watch.device.status & Status.FEATURES_OK:
        return None
    word = watch.life.written.get(("driver_feature_select", -1), 0)
    if watch.device.features >> 32 * word & 0xFFFFFFFF == event.value:
        return None
    return "another feature set without a reset"


exercised("DRV-FEAT-18", on="pop", needs="ring", when=lambda w, *_: w.has(ft.F_ACCESS_PLATFORM))
exercised("DRV-FEAT-19", on="pop", needs="ring", when=lambda w, *_: not w.has(ft.F_ACCESS_PLATFORM))

# Device configuration

presented("DRV-CONFIG-05")


def is_config(watch: Watch, event: Event) -> bool:
    """Whether a read or write is one of device configuration."""
    layout = watch.device.model.layout
    return event.queue < 0 and layout is not None and event.name in layout


@rule("DRV-CONFIG-04", on=STATUS)
def a_field_is_missing(watch: Watch, event: Event, subject: Any) -> Answer:
    """Exercised where some field of the configuration does not exist; the device finds who touches it."""
    layout = watch.device.model.layout
    if layout is None or not goes_live(watch, event, subject):
        return None
    return True if any(not field.exists(watch.device.offered) for field in layout) else None


@rule("DRV-CONFIG-01", "DRV-CONFIG-02", on=("read", "end", "reset device_status"))
def torn_reads_are_repeated(watch: Watch, event: Event, subject: Any) -> Answers:
    """What was read in pieces while the generation changed is read again."""
    layout = watch.device.model.layout
    if layout is None:
        return None
    torn: dict[str, str] = watch.remember("torn", {})
    if event.kind != "read":
        return {rule: f"{name} was read while it changed, and not read again" for name, rule in torn.items()}
    if not is_config(watch, event):
        return None
    field = layout[event.name]
    seen: dict[str, tuple[int, int]] = watch.remember("pieces", {})
    first, generation = seen.get(field.name, (-1, -1))
    now = watch.device.generation
    if event.offset == field.offset:
        seen[field.name] = (event.offset, now)
        repeated = torn.pop(field.name, None)
        return {repeated: True} if repeated else None
    if first >= 0 and generation != now:
        torn[field.name] = "DRV-CONFIG-01" if field.width == 8 else "DRV-CONFIG-02"
    return None


@rule("DRV-CONFIG-08", on=("interrupt configuration change", "read", "settled"))
def a_change_is_looked_at(watch: Watch, event: Event, subject: Any) -> Answer:
    """After a configuration change notification the configuration is read again."""
    if event.kind == "interrupt":
        if watch.device.status & Status.NEEDS_RESET or watch.device.model.layout is None:
            return None
        watch.life.memo["changed"] = 1
        return None
    if event.kind == "read" and is_config(watch, event):
        return True if watch.life.memo.pop("changed", 0) else None
    if event.kind == "settled" and watch.life.memo.pop("changed", 0):
        return "the configuration changed, the driver was told, and did not read it"
    return None


@rule("DRV-CONFIG-07", on="told", needs="user")
def little_endian(watch: Watch, event: Event, subject: Any) -> Answer:
    """The driver understands what the device's configuration says."""
    value = watch.device.model.config[event.name]
    right = int.from_bytes(value, "little") if isinstance(value, bytes) else value
    if event.value == right:
        return True if right > 0xFF else None
    return f"the driver takes {event.name} for {event.value:#x}, it is {right:#x}"


# Queue reset and cleanup


@rule("DRV-VQRESET-01", on=("read queue_reset", *SETUP))
def queue_reset_is_verified(watch: Watch, event: Event, subject: Any) -> Answer:
    """After the request for a queue's reset, queue_reset is read until it is 0."""
    waiting: set[int] = watch.remember("queues in reset", set())
    if event.queue not in waiting:
        return None
    if event.name == "queue_reset":
        if event.value:
            return None
        waiting.discard(event.queue)
        return True
    waiting.discard(event.queue)
    return f"{event.name} written before queue_reset was read as 0"


@rule("DRV-VQRESET-04", on="write queue_reset")
def queue_reset_needs_its_feature(watch: Watch, event: Event, subject: Any) -> Answer:
    """Queues are reset singly with RING_RESET only; without it the register does not exist."""
    watch.remember("queues in reset", set()).add(event.queue)
    watch.remember("queues to set up", {})[event.queue] = set()
    return True


@rule("DRV-VQRESET-03", on=SETUP)
def a_queue_is_set_up_again(watch: Watch, event: Event, subject: Any) -> Answer:
    """A queue that was reset gets its addresses again before it is enabled."""
    again: dict[int, set[str]] = watch.remember("queues to set up", {})
    if event.queue not in again:
        return None
    again[event.queue].add(event.name)
    if event.name != "queue_enable":
        return None
    missing = {"queue_desc", "queue_driver", "queue_device"} - again.pop(event.queue)
    return f"{', '.join(sorted(missing))} not written again after the queue reset" if missing else True


@rule("DRV-CLEANUP-01", "DRV-PACKED-04", "DRV-PACKED-05", on=("pop", "push", "publish"), needs="ring")
def exposed_descriptors_stay(watch: Watch, event: Event, subject: Any) -> Answers:
    """Descriptors of a buffer that the device has are not changed until it is used."""
    ring = watch.queue(event).ring
    if ring is None or len(ring.outstanding) > 64:
        return None
    copies: dict[int, dict[int, bytes]] = watch.remember("exposed", {})
    if event.kind == "pop":
        copies.setdefault(event.queue, {})[event.value] = ring.descriptors(subject)
        return None
    mine = copies.get(event.queue, {})
    if event.kind == "publish":
        # The device's own used descriptors may lie over those of other buffers of a packed ring.
        copies[event.queue] = {id: ring.descriptors(chain) for id, chain in ring.outstanding.items()}
        return None
    for id, chain in ring.outstanding.items():
        if id in mine and ring.descriptors(chain) != mine[id]:
            mine.pop(id)
            return _each(watch, f"the descriptors of chain {id} changed while the device had it")
    return _each(watch, True)


def _each(watch: Watch, answer: Answer) -> Answers:
    packed = ("DRV-PACKED-04", "DRV-PACKED-05") if watch.has(ft.F_RING_PACKED) else ()
    return dict.fromkeys(("DRV-CLEANUP-01", *packed), answer)


exercised(
    "DRV-CLEANUP-02",
    on="reset device_status",
    needs="ring",
    when=lambda watch, *_: any(queue.ring and queue.ring.outstanding for queue in watch.device.queues),
)
