"""``tools/bench NAME [--quick] [--json FILE]``: run one benchmark, show its rows, write them."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

from . import report

TOOLS = {"__main__", "report"}


def main() -> int:
    """0: measured and every limit met; 1: a limit was missed."""
    package = Path(__file__).resolve().parent
    names = sorted(module.name for module in pkgutil.iter_modules([str(package)]) if module.name not in TOOLS)
    parser = argparse.ArgumentParser(prog="tools/bench", description="Benchmarks; see docs/performance.md.")
    parser.add_argument("name", choices=names)
    parser.add_argument(
        "--quick", action="store_true", help="few repeats: to see that it works, not to judge"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    versions, rows = importlib.import_module(f"bench_suite.{arguments.name}").run(arguments.quick)
    print(report.show(rows))
    if arguments.json:
        report.write(arguments.json, versions, rows)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
