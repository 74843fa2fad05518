"""What a check says in the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from .catalogue import find


class Verdict(StrEnum):
    """How a check ended. FAIL, WEDGED and ERROR fail the run."""

    PASS = "PASS"
    FAIL = "FAIL"
    """Against the standard."""
    REJECT = "REJECT"
    """Something malformed was refused in good order: the peer works again after a reset."""
    WEDGED = "WEDGED"
    """The peer does not come back after a reset, or is dead."""
    ERROR = "ERROR"
    """The check itself broke; it says nothing about the peer."""
    SKIP = "SKIP"
    """Does not apply; the reason is given."""
    NOT_OBSERVABLE = "NOT_OBSERVABLE"
    """Cannot be seen from here; the reason is given."""
    NOT_EXERCISED = "NOT_EXERCISED"
    """Nothing that the driver did so far had to do with it."""


BAD = (Verdict.FAIL, Verdict.WEDGED, Verdict.ERROR)


class Severity(StrEnum):
    """How much it matters, if it is bad."""

    CRITICAL = "critical"
    """The peer is lost, and in a hypervisor perhaps the guest or the host's thread with it."""
    MAJOR = "major"
    """Something that the standard leaves no choice about."""
    MINOR = "minor"
    """Something that the standard recommends."""
    NONE = "none"


def severity(verdict: Verdict, requirements: Iterable[str]) -> Severity:
    """Severity of a verdict about these requirements."""
    if verdict is Verdict.WEDGED:
        return Severity.CRITICAL
    if verdict is not Verdict.FAIL:
        return Severity.NONE
    levels = {find(requirement).level for requirement in requirements}
    return Severity.MINOR if levels and levels <= {"SHOULD", "SHOULD NOT", "MAY"} else Severity.MAJOR


@dataclass(slots=True)
class Outcome:
    """What one check (or one rule) found.

    Attributes:
        check: name of the check, such as ``test_status.py::test_reset[split]``.
        requirements: ids of the catalogue that it is about.
        title: what is checked, in one sentence.
        verdict, severity: how it ended.
        sent: what was given to the peer.
        seen: what came back, or the reason where there is no verdict.
        section: of the standard.
        reproduce: one command that shows it again.
        evidence: the last accesses, oldest first, decoded.
        seconds: how long it took.
    """

    check: str
    requirements: list[str]
    title: str
    verdict: Verdict
    severity: Severity = Severity.NONE
    sent: str = ""
    seen: str = ""
    section: str = ""
    reproduce: str = ""
    evidence: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether it fails the run."""
        return self.verdict in BAD

    @property
    def area(self) -> str:
        """Area of its first requirement."""
        return find(self.requirements[0]).area if self.requirements else "other"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"area": self.area}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outcome:
        """Back from JSON."""
        known = {name: data[name] for name in cls.__slots__ if name in data}
        return cls(**known | {"verdict": Verdict(data["verdict"]), "severity": Severity(data["severity"])})
