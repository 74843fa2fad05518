"""The laws of the house: who may import whom, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "guestpv"

STANDS_ON: dict[str, set[str]] = {
    "errors": set(),
    "spec": set(),
    "system": set(),
    "wire": {"spec"},
    "memory": {"system"},
    "core": set(),
    "virtqueue": {"spec", "memory", "core"},
    "pci": {"spec", "system", "wire", "memory", "core"},
    "vfio": {"pci"},
    "transport": {"virtqueue", "pci"},
    "drivers": {"transport"},
    "services": {"drivers"},
    "devices": {"spec", "memory", "virtqueue.layout", "pci.function"},
    "serve": {"devices", "wire"},
    "trace": {"spec", "transport", "virtqueue"},
    "opener": {"vfio", "drivers", "devices", "serve", "trace"},
    "conformance": {"drivers", "devices", "serve", "opener"},
    "vectors": {"opener"},
    "explain": {"conformance"},
    "cli": {"services", "trace", "conformance", "vectors", "explain", "opener"},
    "__main__": {"cli"},
    "": {"opener"},
}
"""Unit (a module or package directly in guestpv, "" for guestpv itself) -> what it stands directly upon.

What a unit stands upon it may import, and everything below that. ``errors`` is everybody's.
"""

EXACTLY = {"devices"}
"""Units that may import only what stands there: the other wing shares data and layout, no behaviour."""

SHARED_MODULES = {unit.split(".")[0] for units in STANDS_ON.values() for unit in units if "." in unit}


def allowed(unit: str) -> set[str]:
    """Everything a unit may import."""
    found = {unit, "errors"} | STANDS_ON[unit]
    waiting = set() if unit in EXACTLY else set(STANDS_ON[unit])
    while waiting:
        below = STANDS_ON.get(waiting.pop(), set())
        waiting |= below - found
        found |= below
    return found


def module_name(path: Path, package: Path) -> str:
    """Dotted name below the package: ``transport.pci``, ``virtqueue.__init__``, ``__init__``."""
    return ".".join(path.relative_to(package).with_suffix("").parts)


def imported(tree: ast.Module, module: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name below the package) of every import of ours, wherever in the file it is."""

    def resolve(name: str) -> str:
        """The module that a dotted name reaches: the name itself, or what defines it."""
        if name in modules or f"{name}.__init__" in modules:
            return name
        head, _, last = name.rpartition(".")
        if head:
            return resolve(head)
        # A name that is not a module: of the package itself only data is free, the rest is the opener's.
        return "" if last.startswith("__") else "opener"

    def ours(name: str) -> Iterator[str]:
        if name.split(".")[0] == "guestpv":
            below = name.removeprefix("guestpv").removeprefix(".")
            yield resolve(below) if below else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                for target in ours(alias.name):
                    yield node.lineno, target
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = ["guestpv", *module.split(".")][: -node.level]
                origin = ".".join([*above, origin] if origin else above)
            for alias in node.names:
                for target in ours(f"{origin}.{alias.name}"):
                    yield node.lineno, target
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                for target in ours(str(first.value)):
                    yield node.lineno, target


def violations(package: Path) -> list[str]:
    """Every import in the package that a law forbids."""
    files = sorted(package.rglob("*.py"))
    modules = {module_name(path, package) for path in files}
    found = []
    for path in files:
        module = module_name(path, package)
        unit = "" if module == "__init__" else module.split(".")[0]
        where = path.relative_to(package.parent)
        if unit not in STANDS_ON:
            found.append(f"{where}: no law says what {unit} stands upon")
            continue
        may = allowed(unit)
        for line, target in imported(ast.parse(path.read_text()), module, modules):
            parts = target.split(".")
            if module.endswith("__init__") and unit in SHARED_MODULES:
                found.append(
                    f"{where}:{line}: {unit}/__init__ imports nothing, or its modules cannot be shared"
                )
            elif target and not may & {".".join(parts[:end]) for end in range(1, len(parts) + 1)}:
                found.append(f"{where}:{line}: {unit or 'guestpv'} must not import {target}")
    return found


def test_imports_go_downwards() -> None:
    assert violations(PACKAGE) == []


def test_every_layer_that_exists_has_a_law_and_files() -> None:
    units = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert units - {"__init__"} <= STANDS_ON.keys()
    assert {
        "spec",
        "system",
        "virtqueue",
        "vfio",
        "transport",
        "drivers",
        "services",
        "devices",
        "cli",
    } <= units


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small package in which every import is lawful."""
    files = {
        "__init__": "def __getattr__(name):\n    from . import opener\n",
        "errors": "",
        "system": "from .errors import GuestpvError",
        "memory": "from .system import SYSTEM\nimport numpy",
        "opener": "from .transport.base import Transport\nfrom .devices import model",
        "spec.__init__": "",
        "spec.ring": "from .layout import Field",
        "spec.layout": "",
        "core.__init__": "",
        "core.build": "import cffi",
        "virtqueue.__init__": "",
        "virtqueue.layout": "from guestpv.spec.ring import DESC",
        "virtqueue.split": "from ..core._core import lib\nfrom .layout import sizes",
        "pci.__init__": "",
        "pci.function": "from ..memory import DmaSpace",
        "pci.qtest": "from ..spec import ring",
        "vfio.__init__": "",
        "vfio.function": "from ..pci.function import PciFunction\nfrom .. import errors",
        "transport.__init__": "",
        "transport.base": "from ..virtqueue import split\nfrom ..system import SYSTEM",
        "drivers.__init__": "",
        "drivers.net": "from ..transport.base import Transport",
        "services.__init__": "",
        "services.net": "def f():\n    from ..drivers.net import Net",
        "devices.__init__": "",
        "devices.model": "from ..virtqueue.layout import sizes\nfrom ..pci.function import PciFunction",
        "cli.__init__": "",
        "cli.main": "from .. import __version__\nfrom ..services import net\nimport guestpv",
    }
    root = tmp_path / "guestpv"
    for name, text in files.items():
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_lawful_house_has_no_violations(house: Path) -> None:
    assert violations(house) == []


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        (
            "spec.ring",
            "from ..errors import GuestpvError\nimport guestpv.memory",
            "spec must not import memory",
        ),
        ("system", "from .memory import DmaPool", "system must not import memory"),
        ("memory", "from .spec import ring", "memory must not import spec"),
        ("core.build", "from .. import spec", "core must not import spec"),
        (
            "virtqueue.split",
            "from ..transport.base import Transport",
            "virtqueue must not import transport.base",
        ),
        ("pci.qtest", "def f():\n    from ..vfio import function", "pci must not import vfio.function"),
        ("vfio.function", "from ..virtqueue.split import S", "vfio must not import virtqueue.split"),
        (
            "transport.base",
            "if TYPE_CHECKING:\n    from ..drivers.net import Net",
            "transport must not import drivers",
        ),
        ("drivers.net", "from ..vfio.function import VfioFunction", "drivers must not import vfio.function"),
        ("drivers.net", "from guestpv import open", "drivers must not import opener"),
        ("services.net", "from ..cli.main import main", "services must not import cli.main"),
        (
            "services.net",
            "import importlib\nimportlib.import_module('guestpv.vfio.function')",
            "must not import vfio",
        ),
        ("devices.model", "from ..virtqueue.split import S", "devices must not import virtqueue.split"),
        ("devices.model", "from ..virtqueue import split", "devices must not import virtqueue.split"),
        ("devices.model", "from .. import virtqueue", "devices must not import virtqueue"),
        ("devices.model", "from ..pci import qtest", "devices must not import pci.qtest"),
        ("devices.model", "from ..system import SYSTEM", "devices must not import system"),
        ("opener", "from .services.net import NetService", "opener must not import services.net"),
        ("opener", "import guestpv.cli.main as m", "opener must not import cli.main"),
        ("virtqueue.__init__", "from . import split", "virtqueue/__init__ imports nothing"),
        ("pci.__init__", "from .function import PciFunction", "pci/__init__ imports nothing"),
        ("helpers", "", "no law says what helpers stands upon"),
    ],
)
def test_a_broken_law_is_found(house: Path, module: str, text: str, complaint: str) -> None:
    path = house.joinpath(*module.split(".")).with_suffix(".py")
    path.write_text(text)
    found = violations(house)
    assert len(found) == 1
    assert complaint in found[0]
    assert str(path.relative_to(house.parent)) in found[0]
