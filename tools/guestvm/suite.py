"""Inside a bundle: checks virtio functions as the kernel command line says, and reports on the console.

``guestpv.conform="device [ADDRESS|all] [--select IDS] [--hostile] [--case NAME] [--shard I/N]"`` and
``guestpv.format=tap|json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from guestpv.conformance import catalogue, runner, tap
from guestpv.conformance.report import Report, now, versions
from guestpv.conformance.rig import require_type
from guestpv.conformance.verdict import Outcome, Verdict
from guestpv.errors import FeaturesRefused, GuestpvError, UsageError
from guestpv.opener import open as open_device
from guestpv.vfio.binding import bind
from guestpv.vfio.survey import Function, survey

BEGIN = "===== guestpv conformance: begin ====="
END = "===== guestpv conformance: end, status {} ====="
TRUST = Path("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
NEEDED = "needs a virtual IOMMU, which this machine does not have"


class Words(argparse.ArgumentParser):
    """Complains by ``UsageError``."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"guestpv.conform: {message}", hint=self.format_usage().strip())


def asked(line: str) -> argparse.Namespace:
    """What a kernel command line asks for.

    Raises:
        UsageError: it does not make sense.
    """
    given = dict(re.findall(r"^guestpv\.(\w+)=(.*)$", "\n".join(shlex.split(line)), re.MULTILINE))
    words = Words(prog='guestpv.conform="device', add_help=False)
    words.add_argument("address", nargs="?", default="all")
    words.add_argument("--select", default="")
    words.add_argument("--hostile", action="store_true")
    words.add_argument("--case", dest="cases", action="append", default=[])
    words.add_argument("--shard", default="1/1")
    verb, *rest = shlex.split(given.pop("conform", "device"))
    if verb != "device":
        raise UsageError(f"guestpv.conform: {verb!r} cannot be run here", hint='guestpv.conform="device all"')
    options = words.parse_args(rest)
    options.format = given.pop("format", "tap")
    if given or options.format not in ("tap", "json"):
        raise UsageError(
            f"there is no guestpv.{next(iter(given), 'format')}={next(iter(given.values()), options.format)}"
        )
    catalogue.patterns(options.select)
    return options


class Console:
    """Prints outcomes as they come: TAP, or a JSON object for each device."""

    def __init__(self, form: str) -> None:
        # While it runs, the suite has sys.stdout for itself.
        self._out = sys.stdout
        self._json = form == "json"
        self._count = 0
        self.bad = False
        self.say("\n".join([BEGIN] if self._json else [BEGIN, tap.VERSION]))

    def say(self, text: str) -> None:
        """A line."""
        print(text, file=self._out, flush=True)

    def tell(self, outcome: Outcome, place: str) -> None:
        """One outcome of the device at ``place``."""
        self.bad |= outcome.bad
        self._count += 1
        if not self._json:
            self.say(tap.point(self._count, outcome, place))

    def device(self, data: dict[str, Any]) -> None:
        """All of a device."""
        if self._json:
            self.say(json.dumps(data))

    def end(self) -> None:
        """Nothing more comes."""
        if not self._json:
            self.say(f"1..{self._count}")
        self.say(END.format(int(self.bad)))


def functions(address: str) -> Iterator[Function]:
    """The functions that are meant; with ``all``, those of a type that the suite knows.

    Raises:
        UsageError: there is no such function.
    """
    found = [
        one for one in survey() if address in ("all", one.address) or one.address.endswith(f":{address}")
    ]
    if not found:
        there = " ".join(f"{one.address} ({one.name})" for one in survey())
        raise UsageError(f"no virtio function {address}", hint=f"there are: {there or 'none'}")
    return iter(found)


def check(function: Function, options: argparse.Namespace, console: Console) -> None:
    """Run the suite on one function."""
    place = f"{function.address} {function.name}"
    report = Report("device", place, [], versions(), now(), f"guestpv conform device {function.address}")

    def tell(outcome: Outcome) -> None:
        report.outcomes.append(outcome)
        console.tell(outcome, place)

    try:
        bind(function.address, force=True)
        with open_device(f"vfio:{function.address}") as transport:
            require_type(transport)
            with contextlib.suppress(FeaturesRefused):
                transport.negotiate(0)
        runner.run(
            f"vfio:{function.address}",
            select=options.select,
            hostile=options.hostile,
            shard=options.shard,
            cases=options.cases,
            tell=tell,
        )
    except GuestpvError as error:
        # Other types than the suite's are no failure of a machine that has them as well.
        known = function.type in (1, 2, 4, 5) or options.address != "all"
        why = NEEDED if function.group is None else error.message
        seen = "; ".join(filter(None, (why, error.hint)))
        tell(Outcome("open", [], "open", Verdict.ERROR if known else Verdict.SKIP, seen=seen))
    console.device(report.to_dict())


def main() -> None:
    console = None
    try:
        options = asked(Path("/proc/cmdline").read_text())
        subprocess.run(["modprobe", "vfio_iommu_type1"], check=False, stderr=subprocess.DEVNULL)
        if TRUST.exists():
            # Virtual IOMMUs without interrupt remapping: this guest is nobody's, and is gone in a moment.
            TRUST.write_text("1")
        console = Console(options.format)
        for function in functions(options.address):
            check(function, options, console)
    except GuestpvError as error:
        console = console or Console("tap")
        console.bad = True
        console.say(f"Bail out! {'; '.join(filter(None, (error.message, error.hint)))}")
    console.end()


if __name__ == "__main__":
    main()
