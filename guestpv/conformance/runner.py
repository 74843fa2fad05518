"""The device suite, run by a program: pytest inside, outcomes outside."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..errors import GuestpvError, UsageError
from .verdict import Outcome

CHECKS: Final = Path(__file__).parent / "device"
"""Where the checks of a device are."""
NO_PLUGINS: Final = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"


def run(
    spec: str,
    *,
    select: str = "",
    hostile: bool = False,
    shard: str = "1/1",
    cases: Sequence[str] = (),
    jobs: int = 1,
    wire: str = "",
    tell: Callable[[Outcome], None] = lambda outcome: None,
    plugins: Sequence[object] = (),
) -> list[Outcome]:
    """Check a device.

    Args:
        spec: the device.
        select: requirements, as ``catalogue.patterns`` takes them.
        hostile: whether to give it malformed rings and requests, too.
        shard: ``I/N``.
        cases: names of single cases, as outcomes have them; all of them when none are named.
        jobs: processes, each with a device of its own: only where the scheme makes devices. ``{job}`` in
            ``spec`` becomes the number of the process, so that each can have a disk image of its own.
        wire: network interface at the other end of a network device's cable.
        tell: called with each outcome as it comes.
        plugins: more pytest plugins.

    Raises:
        UsageError: pytest is not installed, or an argument makes no sense.
        GuestpvError: the suite could not run.
    """
    if find_spec("pytest") is None:
        raise UsageError(
            "the checks of a device are pytest tests, and pytest is not installed",
            hint="pip install 'guestpv[conformance]'",
        )
    if jobs > 1 and find_spec("xdist") is None:
        raise UsageError("several jobs need pytest-xdist", hint="pip install pytest-xdist")
    import pytest

    arguments = [
        *(str(CHECKS / name) for name in cases),
        *([] if cases else [str(CHECKS)]),
        f"--device={spec}",
        f"--select={select}",
        f"--shard={shard}",
        f"--wire={wire}",
        *(["--hostile"] if hostile else []),
        *(["-p", "xdist.plugin", f"--numprocesses={jobs}"] if jobs > 1 else []),
        f"--config-file={os.devnull}",
        f"--rootdir={CHECKS}",
        *("--capture=no", "--quiet"),
        "--tb=native",  # An outcome says what was seen; to quote sources takes longer than most checks.
        *("-p", "no:cacheprovider", "-p", "guestpv.conformance.options"),
    ]
    collector = _Collector(tell)
    said = io.StringIO()
    with _no_other_plugins(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = pytest.main(arguments, plugins=[collector, *plugins])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise UsageError("no check was selected", hint="guestpv conform device SPEC --select DEV-PCI")
    # So pytest also calls it when checks could not be collected, as the device could not be looked at.
    if status == pytest.ExitCode.INTERRUPTED and not collector.broken:
        raise KeyboardInterrupt
    if status == pytest.ExitCode.USAGE_ERROR:
        problem = [line for line in said.getvalue().splitlines() if line.startswith("ERROR: ")]
        raise UsageError(problem[-1].removeprefix("ERROR: ") if problem else said.getvalue().strip())
    if collector.broken:
        several = "each job opens a device of its own: give each its file with {job}, as in disk{job}.img"
        raise GuestpvError(
            f"the checks could not run: {collector.broken[0]}", where=spec, hint=several if jobs > 1 else ""
        )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not collector.outcomes:
        last = [line for line in said.getvalue().splitlines() if line.strip()][-20:]
        raise GuestpvError("the checks could not run: " + "\n".join(last))
    return sorted(collector.outcomes, key=lambda outcome: collector.order.get(outcome.check, 0))


@contextlib.contextmanager
def _no_other_plugins() -> Iterator[None]:
    """Keep out what else is installed: it could change verdicts, and loading it takes longer than the checks.

    The variable holds for the processes of several jobs, too; pytest has an option for it from 8.4 on only.
    """
    before = os.environ.get(NO_PLUGINS)
    os.environ[NO_PLUGINS] = "1"
    try:
        yield
    finally:
        del os.environ[NO_PLUGINS]
        if before is not None:
            os.environ[NO_PLUGINS] = before


class _Collector:
    """A pytest plugin that gathers outcomes, also those of other processes."""

    def __init__(self, tell: Callable[[Outcome], None]) -> None:
        self.outcomes: list[Outcome] = []
        self.broken: list[str] = []
        self.order: dict[str, int] = {}
        self._tell = tell

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
            self.broken.append(lines[-1].removeprefix("E").strip() if lines else report.nodeid)

    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.order = {name.rpartition("/")[2]: place for place, name in enumerate(ids)}

    # Only with xdist there is such a hook.
    pytest_xdist_node_collection_finished.pytest_impl = {"optionalhook": True}  # type: ignore[attr-defined]

    def pytest_runtest_logreport(self, report: Any) -> None:
        from .plugin import outcomes_of

        for outcome in outcomes_of(report):
            self.outcomes.append(outcome)
            self._tell(outcome)
