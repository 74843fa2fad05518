"""``tools/hostile``: run hostile devices against the drivers and say what it came to."""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
from pathlib import Path

from . import rings, services


def main() -> int:
    """0: the driver got over every fault; else an error names the one that it did not."""
    parser = argparse.ArgumentParser(
        prog="tools/hostile", description="Hostile devices; see docs/reliability.md."
    )
    parser.add_argument("what", choices=("rings", "services"))
    parser.add_argument("--faults", type=int, default=10_000, help="how many [10000]")
    parser.add_argument("--over", choices=("loopback", "vfio-user"), default="loopback", help="[loopback]")
    parser.add_argument("--seed", type=int, default=1, help="another run [1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    arguments = parser.parse_args()
    faulthandler.enable()

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, flush=True)

    if arguments.what == "rings":
        outcome = rings.run(arguments.faults, arguments.seed, say)
    else:
        outcome = services.run(arguments.faults, arguments.seed, arguments.over, say)
    outcome = {"what": arguments.what, "over": arguments.over, "seed": arguments.seed, **outcome}
    print(json.dumps(outcome, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
