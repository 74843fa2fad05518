"""The catalogue, coverage and the forms of a conformance report."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from guestpv.cli.main import main
from guestpv.conformance import catalogue, coverage
from guestpv.conformance.html import html
from guestpv.conformance.junit import junit
from guestpv.conformance.report import Report
from guestpv.conformance.tap import point, tap
from guestpv.conformance.verdict import Outcome, Severity, Verdict, severity
from guestpv.errors import UsageError

REPORT = Report(
    "device",
    "loopback:blk",
    [
        Outcome("test_a.py::test_one[split]", ["DEV-SPLIT-01"], "One <b>title</b>.", Verdict.PASS),
        Outcome(
            "test_a.py::test_one[packed]",
            ["DEV-SPLIT-01", "DEV-PACKED-01"],
            "One title.",
            Verdict.FAIL,
            Severity.MAJOR,
            sent="a < b & c",
            seen="]]> \x00 and \x1b[31m",
            section="2.7",
            reproduce="guestpv conform device loopback:blk --case 'x'",
            evidence=["write notify+0x0/2 = 0x0", "<script>alert(1)</script>"],
            seconds=0.25,
        ),
        Outcome("test_b.py::test_two", ["DEV-PCI-01"], "Two.", Verdict.SKIP, seen="why not"),
    ],
    versions={"guestpv": "1"},
    date="2026-01-02 03:04:05 UTC",
    command="guestpv conform device loopback:blk",
)


def test_observable_are_the_binding_core_rows_that_can_be_seen() -> None:
    for side in catalogue.SIDES:
        rows = catalogue.load(side)
        chosen = catalogue.observable(side)
        assert 100 < len(chosen) < len(rows)
        for row in rows.values():
            assert (row.id in chosen) == (
                row.scope == "core"
                and row.level in ("MUST", "MUST NOT", "RULE")
                and not row.check.startswith("none")
            )


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("DEV-SPLIT", ["DEV-SPLIT-01", "DEV-SPLIT-40"], ["DEV-PACKED-01", "DRV-SPLIT-01"]),
        ("DEV-BLK-0*,drv-net-12", ["DEV-BLK-07", "DRV-NET-12"], ["DEV-BLK-10", "DRV-NET-120"]),
        ("", ["DEV-BLK-07", "DRV-NET-12"], []),
        ("DEV-CONF", ["DEV-CONF-01"], ["DEV-CONFIG-01"]),
    ],
)
def test_selection(text: str, yes: list[str], no: list[str]) -> None:
    patterns = catalogue.patterns(text)
    assert all(catalogue.matches(id, patterns) for id in yes)
    assert not any(catalogue.matches(id, patterns) for id in no)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="DEV-NOTHING"):
        catalogue.patterns("DEV-SPLIT,DEV-NOTHING")


def test_the_worst_verdict_about_a_requirement_counts() -> None:
    judged = REPORT.judged()
    assert judged == {
        "DEV-SPLIT-01": Verdict.FAIL,
        "DEV-PACKED-01": Verdict.FAIL,
        "DEV-PCI-01": Verdict.SKIP,
    }
    assert not REPORT.ok
    assert REPORT.counts == {"PASS": 1, "FAIL": 1, "SKIP": 1}


def test_severity_follows_the_level() -> None:
    assert severity(Verdict.FAIL, ["DEV-STATUS-01"]) is Severity.MAJOR
    assert severity(Verdict.FAIL, ["DEV-STATUS-03"]) is Severity.MINOR
    assert severity(Verdict.WEDGED, ["DEV-STATUS-03"]) is Severity.CRITICAL
    assert severity(Verdict.PASS, ["DEV-STATUS-01"]) is Severity.NONE


def test_json_comes_back_as_it_was() -> None:
    again = Report.from_dict(json.loads(json.dumps(REPORT.to_dict())))
    assert again == REPORT


def test_junit_is_well_formed_and_counts() -> None:
    suite = ElementTree.fromstring(junit(REPORT))[0]
    assert {name: suite.attrib[name] for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
    }
    failure = suite.find(".//failure")
    assert failure is not None
    assert "write notify" in (failure.text or "")


def test_tap_has_a_line_for_each_check() -> None:
    lines = tap(REPORT.outcomes).splitlines()
    assert lines[:3] == ["TAP version 14", "1..3", "ok 1 - test_a.py::test_one[split] (DEV-SPLIT-01)"]
    assert lines[3] == "not ok 2 - test_a.py::test_one[packed] (DEV-SPLIT-01 DEV-PACKED-01)"
    assert lines[-1] == "ok 3 - test_b.py::test_two (DEV-PCI-01) # SKIP why not"
    below = lines[4:-1]
    assert (below[0], below[-1]) == ("  ---", "  ...")
    assert '  seen: "]]> \\u0000 and \\u001b[31m"' in below


def test_tap_keeps_directives_out_of_names() -> None:
    outcome = Outcome("odd # TODO\nname", [], "", Verdict.PASS)
    assert point(7, outcome, "0000:01:00.0") == "ok 7 - 0000:01:00.0 odd \\# TODO name"


class Page(HTMLParser):
    """Elements that have to be balanced, and the text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[dict[str, str | None]] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "details":
            self.rows.append(dict(attrs))
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_with_everything_escaped() -> None:
    page = Page()
    text = html(REPORT)
    page.feed(text)
    assert page.open == []
    assert page.sources == []
    # Area by area, and in each what is bad comes first.
    assert [row["data-verdict"] for row in page.rows] == ["SKIP", "FAIL", "PASS"]
    assert {row["data-area"] for row in page.rows} == {"split", "pci"}
    assert "<script>alert" not in text
    assert "<b>title" not in text
    assert not re.search(r"\$\w", text)


def test_text_names_what_failed() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    for part in REPORT.text():
        console.print(part)
    text = console.export_text()
    assert "FAIL One title.  (DEV-SPLIT-01 DEV-PACKED-01; section 2.7; major)" in text
    assert "reproduce" in text
    assert "1 PASS, 1 FAIL, 1 SKIP" in text


def test_coverage_adds_up() -> None:
    done = CliRunner().invoke(main, ["conform", "coverage", "--json", "--missing"])
    assert done.exit_code == 0
    data = json.loads(done.output)["data"]
    for side in catalogue.SIDES:
        counts = data[side]
        assert counts["observable"] == len(catalogue.observable(side))
        assert counts["checked"] == sum(area["checked"] for area in counts["areas"].values())
        assert len(data["missing"][side]) == counts["observable"] - counts["checked"]
        assert all(data["missing"][side].values()), "a row that is not checked has a reason"
    assert data["device"] == coverage.of("device")
