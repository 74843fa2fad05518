"""Test vectors: what a driver writes, byte for byte, for drivers in other languages to be tested against.

Every vector is the record of a run of our own driver half on memory that repeats, never written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA_FILE = "schema.json"
SCHEMA = Path(__file__).with_name(SCHEMA_FILE)


def all_vectors() -> list[dict[str, Any]]:
    """Every vector, as ``schema.json`` describes them."""
    from . import registers, requests, rings

    return [*rings.vectors(), *registers.vectors(), *requests.vectors()]


def export(directory: Path) -> list[Path]:
    """Write every vector to ``directory/NAME.json``, and the schema beside them.

    Args:
        directory: made if it is not there; files of the same names are written over.

    Returns:
        What was written, in the order of the vectors, the schema last.

    Raises:
        OSError: a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for vector in all_vectors():
        path = directory / f"{vector['name']}.json"
        path.write_text(json.dumps(vector, indent=1) + "\n", encoding="ascii")
        written.append(path)
    path = directory / SCHEMA_FILE
    path.write_bytes(SCHEMA.read_bytes())
    return [*written, path]
