"""What the package says about itself: version, entry point, wheel tag, requirement ids."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import guestpv

ROOT = Path(__file__).parents[2]
IDENTIFIER = re.compile(r"\b(?:DRV|DEV)-[A-Z0-9]+(?:-[A-Z0-9]+)*-[0-9]{2,}\b")
SOURCES = {".py", ".c", ".h", ".md"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def catalogue() -> list[list[str]]:
    """Rows of both halves of the requirement catalogue, without their headings."""
    rows = []
    for name in ("driver-requirements.tsv", "device-requirements.tsv"):
        text = resources.files("guestpv.spec").joinpath(name).read_text()
        rows += [line.split("\t") for line in text.splitlines()[1:]]
    return rows


def unknown_identifiers(texts: dict[str, str], known: set[str]) -> list[str]:
    """``where: id`` of every requirement id in the texts that the catalogue does not have."""
    return [
        f"{where}: {found}"
        for where, text in sorted(texts.items())
        for found in sorted(set(IDENTIFIER.findall(text)) - known)
    ]


def sources() -> Iterator[Path]:
    """Files of the project that may name requirements."""
    for folder in ("guestpv", "tests", "tools", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SOURCES and path.name != "_core.c" and "__pycache__" not in path.parts:
                yield path


def test_the_installed_version_is_the_one_in_the_source() -> None:
    assert metadata.version("guestpv") == guestpv.__version__
    assert "version" in project()["project"]["dynamic"]
    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "guestpv.__version__"}


def test_the_changelog_has_a_section_for_the_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert guestpv.__version__ in headings


def test_the_entry_point_is_importable() -> None:
    declared = project()["project"]["scripts"]["guestpv"]
    (installed,) = metadata.entry_points(group="console_scripts", name="guestpv")
    assert installed.value == declared
    module, _, attribute = declared.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_the_command_tells_its_version_from_anywhere(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("guestpv")
    done = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"guestpv {guestpv.__version__}\n"


def test_one_wheel_serves_every_python_from_the_oldest_one_on() -> None:
    oldest = project()["project"]["requires-python"].removeprefix(">=")
    (call,) = [
        node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}["options"]
    assert options == {"bdist_wheel": {"py_limited_api": "cp" + oldest.replace(".", "")}}


def test_the_core_is_built_against_the_limited_api() -> None:
    from guestpv.core import _core

    assert Path(_core.__file__).name == "_core.abi3.so"


def test_types_and_catalogue_are_package_data() -> None:
    patterns = project()["tool"]["setuptools"]["package-data"]["guestpv"]
    packaged = {path for pattern in patterns for path in (ROOT / "guestpv").glob(pattern)}
    assert {path.name for path in packaged} >= {
        "py.typed",
        "driver-requirements.tsv",
        "device-requirements.tsv",
    }


def test_the_catalogue_is_well_formed() -> None:
    rows = catalogue()
    assert {len(row) for row in rows} == {9}
    assert [row[0] for row in rows if not IDENTIFIER.fullmatch(row[0])] == []
    assert [name for name, times in Counter(row[0] for row in rows).items() if times > 1] == []


def test_every_requirement_id_in_the_sources_is_in_the_catalogue() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text(errors="replace") for path in sources()}
    known = {row[0] for row in catalogue()}
    assert any(known & set(IDENTIFIER.findall(text)) for text in texts.values())
    assert unknown_identifiers(texts, known) == []


def quoted_messages() -> list[str]:
    """Our messages in the guide's table, the code spans of its first column; "..." is what varies."""
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "vfio-in-a-guest.md").read_text(), re.MULTILINE)
    ours = [row for row in rows if row.startswith("`")]
    return [span for row in ours for span in re.findall("`(.+?)`", row)]


def test_the_guide_quotes_messages_as_they_are() -> None:
    words = "\n".join(
        node.value
        for path in (ROOT / "guestpv").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    messages = quoted_messages()
    assert len(messages) > 10
    parts = [part.strip() for message in messages for part in message.split("...")]
    assert [part for part in parts if part not in words] == []


def test_an_unknown_requirement_id_is_found() -> None:
    known = {row[0] for row in catalogue()}
    wrong = "-".join(("DRV", "NOWHERE", "01"))
    right = next(iter(known))
    assert unknown_identifiers({"a.py": f"# {right}, {wrong}"}, known) == [f"a.py: {wrong}"]
