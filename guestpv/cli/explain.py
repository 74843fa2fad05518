"""``guestpv explain``: what a step, a feature, a register or a requirement is."""

from __future__ import annotations

from typing import Any

import click

from ..errors import UsageError
from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv explain queue_enable
  guestpv explain features-ok
  guestpv explain VIRTIO_NET_F_MRG_RXBUF
  guestpv explain DRV-SPLIT-14
  guestpv explain VirtIoHwInitialize
  guestpv explain --list feature
"""
KINDS = ("step", "feature", "register", "requirement")


def complete_name(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names that begin so, for the shell; requirements once two letters of them are there."""
    from ..explain import topics

    begun = incomplete.lower()
    return [
        name
        for name, topic in topics().items()
        if name.lower().startswith(begun) and (topic.kind != "requirement" or len(begun) > 1)
    ]


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("--list", "kind", type=click.Choice(KINDS), help="List everything of one kind instead.")
@reporting
def explain(report: Report, name: str | None, kind: str | None) -> None:
    """Explain NAME: a step, a feature, a register or a requirement of virtio.

    NAME may also be a function of the Windows drivers: what it does is explained.

    What it is, where the standard says so, what our code does about it, what breaks when it is wrong,
    and which function of the Windows drivers does it.
    """
    from ..explain import find, topics

    if (name is None) == (kind is None):
        raise UsageError("give a NAME, or --list and a kind", hint="guestpv explain --help")
    if name is None:
        found = [topic for topic in topics().values() if topic.kind == kind]
        rows = [
            {"name": topic.title, "section": topic.section.split(" ")[0].rstrip(","), "what": topic.what}
            for topic in found
        ]
        report.done({"topics": rows}, lambda: _list(rows))
        return
    described = [topic.describe() for topic in find(name)]
    report.done({"topics": described}, lambda: _show(described))


def _list(rows: list[dict[str, str]]) -> None:
    from .tables import console, table

    console().print(table(("NAME", "SECTION", "WHAT"), ((r["name"], r["section"], r["what"]) for r in rows)))


def _show(topics: list[dict[str, Any]]) -> None:
    from .tables import console, pairs

    for number, topic in enumerate(topics):
        rows = [(topic["kind"], topic["title"]), ("section", topic["section"]), *topic["details"].items()]
        rows.append(("what", topic["what"]))
        rows.append(("our code", "\n".join(topic["code"]) or "nothing here names it"))
        if topic["breaks"]:
            rows.append(("when wrong", topic["breaks"]))
        if topic["windows"]:
            rows.append(("Windows", topic["windows"]))
        for one in topic["deviations"]:
            text = f"{one['what']} Where: {one['where']}. By reading only."
            rows.append((f"{one['driver']} ({one['id']})", text))
        if number:
            click.echo()
        console().print(pairs((name, text.replace("`", "")) for name, text in rows))
