"""What the kernel command line of a bundle may ask for."""

import pytest

from guestpv.errors import UsageError
from guestvm.suite import asked


def test_without_words_everything_is_checked() -> None:
    options = asked("console=ttyS0 quiet")
    assert (options.address, options.select, options.hostile, options.format) == ("all", "", False, "tap")


def test_words_are_those_of_the_command() -> None:
    options = asked(
        'quiet guestpv.conform="device 0000:01:00.0 --select DEV-BLK --hostile" guestpv.format=json x=y'
    )
    assert (options.address, options.select, options.hostile) == ("0000:01:00.0", "DEV-BLK", True)
    assert options.format == "json"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("guestpv.conform=driver", "'driver' cannot be run here"),
        ('guestpv.conform="device --dance"', "--dance"),
        ('guestpv.conform="device all --select DEV-DANCE"', "DEV-DANCE"),
        ("guestpv.format=xml", "guestpv.format=xml"),
        ("guestpv.dance=on", "guestpv.dance=on"),
    ],
)
def test_what_makes_no_sense_is_said(line: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        asked(line)
