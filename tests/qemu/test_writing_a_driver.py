"""The tutorial's drivers on QEMU's devices."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest

from pages import Block, blocks, run

from .conftest import EXECUTABLE

pytestmark = pytest.mark.usefixtures("strict")

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-driver.md"
QEMU = "On QEMU's device"


def is_needed(block: Block) -> bool:
    """Classes, imports and constants, without what the page shows in between."""
    return block.heading == QEMU or "class " in block.code or "CONFIG = " in block.code


@pytest.mark.timeout(240)
@pytest.mark.parametrize("part", ["Part 1: entropy", "Part 2: a console"])
def test_the_driver_of_a_part_drives_qemus_device(part: str, tmp_path: Path) -> None:
    names: dict[str, object] = {}
    exec("import guestpv\nfrom guestpv.trace import Recorder\nSPEC = 'loopback:rng'", names)
    changes = [
        ("/tmp/console.sock", str(tmp_path / "c.sock")),
        (
            "with guestpv.open(SPEC,",
            f"with guestpv.open(SPEC + ('&' if '?' in SPEC else '?') + 'qemu={quote(EXECUTABLE)}',",
        ),
    ]
    seen = 0
    for block in blocks(PAGE, part):
        if not is_needed(block):
            continue
        on_qemu = block.heading == QEMU
        printed = run(block, names, PAGE, *(changes if on_qemu else []))
        assert printed == (block.printed or ""), f"line {block.line}"
        seen += on_qemu
    assert seen == 1
