"""Rules of virtio over PCI (4.1)."""

from __future__ import annotations

from typing import Any

from ...devices.dma import Unmapped
from ...devices.evidence import Event
from ...spec import features as ft
from ...spec import pci
from ...spec.pci import CfgType
from .rules import Answer, Answers, Watch, exercised, presented, rule
from .rules_common import STATUS, begins, goes_live

CAPABILITIES = (pci.PCI_CONFIG_CAPABILITIES, 0x40)
VECTORS = ("write queue_msix_vector", "write config_msix_vector")

# What a device presents: ids, capabilities, structures

presented("DRV-PCI-01", "DRV-PCI-02", "DRV-PCI-03", "DRV-PCI-54")
presented("DRV-PCI-10", "DRV-PCI-12", "DRV-PCI-13", "DRV-PCI-15", "DRV-PCI-40", "DRV-PCI-57", "DRV-PCI-58")
presented("DRV-PCI-41", needs="registers")


@rule("DRV-PCI-39", on=("read", "write"), needs="config")
def capabilities_are_looked_for(watch: Watch, event: Event, subject: Any) -> Answer:
    """A driver looks into the capability list before it touches the structures in the BARs."""
    if watch.memo.setdefault("first access judged", False):
        return None
    watch.memo["first access judged"] = True
    if any(e.kind == "config-read" and e.offset >= CAPABILITIES[0] for e in watch.journal.events):
        return True
    return f"{event.name} touched before the capability list was read"


@rule("DRV-PCI-40", on=("read", "write"), needs="config")
def a_legacy_device_is_left_alone(watch: Watch, event: Event, subject: Any) -> Answer:
    """Without virtio capabilities no BAR is touched."""
    return f"{event.name} touched" if "DRV-PCI-40" in watch.refuses else None


exercised("DRV-PCI-17", on=STATUS, when=goes_live, needs="config")
exercised("DRV-PCI-56", "DRV-PCI-59", on=STATUS, when=goes_live)
exercised("DRV-PCI-60", on="write queue_enable")

# The PCI configuration access capability


def window(watch: Watch, event: Event) -> bool:
    """Whether an access to configuration space is one of pci_cfg_data."""
    function = watch.function
    at = function.config.positions.get(CfgType.PCI_CFG) if function else None
    return at is not None and at + 16 <= event.offset < at + 20


exercised(
    *("DRV-PCI-36", "DRV-PCI-38", "DRV-PCI-75"),
    on=("config-read", "config-write"),
    when=lambda watch, event, _: window(watch, event),
    needs="config",
)


@rule("DRV-PCI-37", on=("config-read", "config-write"), needs="config")
def window_accesses_are_aligned(watch: Watch, event: Event, subject: Any) -> Answer:
    """An access through pci_cfg_data is aligned."""
    if not window(watch, event):
        return None
    return f"{event.width} bytes at {event.offset:#x}" if event.offset % event.width else True


# Common configuration: who writes what, and when

exercised("DRV-PCI-18", "DRV-PCI-19", "DRV-PCI-20", "DRV-PCI-21", on=STATUS, when=goes_live)
exercised("DRV-PCI-22", on=STATUS, when=lambda w, e, s: goes_live(w, e, s) and w.has(ft.F_NOTIF_CONFIG_DATA))
exercised("DRV-PCI-23", on="write queue_size", when=lambda w, *_: w.has(ft.F_RING_PACKED))
exercised("DRV-PCI-24", on="write queue_size", when=lambda w, *_: not w.has(ft.F_RING_PACKED))
exercised("DRV-PCI-26", on=STATUS, when=begins)
exercised("DRV-PCI-27", "DRV-PCI-67", on="write queue_enable")
exercised(
    "DRV-PCI-28", on="write queue_enable", when=lambda w, e, _: ("queue_reset", e.queue) in w.life.written
)
exercised("DRV-PCI-61", on=STATUS, when=lambda w, e, s: goes_live(w, e, s) and not w.has(ft.F_RING_RESET))
exercised("DRV-PCI-44", "DRV-PCI-45", on=VECTORS, when=lambda w, e, _: e.value != pci.NO_VECTOR)


@rule("DRV-PCI-05", "DRV-PCI-06", "DRV-PCI-07", on=("read", "write"))
def widths(watch: Watch, event: Event, subject: Any) -> Answers:
    """Fields are accessed by their own width; the device finds other accesses."""
    if event.name in ("queue_notify", "isr"):
        return None
    return {{1: "DRV-PCI-05", 2: "DRV-PCI-06"}.get(event.width, "DRV-PCI-07"): True}


@rule("DRV-PCI-25", on="write queue_enable")
def a_queue_is_complete_when_enabled(watch: Watch, event: Event, subject: Any) -> Answer:
    """The addresses of a queue are written before it is enabled."""
    names = ("queue_desc", "queue_driver", "queue_device")
    missing = [name for name in names if (name, event.queue) not in watch.life.written]
    return f"enabled without {', '.join(missing)}" if missing else True


@rule("DRV-PCI-55", on="write queue_enable")
def low_half_first(watch: Watch, event: Event, subject: Any) -> Answer:
    """A 64-bit register is two 32-bit ones, the low half at the lower address."""
    if event.queue >= len(watch.device.queues):
        return None
    queue = watch.queue(event)
    swapped = []
    for address in (queue.desc, queue.driver, queue.device):
        try:
            watch.device.memory.view(address, 1)
        except Unmapped:
            swapped.append(address >> 32 | (address & 0xFFFFFFFF) << 32)
    if len(swapped) < 3:
        return True
    try:
        for address in swapped:
            watch.device.memory.view(address, 1)
    except Unmapped:
        return True
    return "the addresses make sense with their halves exchanged"


@rule("DRV-PCI-64", on=("read device_feature", "write driver_feature"))
def a_feature_word_is_selected(watch: Watch, event: Event, subject: Any) -> Answer:
    """The select register is written before a feature word is accessed."""
    select = f"{event.name}_select"
    return (
        True if (select, -1) in watch.life.written else f"{event.name} accessed before {select} was written"
    )


PER_QUEUE = ("size", "msix_vector", "enable", "notify_off", "desc", "driver", "device", "reset")


@rule("DRV-PCI-65", on=tuple(f"{kind} queue_{name}" for kind in ("read", "write") for name in PER_QUEUE))
def a_queue_is_selected(watch: Watch, event: Event, subject: Any) -> Answer:
    """queue_select is written before the registers of a queue are accessed."""
    if any(name == "queue_select" for name, _ in watch.life.written):
        return True
    return f"{event.name} accessed before queue_select was written"


@rule("DRV-PCI-66", on=("write queue_size", "write queue_enable"))
def the_size_is_read_first(watch: Watch, event: Event, subject: Any) -> Answer:
    """The largest size of a queue is read before a size is written or the queue enabled."""
    if ("queue_size", event.queue) in watch.life.read:
        return True
    return f"{event.name} written before queue_size was read"


@rule("DRV-PCI-73", on=VECTORS)
def vectors_are_table_entries(watch: Watch, event: Event, subject: Any) -> Answer:
    """A vector register gets a number of at most 0x7ff, or NO_VECTOR."""
    if event.value <= 0x7FF or event.value == pci.NO_VECTOR:
        return True
    return f"{event.value:#x} written to {event.name}"


@rule("DRV-PCI-74", on="enable")
def rings_begin_as_zeroes(watch: Watch, event: Event, subject: Any) -> Answer:
    """The used ring, or the device's event suppression, is zero when a queue is enabled."""
    ring = watch.queue(event).ring
    assert ring is not None
    # avail_event means nothing without EVENT_IDX, and there are drivers that do not make room for it.
    own = ring.own if ring.event_idx or watch.has(ft.F_RING_PACKED) else ring.own[:-2]
    return "the device area is not zero" if any(own) else True


# Notifications


def with_data(watch: Watch, event: Event, subject: Any) -> bool:
    """Whether notifications carry data."""
    return watch.has(ft.F_NOTIFICATION_DATA)


def plain(watch: Watch, event: Event, subject: Any) -> bool:
    """Whether notifications are the queue's index only."""
    return not with_data(watch, event, subject) and not watch.has(ft.F_NOTIF_CONFIG_DATA)


NOTIFY = "write queue_notify"
exercised("DRV-PCI-47", on=NOTIFY, when=lambda w, e, s: not with_data(w, e, s))
exercised("DRV-PCI-49", on=NOTIFY, when=plain)
exercised("DRV-PCI-48", on=NOTIFY, when=with_data)
exercised(
    "DRV-PCI-50", on=NOTIFY, when=lambda w, e, s: with_data(w, e, s) and not w.has(ft.F_NOTIF_CONFIG_DATA)
)
exercised("DRV-PCI-68", on=NOTIFY, when=lambda w, *_: w.function and w.function.registers.multiplier)


@rule("DRV-PCI-69", on=NOTIFY)
def notification_data_in_its_place(watch: Watch, event: Event, subject: Any) -> Answer:
    """The queue is in the low half of a 32-bit notification, its position in the high one."""
    if not with_data(watch, event, subject) or event.width != 4 or watch.has(ft.F_NOTIF_CONFIG_DATA):
        return None
    low, high = event.value & 0xFFFF, event.value >> 16
    queues = len(watch.device.queues)
    return f"{event.value:#x} has its halves exchanged" if high < queues <= low else True
