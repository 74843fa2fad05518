"""``PYTHONPATH=tests python -m mutants device [--write] [--json FILE]``: run the suite on the broken peers.

``--write`` brings the package's ledger up to date with what was caught.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

import guestpv.conformance
from guestpv.conformance import catalogue, ledger
from guestpv.conformance.bench import Peer
from guestpv.conformance.runner import run
from guestpv.conformance.verdict import Outcome, Verdict

CAUGHT = (Verdict.FAIL, Verdict.WEDGED)


def name_of(outcome: Outcome) -> str:
    """The broken peer that a case ran on: ``test_x.py::test_y[NAME/split-...]``."""
    return re.split("[]/-]", outcome.check.partition("[")[2])[0]


def kills(outcomes: Iterable[Outcome], peers: list[Peer]) -> dict[tuple[str, str], set[str]]:
    """(broken peer, requirement that it breaks) -> checks of that requirement that caught it."""
    broken = {peer.name: peer for peer in peers}
    found: dict[tuple[str, str], set[str]] = {
        (peer.name, requirement): set() for peer in peers for requirement in peer.breaks or ()
    }
    for outcome in outcomes:
        name = name_of(outcome)
        if outcome.verdict in CAUGHT:
            for requirement in set(outcome.requirements) & set(broken[name].breaks or ()):
                found[name, requirement].add(outcome.check.partition("[")[0])
    return found


def device() -> tuple[list[Outcome], dict[tuple[str, str], set[str]]]:
    """Run the device suite on all broken devices."""
    from . import devices_broken
    from .device import MUTANTS

    outcomes = run(MUTANTS[0].spec, hostile=True, plugins=[devices_broken])
    return outcomes, kills(outcomes, MUTANTS)


def ledger_text(side: catalogue.Side, found: dict[tuple[str, str], set[str]]) -> str:
    """What the ledger of a side has to be; reasons stay as they are."""
    checks: dict[str, set[str]] = {}
    for (_, requirement), names in found.items():
        checks.setdefault(requirement, set()).update(names)
    reasons = {entry.id: entry.reason for entry in ledger.load(side).values()}
    return ledger.render(side, {id: sorted(names) for id, names in checks.items()}, reasons)


def main() -> None:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("side", choices=["device"])
    parser.add_argument("--write", action="store_true", help="update the package's ledger")
    parser.add_argument("--json", type=Path, help="write what was caught")
    options = parser.parse_args()
    outcomes, found = device()
    text = ledger_text(options.side, found)
    if options.write:
        (Path(guestpv.conformance.__file__).parent / f"ledger-{options.side}.tsv").write_text(text)
    missed = [f"{name} ({requirement})" for (name, requirement), names in found.items() if not names]
    errors = [f"{o.check}: {o.seen}" for o in outcomes if o.verdict is Verdict.ERROR]
    if options.json:
        data = {"missed": missed, "errors": errors, "caught": len(found) - len(missed), "ledger": text}
        options.json.write_text(json.dumps(data))
    print(f"{options.side}: {len(found) - len(missed)} of {len(found)} mistakes caught")
    for line in [*missed, *errors]:
        print(f"  {line}")


if __name__ == "__main__":
    main()
