"""The trace of QEMU's devices: nobody here wrote what is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from click.testing import CliRunner

from guestpv.cli.main import main
from guestpv.trace.record import read

from .conftest import EXECUTABLE
from .test_cli_net import GPV, SPEC, isolated

SIZE = 1 << 20


def run(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("packed", ["off", "on"])
def test_a_disk_of_qemu_is_traced_and_its_record_done_again(tmp_path: Path, packed: str) -> None:
    params = {"qemu": EXECUTABLE, "blockdev": f"driver=null-co,node-name=d,size={SIZE},read-zeroes=on"}
    spec = f"qtest:{quote(f'virtio-blk-pci,drive=d,packed={packed}')}?{urlencode(params)}"
    path = tmp_path / "trace.jsonl"
    done = run("trace", "--quiet", "--jsonl", path, "blk", "read", spec, "/dev/null", "--length", "256k")
    assert done.exit_code == 0, done.output
    with path.open() as lines:
        _, events = read(lines)
    status = [
        event.facts["value"]
        for event in events
        if event.kind == "write" and event.facts["register"] == "device_status"
    ]
    assert status[-5:] == [1, 3, 11, 15, 0]
    (offered, *_) = [event.text for event in events if event.text.startswith("read device_feature = ")]
    assert "SEG_MAX GEOMETRY" in offered
    made = next(event for event in events if event.kind == "queue")
    assert made.facts["format"] == ("packed" if packed == "on" else "split")
    adds, backs = ([event for event in events if event.kind == kind] for kind in ("add", "reap"))
    assert adds
    assert len(adds) == len(backs)
    assert all(event.text.endswith("read: status OK") for event in backs)
    decided = [event.facts["kick"] for event in events if event.kind == "decision"]
    assert sum(decided) == sum(event.kind == "doorbell" for event in events) > 0
    assert any(event.kind == "interrupt" for event in events)

    again = json.loads(run("trace", "replay", "--json", path, spec).stdout)["data"]
    assert (again["differences"], again["stopped"], again["buffers"]) == ([], "", len(backs))
    ours = json.loads(run("trace", "replay", "--json", path).stdout)["data"]
    assert (ours["stopped"], ours["buffers"]) == ("", len(backs))
    # Our model has the same features, and other limits.
    names = {one["what"].removeprefix("read ") for one in ours["differences"]}
    assert names
    assert names <= {
        *("cylinders", "heads", "sectors", "seg_max", "min_io_size", "opt_io_size"),
        *("max_discard_sectors", "max_discard_seg", "discard_sector_alignment"),
        *("max_write_zeroes_sectors", "max_write_zeroes_seg", "write_zeroes_may_unmap", "writeback"),
    }


def test_a_link_that_runs_in_the_core_is_traced(tmp_path: Path) -> None:
    """``net up``: the pump in C, a lease, commands."""
    (runtime := tmp_path / "run").mkdir(mode=0o700)
    spec = SPEC.format(more="")
    done = isolated(
        runtime,
        f"{GPV} trace --quiet --jsonl t.jsonl --pcapng t.pcapng net up {spec} --json > up.out &"
        f"until grep -q ok up.out; do sleep 0.1; done; {GPV} net down --json && wait $!",
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "t.jsonl").open() as lines:
        _, events = read(lines)
    commands = [event.text for event in events if event.kind == "add" and event.facts["queue"] == 2]
    assert any("command RX" in text for text in commands)
    frames = [event for event in events if event.kind == "add" and event.facts["queue"] == 1]
    assert any("IPv4" in event.text and "to ff:ff:ff:ff:ff:ff" in event.text for event in frames), "DHCP"
    assert any("IPv4" in event.text for event in events if event.kind == "reap" and not event.facts["queue"])
    kicks = sum(event.kind == "doorbell" for event in events)
    assert kicks == sum(event.facts["kick"] for event in events if event.kind == "decision") > 0
    assert (tmp_path / "t.pcapng").stat().st_size > 500
