"""Live migration of a guest to a second QEMU on this machine."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guestvm.errors import LabError
from guestvm.machine import Machine
from guestvm.monitor import Monitor

COMPLETION_LIMIT = 300
"""Seconds for a migration under load, on a machine that is slow and busy."""


def migrate(
    machine: Machine,
    *,
    through_file: bool = False,
    replace: Mapping[str, str] | None = None,
    qemu: str | None = None,
) -> dict[str, Any]:
    """Move the guest into a QEMU that is started for it; what QEMU reports of the migration.

    Commands that run in the guest go on, and their output goes on in their `Process`. The guest must not
    have a device that was hot-plugged.

    through_file: stop the guest, write it to a file and start again from there, instead of sending it over
        a unix socket while it runs.
    replace: option words of QEMU's that are others on the new side, such as a -netdev with its own TAP link.
    qemu: another QEMU program; it needs the machine type of the first.
    """
    assert machine.directory is not None
    home = Path(tempfile.mkdtemp(prefix="to-", dir=machine.directory))
    words = _words(machine.words, machine.run_directory, home, replace or {}, qemu)
    process = machine.launch([*words, "-incoming", "defer"], home)
    try:
        agent = machine.connect(process, home, "agent.sock")
        target = Monitor(machine.connect(process, home, "qmp.sock"))
        with machine.link.held():
            report = _transfer(machine, target, home, through_file)
            machine.link.follow(agent)
            machine.move(process, home, target)
    except BaseException:
        if machine.sockets != home:
            process.kill()
            process.wait(10)
            shutil.rmtree(home, ignore_errors=True)
        raise
    machine.words = words
    return report


def _words(
    words: Sequence[str], before: Path, home: Path, replace: Mapping[str, str], qemu: str | None
) -> list[str]:
    moved = []
    for option, word in zip(["", *words], words, strict=False):
        if option == "-chardev":
            word = word.replace(f"path={before}/", f"path={home}/")
        moved.append(replace.get(word, word))
    if qemu is not None:
        moved[moved.index("-accel") - 1] = qemu
    return moved


def _transfer(machine: Machine, target: Monitor, home: Path, through_file: bool) -> dict[str, Any]:
    uri = f"exec:cat > {home}/state" if through_file else f"unix:{home}/migration.sock"
    if through_file:
        machine.qmp("stop")
    else:
        target.command("migrate-incoming", uri=uri)
    machine.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=1000)
    machine.qmp("migrate", uri=uri)
    deadline = time.monotonic() + COMPLETION_LIMIT
    while (report := machine.qmp("query-migrate")).get("status") != "completed":
        if report.get("status") in ("failed", "cancelled"):
            raise LabError(f"the migration {report['status']}: {report.get('error-desc', 'no reason given')}")
        if time.monotonic() > deadline:
            with contextlib.suppress(LabError):
                machine.qmp("migrate_cancel")
            raise LabError(f"the migration did not complete within {COMPLETION_LIMIT} s: {report}")
        time.sleep(0.02)
    if through_file:
        target.command("migrate-incoming", uri=f"exec:cat {home}/state")
    while (state := target.command("query-status"))["status"] in ("inmigrate", "finish-migrate"):
        if time.monotonic() > deadline:
            raise LabError(f"the guest does not run on the new side: {state}")
        time.sleep(0.005)
    if through_file:
        target.command("cont")
        (home / "state").unlink()
    return dict(report)
