"""A report as one HTML page that needs nothing else: filters by area and verdict, evidence folded."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from string import Template

from .catalogue import find
from .report import Report
from .verdict import Outcome, Verdict

CLASS = {
    Verdict.PASS: "good",
    Verdict.REJECT: "good",
    Verdict.FAIL: "bad",
    Verdict.WEDGED: "bad",
    Verdict.ERROR: "bad",
    Verdict.SKIP: "none",
    Verdict.NOT_OBSERVABLE: "none",
    Verdict.NOT_EXERCISED: "none",
}

PAGE = "page.html"
"""The page, with places for ``string.Template``."""


def html(report: Report) -> str:
    """The page."""
    facts = [report.date, *(f"{name} {value}" for name, value in report.versions.items())]
    data = report.to_dict()
    facts.append(f"{data['judged']} of {data['observable']} observable requirements judged")
    if report.note:
        facts.append(report.note)
    text = " &middot; ".join(escape(fact) for fact in facts)
    if report.command:
        text += f"<br><code>{escape(report.command)}</code>"
    areas = sorted({outcome.area for outcome in report.outcomes})
    sections = []
    for area in areas:
        here = [outcome for outcome in report.outcomes if outcome.area == area]
        here.sort(key=lambda outcome: not outcome.bad)
        rows = "".join(_row(outcome, report.outcomes.index(outcome)) for outcome in here)
        sections.append(f"<section><h2>{escape(area)} <span>{len(here)} checks</span></h2>{rows}</section>")
    page = Template(files(__package__).joinpath(PAGE).read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(f"Conformance of a {report.side}: {report.subject}"),
        facts=text,
        counts="".join(
            f'<label class="{CLASS[Verdict(name)]}" title="Double click: these only">'
            f'<input type="checkbox" value="{name}" checked>'
            f"<b>{count}</b> {name}</label>"
            for name, count in report.counts.items()
        ),
        areas="".join(f"<option>{escape(area)}</option>" for area in areas),
        outcomes="".join(sections),
    )


def _row(outcome: Outcome, number: int) -> str:
    facts = [("check", f"<code>{escape(outcome.check)}</code>")] if outcome.check else []
    for requirement in outcome.requirements:
        row = find(requirement)
        facts.append((requirement, f"{escape(row.requirement)} <span class=none>({row.level})</span>"))
    facts.append(("section", escape(outcome.section)))
    if outcome.bad:
        facts.append(("severity", escape(outcome.severity)))
    for name in ("sent", "seen"):
        if value := getattr(outcome, name):
            facts.append((name, escape(value)))
    if outcome.reproduce:
        facts.append(("reproduce", f"<code>{escape(outcome.reproduce)}</code>"))
    listing = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in facts)
    evidence = f"<pre>{escape(chr(10).join(outcome.evidence))}</pre>" if outcome.evidence else ""
    variant = outcome.check.partition("[")[2].rstrip("]")
    variant = f' <span class="none">{escape(variant)}</span>' if variant not in ("", "device") else ""
    words = " ".join([outcome.title, outcome.check, *outcome.requirements, outcome.section, outcome.seen])
    return (
        f'<details id="o{number}" data-verdict="{outcome.verdict}" data-area="{escape(outcome.area)}"'
        f' data-text="{escape(words.lower())}"><summary>'
        f'<span class="v {CLASS[outcome.verdict]}">{outcome.verdict.replace("_", " ")}</span>'
        f"<span>{escape(outcome.title)}{variant}</span>"
        f'<span class="i">{escape(" ".join(outcome.requirements))}</span></summary>'
        f'<div class="body"><dl>{listing}</dl>{evidence}</div></details>'
    )
