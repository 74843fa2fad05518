"""``guestpv blk`` on our own disk: content, holes, consent, and words for what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from guestpv.cli.blk_disk import is_spec
from guestpv.cli.blk_options import Size
from guestpv.cli.main import main

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """5 MiB and a bit: content, a hole, content."""
    path = tmp_path / "source"
    random = np.random.default_rng(2)
    with path.open("wb") as file:
        file.write(random.bytes(MIB))
        file.seek(4 * MIB)
        file.write(random.bytes(MIB + 1000))
    return path


def run(*words: object, input: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["blk", *map(str, words)], input=input)


def test_a_path_that_is_not_there_is_named_with_what_to_do() -> None:
    said = run("read", "loopback:blk", "/no/such/file")
    assert said.exit_code == 1
    assert "/no/such/file: No such file or directory" in said.stderr
    assert "check the path" in said.stderr


def data(*words: object) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["data"]


def error(*words: object, code: int) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)["error"]


def test_info(image: Path) -> None:
    shown = data("info", f"loopback:blk?file={image}&serial=abc&num_queues=3")
    assert (shown["capacity"], shown["block_size"], shown["id"], shown["queues"]) == (SIZE, 512, "abc", 3)
    assert shown["cache"] == "write-back"
    assert "write zeroes" in run("info", "loopback:blk").output
    assert "SECURE_ERASE was not negotiated" in run("info", "loopback:blk").output


@pytest.mark.parametrize("block", [512, 4096])
def test_there_and_back(image: Path, source: Path, tmp_path: Path, block: int) -> None:
    spec = f"loopback:blk?file={image}&block_size={block}"
    wrote = data("write", spec, source, "--offset", "1M", "--yes")
    assert wrote["bytes"] == source.stat().st_size
    assert wrote["zero_bytes"] == 3 * MIB
    assert image.read_bytes()[MIB : MIB + source.stat().st_size] == source.read_bytes()
    assert data("verify", spec, source, "--offset", "1M")["bytes"] == source.stat().st_size
    back = tmp_path / "back"
    data("read", spec, back, "--offset", "1M", "--length", source.stat().st_size)
    assert back.read_bytes() == source.read_bytes()
    assert back.stat().st_blocks * 512 <= 2 * MIB + 8192
    other = tmp_path / "other.img"
    with other.open("wb") as file:
        file.truncate(SIZE)
    data("copy", spec, f"loopback:blk?file={other}", "--yes")
    assert other.read_bytes() == image.read_bytes()


def test_standard_streams(image: Path, source: Path) -> None:
    spec = f"loopback:blk?file={image}"
    done = run("write", spec, "-", "--yes", input=None)
    assert done.exit_code == 0
    assert "0 B written" in done.stderr


def test_the_first_difference_is_named(image: Path, source: Path) -> None:
    spec = f"loopback:blk?file={image}"
    data("write", spec, source, "--yes")
    with image.open("r+b") as file:
        file.seek(2 * MIB + 700)
        file.write(b"!")
    said = error("verify", spec, source, code=1)
    assert f"at byte {2 * MIB + 700} (sector {(2 * MIB + 700) // 512})" in said["message"]


def test_ranges(image: Path) -> None:
    image.write_bytes(b"x" * SIZE)
    spec = f"loopback:blk?file={image}"
    assert data("zero", spec, "--offset", "1M", "--length", "2M", "--yes")["bytes"] == 2 * MIB
    content = image.read_bytes()
    assert content[MIB : 3 * MIB] == bytes(2 * MIB)
    assert content[:MIB] + content[3 * MIB :] == b"x" * (SIZE - 2 * MIB)
    assert data("discard", spec, "--offset", "8M", "--yes")["bytes"] == 8 * MIB
    spec = f"loopback:blk?file={image}&offer=-write_zeroes,-discard"
    assert data("zero", spec, "--length", "8M", "--yes")["bytes"] == 8 * MIB
    assert image.read_bytes()[: 8 * MIB] == bytes(8 * MIB)
    assert "DISCARD was not negotiated" in error("discard", spec, "--yes", code=3)["message"]


def test_bench() -> None:
    for extra in ((), ("--write", "--yes"), ("--poll", "--size", "64K", "--depth", "4")):
        shown = data("bench", "loopback:blk", "--seconds", "0.2", *extra)
        assert shown["requests"] > 0
        assert shown["latency_us"]["p50"] <= shown["latency_us"]["max"]
        assert shown["kicks_per_request"] <= 1


def test_nothing_is_destroyed_without_consent(image: Path, source: Path) -> None:
    spec = f"loopback:blk?file={image}"
    for words in (("write", spec, source), ("zero", spec), ("discard", spec), ("copy", source, spec)):
        assert "--yes" in error(*words, code=3)["hint"]
    assert image.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("read", "{source}", "out"), 2, "neither a PCI address nor scheme:body"),
        (("read", "loopback:net", "{out}"), 2, "it is a virtio net device, no block device"),
        (("read", "{disk}", "{out}", "--offset", "17M"), 2, "it has 16777216 bytes"),
        (("write", "{disk}", "{source}", "--offset", "14M", "--yes"), 2, "do not fit into 16777216"),
        (("write", "{disk}", "/does/not/exist", "--yes"), 1, "No such file"),
        (("write", "{disk}&ro=on", "{source}", "--yes"), 3, "read-only"),
        (("write", "{disk}", "{source}", "--offset", "100", "--yes"), 2, "not whole blocks"),
        (("zero", "{disk}", "--offset", "16M", "--yes"), 2, "the disk at 16777216"),
        (("zero", "{disk}", "--offset", "lots", "--yes"), 2, "is no size"),
        (("bench", "{disk}", "--size", "1000"), 2, "not whole blocks"),
        (("verify", "{disk}", "{source}", "--length", "16M"), 2, "it has"),
        (("status", "nbd9"), 2, "nbd9 is not up"),
        (("down",), 2, "nothing is up"),
    ],
)
def test_bad_input(
    image: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    tmp_path.chmod(0o700)
    names = {"source": source, "out": tmp_path / "out", "disk": f"loopback:blk?file={image}"}
    assert says in error(*(word.format(**names) for word in words), code=code)["message"]
    assert image.read_bytes() == bytes(SIZE)


def test_sizes_and_specs() -> None:
    size = Size()
    for text, value in {
        "0": 0,
        "512": 512,
        "4K": 4096,
        "1.5MiB": 3 * MIB // 2,
        "2gb": 2 << 30,
        "3s": 1536,
    }.items():
        assert size.convert(text, None, None) == value
    assert [
        is_spec(word) for word in ("0000:01:00.0", "01:00.0", "loopback:blk", "-", "a.img", "/dev/sda")
    ] == [
        *[True] * 3,
        *[False] * 3,
    ]
