"""``guestpv support-bundle``: what somebody who helps has to know, in one file, without secrets."""

from __future__ import annotations

import io
import json
import os
import platform
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import UsageError
from .report import Report, describe, explain, reporting

if TYPE_CHECKING:
    from .redact import Redactor

EXAMPLE = """\b
Examples:
  guestpv support-bundle
  guestpv support-bundle -o bundle.tar.gz --add trace.jsonl
"""
PACKAGES: Final = ("numpy", "cffi", "pyudev", "pyroute2", "click", "rich", "qemu.qmp")
LARGEST: Final = 64 << 20
ABOUT: Final = """\
What `guestpv support-bundle` collected on this machine:

versions.json   guestpv, Python and its packages, the kernel
doctor.json     what `guestpv doctor` says
functions.json  what `guestpv list` says
info/*.json     what the kernel shows of each function; no device was opened
added/*         files that were named with --add

MAC addresses keep their first half, IP addresses, the host's and the user's name and the path of the home
directory are replaced. No environment, no kernel command line, no frames and no disk contents are in here.
Look through it before you send it all the same.
"""


@click.command("support-bundle", epilog=EXAMPLE)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; default: guestpv-support-DATE.tar.gz here.",
)
@click.option(
    "--add",
    "added",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text file to put in, such as a trace or a log; can be repeated.",
)
@reporting
def support_bundle(report: Report, output: Path | None, added: tuple[Path, ...]) -> None:
    """Collect what a report about a problem needs into one archive.

    Versions, doctor's checks, the virtio functions and what the kernel says about them, and files that
    are named. Addresses and names are made unreadable; no device is touched.
    """
    from .redact import Redactor

    redactor = Redactor.here()
    path = output or Path(time.strftime("guestpv-support-%Y%m%d-%H%M%S.tar.gz"))
    members = collect(redactor, added)
    # For the owner's eyes: it says a lot about the machine, whatever was taken out.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in members.items():
            data = text.encode()
            entry = tarfile.TarInfo(f"guestpv-support/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))
    report.done(
        {"file": str(path), "members": list(members)},
        lambda: click.echo(f"{path}: {len(members)} files. Look through it, then send it."),
    )


def collect(redactor: Redactor, added: tuple[Path, ...]) -> dict[str, str]:
    """Member -> its text. What cannot be found out is told instead of being left out."""
    from ..vfio.survey import survey
    from .list import describe as of_function

    members = {"README.txt": ABOUT, "versions.json": _json(versions())}
    members["doctor.json"] = _json(_attempt(_doctor))
    functions = _attempt(survey)
    if isinstance(functions, list):
        members["functions.json"] = _json([of_function(function) for function in functions])
        for function in functions:
            members[f"info/{function.address}.json"] = _json(_attempt(partial(_info, function)))
    else:
        members["functions.json"] = _json(functions)
    for path in added:
        if path.stat().st_size > LARGEST:
            raise UsageError(
                f"more than {LARGEST >> 20} MiB", where=str(path), hint="cut it to the part that matters"
            )
        try:
            members[f"added/{path.name}"] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UsageError(
                "not a text file: what is in it could not be looked through for secrets",
                where=str(path),
                hint="send it separately, if you want others to have it",
            ) from None
    return {name: redactor(text) for name, text in members.items()}


def versions() -> dict[str, Any]:
    """Of us, of Python and its packages, of the kernel."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {
        "guestpv": __version__,
        "python": platform.python_version(),
        "packages": found,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
    }


def _doctor() -> list[dict[str, Any]]:
    from dataclasses import asdict

    from .checks import examine

    return [asdict(check) for check in examine(None)]


def _info(function: Any) -> dict[str, Any]:
    from ..opener import Spec
    from .info import of_kernel

    return of_kernel(Spec("vfio", function.address), function)


def _attempt(what: Callable[[], Any]) -> Any:
    try:
        return what()
    except Exception as error:
        return {"error": describe(explain(error))}


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, default=str) + "\n"
