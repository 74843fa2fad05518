"""``guestpv vectors list`` and ``export``."""

from __future__ import annotations

from pathlib import Path

import click

from .report import Report, reporting


@click.command("list", epilog="\b\nExample:\n  guestpv vectors list --json | jq '.data.vectors[].name'")
@reporting
def list_vectors(report: Report) -> None:
    """Show every vector: its name, what happens in it, and the sections of the standard."""
    from ..vectors import all_vectors
    from .tables import console, table

    rows = [{key: vector[key] for key in ("name", "kind", "title", "section")} for vector in all_vectors()]
    report.done(
        {"vectors": rows},
        lambda: console().print(
            table(
                ("VECTOR", "SECTION", "WHAT HAPPENS"), [(r["name"], r["section"], r["title"]) for r in rows]
            )
        ),
    )


@click.command("export", epilog="\b\nExample:\n  guestpv vectors export tests/virtio-vectors")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@reporting
def export(report: Report, directory: Path) -> None:
    """Write every vector to DIRECTORY as JSON, and schema.json, which describes them.

    The vectors come from runs of guestpv's own driver half on memory that repeats: the same version
    writes the same bytes on every machine. docs/vectors.md says how to replay them.
    """
    from ..vectors import export as write

    files = [str(path) for path in write(directory)]
    report.done(
        {"directory": str(directory), "files": files},
        lambda: click.echo(f"{len(files) - 1} vectors and their schema are in {directory}"),
    )
