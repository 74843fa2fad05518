"""``tools/soak``: run a soak and say what it came to."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from guestvm import LabError

from .run import soak


def main() -> int:
    """0: nothing was lost, nothing grew, breaks were seen in time; 1: what went wrong is named."""
    parser = argparse.ArgumentParser(
        prog="tools/soak", description="Load and bad luck; see docs/reliability.md."
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="how long, after booting; 0: once through all [30]"
    )
    parser.add_argument("--kernel", default="6.1", help="series of the guest's kernel [6.1]")
    parser.add_argument("--packed", action="store_true", help="packed rings instead of split ones")
    parser.add_argument("--seed", type=int, help="repeat the random choices of another soak [a new one]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, flush=True)

    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    say(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="guestpv-soak-") as directory:
        try:
            outcome = soak(arguments.minutes, arguments.kernel, arguments.packed, Path(directory), say, seed)
        except LabError as error:
            print(f"tools/soak: {error}", file=sys.stderr)
            return 1
    report = {
        "machine": {"processors": os.cpu_count(), "load": os.getloadavg()[0], "kernel": platform.release()},
        "guest": {"kernel": arguments.kernel, "rings": "packed" if arguments.packed else "split"},
        **asdict(outcome),
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for problem in outcome.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
