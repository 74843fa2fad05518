"""``guestpv net top``: what the queues of the links that are up do, as it happens."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import click

from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv net top
  guestpv net top pv0 --interval 5
  guestpv net top --json | jq '.data[].queues[0].rx.packets_per_second'
"""

RATES: Final = ("packets", "bytes", "kicks", "interrupts", "dropped")
BAR: Final = 10


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, metavar="[NAME|ADDRESS]")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds that rates are taken over.",
)
@reporting
def top(report: Report, name: str | None, interval: float) -> None:
    """Show every queue of the links that are up, or of the one with this NAME or PCI ADDRESS.

    Packets and bits, doorbells rung (kicks), interrupts and drops a second, and how many of a ring's
    buffers the device has. On a terminal it goes on until Ctrl-C; with --json, or in a pipe, it reports once.
    """
    from ..services.control import find
    from ..vfio.lock import runtime_directory
    from .signals import Stop

    def sample() -> tuple[float, list[dict[str, Any]]]:
        found = [endpoint.status for endpoint in find(runtime_directory(), name)]
        return time.monotonic(), found

    with Stop() as stop:
        before = sample()
        if report.as_json or not sys.stdout.isatty():
            time.sleep(interval)
            data = rates(before, sample())
            report.done(data, lambda: show(data))
            return
        watch(before, sample, stop, interval)


def watch(before: tuple[float, list[dict[str, Any]]], sample: Any, stop: Any, interval: float) -> None:
    """Renew the table on the terminal until somebody stops it."""
    from rich.live import Live

    from ..system import SYSTEM
    from .tables import console

    with Live(console=console(), auto_refresh=False, screen=False) as live:
        while not stop.wanted:
            SYSTEM.poll([stop.fd], interval)
            after = sample()
            live.update(picture(rates(before, after)), refresh=True)
            before = after


def rates(
    before: tuple[float, list[dict[str, Any]]], after: tuple[float, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Every link with its queues: rates a second between two samples, and the fill of the rings now."""
    seconds = max(after[0] - before[0], 0.001)
    known = {status.get("name"): status for status in before[1]}
    links = []
    for status in after[1]:
        old = known.get(status.get("name"), status)
        pairs = zip(status.get("queues", []), old.get("queues", []), strict=False)
        links.append(
            {
                **{key: status.get(key) for key in ("name", "function", "mode", "link", "error")},
                "queues": [{way: _way(way, new, was, seconds) for way in ("rx", "tx")} for new, was in pairs],
            }
        )
    return links


def _way(way: str, new: dict[str, int], was: dict[str, int], seconds: float) -> dict[str, float]:
    result: dict[str, float] = {name: new.get(f"{way}_{name}", 0) for name in RATES}
    for name in RATES:
        key = f"{way}_{name}"
        result[f"{name}_per_second"] = round((new.get(key, 0) - was.get(key, 0)) / seconds, 1)
    return result | {"outstanding": new.get(f"{way}_outstanding", 0), "size": new.get(f"{way}_size", 0)}


def show(links: list[dict[str, Any]]) -> None:
    """For a person, once."""
    from .tables import console

    console().print(picture(links))


def picture(links: list[dict[str, Any]]) -> Any:
    """A table with a line for every queue."""
    from .counters import amount
    from .tables import table

    headings = ("LINK", "QUEUE", "PKT/S", "BIT/S", "KICK/S", "IRQ/S", "DROP/S", "WITH THE DEVICE")
    rows = []
    for link in links:
        for pair, queue in enumerate(link["queues"]):
            for way, counts in queue.items():
                full = round(BAR * counts["outstanding"] / counts["size"]) if counts["size"] else 0
                rows.append(
                    (
                        str(link["name"]),
                        f"{way}{pair}",
                        amount(counts["packets_per_second"], ""),
                        amount(counts["bytes_per_second"] * 8, ""),
                        amount(counts["kicks_per_second"], ""),
                        amount(counts["interrupts_per_second"], ""),
                        amount(counts["dropped_per_second"], ""),
                        f"{'#' * full:.<{BAR}} {counts['outstanding']}/{counts['size']}",
                    )
                )
        if link.get("error"):
            rows.append((str(link["name"]), link["error"], *[""] * 6))
    if not rows:
        return "Nothing is up. (guestpv net up)"
    return table(headings, rows, right="PKT/S BIT/S KICK/S IRQ/S DROP/S")
