"""A report as JUnit XML, for continuous integration."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from .report import Report
from .verdict import Outcome, Verdict

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> str:
    """The report as one ``testsuite``; a case is a check, its class the area."""
    bad = {verdict: sum(o.verdict is verdict for o in report.outcomes) for verdict in Verdict}
    suite = ElementTree.Element(
        "testsuite",
        name=f"guestpv conform {report.side}",
        tests=str(len(report.outcomes)),
        failures=str(bad[Verdict.FAIL] + bad[Verdict.WEDGED]),
        errors=str(bad[Verdict.ERROR]),
        skipped=str(bad[Verdict.SKIP] + bad[Verdict.NOT_OBSERVABLE] + bad[Verdict.NOT_EXERCISED]),
        time=f"{sum(outcome.seconds for outcome in report.outcomes):.3f}",
        timestamp=report.date.removesuffix(" UTC").replace(" ", "T"),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in {"subject": report.subject, **report.versions}.items():
        ElementTree.SubElement(properties, "property", name=name, value=_clean(value))
    for outcome in report.outcomes:
        _case(suite, report, outcome)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, report: Report, outcome: Outcome) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=f"{report.side}.{outcome.area}",
        name=_clean(outcome.check or " ".join(outcome.requirements)),
        time=f"{outcome.seconds:.3f}",
    )
    properties = ElementTree.SubElement(case, "properties")
    for requirement in outcome.requirements:
        ElementTree.SubElement(properties, "property", name="requirement", value=requirement)
    ElementTree.SubElement(properties, "property", name="verdict", value=outcome.verdict.value)
    kind = {Verdict.FAIL: "failure", Verdict.WEDGED: "failure", Verdict.ERROR: "error"}.get(outcome.verdict)
    if kind:
        problem = ElementTree.SubElement(
            case, kind, type=outcome.verdict.value, message=_clean(outcome.seen or outcome.title)
        )
        lines = [
            outcome.title,
            f"section {outcome.section}",
            f"sent: {outcome.sent}",
            f"seen: {outcome.seen}",
        ]
        problem.text = _clean("\n".join([*lines, f"reproduce: {outcome.reproduce}", *outcome.evidence]))
    elif outcome.verdict not in (Verdict.PASS, Verdict.REJECT):
        ElementTree.SubElement(case, "skipped", message=_clean(f"{outcome.verdict}: {outcome.seen}"))


def _clean(text: str) -> str:
    """Without the characters that XML cannot carry."""
    return _NOT_XML.sub("?", text)
