"""The pytest plugin of the device suite: fixtures, feature combinations, and verdicts out of what tests do.

It is loaded where ``--device`` is given. A test is a check if it is marked with requirement ids; its
docstring's first line is its title. Marks: ``requirement(*ids)``, ``device(*types)`` for checks of some
device types only, ``hostile`` for malformed use, ``fresh`` for a device that nobody used before,
``formats`` where the ring format matters and its options do not, ``ring(*features)`` for combinations with
these.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import json
import shlex
import signal
import threading
import time
from collections.abc import Generator, Iterator
from types import FrameType
from typing import Any, Final

import pytest

from ..errors import DeviceGone, DeviceViolation, FeaturesRefused, GuestpvError, TimeLimit, UsageError
from ..spec import features as ft
from ..transport.base import Transport
from ..transport.pci import PciTransport
from . import catalogue
from .bench import Bench, Facts, Peer
from .case import Case, CaseTimeout, NotObservable
from .queue import Queue
from .rig import Combination, Rig
from .verdict import BAD, Outcome, Severity, Verdict, severity
from .watched import WatchedFunction

CASE_LIMIT: Final = 120.0
"""Seconds until a case that never ends is ended."""
JOB: Final = "{job}"
"""Stands for the number of the process in a specification."""
PROPERTY: Final = "guestpv.outcome"
"""Name of the user property of a test report that carries the outcome."""

BENCH: Final = pytest.StashKey[Bench]()
PEERS: Final = pytest.StashKey[list[Peer]]()
CASE: Final = pytest.StashKey[Case]()
RIG: Final = pytest.StashKey[Rig]()
STARTED: Final = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    """Marks, and the one device that the command line names."""
    for line in (
        "requirement(*ids): rows of the requirement catalogue that the test checks",
        "device(*types): device types that the check is about, such as net",
        "hostile: gives the device what no driver may give it; only with --hostile",
        "fresh: needs a device that nobody used before",
        "ring(*features): only feature combinations of rings that have all of these, such as in_order",
        "formats: only the two ring formats matter, not their options",
        "rings(*patterns): feature combinations of rings that the check is about, such as split-*",
    ):
        config.addinivalue_line("markers", line)
    config.stash[BENCH] = Bench(config.getoption("--wire"))
    job = getattr(config, "workerinput", {}).get("workerid", "gw0").removeprefix("gw")
    config.stash[PEERS] = [Peer(config.getoption("--device").replace(JOB, job))]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close what is open."""
    config.stash[BENCH].lose()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each device and, where rings matter, each feature combination that it offers."""
    if "peer" not in metafunc.fixturenames:
        return
    marks = list(metafunc.definition.iter_markers())
    ids = _requirements(marks)
    types = {type for mark in marks if mark.name == "device" for type in mark.args}
    plain = any(mark.name == "formats" for mark in marks)
    needed = ft.mask(ft.feature_bit(0, name) for mark in marks if mark.name == "ring" for name in mark.args)
    patterns = [mark.args for mark in marks if mark.name == "rings"]
    wants_ring = "combination" in metafunc.fixturenames
    cases: list[Any] = []
    for peer in metafunc.config.stash[PEERS]:
        if peer.breaks is not None and not set(peer.breaks) & set(ids):
            continue
        facts = _facts(metafunc.config, peer)
        if types and ft.DEVICE_NAMES[facts.device_type] not in types:
            continue
        rings: list[Combination | None] = [None]
        if wants_ring:
            rings = [
                ring
                for ring in facts.rings
                if (not plain or ring.name in ("split", "packed"))
                and all(any(fnmatch.fnmatch(ring.name, one) for one in some) for some in patterns)
            ]
            rings = [ring for ring in rings if ring and ring.features & needed == needed]
            if not rings:
                skip = pytest.mark.skip(reason="the device offers no such ring")
                cases.append(pytest.param((peer, None), id=peer.name or "device", marks=skip))
        for ring in rings:
            name = "/".join(part for part in (peer.name, ring.name if ring else "") if part)
            cases.append(pytest.param((peer, ring), id=name or "device"))
    metafunc.parametrize("peer", cases, indirect=True, scope="function")


@functools.cache
def _opening(config: pytest.Config, spec: str) -> Facts:
    return config.stash[BENCH].facts(Peer(spec))


def _facts(config: pytest.Config, peer: Peer) -> Facts:
    try:
        return _opening(config, peer.spec)
    except GuestpvError as error:
        raise pytest.UsageError(f"{error.where}: {error.message}" if error.where else str(error)) from error


def _requirements(marks: list[pytest.Mark]) -> list[str]:
    return [id for mark in reversed(marks) if mark.name == "requirement" for id in mark.args]


def requirements(item: pytest.Item) -> list[str]:
    """The requirement ids that a test is marked with."""
    return _requirements(list(item.iter_markers()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``--select``, ``--shard`` and ``--hostile``; tests for no device that is here are left out."""
    try:
        wanted = catalogue.patterns(config.getoption("--select"))
        part, parts = _shard(config.getoption("--shard"))
    except UsageError as error:
        raise pytest.UsageError(f"{error.message} ({error.hint})") from error
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        nothing = getattr(item, "callspec", None) and any(
            mark.name == "skip" and "empty parameter set" in str(mark.kwargs) for mark in item.iter_markers()
        )
        ids = requirements(item)
        chosen = not nothing and (not ids or any(catalogue.matches(id, wanted) for id in ids))
        (kept if chosen else dropped).append(item)
    dropped += [item for number, item in enumerate(kept) if number % parts != part - 1]
    items[:] = kept[part - 1 :: parts]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    if not config.getoption("--hostile"):
        for item in items:
            if item.get_closest_marker("hostile"):
                item.add_marker(pytest.mark.skip(reason="malformed use, which --hostile allows"))


def _shard(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise UsageError(f"--shard {text}: not a part", hint="such as 1/4 to 4/4")
    return int(first), int(second)


# Fixtures, from the device down.


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Peer:
    """The device of this case, by its specification."""
    chosen: Peer = request.param[0]
    return chosen


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """Evidence and verdict of this case."""
    kept: Case = request.node.stash[CASE]
    return kept


@pytest.fixture
def rig(request: pytest.FixtureRequest, peer: Peer, case: Case) -> Rig:
    """The device, reset and not negotiated."""
    bench = request.config.stash[BENCH]
    fresh = request.node.get_closest_marker("fresh") is not None
    opened = bench.rig(peer, case, fresh=fresh, untouched=fresh)
    request.node.stash[RIG] = opened
    return opened


@pytest.fixture
def transport(rig: Rig) -> Transport:
    """The transport, reset and not negotiated."""
    return rig.transport


@pytest.fixture
def function(request: pytest.FixtureRequest, peer: Peer, case: Case) -> WatchedFunction:
    """The PCI function: the one behind ``rig``, or, without ``rig``, as it is, with nothing driving it."""
    if "rig" in request.fixturenames:
        behind: Rig = request.getfixturevalue("rig")
        return behind.function
    bench = request.config.stash[BENCH]
    if not bench.facts(peer).pci:
        case.not_observable("the device is no PCI function")
    return bench.function(peer, case)


@pytest.fixture
def combination(request: pytest.FixtureRequest, peer: Peer) -> Combination:
    """One feature combination of rings that the device offers; the check runs once for each."""
    chosen: Combination = request.getfixturevalue("peer") and request.node.callspec.params["peer"][1]
    return chosen


@pytest.fixture
def negotiated(rig: Rig, combination: Combination) -> Rig:
    """The device with FEATURES_OK for the combination, without queues."""
    _negotiating(rig, combination)
    return rig


def _negotiating(rig: Rig, combination: Combination) -> None:
    try:
        rig.negotiate(rig.features_for(combination.features))
    except FeaturesRefused as refusal:
        # A SHOULD of the standard, judged by the checks of feature negotiation.
        pytest.skip(f"the device refuses this combination: {refusal.message}")


@pytest.fixture
def queue(negotiated: Rig) -> Queue:
    """The main queue of a running device; every queue that the device type needs is enabled."""
    work = negotiated.work
    queues = {index: negotiated.queue(index) for index in work.queues}
    negotiated.transport.driver_ok()
    return queues[work.main]


# Running and judging.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
    """A case gets its log, and a limit."""
    item.stash[CASE] = Case(item.name)
    item.stash[STARTED] = time.monotonic()
    with _limited():
        return (yield)


class _limited:
    """Raise ``CaseTimeout`` in the main thread when the limit is over."""

    def __enter__(self) -> None:
        self._mine = threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGALRM, self._over)
            signal.setitimer(signal.ITIMER_REAL, CASE_LIMIT)

    @staticmethod
    def _over(number: int, frame: FrameType | None) -> None:
        raise CaseTimeout(f"the case did not end within {CASE_LIMIT:g} s")

    def __exit__(self, *_: object) -> None:
        if self._mine:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A case that hangs fails instead of ending the run."""
    try:
        return (yield)
    except CaseTimeout as over:
        raise TimeLimit(str(over), where=pyfuncitem.name) from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn how a test ended into a verdict, and let the verdict decide how pytest counts it."""
    report = yield
    if call.when == "teardown" or (call.when == "setup" and not call.excinfo):
        return report
    if not requirements(item):
        _give_back(item, lost=report.failed)
        return report
    outcome = _judge(item, call)
    report.user_properties.append((PROPERTY, json.dumps(outcome.to_dict())))
    if outcome.verdict in BAD:
        report.outcome = "failed"
        report.longrepr = _text(outcome) if outcome.verdict is not Verdict.ERROR else report.longrepr
    elif report.failed:
        report.outcome = "passed"
    return report


def _judge(item: pytest.Item, call: pytest.CallInfo[None]) -> Outcome:
    case = item.stash[CASE]
    error = call.excinfo.value if call.excinfo else None
    verdict, seen = _first_verdict(error, case)
    # Recovering goes into no evidence.
    evidence = case.evidence
    if trouble := _give_back(item, probe=verdict in BAD or item.get_closest_marker("hostile") is not None):
        if verdict is not Verdict.WEDGED:
            seen = f"{seen}; then: {trouble}" if seen else trouble
        verdict = Verdict.WEDGED
    elif verdict is Verdict.WEDGED:
        # It went away and is back: a back end may end a connection that it cannot make sense of.
        verdict = Verdict.REJECT if item.get_closest_marker("hostile") else Verdict.FAIL
    elif verdict is Verdict.PASS and case.refusal:
        verdict, seen = Verdict.REJECT, case.refusal
    ids = requirements(item)
    doc = inspect.getdoc(getattr(item, "function", None)) or item.name
    file, bracket, parameters = item.nodeid.partition("[")
    place = file.rpartition("/")[2] + bracket + parameters
    hostile = " --hostile" if item.get_closest_marker("hostile") else ""
    spec = shlex.quote(item.config.getoption("--device"))
    if wire := item.config.getoption("--wire"):
        spec += f" --wire {shlex.quote(wire)}"
    return Outcome(
        check=place,
        requirements=ids,
        title=doc.split("\n\n")[0].replace("\n", " "),
        verdict=verdict,
        severity=severity(verdict, ids) if verdict in BAD else Severity.NONE,
        sent=case.sent_text,
        seen=seen,
        section=", ".join(dict.fromkeys(catalogue.find(id).number for id in ids)),
        reproduce=f"guestpv conform device {spec}{hostile} --case {shlex.quote(place)}",
        evidence=evidence if verdict in (*BAD, Verdict.REJECT) else [],
        seconds=round(time.monotonic() - item.stash[STARTED], 4),
    )


def _first_verdict(error: BaseException | None, case: Case) -> tuple[Verdict, str]:
    """The verdict by itself; whether the device comes back is another question."""
    match error:
        case None:
            return Verdict.PASS, ""
        case NotObservable():
            return Verdict.NOT_OBSERVABLE, error.msg or ""
        case pytest.skip.Exception():
            return Verdict.SKIP, error.msg or ""
        case DeviceGone() | TimeLimit():
            return Verdict.WEDGED, str(error).splitlines()[0]
        case DeviceViolation() | FeaturesRefused():
            return Verdict.FAIL, str(error)
        case AssertionError() | pytest.fail.Exception():
            return Verdict.FAIL, str(error).split("\nassert ")[0].split("\n  +")[0] or "not as it has to be"
    return Verdict.ERROR, f"{type(error).__name__}: {error}"


def _give_back(item: pytest.Item, *, probe: bool = False, lost: bool = False) -> str:
    """Return the device to the bench. What keeps it from coming back, or an empty string."""
    rig = item.stash.get(RIG, None)
    if rig is None:
        return ""
    del item.stash[RIG]
    trouble = ""
    try:
        if probe:
            rig.works()
        else:
            rig.transport.reset(rig.limit)
    except (AssertionError, GuestpvError, CaseTimeout) as error:
        trouble = f"the device does not come back after a reset: {str(error).splitlines()[0]}"
    bench = item.config.stash[BENCH]
    bench.done(rig, lost=bool(trouble or probe or lost))
    if trouble and not isinstance(rig.transport, PciTransport):
        trouble = _comes_back(bench, Peer(rig.spec)) and trouble
    return trouble


def _comes_back(bench: Bench, peer: Peer) -> str:
    """Whether a device that can be connected to again works then: an empty string if so."""
    try:
        rig = bench.rig(peer, Case("again"))
        try:
            rig.works()
        finally:
            bench.done(rig)
    except (AssertionError, GuestpvError) as error:
        return str(error)
    return ""


def _text(outcome: Outcome) -> str:
    lines = [
        f"{outcome.verdict}: {outcome.title} ({' '.join(outcome.requirements)}, section {outcome.section})",
        f"sent: {outcome.sent}",
        f"seen: {outcome.seen}",
        f"reproduce: {outcome.reproduce}",
    ]
    return "\n".join([*lines, *(f"    {line}" for line in outcome.evidence)])


def pytest_report_header(config: pytest.Config) -> str:
    """What is checked."""
    return f"device: {config.getoption('--device')}"


def outcomes_of(report: pytest.TestReport) -> Iterator[Outcome]:
    """The outcome that a test's report carries, wherever it was made."""
    for name, value in report.user_properties:
        if name == PROPERTY and report.when != "teardown":
            yield Outcome.from_dict(json.loads(str(value)))
