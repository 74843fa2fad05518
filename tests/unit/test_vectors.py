"""Test vectors: the same bytes everywhere, of the described form, and of use to a ring that is not ours."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from guestpv.cli.main import main
from guestpv.spec.features import F_EVENT_IDX, F_RING_PACKED, NET, feature_names
from guestpv.spec.status import Status

REPLAY = Path(__file__).parent / "vector_replay" / "replay.c"
PAGE = Path(__file__).parents[2] / "docs" / "vectors.md"
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-g"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    done = CliRunner().invoke(main, ["vectors", "export", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def vectors(exported: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(exported.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths if path.name != "schema.json"}


def build(target: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or "gcc"
    subprocess.run([compiler, *FLAGS, *flags, REPLAY, "-o", target], check=True, timeout=120)
    return target


def replay(program: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *sorted(files)], capture_output=True, text=True, timeout=60)


def ring_files(exported: Path) -> list[Path]:
    return [*exported.glob("split-*.json"), *exported.glob("packed-*.json")]


def test_another_process_writes_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "guestpv", "vectors", "export", str(tmp_path / "again")]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PYTHONHASHSEED": "7"}, cwd=tmp_path)
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (exported / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_every_vector_is_what_the_schema_describes(
    exported: Path, vectors: dict[str, dict[str, Any]]
) -> None:
    schema = json.loads((exported / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    for name, vector in vectors.items():
        assert vector["name"] == name
        judge.validate(vector)
    broken = json.loads(json.dumps(vectors["split-chains"]))
    del broken["steps"][0]["after"]
    assert not judge.is_valid(broken)


def test_each_step_begins_where_the_last_one_ended(vectors: dict[str, dict[str, Any]]) -> None:
    rings = [vector for vector in vectors.values() if vector["kind"] == "ring"]
    assert {vector["queue"]["format"] for vector in rings} == {"split", "packed"}
    for vector in rings:
        memory = vector["start"]
        for step in vector["steps"]:
            assert step["before"] == memory
            memory = step["after"]


@pytest.mark.requirement("DRV-PACKED-24", "DRV-PACKED-26", "DRV-PACKED-27")
def test_an_independent_ring_in_c_writes_what_the_vectors_say(exported: Path, tmp_path: Path) -> None:
    program = build(tmp_path / "replay", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    done = replay(program, *ring_files(exported))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(ring_files(exported)) >= 25


@pytest.mark.parametrize(
    ("bug", "finder"),
    [
        (1, "split-index-wrap-event-index"),  # event compared without the wrap of the index
        (2, "packed-odd-size"),  # wrap counter never flipped
        (3, "split-chains"),  # a chain without NEXT
    ],
)
def test_a_ring_with_a_classic_mistake_does_not_pass(
    exported: Path, tmp_path: Path, bug: int, finder: str
) -> None:
    done = replay(build(tmp_path / "replay", f"-DBUG={bug}"), *ring_files(exported))
    assert done.returncode == 1
    assert f"{finder}: step" in done.stdout


def test_a_vector_with_one_wrong_byte_does_not_pass(
    exported: Path, vectors: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    vector = json.loads(json.dumps(vectors["split-one-buffer"]))
    after = vector["steps"][0]["after"]
    after["desc"] = "ff" + after["desc"][2:]
    (tmp_path / "wrong.json").write_text(json.dumps(vector))
    done = replay(build(tmp_path / "replay"), tmp_path / "wrong.json")
    assert done.returncode == 1
    assert "desc byte 0" in done.stdout


@pytest.mark.requirement("DRV-INIT-01", "DRV-STATUS-01", "DRV-STATUS-02")
def test_initialization_goes_through_its_steps_in_order(vectors: dict[str, dict[str, Any]]) -> None:
    written = [
        int(access["value"], 16)
        for step in vectors["registers-init"]["steps"]
        for access in step["accesses"]
        if access["register"] == "device_status" and access["access"] == "write"
    ]
    live = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
    assert written == [0, 1, 3, 11, int(live)]
    reads = [
        access["value"]
        for step in vectors["registers-reset-waits"]["steps"][-1:]
        for access in step["accesses"]
        if access["access"] == "read"
    ]
    assert reads[-1] == "0x00"
    assert len(reads) == 4
    assert "0x00" not in reads[:-1]


@pytest.mark.requirement("DRV-PCI-57")
def test_a_walk_in_c_finds_the_structures_that_the_vector_names(exported: Path, tmp_path: Path) -> None:
    program = build(tmp_path / "replay", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    found = replay(program, exported / "pci-discovery.json")
    assert (found.returncode, found.stdout) == (0, "pci-discovery: 5 structures\n")
    wrong = json.loads((exported / "pci-discovery.json").read_text())
    wrong["structures"][0]["bar"] += 1
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    assert replay(program, tmp_path / "wrong.json").returncode == 1


def test_what_is_discovered_can_be_found_in_configuration_space(vectors: dict[str, dict[str, Any]]) -> None:
    vector = vectors["pci-discovery"]
    space = bytes.fromhex(vector["config_space"])
    assert struct.unpack_from("<HH", space) == (0x1AF4, 0x1040 + NET)
    for found in vector["structures"]:
        at = found["position"]
        kind, bar = space[at + 3], space[at + 4]
        assert (space[at], kind, bar) == (9, found["cfg_type"], found["bar"])
        assert struct.unpack_from("<II", space, at + 8) == (found["offset"], found["length"])


@pytest.mark.requirement("DRV-BLK-47", "DRV-BLK-48")
def test_requests_read_as_the_standard_lays_them_out(vectors: dict[str, dict[str, Any]]) -> None:
    disk = vectors["requests-blk"]["requests"]
    kinds = [struct.unpack_from("<IIQ", bytes.fromhex(request["readable"])) for request in disk]
    assert kinds == [(1, 0, 8), (0, 0, 8), (4, 0, 0), (11, 0, 0), (13, 0, 0), (8, 0, 0)]
    assert disk[1]["used"] == 513
    frame = bytes.fromhex(vectors["requests-net-frames"]["requests"][0]["readable"])
    assert len(frame) == 12 + 60
    assert frame[:12] == bytes(12)
    pages = bytes.fromhex(vectors["requests-balloon"]["requests"][1]["readable"])
    assert len(struct.unpack(f"<{len(pages) // 4}I", pages)) == 3


def test_features_are_told_by_name_and_as_bits(vectors: dict[str, dict[str, Any]]) -> None:
    vector = vectors["packed-odd-size"]
    bits = int(vector["feature_bits"], 16)
    assert bits >> F_RING_PACKED & 1
    assert bits >> F_EVENT_IDX & 1
    assert vector["features"] == feature_names(None, bits)


def test_the_list_and_the_page_know_every_vector(vectors: dict[str, dict[str, Any]]) -> None:
    done = CliRunner().invoke(main, ["vectors", "list", "--json"])
    listed = json.loads(done.output)["data"]["vectors"]
    assert {row["name"] for row in listed} == set(vectors)
    page = PAGE.read_text()
    for name in vectors:
        assert f"`{name}`" in page or f"`{name.partition('-')[2]}`" in page, name
