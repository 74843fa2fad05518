"""Every rule of the strict device is proved by a driver that breaks it, and none fires on a healthy one."""

from __future__ import annotations

import pytest
from mutants.driver import WALKS, Walk

from guestpv.conformance.driver.rules import checked

MUTANTS = [walk for walk in WALKS if walk.breaks]
HEALTHY = [walk for walk in WALKS if not walk.breaks]


@pytest.mark.parametrize("walk", MUTANTS, ids=lambda walk: walk.name)
def test_a_mutant_is_caught_by_the_rules_that_it_breaks_and_no_other(walk: Walk) -> None:
    bench = walk.run()
    assert bench.broken == walk.breaks, "\n".join(map(str, bench.function.findings))


@pytest.mark.parametrize("walk", HEALTHY, ids=lambda walk: walk.name)
def test_no_rule_fires_on_a_healthy_walk(walk: Walk) -> None:
    bench = walk.run()
    assert [str(finding) for finding in bench.function.findings] == []


def test_healthy_walks_exercise_every_rule() -> None:
    seen = {name for walk in HEALTHY for name in walk.run().watch.exercised}
    assert checked() - seen == set()


def test_every_rule_has_a_mutant() -> None:
    assert checked() - {name for walk in MUTANTS for name in walk.breaks} == set()
