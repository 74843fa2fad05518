"""How a command reports: for people or as JSON, and its errors in one form with one exit code."""

from __future__ import annotations

import errno
import functools
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from ..errors import AccessDenied, GuestpvError, UsageError

Human = Callable[[], None]
DANGERS: Final = "guestpv.vfio.noiommu"
"""The logger whose warnings people see without asking for the log."""


def schema_of(context: click.Context | None) -> str:
    """Name of the JSON schema of the running verb: ``guestpv net up`` reports ``guestpv.net-up/1``."""
    words = context.command_path.split()[1:] if context else []
    return f"guestpv.{'-'.join(words) or 'guestpv'}/1"


class Report:
    """What a running verb says.

    Attributes:
        as_json: one JSON object a line on standard output instead of text.
        verbose: how often ``-v`` was given.
    """

    def __init__(self, schema: str, as_json: bool, verbose: int) -> None:
        self.schema = schema
        self.as_json = as_json
        self.verbose = verbose

    def done(self, data: Any, human: Human) -> None:
        """Report a result: ``data`` as JSON, or whatever ``human`` prints."""
        if self.as_json:
            self._line(ok=True, data=data, error=None)
        else:
            human()
        sys.stdout.flush()

    def event(self, text: str) -> None:
        """In JSON: a line about something that happened while the verb runs."""
        click.echo(
            json.dumps({"schema": "guestpv.event/1", "ok": True, "data": {"event": text}, "error": None})
        )
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Tell a person about progress; silent in JSON."""
        if not self.as_json:
            click.echo(text)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Tell about a danger, on standard error."""
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {text}", err=True)

    def failed(self, error: GuestpvError, data: Any = None) -> None:
        """Report an error: JSON on standard output, or text on standard error."""
        if self.as_json:
            self._line(ok=False, data=data, error=describe(error))
            sys.stdout.flush()
            return
        sys.stdout.flush()
        text = f"{error.where}: {error.message}" if error.where else error.message
        click.echo(f"{click.style('error:', fg='red', bold=True)} {text}", err=True)
        for line in error.hint.splitlines():
            click.echo(f"  {click.style('->', fg='green')} {line}", err=True)
        cause = None if error.__suppress_context__ else error.__context__
        if isinstance(cause, GuestpvError) and cause is not error.__cause__:
            click.echo(f"  while coping with: {str(cause).splitlines()[0]}", err=True)
        if self.verbose > 1:
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)

    def _line(self, *, ok: bool, data: Any, error: dict[str, str] | None) -> None:
        click.echo(json.dumps({"schema": self.schema, "ok": ok, "data": data, "error": error}))


def describe(error: GuestpvError) -> dict[str, str]:
    """An error as the ``error`` member of a JSON report."""
    return {"code": error.code, "message": error.message, "where": error.where, "hint": error.hint}


def explain(error: Exception) -> GuestpvError:
    """Any exception as one of our own tree.

    An error of the operating system keeps its file and errno; everything else that gets here is a defect.
    """
    if isinstance(error, GuestpvError):
        return error
    if isinstance(error, OSError):
        where = str(error.filename or "")
        name = errno.errorcode.get(error.errno or 0, "")
        text = f"{error.strerror or error}" + (f" ({name})" if name else "")
        if isinstance(error, PermissionError):
            return AccessDenied(text, where=where, hint="run the command as root, or with sudo")
        hint = "run it again with -vv to see where it happened"
        if where and isinstance(error, FileNotFoundError):
            hint = "check the path, and that its directory exists"
        return GuestpvError(text, where=where, hint=hint)
    return GuestpvError(
        f"internal error: {type(error).__name__}: {error}",
        hint="this is a defect of guestpv: run it again with -vv and report what it prints",
    )


def from_click(error: click.ClickException) -> UsageError:
    """A command line that click could not make sense of, as an error of ours."""
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context else "guestpv --help"
    return UsageError(error.format_message(), hint=hint)


class _Dangers(logging.Handler):
    """Passes on what the library warns of."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.warn(record.getMessage())


@contextmanager
def _dangers_told(report: Report) -> Iterator[None]:
    """Every verb tells what no-IOMMU mode risks; -vv shows the whole log anyway."""
    log, handler = logging.getLogger(DANGERS), _Dangers(report)
    if report.verbose <= 1:
        log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def reporting(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb ``--json`` and ``-v``, a Report as its first argument, and the common end of errors."""

    @click.option("--json", "as_json", is_flag=True, help="Report as JSON, for programs.")
    @click.option(
        "-v",
        "--verbose",
        count=True,
        help="More detail; -vv adds the library's log, and where an error came from.",
    )
    @click.pass_context
    @functools.wraps(function)
    def run(context: click.Context, /, *args: Any, as_json: bool, verbose: int, **values: Any) -> None:
        report = Report(schema_of(context), as_json, verbose)
        if verbose > 1:
            logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s: %(message)s")
        try:
            with _dangers_told(report):
                function(report, *args, **values)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as problem:
            error = explain(problem)
            if error is not problem:
                error.__cause__ = problem
            report.failed(error)
            context.exit(error.exit_status)

    return run
