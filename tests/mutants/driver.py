"""All mutants of drivers: by hand on registers and rings, and our own with one function broken.

``PYTHONPATH=tests python -m mutants.driver [--write]`` prints the kill rate; ``--write`` brings the package's
ledger up to date with what is caught.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import guestpv.conformance
from guestpv.conformance import ledger
from guestpv.conformance.driver.rulebook import REASONS
from guestpv.conformance.driver.rules import RULES
from guestpv.conformance.verdict import Verdict

from . import (
    driver_balloon,
    driver_blk,
    driver_common,
    driver_net,
    driver_net_packets,
    driver_pci,
    driver_ring,
)
from .driver_bench import WALKS, Walk
from .driver_patched import PATCHED, Patched

__all__ = [
    "PATCHED",
    "WALKS",
    "Patched",
    "Walk",
    "driver_balloon",
    "driver_blk",
    "driver_common",
    "driver_net",
    "driver_net_packets",
    "driver_pci",
    "driver_ring",
]

MUTANTS = [walk for walk in WALKS if walk.breaks]
HEALTHY = [walk for walk in WALKS if not walk.breaks]


def caught(mutant: Walk | Patched) -> set[str]:
    """The requirements that were seen broken."""
    if isinstance(mutant, Walk):
        return mutant.run().broken
    outcomes = mutant.run(pytest.MonkeyPatch()).outcomes()
    return {outcome.requirements[0] for outcome in outcomes if outcome.verdict is Verdict.FAIL}


def ledger_text(proved: set[str]) -> str:
    """What the package's ledger has to be."""
    checks: dict[str, list[str]] = {}
    for rule in RULES:
        for requirement in set(rule.requirements) & proved:
            if rule.name not in checks.setdefault(requirement, []):
                checks[requirement].append(rule.name)
    return ledger.render("driver", checks, REASONS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="mutants.driver", description=__doc__)
    parser.add_argument("--write", action="store_true", help="update the package's ledger")
    write = parser.parse_args().write
    killed: list[Walk | Patched] = [one for one in (*MUTANTS, *PATCHED) if caught(one) == one.breaks]
    print(f"driver: {len(killed)} of {len(MUTANTS) + len(PATCHED)} mutants caught")
    if write:
        text = ledger_text({name for one in killed for name in one.breaks})
        (Path(guestpv.conformance.__file__).parent / "ledger-driver.tsv").write_text(text)


if __name__ == "__main__":
    main()
