"""A record as one self-contained page: a sequence diagram, the rings at every step, filter and search."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from .record import EXITS, LANES, STANDARD, Recorder

PLACE: Final = "@RECORD@"
SHOWN_DATA: Final = 64
"""Bytes of each element of a buffer that the page shows."""


Glossary = Mapping[str, tuple[str, str]]
"""Step or register -> what it is, and what breaks when it is wrong."""


def page(recorder: Recorder, verb: Sequence[str] = (), glossary: Glossary | None = None) -> str:
    """The page, which needs nothing from elsewhere.

    Args:
        recorder: the record.
        verb: what was traced, for the title.
        glossary: is shown beside the events.
    """
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # A script's text ends at the first "</", whatever it is part of.
    data = json.dumps(contents(recorder, verb, glossary or {}), separators=(",", ":")).replace("</", "<\\/")
    return template.replace(PLACE, data)


def contents(recorder: Recorder, verb: Sequence[str], glossary: Glossary) -> dict[str, Any]:
    """What the page shows, as JSON has it."""
    return {
        "verb": " ".join(verb),
        "standard": STANDARD,
        "began": recorder.began // 1_000_000,
        "summary": recorder.summary(),
        "lanes": {kind: list(lane) for kind, lane in LANES.items()},
        "exits": sorted(EXITS),
        "glossary": {name: list(words) for name, words in glossary.items()},
        "devices": [device.name for device in recorder.devices],
        "events": [_shown(event.to_json()) for event in recorder.events],
    }


def _shown(event: dict[str, Any]) -> dict[str, Any]:
    if "data" in event:
        event["data"] = [text[: 2 * SHOWN_DATA] for text in event["data"]]
    return event
