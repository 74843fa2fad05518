"""What the strict device does to a driver: named provocations, each within the standard."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from threading import Timer
from typing import Final

import numpy as np

from ...devices.function import SoftwareFunction
from ...devices.looks import ORDER, Looks, reserved_bar, reserved_type
from ...devices.models.net import Net
from ...devices.packed import PackedRing
from ...devices.split import SplitRing
from ...errors import UsageError
from ...spec import features as ft
from ...spec import net
from ...spec.ring import DESC_F_NEXT
from ...spec.status import Status
from .rules import Watch

DELAY: Final = 0.002
"""Seconds; far more than a driver takes to look for what it waits for, far less than it waits."""
Provoke = Callable[[Watch], object]
TYPES: Final = ("rng", "net", "blk", "balloon")
RING_FEATURES: Final = (
    *("packed", "indirect_desc", "event_idx", "in_order"),
    *("order_platform", "notification_data", "notif_config_data", "ring_reset"),
)
"""Parameters of ``loopback:`` that pairs are made of."""


@dataclass(frozen=True)
class Scenario:
    """One provocation.

    Attributes:
        name: for ``--scenario``.
        title: what happens, in one sentence.
        types: device types that it is for.
        params: of the device, as ``loopback:`` has them.
        provoke: sets the device up before the driver comes.
        looks: how the function presents itself; only where the driver has not seen it yet.
        works: requirements that the driver keeps by going live.
        refuses: requirements that it keeps by not going live.
        right: requirements that the driver keeps if its user gets what is right all the same.
        fails: the driver may give up.
        exercise: instead of the device type's own, which makes it one for guestpv's drivers only.
        patience: seconds that our own drivers wait for the device.
    """

    name: str
    title: str
    types: tuple[str, ...] = TYPES
    params: dict[str, str] = field(default_factory=dict)
    provoke: Provoke = lambda watch: None
    looks: Looks | None = None
    works: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    fails: bool = False
    exercise: str = ""
    patience: float = 30.0

    @property
    def served(self) -> bool:
        """Whether it can be put before a driver that has found its function already."""
        return not (self.looks or self.params.keys() - set(RING_FEATURES) or self.exercise)

    def set_up(self, watch: Watch) -> None:
        """Provoke."""
        watch.works, watch.refuses = self.works, self.refuses
        self.provoke(watch)


def pairwise(names: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of switches in which every two have every combination of on and off."""
    left = {((a, x), (b, y)) for a, b in combinations(names, 2) for x in ("on", "off") for y in ("on", "off")}
    while left:
        row: dict[str, str] = {}
        for name in names:
            gain = {
                value: sum(
                    1
                    for (a, x), (b, y) in left
                    if (a == name and x == value and row.get(b, y) == y)
                    or (b == name and y == value and row.get(a, x) == x)
                )
                for value in ("on", "off")
            }
            row[name] = max(gain, key=gain.__getitem__)
        left -= {pair for pair in left if all(row[name] == value for name, value in pair)}
        yield row


def registers(watch: Watch, **knobs: int) -> None:
    """Turn the register blocks' knobs."""
    assert watch.function is not None
    for name, value in knobs.items():
        setattr(watch.function.registers, name, value)


def offer(watch: Watch, bits: int) -> None:
    """Offer further features."""
    watch.device.offered |= bits


def refuse_features_ok(watch: Watch) -> None:
    """Leave FEATURES_OK clear."""
    watch.device.refuse_features_ok = True


def withhold_access_platform(watch: Watch) -> None:
    """An IOMMU, and no word of it."""
    watch.device.offered &= ~(1 << ft.F_ACCESS_PLATFORM)


def broken_dependencies(watch: Watch) -> None:
    """Offer every feature of the type that needs others, without the others."""
    kind = watch.device.model.device_type
    kept = watch.device.offered
    for bit in ft.bits(watch.device.offered & sum(1 << b for b in ft.DEVICE_FEATURES.get(kind, {}))):
        without = watch.device.offered & ~(1 << bit)
        if ft.close_dependencies(kind, without) != without:
            kept &= ~(1 << bit)
    watch.device.offered = kept


def when(watch: Watch, kind: str, act: Callable[[], None], after: int = 1) -> None:
    """Act once, at the ``after``-th event of a kind since DRIVER_OK."""
    left = [after]

    def look(event: object, subject: object) -> None:
        if getattr(event, "kind", "") == kind and watch.device.running and left[0]:
            left[0] -= 1
            if not left[0]:
                watch.device.executor.post(act)

    watch.follow(look)


def needs_reset(watch: Watch) -> None:
    """Break down after some buffers."""
    when(watch, "publish", watch.device.need_reset, 3)


def spurious_interrupts(watch: Watch) -> None:
    """Interrupts without a reason, on each queue and for configuration."""

    def send() -> None:
        for queue in watch.device.queues:
            if queue.enabled:
                watch.device.interrupt(queue)
        watch.device.interrupt(watch.device.queues[0])

    for number in (1, 4, 9):
        when(watch, "publish", send, number)


def misleading_words(watch: Watch) -> None:
    """Leave something in the word that the driver has to ignore when it decides whether to notify."""

    def spoil(event: object, subject: object) -> None:
        if getattr(event, "kind", "") != "enable":
            return
        ring = watch.device.queues[getattr(event, "queue", 0)].ring
        if isinstance(ring, SplitRing):
            area = ring.areas[2]
            area[0 if ring.event_idx else len(area) - 2] = 1
            ring.shown = ring.own

    watch.follow(spoil)


def change_configuration(watch: Watch) -> None:
    """Tell of a configuration change while buffers are on their way."""
    when(watch, "publish", watch.device.config_changed, 2)


def spoiled_used_descriptors(watch: Watch) -> None:
    """Leave NEXT and an address of no meaning in used descriptors."""

    def spoil(event: object, subject: object) -> None:
        if getattr(event, "kind", "") != "push":
            return
        ring = watch.device.queues[getattr(event, "queue", 0)].ring
        if isinstance(ring, PackedRing):
            area = ring.areas[0]
            slot = 16 * (ring.used % ring.size)
            area[slot : slot + 8] = b"\xa5" * 8
            ring.used_flags = DESC_F_NEXT

    watch.follow(spoil)


def soon(act: Callable[[], object]) -> None:
    """Act in ``DELAY`` seconds, whatever the driver does until then."""
    timer = Timer(DELAY, act)
    timer.daemon = True
    timer.start()


def late_completions(watch: Watch, order: Callable[[int], int] | None = None) -> None:
    """Complete buffers some time after they were taken, those of one moment in this order."""
    watch.device.hold = True
    state = "waiting"

    def release() -> None:
        if state != "over":
            watch.device.release(order=order)
            soon(release)

    def look(event: object, subject: object) -> None:
        nonlocal state
        kind = getattr(event, "kind", "")
        if kind == "end":
            state = "over"
        elif kind == "pop" and state == "waiting":
            state = "working"
            soon(release)

    watch.follow(look)


def hold_everything(watch: Watch) -> None:
    """Complete nothing."""
    watch.device.hold = True


def late_interrupts(watch: Watch) -> None:
    """Keep MSI-X messages back for a while."""
    assert watch.function is not None
    interrupts, executor = watch.function.interrupts, watch.device.executor

    def deliver() -> None:
        with executor:
            interrupts.deliver_withheld()

    def look(event: object, subject: object) -> None:
        if getattr(event, "kind", "") == "interrupt":
            interrupts.withhold = True
            soon(deliver)

    watch.follow(look)


LIMITS: Final[dict[str, list[dict[str, str]]]] = {
    "blk": [
        {"seg_max": "1", "size_max": "4096"},
        {"block_size": "4096"},
        {"num_queues": "4"},
        {"size": "512K"},
    ],
    "net": [{"mtu": "68"}, {"mtu": "1500"}, {"pairs": "3"}, {"offloads": "off"}],
    "rng": [{"most": "1"}, {"segment": "65536"}],
    "balloon": [{"segment": "65536"}],
}
"""Device type -> parameters at the edges."""


def unknown_features(watch: Watch) -> None:
    """Offer bits that are undefined, reserved, or another device type's."""
    foreign = next(
        bit for bit in range(24) if bit not in ft.DEVICE_FEATURES.get(watch.device.model.device_type, {})
    )
    offer(watch, ft.mask((foreign, 26, 44, 100)))


def stray(**fields: int) -> Provoke:
    """Leave these values in the header of received packets."""

    def change(header: bytes) -> bytes:
        whole = np.frombuffer(header, net.header_dtype(0), 1).copy()
        for name, value in fields.items():
            whole[name] |= value
        return whole.tobytes() + header[whole.nbytes :]

    def provoke(watch: Watch) -> None:
        model = watch.device.model
        assert isinstance(model, Net)
        model.stray = change

    return provoke


def network() -> Iterator[Scenario]:
    """Scenarios that are for network devices only."""
    for name, title, fields, requirement in (
        ("unknown-flags", "flags that nobody knows", {"flags": 0x80}, "DRV-NET-74"),
        (
            "stray-checksum",
            "csum_start and csum_offset without NEEDS_CSUM",
            {"csum_start": 9, "csum_offset": 3},
            "DRV-NET-77",
        ),
        ("wrong-hdr-len", "an hdr_len beyond the packet", {"hdr_len": 0xFFFF}, "DRV-NET-79"),
    ):
        yield Scenario(
            name,
            f"Received packets have {title}",
            ("net",),
            provoke=stray(**fields),
            exercise="net",
            right=(requirement,),
        )
    yield Scenario(
        "merged-packets",
        "Packets take several receive buffers",
        ("net",),
        params={"mtu": "9000"},
        exercise="net",
        right=("DRV-NET-184",),
    )
    yield Scenario("link-states", "The link's state takes every form", ("net",), exercise="net links")
    yield Scenario(
        "steered",
        "Two pairs of queues with RSS and reported hashes",
        ("net",),
        params={"pairs": "2", "offer": "+rss,+hash_report"},
        exercise="net steered",
    )


def _scenarios() -> Iterator[Scenario]:
    yield Scenario("plain", "A device that does nothing special")
    for number, row in enumerate(pairwise(RING_FEATURES), 1):
        yield Scenario(f"features-{number}", f"Features in pairs, row {number}", params=row)
    yield Scenario(
        "unknown-features",
        "Undefined, reserved and foreign bits are offered",
        provoke=unknown_features,
    )
    yield Scenario(
        "broken-offer",
        "Features are offered without those that they require",
        ("net", "blk"),
        provoke=broken_dependencies,
    )
    yield Scenario(
        "sr-iov", "SR_IOV is offered, the capability is missing", provoke=lambda w: offer(w, 1 << ft.F_SR_IOV)
    )
    yield Scenario("features-refused", "FEATURES_OK does not stay", provoke=refuse_features_ok, fails=True)
    yield Scenario(
        "no-platform",
        "ACCESS_PLATFORM is not offered behind an IOMMU",
        ("rng", "net", "blk"),
        provoke=withhold_access_platform,
        refuses=("DRV-FEAT-13",),
        fails=True,
        params={"translated": "on"},
    )
    yield Scenario(
        "slow-reset",
        "device_status is not 0 for some reads after a reset",
        provoke=lambda w: registers(w, reset_reads=3),
    )
    yield Scenario(
        "slow-queue-reset",
        "queue_reset is not 0 for some reads",
        ("rng",),
        provoke=lambda w: registers(w, queue_reset_reads=3),
        exercise="queue reset",
    )
    yield Scenario(
        "torn-configuration",
        "The configuration changes while it is read",
        ("net", "blk"),
        provoke=lambda w: registers(w, generation_bumps=4),
    )
    yield Scenario(
        "vectors-refused",
        "MSI-X vectors are refused",
        provoke=lambda w: registers(w, vectors_granted=1),
        fails=True,
    )
    yield Scenario(
        "needs-reset",
        "DEVICE_NEEDS_RESET is set while buffers are on their way",
        provoke=needs_reset,
        fails=True,
        patience=0.5,
    )
    yield Scenario("late-completions", "Buffers come back late", provoke=late_completions)
    yield Scenario(
        "out-of-order",
        "Buffers come back late, those of one moment in the opposite order",
        provoke=partial(late_completions, order=operator.neg),
        params={"in_order": "off"},
    )
    yield Scenario("late-interrupts", "MSI-X messages come late", provoke=late_interrupts)
    yield Scenario(
        "reset-in-flight",
        "The driver ends while the device has its buffers",
        ("rng", "blk"),
        provoke=hold_everything,
        exercise="in flight",
    )
    yield Scenario(
        "spurious-interrupts",
        "Interrupts come without a reason",
        provoke=spurious_interrupts,
        right=("DRV-SPLIT-19",),
    )
    yield Scenario(
        "misleading-words", "Suppression fields that do not count are not 0", provoke=misleading_words
    )
    yield Scenario(
        "misleading-words-no-event-idx",
        "The same without EVENT_IDX",
        provoke=misleading_words,
        params={"event_idx": "off"},
    )
    yield Scenario(
        "configuration-changes",
        "Configuration changes while buffers are on their way",
        ("net", "blk", "balloon"),
        provoke=change_configuration,
    )
    for name, params in {
        "intx": {"msix": "off"},
        "one-vector": {"msix": "1"},
        "two-vectors": {"msix": "2"},
        "many-vectors": {"msix": "2048"},
    }.items():
        yield Scenario(name, f"{params['msix']} MSI-X vectors", params=params, works=("DRV-PCI-41",))
    yield Scenario("one-doorbell", "All notifications have one address", params={"multiplier": "0"})
    yield Scenario("far-doorbells", "Notification addresses are a page apart", params={"multiplier": "4096"})
    for depth in ("1", "2", "1024"):
        yield Scenario(
            f"queue-size-{depth}",
            f"Queues of {depth} entries",
            TYPES if depth == "1024" else ("rng", "net") if depth == "2" else ("rng",),
            params={"queue_size": depth},
        )
    yield Scenario("queue-size-odd", "Packed queues of 7 entries", params={"queue_size": "7", "packed": "on"})
    yield Scenario(
        "untranslated", "Bus addresses are physical ones", ("rng", "blk"), params={"translated": "off"}
    )
    yield Scenario("own-thread", "The device works while the driver does", params={"threaded": "on"})
    odd = {
        "modern-id": (Looks(), "DRV-PCI-01"),
        "revision": (Looks(revision=0x77), "DRV-PCI-03"),
        "reserved-capability": (Looks(first=(reserved_type(),)), "DRV-PCI-10"),
        "long-capabilities": (Looks(longer=8), "DRV-PCI-12"),
        "reserved-bar": (Looks(first=(reserved_bar(),)), "DRV-PCI-13"),
        "long-structures": (Looks(spare=512), "DRV-PCI-15 DRV-CONFIG-05"),
        "shuffled-capabilities": (Looks(order=ORDER[::-1]), "DRV-PCI-57"),
        "other-bar": (Looks(bar=2, shift=8192), "DRV-PCI-58"),
    }
    for name, (looks, ids) in odd.items():
        yield Scenario(
            name, f"PCI configuration space: {name.replace('-', ' ')}", looks=looks, works=tuple(ids.split())
        )
    for kind, device in {"net": 0x1000, "blk": 0x1001, "balloon": 0x1002}.items():
        yield Scenario(
            f"transitional-{kind}",
            "A transitional device id",
            (kind,),
            looks=Looks(device=device),
            works=("DRV-PCI-02",),
        )
    yield Scenario(
        "legacy-only", "No virtio capabilities", looks=Looks(order=()), refuses=("DRV-PCI-40",), fails=True
    )
    yield Scenario(
        "stranger",
        "A device id that is not virtio's",
        looks=Looks(device=0x1080),
        refuses=("DRV-PCI-54",),
        fails=True,
    )
    for row in (
        {"packed": "off"},
        {"packed": "on"},
        {"in_order": "on"},
        {"packed": "on", "indirect_desc": "off"},
        {"packed": "on", "in_order": "on"},
    ):
        label = "-".join(f"{key}-{value}" for key, value in row.items()).replace("_", "-")
        yield Scenario(
            f"any-order-{label}",
            "Buffers of several elements come back in any order",
            ("rng",),
            params=row | {"most": "150"},
            exercise="ring",
        )
    for name, params in {"intx": {"msix": "off"}, "one-vector": {"msix": "1"}}.items():
        yield Scenario(
            f"both-causes-{name}",
            "One interrupt tells of a used buffer and of a configuration change",
            ("blk",),
            params=params,
            exercise="both causes",
        )
    yield Scenario(
        "long-run",
        "More buffers than 16 bits count",
        ("rng",),
        params={"most": "1"},
        exercise="many",
        right=("DRV-SPLIT-52",),
    )
    yield Scenario(
        "spoiled-used-descriptors",
        "Used descriptors of packed rings have NEXT set and an address of no meaning",
        params={"packed": "on", "in_order": "off"},
        provoke=spoiled_used_descriptors,
        right=("DRV-PACKED-36", "DRV-PACKED-37"),
    )
    yield from network()
    for kind, rows in LIMITS.items():
        for number, params in enumerate(rows, 1):
            yield Scenario(
                f"limits-{kind}-{number}",
                f"Limits: {', '.join(f'{k} {v}' for k, v in params.items())}",
                (kind,),
                params=params,
            )


SCENARIOS: Final = {scenario.name: scenario for scenario in _scenarios()}


def choose(names: str, kind: str) -> list[Scenario]:
    """The scenarios that ``--scenario`` names: ``all``, or names separated by commas.

    Raises:
        UsageError: one is unknown, or not for this device type.
    """
    mine = {name: scenario for name, scenario in SCENARIOS.items() if kind in scenario.types}
    if names == "all":
        return list(mine.values())
    chosen = []
    for name in filter(None, names.split(",")):
        if name not in mine:
            raise UsageError(f"{kind} has no scenario {name!r}", hint="all " + " ".join(mine))
        chosen.append(mine[name])
    return chosen


def calm(function: SoftwareFunction, offered: int) -> None:
    """Take every provocation back."""
    device = function.device
    device.offered, device.refuse_features_ok, device.hold = offered, False, False
    function.interrupts.deliver_withheld()
    registers = function.registers
    registers.reset_reads = registers.queue_reset_reads = registers.generation_bumps = 0
    registers.vectors_granted = registers.vectors
    device.status &= ~Status.NEEDS_RESET
