"""The command line itself: help, exit codes, errors and JSON in one form for every verb."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import guestpv
from guestpv import errors
from guestpv.cli import main as cli
from guestpv.cli import report
from guestpv.cli.main import main

HEAVY = {"numpy", "pyroute2", "pyudev", "rich", "cffi", "asyncio"}


def every_verb(group: click.Group, words: list[str]) -> list[list[str]]:
    """The words of every command below a group."""
    context = click.Context(group)
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        found.append([*words, name])
        if isinstance(command, click.Group):
            found += every_verb(command, found[-1])
    return found


VERBS = every_verb(main, [])


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make ``guestpv list`` raise."""

    def survey() -> None:
        raise error

    monkeypatch.setattr("guestpv.vfio.survey.survey", survey)


@pytest.mark.parametrize("words", [[], *VERBS], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from guestpv.cli.main import main\n"
        f"try: main({[*words, '--help']!r})\n"
        "except SystemExit as end: print(end.code, *sorted(sys.modules), file=sys.stderr)"
    )
    done = python("-c", program)
    code, *modules = done.stderr.split()
    assert code == "0"
    assert not HEAVY & set(modules)
    assert not any(name.startswith("guestpv.core") for name in modules)


def test_help_answers_at_once() -> None:
    def seconds(*words: str) -> float:
        """Of processor time, which a busy machine does not stretch as it does the clock's."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(*words).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    bare = min(seconds("-c", "pass") for _ in range(3))
    assert any(seconds("-m", "guestpv", "--help") - bare < 0.3 for _ in range(20))


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_explains_itself_with_an_example(words: list[str]) -> None:
    done = run(*words, "-h")
    assert done.exit_code == 0
    assert f"guestpv {' '.join(words)}" in done.output.split("Example", 1)[1]
    assert all(len(line) <= 80 for line in done.output.splitlines() if "/completions/" not in line)
    if "COMMAND [ARGS]" not in done.output:
        assert "--json" in done.output


def test_lines_of_help_in_the_tables_are_true() -> None:
    for verbs in (cli.VERBS, __import__("guestpv.cli.net", fromlist=["VERBS"]).VERBS):
        for name, (place, text) in verbs.items():
            module, attribute = place.split(":")
            command = getattr(__import__(f"guestpv.cli.{module}", fromlist=[attribute]), attribute)
            assert (command.name, text[-1]) == (name, ".")


def test_version() -> None:
    assert run("--version").output == f"guestpv {guestpv.__version__}\n"


def test_without_a_verb_it_shows_help() -> None:
    done = run()
    assert done.exit_code == 2
    assert "Commands:" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["list", "--bogus"], "No such option"),
        (["net", "up", "--queues", "0"], "0 is not in the range"),
        (["completion", "tcsh"], "is not one of"),
    ],
)
def test_wrong_usage(words: list[str], message: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "--help" in done.stderr
    as_json = run(*words, "--json")
    answer = json.loads(as_json.stdout)
    assert as_json.exit_code == 2
    assert answer["ok"] is False
    assert answer["data"] is None
    assert answer["error"]["code"] == "usage"
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (errors.GuestpvError("m", where="w", hint="h"), "failed", 1),
        (errors.UsageError("m", where="w", hint="h"), "usage", 2),
        (errors.Refused("m", where="w", hint="h"), "refused", 3),
        (errors.AccessDenied("m", where="w", hint="h"), "permission", 4),
        (errors.DeviceViolation("m", where="w", hint="h"), "device-violation", 5),
        (errors.TimeLimit("m", where="w", hint="h"), "time-limit", 6),
        (errors.DeviceGone("m", where="w", hint="h"), "device-gone", 1),
        (errors.FeaturesRefused("m", where="w", hint="h"), "features-refused", 1),
    ],
)
def test_errors_have_one_form_and_one_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: errors.GuestpvError, code: str, status: int
) -> None:
    raising(monkeypatch, error)
    text = run("list")
    assert (text.exit_code, text.stdout) == (status, "")
    assert text.stderr == "error: w: m\n  -> h\n"
    as_json = run("list", "--json")
    assert as_json.exit_code == status
    assert json.loads(as_json.stdout) == {
        "schema": "guestpv.list/1",
        "ok": False,
        "data": None,
        "error": {"code": code, "message": "m", "where": "w", "hint": "h"},
    }
    assert as_json.stderr == ""


def test_errors_of_the_operating_system_and_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, PermissionError(13, "Permission denied", "/sys/x"))
    done = run("list")
    assert (done.exit_code, "/sys/x: Permission denied (EACCES)" in done.stderr) == (4, True)
    raising(monkeypatch, OSError(28, "No space left on device"))
    done = run("list")
    assert (done.exit_code, "No space left on device (ENOSPC)" in done.stderr) == (1, True)
    raising(monkeypatch, ZeroDivisionError("oops"))
    done = run("list")
    assert (done.exit_code, "internal error: ZeroDivisionError: oops" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("list", "-vv").stderr


def test_an_error_that_followed_another_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    second = errors.TimeLimit("the kernel's driver did not come back")
    second.__context__ = errors.DeviceViolation("the device lied")
    raising(monkeypatch, second)
    done = run("list")
    assert done.exit_code == 6
    assert "while coping with: the device lied" in done.stderr


def test_ctrl_c_outside_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def survey() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("guestpv.vfio.survey.survey", survey)
    assert run("list").exit_code == 130


def test_a_reader_that_has_gone_is_no_error() -> None:
    script = f"{sys.executable} -m guestpv --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("0", "1")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = run("completion", shell)
    assert done.exit_code == 0
    assert "_GUESTPV_COMPLETE" in done.output


def test_completion_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, vendor in (("0000:00:02.0", "0x1af4"), ("0000:00:1f.0", "0x8086")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "vendor").write_text(vendor + "\n")
    (tmp_path / "0000:00:03.0").mkdir()
    monkeypatch.setattr("guestpv.cli.completion.SYSFS", tmp_path)
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setenv("_GUESTPV_COMPLETE", "bash_complete")

    def complete(typed: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", f"guestpv info {typed}")
        return run().output.split()

    assert complete("") == ["plain,0000:00:02.0"]
    assert complete("vfio:") == ["plain,vfio:0000:00:02.0"]
    assert complete("0001") == []


def test_schema_names_the_verb() -> None:
    assert report.schema_of(None) == "guestpv.guestpv/1"
    context = click.Context(click.Command("up"), info_name="guestpv net up")
    assert report.schema_of(context) == "guestpv.net-up/1"


def test_module_is_the_command() -> None:
    assert os.linesep.join(python("-m", "guestpv", "--version").stdout.split()) == os.linesep.join(
        ["guestpv", guestpv.__version__]
    )
