"""The core without Python: long walks, two sleeping threads, a lying device under sanitizers, aarch64."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "guestpv" / "core"
TEST = Path(__file__).resolve().parent / "core_model" / "ring_test.c"
SOURCES = [TEST, *(CORE / f"{name}.c" for name in ("queue", "split", "packed", "kick", "wait"))]
FLAGS = ["-std=gnu11", "-g", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{CORE}"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CROSS = "aarch64-linux-gnu-"

pytestmark = pytest.mark.timeout(400)


def build(target: Path, compiler: str, *flags: str) -> Path:
    subprocess.run([compiler, *FLAGS, *flags, *SOURCES, "-o", target, "-pthread"], check=True, timeout=120)
    return target


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native") / "ring_test", "gcc", *SANITIZE)


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the program for aarch64."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if shutil.which(f"{CROSS}gcc") is None or emulator is None:
        pytest.fail(
            "aarch64 needs: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"
        )
    program = build(tmp_path_factory.mktemp("aarch64") / "ring_test", f"{CROSS}gcc", "-static")
    return [emulator, str(program)]


@pytest.mark.parametrize("seed", [1, 2])
def test_every_buffer_comes_back_once_over_many_wraps_of_the_index(tmp_path: Path, seed: int) -> None:
    """All 64 sets of options, each with more than three times 65536 buffers."""
    program = build(tmp_path / "ring_test", "gcc")
    run(program, "walk", str(seed), str(64 * 3 * 70000))


def test_walk_under_sanitizers(sanitized: Path) -> None:
    run(sanitized, "walk", "3", "1000000")


def test_two_threads_that_sleep_lose_no_wakeup(sanitized: Path) -> None:
    run(sanitized, "threads", "1000")


def test_a_device_that_writes_anything_anywhere(sanitized: Path) -> None:
    """Ten million writes: no crash, no endless loop, no access outside; each kind of lie is met and named."""
    output = run(sanitized, "fuzz", "4", "10000000")
    found = {int(kind): int(count) for kind, count in re.findall(r"violation (\d+): (\d+)", output)}
    assert sorted(found) == list(range(1, 11))
    assert all(found.values()), found
    assert int(re.search(r"reaped: (\d+)", output)[1]) > 10000  # type: ignore[index]


def test_aarch64_walk_and_threads(aarch64: list[str]) -> None:
    run(*aarch64, "walk", "5", "640000")
    run(*aarch64, "threads", "300")
    run(*aarch64, "fuzz", "6", "300000")


@pytest.mark.requirement("DRV-FEAT-22")
def test_order_platform_takes_device_barriers_and_c11_otherwise(tmp_path: Path, aarch64: list[str]) -> None:
    """Hardware is in the outer shareable domain, which C11's orders do not reach."""

    def mnemonics(tool: str, name: str) -> str:
        target = tmp_path / f"{name}.o"
        subprocess.run([f"{tool}gcc", *FLAGS, "-c", CORE / f"{name}.c", "-o", target], check=True, timeout=60)
        return run(f"{tool}objdump", "-d", "--no-show-raw-insn", target)

    for name in ("split", "packed"):
        arm = mnemonics(CROSS, name)
        assert {"oshst", "oshld"} <= set(re.findall(r"dmb\s+(\w+)", arm))
        assert re.search(r"dsb\s+sy", arm)
        assert re.search(r"stlrh\s", arm)
        assert re.search(r"ldarh\s", arm)
        assert re.search(r"dmb\s+ish$", arm, re.MULTILINE)
    assert re.search(r"dmb\s+oshst", mnemonics(CROSS, "kick")), "the ring before the doorbell"
    native = subprocess.run(
        ["gcc", "-dumpmachine"], capture_output=True, text=True, check=True, timeout=10
    ).stdout
    if native.startswith("x86_64"):
        assert "mfence" in mnemonics("", "split")
