"""Whatever is left in the file system is the owner's alone, and no shell sees a user's words."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpv.services.capture import CaptureServer
from guestpv.services.control import ControlServer
from guestpv.vfio import binding
from guestpv.vfio.lock import FunctionLock, runtime_directory

SOURCES = sorted((Path(__file__).parents[2] / "guestpv").rglob("*.py"))
SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}
STARTERS = {"run", "Popen", "call", "check_call", "check_output", "create_subprocess_exec"}


@pytest.fixture
def careless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of a user whose umask takes nothing away."""
    before = os.umask(0)
    path = tmp_path / "g"
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(path))
    yield path
    os.umask(before)


def test_files_and_sockets_are_closed_to_others(careless: Path) -> None:
    directory = runtime_directory()
    lock = FunctionLock("0000:01:00.0")
    binding._remember({"address": "0000:01:00.0", "driver": "virtio-pci"}, binding.SYSTEM)
    with ControlServer(directory, dict, lambda: None) as control:
        path = control.listen("pv0")
        capture = CaptureServer(path.with_suffix(".capture"), lambda fd: None)
        modes = {one.name: one.lstat().st_mode & 0o777 for one in careless.iterdir()}
        capture.close()
    lock.close()
    assert careless.stat().st_mode & 0o777 == 0o700
    assert set(modes.values()) == {0o600}
    assert {"pv0.sock", "pv0.capture", "0000:01:00.0.lock", "0000:01:00.0.json"} == set(modes)


def shells(source: str) -> list[int]:
    """Lines that call a shell, or start a program from one string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        module = function.value.id if isinstance(function, ast.Attribute) and isinstance(
            function.value, ast.Name) else ""  # fmt: skip
        through_shell = any(word.arg == "shell" for word in node.keywords)
        text = bool(node.args) and isinstance(node.args[0], ast.JoinedStr | ast.Constant)
        one_string = module == "subprocess" and name in STARTERS and text
        if through_shell or one_string or (module in ("os", "subprocess", "asyncio") and name in SHELLS):
            found.append(node.lineno)
    return found


def test_the_search_finds_shells() -> None:
    for line in (
        "os.system(name)",
        "subprocess.run(['ip', name], shell=True)",
        "subprocess.Popen(f'ip link set {name}')",
        "subprocess.getoutput(name)",
    ):
        assert shells(line) == [1], line
    assert shells("subprocess.run(['sh', name]); os.execvp('x', words)") == []


def test_no_shell_is_given_words_of_a_user() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert shells(text) == [], path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.List) and [getattr(e, "value", None) for e in node.elts[1:2]] == ["-c"]:
                # A script of our own is a constant; what varies are its arguments.
                script = node.elts[2]
                assert isinstance(script, ast.Constant | ast.Name), f"{path}:{node.lineno}"
