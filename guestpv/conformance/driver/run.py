"""Put a driver before the strict device, scenario by scenario, and say what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from ...devices.evidence import Finding
from ...devices.function import SoftwareFunction
from ...devices.loopback import open_function
from ...errors import GuestpvError
from ...pci.function import PciFunction
from ...transport.pci import PciTransport
from .. import catalogue
from ..verdict import Outcome, Severity, Verdict, severity
from . import exercises, rulebook
from .observed import observe
from .rules import RULES, Result, Watch
from .scenarios import Scenario

RANK = (Verdict.FAIL, Verdict.PASS, Verdict.NOT_EXERCISED, Verdict.NOT_OBSERVABLE, Verdict.SKIP)
MOST_FINDINGS = 5
PLAIN = ("net", "net links", "net steered", "many")
"""Exercises that the observing build is too slow for, or that do not use its calls."""


@dataclass
class Run:
    """What scenarios said so far.

    Attributes:
        results: requirement -> result of each scenario that said something, with its name.
        other: findings that no requirement of the catalogue covers.
        troubles: scenario -> what went wrong for the driver's user.
        seconds: of all scenarios.
    """

    requirements: list[str]
    reproduce: str = ""
    results: dict[str, list[tuple[str, Result]]] = field(default_factory=dict)
    other: list[tuple[str, Finding]] = field(default_factory=list)
    troubles: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def take(self, scenario: str, watch: Watch) -> None:
        """The end of a scenario."""
        watch.finish()
        for result in watch.results(self.requirements):
            self.results.setdefault(result.requirement, []).append((scenario, result))
        self.other += [(scenario, finding) for finding in watch.findings if not finding.requirement]

    def outcomes(self) -> list[Outcome]:
        """One outcome a requirement, in the catalogue's order, and one for each trouble."""
        found = [self._outcome(name, self.results.get(name, [])) for name in self.requirements]
        for scenario, text in self.troubles.items():
            found.append(Outcome(f"scenario {scenario}", [], "The driver works", Verdict.ERROR, seen=text))
        return found

    def _outcome(self, requirement: str, said: Sequence[tuple[str, Result]]) -> Outcome:
        row = catalogue.find(requirement)
        verdict = min((result.verdict for _, result in said), key=RANK.index, default=Verdict.NOT_EXERCISED)
        names = sorted({rule.name for rule in RULES if requirement in rule.requirements})
        outcome = Outcome(
            ": ".join((requirement, *names[:1])), [requirement], row.requirement, verdict, section=row.number
        )
        bad = [(scenario, result) for scenario, result in said if result.verdict is Verdict.FAIL]
        if bad:
            scenario, result = bad[0]
            outcome.severity = severity(verdict, [requirement])
            names = list(dict.fromkeys(name for name, _ in bad))
            outcome.sent = f"scenario {', '.join(names[:MOST_FINDINGS])}"
            outcome.seen = "; ".join(dict.fromkeys(str(f.message) for f in result.findings[:MOST_FINDINGS]))
            outcome.evidence = [str(event) for event in result.findings[0].evidence]
            outcome.reproduce = f"{self.reproduce} --scenario {scenario}" if self.reproduce else ""
        elif verdict is Verdict.PASS:
            outcome.severity = Severity.NONE
            outcome.seen = f"kept {sum(result.count for _, result in said)} times"
        elif verdict in (Verdict.NOT_OBSERVABLE, Verdict.SKIP):
            outcome.seen = rulebook.REASONS.get(requirement) or said[0][1].reason
        return outcome


def _transport(function: SoftwareFunction, exercise: str) -> PciTransport:
    """On the observing build; but the network driver's bursts run in the ordinary one."""
    return PciTransport(cast(PciFunction, function)) if exercise in PLAIN else observe(function)


def loopback(
    kind: str,
    params: dict[str, str],
    scenarios: Iterable[Scenario],
    requirements: list[str],
    tell: Callable[[str], None] = lambda text: None,
) -> Run:
    """Our own driver of a device type before the strict device, each scenario with a fresh one."""
    query = "&".join(f"{name}={value}" for name, value in params.items())
    run = Run(requirements, f"guestpv conform driver loopback:{kind}{'?' if query else ''}{query}")
    started = time.monotonic()
    for scenario in scenarios:
        tell(scenario.name)
        function = open_function(kind, params | scenario.params)
        if scenario.looks is not None:
            function.present(scenario.looks)
        watch = Watch.over(function)
        scenario.set_up(watch)
        try:
            transport = _transport(function, scenario.exercise or kind)
        except GuestpvError as error:
            trouble = f"{type(error).__name__}: {error}"
            function.close()
        else:
            trouble = exercises.drive(scenario.exercise or kind, transport, watch, scenario.patience)
        for requirement in scenario.right:
            if trouble:
                watch.break_rule(requirement, trouble)
            else:
                watch.keep(requirement)
        if trouble and not scenario.fails:
            run.troubles[scenario.name] = trouble
        watch.settle()
        run.take(scenario.name, watch)
    run.seconds = time.monotonic() - started
    return run
