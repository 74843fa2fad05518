"""Each rule of the rings, broken once in a copy of the core: the native tests have to notice."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "guestpv" / "core"
TEST = Path(__file__).resolve().parent / "core_model" / "ring_test.c"

PROCESSOR_SECONDS = 2

MUTANTS = [
    # requirement, file, text that occurs once, what stands there instead
    ("DRV-SPLIT-40", "split.c", "gpv_word(len, flags, next)", "gpv_word(len, next, flags)"),
    (
        "DRV-SPLIT-04",
        "ring.h",
        "element >= rows->writable_from ? GPV_DESC_F_WRITE",
        "element ? GPV_DESC_F_WRITE",
    ),
    ("DRV-SPLIT-06", "ring.h", "if (length == 0)", "if (length > 50)"),
    ("DRV-SPLIT-08", "split.c", "q->free_head = (uint16_t)id;", "q->free_head = 0;"),
    ("DRV-SPLIT-09", "queue.c", "if (options & GPV_INDIRECT)", "if (1)"),
    ("DRV-SPLIT-44", "split.c", "i + 1 < rows->elements ? i + 1 : 0);", "i);"),
    ("DRV-SPLIT-47", "split.c", "(uint16_t)q->turn_added, word", "(uint16_t)(q->turn_added % q->size), word"),
    ("DRV-SPLIT-48", "split.c", "avail_ring[turn & mask]", "avail_ring[(turn + 1) & mask]"),
    ("DRV-SPLIT-50", "split.c", "room -= taken;", "room -= 1;"),
    (
        "DRV-SPLIT-55",
        "split.c",
        "S(q)->event = (uint16_t)q->turn_reaped;",
        "S(q)->event = (uint16_t)(q->turn_reaped + 1);",
    ),
    ("DRV-SPLIT-56", "ring.h", "(uint16_t)(new_index - event - 1) <", "(uint16_t)(new_index - event) <"),
    ("DRV-SPLIT-25", "split.c", "return !word;", "return 0;"),
    (
        "DRV-SPLIT-57",
        "split.c",
        "q->turn_reaped + 1;\n    if (batch > ready)",
        "q->turn_reaped;\n    if (batch > ready)",
    ),
    ("DRV-SPLIT-54", "ring.h", "if (len > slot->writable)", "if (0)"),
    ("DEV-SPLIT-37", "ring.h", "if (id >= q->size)", "if (0)"),
    ("DEV-SPLIT-37", "ring.h", "if (slot->count == 0)", "if (0)"),
    ("DEV-SPLIT-37", "ring.h", "if (slot->turn >= q->turn_published)", "if (0)"),
    ("DEV-SPLIT-36", "split.c", "if (ready > gpv_waiting(q))", "if (0)"),
    ("DEV-SPLIT-41", "split.c", "if (batch > ready)", "if (0)"),
    ("DRV-SPLIT-34", "split.c", "GPV_STORE(q, S(q)->avail_flags, 0);", "(void)0;"),
    ("DRV-PACKED-12", "packed.c", "room < taken ? GPV_EFULL", "room < 1 ? GPV_EFULL"),
    (
        "DRV-PACKED-26",
        "packed.c",
        "return wrap ? GPV_DESC_F_AVAIL : GPV_DESC_F_USED;",
        "return GPV_DESC_F_AVAIL;",
    ),
    ("DRV-PACKED-27", "ring.h", "place.wrap ^= 1;", "(void)0;"),
    (
        "DRV-PACKED-29",
        "packed.c",
        "if ((flags & USED_AND_AVAIL) != used(place.wrap)) {",
        "if (!(flags & GPV_DESC_F_USED)) {",
    ),
    ("DRV-PACKED-34", "packed.c", "id = in_order ? place.offset : next[id];", "id = place.offset;"),
    ("DRV-PACKED-35", "packed.c", "gpv_place_after(place, step, size)", "gpv_place_after(place, 1, size)"),
    ("DRV-PACKED-13", "packed.c", "flags ^= USED_AND_AVAIL; /* available", "flags ^= 0; /* available"),
    ("DRV-PACKED-13", "packed.c", "id, flags ^ hold);", "id, flags);"),
    (
        "DRV-PACKED-26",
        "packed.c",
        "d = P(q)->desc;\n            flags ^= USED_AND_AVAIL;",
        "d = P(q)->desc;",
    ),
    ("DRV-PACKED-12", "packed.c", "count < q->free ? count : q->free;", "count;"),
    ("DRV-PACKED-37", "packed.c", "if (!(flags & GPV_DESC_F_WRITE) &&", "if (0 &&"),
    ("DRV-PACKED-38", "packed.c", "len = rows.elements * 16;", "len = rows.elements;"),
    (
        "DRV-PACKED-39",
        "packed.c",
        "q->slots[id].turn - q->turn_reaped + 1)",
        "q->slots[id].turn - q->turn_reaped + 2)",
    ),
    ("DRV-PACKED-40", "ring.h", "place.offset | place.wrap << 15", "place.offset | place.wrap << 14"),
    ("DRV-PACKED-45", "packed.c", "(uint32_t)back <= added", "(uint32_t)back < added"),
    (
        "DRV-PACKED-43",
        "packed.c",
        "if (flags == 0) /* RING_EVENT_FLAGS_ENABLE */\n        return 1;",
        "if (flags == 0)\n        return 0;",
    ),
    (
        "DEV-PACKED-16",
        "packed.c",
        "if (waiting && (flags & USED_AND_AVAIL)",
        "if (0 && (flags & USED_AND_AVAIL)",
    ),
    ("DEV-PACKED-20", "packed.c", "if (!waiting)", "if (0)"),
    ("DEV-PACKED-26", "packed.c", "if ((event & 0x7fffu) >= q->size)", "if (0)"),
    ("DEV-PACKED-27", "packed.c", "if (flags != 2 || !q->event_idx)", "if (0)"),
    ("DEV-SPLIT-18", "split.c", "if (word > 1)", "if (0)"),
    ("DRV-SPLIT-46", "queue.c", "memset(q->driver, 0, q->driver_size);", "(void)0;"),
    ("DRV-SPLIT-22", "queue.c", "memset(q->device, 0, q->device_size);", "(void)0;"),
    ("DRV-PACKED-25", "queue.c", "memset(q->desc, 0, q->desc_size);", "(void)0;"),
]
"""What a mutant breaks, by requirement; the lies of a device stand under its requirement."""


Build = Callable[[Path, str, list[str]], Path]
NAMES = ("queue", "split", "packed", "kick", "wait", "ring_test")
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiled(core: Path, name: str, folder: Path, flags: list[str]) -> Path:
    source, target = TEST if name == "ring_test" else core / f"{name}.c", folder / f"{name}.o"
    how = ["-std=gnu11", "-O0", "-w", *flags, f"-I{core}", "-c"]
    subprocess.run(["gcc", *how, source, "-o", target], check=True, timeout=300)
    return target


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build the test over a core that differs from ours in one file; the other files are compiled once."""
    ready: dict[str, dict[str, Path]] = {}

    def build(core: Path, file: str, flags: list[str]) -> Path:
        kind = " ".join(flags)
        if kind not in ready:
            folder = tmp_path_factory.mktemp("core")
            ready[kind] = {name: compiled(CORE, name, folder, flags) for name in NAMES}
        changed = [name for name in NAMES if file in (f"{name}.c", "ring.h")]
        parts = ready[kind] | {name: compiled(core, name, core, flags) for name in changed}
        program = core / "program"
        subprocess.run(["gcc", *flags, *parts.values(), "-o", program, "-pthread"], check=True, timeout=300)
        return program

    return build


def noticed(program: Path) -> bool:
    """Run the test. Returns whether it failed."""
    for command in (["walk", "1", "128000"], ["fuzz", "1", "300000"]):
        # A mutant may spin for ever. The core needs a tenth of this processor time, however busy the machine.
        limited = ["sh", "-c", f'ulimit -t {PROCESSOR_SECONDS}; exec "$@"', "sh", program, *command]
        done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
        if done.returncode != 0 or ": 0\n" in done.stdout:
            return True
    return False


@pytest.fixture
def core(tmp_path: Path) -> Path:
    for path in CORE.glob("*.[ch]"):
        if not path.name.startswith("_"):
            shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [pytest.param(*rest, id=f"{requirement}-{rest[1][:24]}") for requirement, *rest in MUTANTS],
)
def test_a_broken_rule_is_noticed(core: Path, build: Build, file: str, old: str, new: str) -> None:
    text = (core / file).read_text()
    assert text.count(old) == 1, "the mutant no longer fits the core"
    (core / file).write_text(text.replace(old, new))
    assert noticed(build(core, file, [])) or noticed(build(core, file, SANITIZED))


def test_the_core_itself_is_not_noticed(core: Path, build: Build) -> None:
    assert not noticed(build(core, "ring.h", []))
