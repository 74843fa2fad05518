"""The registry of rules, and the strict observer that runs them over a device's journal.

A rule is a small function under the id of the requirement that it judges. It is called for the events it
names and answers ``None`` (this event says nothing about the requirement), ``True`` (the driver could have
broken it here, and kept it) or a text (what it did wrong). A requirement whose breach the device model itself
notices has a rule, too: it says when the requirement was exercised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal, cast

from ...devices.device import Device
from ...devices.evidence import Event, Finding, Journal, Observer
from ...devices.function import SoftwareFunction
from ...devices.queue import DeviceQueue
from ...spec import features as ft
from ...spec.status import Status
from ..verdict import Verdict

Answer = bool | str | None
Answers = Answer | dict[str, Answer]
"""One answer for all requirements of a rule, or one each."""

Check = Callable[["Watch", Event, Any], Answers]
"""Called with the watch, the event, and what it is about: a ``Chain`` for ``pop`` and ``push``."""

Sight = Literal["ring", "registers", "config", "order", "user"]
"""What has to be seen: rings and requests, register accesses, PCI configuration space, every store in order,
what the driver tells its user."""

BLIND: Final[dict[Sight, str]] = {
    "ring": "the rings are not seen",
    "registers": "register accesses end in the front end, the back end does not see them",
    "config": "the hypervisor answers for PCI configuration space itself",
    "order": "ring memory is sampled when the device looks at it; order shows on loopback: only",
    "user": "what this driver tells its user is not seen from its device",
}
SIGHTS: Final[dict[str, frozenset[Sight]]] = {
    "loopback": frozenset(("ring", "registers", "config", "user", "order")),
    "vfio-user": frozenset(("ring", "registers")),
    "vhost-user": frozenset(("ring",)),
}
"""Scheme -> what a strict device sees there."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A check of one or more requirements.

    Attributes:
        requirements: their ids.
        on: ``kind`` or ``kind name`` of the events it wants.
        check: the function.
        needs: what has to be seen.
        name: for reports.
    """

    requirements: tuple[str, ...]
    on: tuple[str, ...]
    check: Check
    needs: Sight
    name: str


RULES: list[Rule] = []


def rule(*requirements: str, on: str | Iterable[str], needs: Sight = "registers") -> Callable[[Check], Check]:
    """Register a function as the rule of these requirements."""

    def register(check: Check) -> Check:
        events = (on,) if isinstance(on, str) else tuple(on)
        RULES.append(Rule(requirements, events, check, needs, getattr(check, "__name__", "")))
        return check

    return register


def exercised(
    *requirements: str,
    on: str | Iterable[str],
    when: Callable[[Watch, Event, Any], object] = lambda watch, event, subject: True,
    needs: Sight = "registers",
) -> None:
    """Register requirements whose breach the device model finds: they are exercised by these events."""

    def device_model(watch: Watch, event: Event, subject: Any) -> Answer:
        return True if when(watch, event, subject) else None

    rule(*requirements, on=on, needs=needs)(device_model)


def presented(*requirements: str, needs: Sight = "config") -> None:
    """Register requirements that scenarios put to the proof by what the device presents (``odd_devices``)."""

    def odd_device(watch: Watch, event: Event, subject: Any) -> Answer:
        return None

    rule(*requirements, on=(), needs=needs)(odd_device)


def checked() -> set[str]:
    """Ids of all requirements that have a rule."""
    return {requirement for entry in RULES for requirement in entry.requirements}


@cache
def _rules_for(
    count: int, device_type: int, packed: bool, sees: frozenset[Sight], kind: str, name: str
) -> tuple[Rule, ...]:
    """The rules of an event, those that name its register first; none of other device types or rings.

    There are half a million events in a run of all scenarios, of a few dozen sorts.

    Args:
        count: of ``RULES``.
    """
    others = {*ft.DEVICE_NAMES.values(), "split" if packed else "packed"} - {ft.DEVICE_NAMES.get(device_type)}

    def concerns(entry: Rule) -> bool:
        areas = {requirement.split("-")[1].lower() for requirement in entry.requirements}
        return entry.needs in sees and not (areas and areas <= others)

    mine = [entry for entry in RULES[:count] if concerns(entry)]
    return tuple(entry for on in (f"{kind} {name}", kind) for entry in mine if on in entry.on)


@cache
def _rules_of(count: int) -> dict[str, list[Rule]]:
    """Requirement -> its rules among the first ``count``."""
    found: dict[str, list[Rule]] = {}
    for entry in RULES[:count]:
        for requirement in entry.requirements:
            found.setdefault(requirement, []).append(entry)
    return found


@dataclass(slots=True)
class Life:
    """What happened since the device was reset. A rule sees what was before its own event.

    Attributes:
        statuses: values written to device_status.
        log: register accesses in order, until DRIVER_OK.
        written: (register, queue) -> last value written; queue is -1 for the device's own.
        read: (register, queue) that were read.
        memo: what rules remember, by a key of their own.
    """

    statuses: list[int] = field(default_factory=list)
    log: list[Event] = field(default_factory=list)
    written: dict[tuple[str, int], int] = field(default_factory=dict)
    read: set[tuple[str, int]] = field(default_factory=set)
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """Every bit that the driver wrote."""
        value = 0
        for written in self.statuses:
            value |= written
        return Status(value & 0xFF)

    def take(self, event: Event) -> None:
        """Note an event."""
        if event.kind == "write":
            if event.name == "device_status":
                self.statuses.append(event.value)
            self.written[event.name, event.queue] = event.value
        elif event.kind == "read":
            self.read.add((event.name, event.queue))
        else:
            return
        if not self.status & Status.DRIVER_OK and len(self.log) < 10_000:
            self.log.append(event)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run says about one requirement.

    Attributes:
        requirement: its id.
        verdict: PASS, FAIL, NOT_EXERCISED, NOT_OBSERVABLE, or SKIP where there is no rule.
        count: how often it could have been broken.
        findings: what broke it.
        reason: why it is not observable.
    """

    requirement: str
    verdict: Verdict
    count: int = 0
    findings: tuple[Finding, ...] = ()
    reason: str = ""


class Watch:
    """The strict observer of one device.

    Args:
        device: the device, whichever way its driver reaches it.
        function: the PCI function round it, if there is one.
        sees: what can be seen of the driver.

    Attributes:
        exercised: requirement -> how often it could have been broken.
        life: what happened since the last reset.
        memo: what rules remember over resets, by a key of their own.
        works, refuses: requirements that a scenario puts to the proof by what it presents: the driver keeps
            them by going live all the same, or by not going live.
        live: how often the driver set DRIVER_OK.
    """

    def __init__(
        self,
        device: Device,
        function: SoftwareFunction | None = None,
        sees: Iterable[Sight] = SIGHTS["loopback"],
    ) -> None:
        self.device = device
        self.function = function
        self.journal: Journal = device.journal
        self.sees = frozenset(sees)
        self.exercised: Counter[str] = Counter()
        self.life = Life()
        self.memo: dict[str, Any] = {}
        self.works: tuple[str, ...] = ()
        self.refuses: tuple[str, ...] = ()
        self.live = 0
        self._first = len(self.journal.findings)
        self._stops = [self.journal.observe(self._see)]

    @classmethod
    def over(cls, function: SoftwareFunction, scheme: str = "loopback") -> Watch:
        """Watch a PCI function that is reached by ``scheme``."""
        return cls(function.device, function, SIGHTS[scheme])

    def has(self, bit: int) -> bool:
        """Whether a feature was negotiated."""
        return bool(self.device.features >> bit & 1)

    def offers(self, bit: int) -> bool:
        """Whether a feature is offered."""
        return bool(self.device.offered >> bit & 1)

    def queue(self, event: Event) -> DeviceQueue:
        """The queue that an event is about."""
        return self.device.queues[event.queue]

    def remember(self, key: str, default: Any = 0) -> Any:
        """What a rule remembers of this life; a mutable default is kept."""
        return self.life.memo.setdefault(key, default)

    def _see(self, event: Event, subject: object) -> None:
        device = self.device
        packed = bool(device.features >> ft.F_RING_PACKED & 1)
        rules = _rules_for(len(RULES), device.model.device_type, packed, self.sees, event.kind, event.name)
        for entry in rules:
            answers = entry.check(self, event, subject)
            if answers is not None:
                self._judge(entry, event, answers)
        self.life.take(event)
        if event.kind == "reset" and event.name == "device_status":
            self.life = Life()

    def _judge(self, entry: Rule, event: Event, answers: Answers) -> None:
        if answers is True:
            for requirement in entry.requirements:
                self.exercised[requirement] += 1
            return
        if not isinstance(answers, dict):
            answers = dict.fromkeys(entry.requirements, answers)
        for requirement, answer in answers.items():
            if isinstance(answer, str):
                where = f"queue {event.queue}" if event.queue >= 0 else event.name
                self.break_rule(requirement, answer, where)
            elif answer:
                self.exercised[requirement] += 1

    def break_rule(self, requirement: str, message: str, where: str = "") -> None:
        """Hold a breach against the driver."""
        self.exercised[requirement] += 1
        self.journal.find(requirement, message, where)

    def keep(self, *requirements: str) -> None:
        """A scenario saw that the driver kept these."""
        self.exercised.update(requirements)

    def tell(self, name: str, value: int) -> None:
        """The driver tells its user this value of a field of its device's configuration."""
        self.journal.record(Event("told", name, value=value))

    def settle(self) -> None:
        """The driver had time to do what it has to do now."""
        self.journal.record(Event("settled", "driver"))

    def finish(self) -> None:
        """The run is over. Idempotent."""
        stops, self._stops = self._stops, []
        if stops:
            self.journal.record(Event("end", "run"))
        for stop in stops:
            stop()

    def follow(self, observer: Observer) -> None:
        """Let ``observer`` see every event until the run is over."""
        self._stops.append(self.journal.observe(observer))

    @property
    def findings(self) -> list[Finding]:
        """What was held against the driver since the watch began."""
        return self.journal.findings[self._first :]

    def results(self, requirements: Iterable[str]) -> list[Result]:
        """What the run says about each of these requirements."""
        broken: dict[str, list[Finding]] = {}
        for finding in self.findings:
            broken.setdefault(finding.requirement, []).append(finding)
        return [self._result(name, tuple(broken.get(name, ()))) for name in requirements]

    def _result(self, requirement: str, findings: tuple[Finding, ...]) -> Result:
        count = self.exercised[requirement]
        if findings:
            return Result(requirement, Verdict.FAIL, max(count, len(findings)), findings)
        if count:
            return Result(requirement, Verdict.PASS, count)
        entries = _rules_of(len(RULES)).get(requirement)
        if not entries:
            return Result(requirement, Verdict.SKIP, reason="no rule looks at it")
        if any(entry.needs in self.sees for entry in entries):
            return Result(requirement, Verdict.NOT_EXERCISED)
        return Result(requirement, Verdict.NOT_OBSERVABLE, reason=BLIND[entries[0].needs])


@rule(on=("write device_status", "end"))
def odd_devices(watch: Watch, event: Event, subject: object) -> Answers:
    """A scenario's device is odd in a way that the driver has to live with, or has to refuse."""
    if event.kind == "write":
        if not event.value & ~watch.device.status & Status.DRIVER_OK:
            return None
        watch.live += 1
        went_on = "the driver went live on a device that it has to refuse"
        return dict.fromkeys(watch.works, True) | dict.fromkeys(watch.refuses, went_on)
    if watch.live:
        return None
    gave_up = "the driver did not go live on a device that it has to work with"
    return cast(Answers, dict.fromkeys(watch.works, gave_up) | dict.fromkeys(watch.refuses, True))
