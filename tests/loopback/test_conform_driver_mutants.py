"""Every rule of the strict device is proved by a driver that breaks it, and none fires on a healthy one."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants.driver import HEALTHY, MUTANTS, PATCHED, Patched, Walk, ledger_text

from guestpv.conformance import catalogue, ledger
from guestpv.conformance.driver import run
from guestpv.conformance.driver.rules import checked
from guestpv.conformance.driver.scenarios import TYPES, choose
from guestpv.conformance.verdict import Verdict

pytestmark = pytest.mark.provokes("mutants")

WANTED = list(catalogue.observable("driver"))


@pytest.mark.parametrize("walk", MUTANTS, ids=lambda walk: walk.name)
def test_a_mutant_is_caught_by_the_rules_that_it_breaks_and_no_other(walk: Walk) -> None:
    bench = walk.run()
    assert bench.broken == walk.breaks, "\n".join(map(str, bench.function.findings))


@pytest.mark.parametrize("mutant", PATCHED, ids=lambda mutant: mutant.name)
def test_our_driver_with_one_function_broken_is_caught(
    mutant: Patched, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = mutant.run(monkeypatch).outcomes()
    failed = {outcome.requirements[0] for outcome in outcomes if outcome.verdict is Verdict.FAIL}
    assert failed == mutant.breaks


@pytest.mark.parametrize("walk", HEALTHY, ids=lambda walk: walk.name)
def test_no_rule_fires_on_a_healthy_walk(walk: Walk) -> None:
    bench = walk.run()
    assert [str(finding) for finding in bench.function.findings] == []


@pytest.fixture(scope="module")
def healthy() -> dict[str, run.Run]:
    """Every scenario of every device type with our own drivers."""
    return {kind: run.loopback(kind, {}, choose("all", kind), WANTED) for kind in TYPES}


@pytest.mark.parametrize("kind", TYPES)
def test_our_drivers_break_no_rule_in_any_scenario(kind: str, healthy: dict[str, run.Run]) -> None:
    outcomes = healthy[kind].outcomes()
    assert [(outcome.requirements, outcome.seen) for outcome in outcomes if outcome.bad] == []
    assert healthy[kind].other == []


def test_every_rule_is_exercised(healthy: dict[str, run.Run]) -> None:
    seen = {name for walk in HEALTHY for name in walk.run().watch.exercised}
    for one in healthy.values():
        seen |= {o.requirements[0] for o in one.outcomes() if o.verdict is Verdict.PASS}
    assert checked() - seen == set()


def test_every_rule_has_a_mutant_and_the_ledger_says_so() -> None:
    proved = {name for mutant in (*MUTANTS, *PATCHED) for name in mutant.breaks}
    assert checked() - proved == set()
    published = Path(ledger.__file__).with_name("ledger-driver.tsv").read_text()
    assert ledger_text(proved & checked()) == published, (
        "run: PYTHONPATH=tests python -m mutants.driver --write"
    )
    print(f"{len(MUTANTS) + len(PATCHED)} mutants of drivers prove {len(proved & checked())} requirements")
