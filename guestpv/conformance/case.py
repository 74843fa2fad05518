"""One case of a run: its log, what it says about itself, and the verdict it asks for."""

from __future__ import annotations

from collections import deque
from typing import Final, NoReturn

from _pytest.outcomes import Skipped

LOG_LENGTH: Final = 4000
EVIDENCE_LENGTH: Final = 60


class NotObservable(Skipped):
    """What a check wants to look at cannot be seen through this scheme."""


class CaseTimeout(BaseException):
    """A case took so long that nothing but a hanging peer explains it. Nobody but the plugin catches it."""


class Case:
    """What a check says besides passing or failing.

    Attributes:
        name: of the check, with its parameters.
        log: every access and every note, oldest first.
        refusal: how the device refused, once ``refused`` was called.
        sent_text: what was given to the device, if the check says so.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.log: deque[str] = deque(maxlen=LOG_LENGTH)
        self._last = ""
        self._times = 0
        self.refusal = ""
        self.sent_text = ""

    def note(self, text: str) -> None:
        """Put a line into the evidence; one that repeats itself is counted."""
        if self.log and text == self._last:
            self._times += 1
            self.log[-1] = f"{text}   ({self._times} times)"
            return
        self._last, self._times = text, 1
        self.log.append(text)

    def sent(self, text: str) -> None:
        """Say in words what the device is given; the report shows it."""
        self.sent_text = text
        self.note(f"# {text}")

    def refused(self, how: str) -> None:
        """The device refused something that it may refuse: REJECT instead of PASS, if it comes back."""
        self.refusal = how
        self.note(f"# refused: {how}")

    @staticmethod
    def not_observable(reason: str) -> NoReturn:
        """End the case: NOT_OBSERVABLE."""
        raise NotObservable(reason)

    @property
    def evidence(self) -> list[str]:
        """The last lines of the log."""
        return list(self.log)[-EVIDENCE_LENGTH:]
