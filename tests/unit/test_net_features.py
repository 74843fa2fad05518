"""The table of network features in the documentation is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from guestpv.drivers import net
from guestpv.spec import features as feat

DOCUMENT = Path(__file__).parents[2] / "docs" / "net.md"
OFFLOADS = net.RECEIVE_OFFLOADS | net.SEND_OFFLOADS


def library(bit: int) -> str:
    for mask, word in ((net.BASE_FEATURES, "yes"), (net.ON_REQUEST, "on request"), (OFFLOADS, "asked for")):
        if mask >> bit & 1:
            return word
    return "no"


def link(bit: int) -> str:
    word = library(bit)
    return "yes" if word == "asked for" or net.FILTERS >> bit & 1 else word


def test_the_table_is_what_the_code_does() -> None:
    rows = re.findall(r"^\| ([A-Z0-9_]+) \| ([a-z ]+) \| ([a-z ]+) \|", DOCUMENT.read_text(), re.MULTILINE)
    known = feat.DEVICE_FEATURES[feat.NET]
    assert rows == [(name, library(bit), link(bit)) for bit, name in known.items()]
