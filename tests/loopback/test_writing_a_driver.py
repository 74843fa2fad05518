"""The tutorial: every block of it runs, and prints what stands below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import blocks, run

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-driver.md"
QEMU = "On QEMU's device"


@pytest.mark.parametrize("part", ["Part 1: entropy", "Part 2: a console"])
def test_the_code_of_a_part_prints_what_the_page_says(part: str) -> None:
    names: dict[str, object] = {}
    count = 0
    for block in blocks(PAGE, part):
        if block.heading == QEMU:
            continue
        printed = run(block, names, PAGE)
        assert printed == (block.printed or ""), f"line {block.line}"
        count += 1
    assert count >= 6


def test_a_wrong_line_on_the_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("## P\n\n```python\nprint(1)\n```\n```text\n2\n```\n\n```python\nx = 3\n```\n")
    first, second = blocks(page, "P")
    assert run(first, {}, page) == "1" != first.printed
    assert (second.printed, second.line) == (None, 11)
    with pytest.raises(ZeroDivisionError):
        run(second, {}, page, ("3", "1 / 0"))
