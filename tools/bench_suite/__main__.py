"""``tools/bench NAME``: run one benchmark, show its rows, keep and compare them."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

from . import plot, report, table

NO_VERSIONS = {"priority", "payload"}
TOOLS = {"__main__", "contest", "guest_disks", "plot", "report", "table", "testpmd"}


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
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates there, as SVG")
    parser.add_argument(
        "--latencies", type=Path, metavar="FILE", help="draw the latencies there, where there are any, as SVG"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="name what is worse than in this earlier --json"
    )
    parser.add_argument(
        "--document",
        type=Path,
        metavar="FILE",
        help="put the table of ring, blk or net into this document, at its mark",
    )
    arguments = parser.parse_args()
    versions, rows = importlib.import_module(f"bench_suite.{arguments.name}").run(arguments.quick)
    print(report.show(rows))
    if arguments.json:
        report.write(arguments.json, versions, rows)
    pictures = ((arguments.plot, plot.picture), (arguments.latencies, plot.curves))
    for file, draw in pictures:
        if not file:
            continue
        where = report.machine()
        told = ", ".join(f"{name} {value}" for name, value in versions.items() if name not in NO_VERSIONS)
        plot.write(file, f"tools/bench {arguments.name}", f"{where['cpu']}; {told}", rows, draw)
    if arguments.document:
        table.replace(arguments.document, arguments.name, rows)
    worse = report.worse(arguments.against, rows) if arguments.against else []
    print("\n".join(worse), end="\n" * bool(worse))
    return 0 if all(row.met for row in rows) and not worse else 1


if __name__ == "__main__":
    sys.exit(main())
