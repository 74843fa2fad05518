"""Weak memory: the core's orders searched exhaustively on small rings, and each of them proved necessary."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "guestpv" / "core"
ORDER = re.compile(r"GPV_(LOAD_ACQUIRE|STORE_RELEASE|FENCE_FULL)\(")
ORDERS = [
    pytest.param(path.name, number, id=f"{path.name}:{number}:{match[1]}")
    for path in (CORE / "split.c", CORE / "packed.c")
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if (match := ORDER.search(line))
]
SCENARIOS = 14


@pytest.mark.timeout(400)
@pytest.mark.requirement("DRV-SPLIT-32", "DRV-SPLIT-33", "DRV-PACKED-13", "DRV-PACKED-19", "DRV-PACKED-20")
def test_no_reordering_loses_a_buffer_or_a_notification(model: Path) -> None:
    done = subprocess.run([model], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    searched = dict(re.findall(r"(.*): (\d+) executions", done.stdout))
    assert len(searched) == SCENARIOS
    assert all(int(count) > 10 for count in searched.values())


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("file", "line"), ORDERS)
def test_each_order_is_missed_when_it_is_gone(model: Path, file: str, line: int) -> None:
    done = subprocess.run([model, file, str(line)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, f"nothing needs the order at {file}:{line}\n{done.stdout}"


def test_each_order_names_its_partner() -> None:
    """The comment above each order says what it pairs with and which clause asks for it."""
    assert len(ORDERS) == 8
    for file, number in (param.values for param in ORDERS):
        lines = (CORE / str(file)).read_text().splitlines()
        comment = " ".join(lines[int(str(number)) - 6 : int(str(number))])
        assert re.search(r"Pairs with the device's", comment), f"{file}:{number}"
        assert re.search(r"\(.*2\.[78]\.\d+", comment), f"{file}:{number}"
