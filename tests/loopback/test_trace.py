"""``guestpv trace`` and ``guestpv.open(..., trace=...)`` on every scheme that needs no other program."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import guestpv
from guestpv.cli.main import main
from guestpv.devices.models.blk import Blk as BlkModel
from guestpv.devices.models.blk_store import Store
from guestpv.drivers.blk import Blk
from guestpv.drivers.net import Net
from guestpv.drivers.rng import Rng
from guestpv.opener import Tracing
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.serve.vhost_user import VhostUserServer
from guestpv.services.nbd import Export
from guestpv.trace import Recorder
from guestpv.trace.packets import packets

SPLIT_AND_PACKED = pytest.mark.parametrize("packed", ["off", "on"])


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def texts(recorder: Recorder, *kinds: str) -> list[str]:
    return [event.text for event in recorder.events if event.kind in kinds]


@pytest.mark.requirement("DRV-INIT-01")
def test_the_status_dance_is_seen() -> None:
    """3.1.1, in its order, before the first buffer."""
    recorder = Recorder()
    with guestpv.open("loopback:rng", trace=recorder) as transport, Rng(transport) as rng:
        rng.read(8)
    written = [
        event
        for event in recorder.events
        if event.kind == "write" and event.facts["register"] == "device_status"
    ]
    # Reset on opening, on negotiating, and at the end.
    assert [event.facts["value"] for event in written] == [0, 0, 1, 3, 11, 15, 0]
    live = written[-2].number
    assert all(event.number > live for event in recorder.events if event.kind == "add")
    readback = next(event for event in recorder.events if event.number > written[4].number and event.exits)
    assert readback.text == "read device_status = 0x0b ACKNOWLEDGE DRIVER FEATURES_OK"


@SPLIT_AND_PACKED
def test_a_block_request_is_told_from_end_to_end(packed: str) -> None:
    recorder = Recorder()
    with guestpv.open(f"loopback:blk?packed={packed}", trace=recorder) as transport, Blk(transport) as disk:
        disk.write(1024, b"guestpv!" * 64)
        disk.read(1024, 512)
        disk.flush()
    assert texts(recorder, "add") == [
        "places buffer 0: write sector 2, 512 bytes of data to the device, 1 byte of status",
        "places buffer 0: read sector 2, 512 bytes of data from it, 1 byte of status",
        "places buffer 0: flush, 1 byte of status",
    ]
    backs = [event for event in recorder.events if event.kind == "reap"]
    assert [event.text.split(": ", 1)[1] for event in backs] == [
        "write: status OK",
        "read: status OK",
        "flush: status OK",
    ]
    assert backs[1].facts["data"] == [(b"guestpv!" * 64).hex(), "00"]
    # One doorbell a request, and nothing else that would leave the guest.
    first = next(event.number for event in recorder.events if event.kind == "add")
    last = backs[-1].number
    assert [event.kind for event in recorder.events[first:last] if event.exits] == ["doorbell"] * 3


def test_what_runs_in_the_core_alone_is_seen_too() -> None:
    """The network port, a burst of requests and the NBD export place their buffers in C."""
    recorder = Recorder()
    with guestpv.open("loopback:net?queue_size=16", trace=recorder) as transport, Net(transport) as net:
        frame = bytes(range(6)) * 2 + b"\x08\x00" + b"guestpv" * 20
        net.send([frame])
        assert net.receive_within(5.0) == [frame]
    out, back = packets(recorder.events)
    assert (out.inbound, back.inbound) == (False, True)
    assert out.frame == back.frame == frame
    assert "IPv4" in texts(recorder, "reap")[0]

    recorder = Recorder()
    with guestpv.open("loopback:blk", trace=recorder) as transport, Blk(transport) as disk:
        disk.read_many(np.arange(8, dtype=np.uint64) * 512, disk.allocate(8 * 512), 512)
        export = Export(disk, 0)
        export.start()
        export.stop()
        export.client.close()
    assert sum("read sector" in text for text in texts(recorder, "add")) == 8


@pytest.mark.provokes("the driver writes to avail_event, in place of a busy device")
def test_suppressed_kicks_are_told_apart() -> None:
    """A device that works already needs no second kick (2.7.10)."""
    recorder = Recorder()
    with guestpv.open("loopback:rng?event_idx=on", trace=recorder) as transport:
        transport.negotiate(0)
        queue = transport.make_queue(0)
        transport.driver_ok()
        memory = transport.pool.allocate(64)
        queue.device["avail_event"] = 100
        queue.add(writable=[memory])
        assert queue.publish() is False
        queue.notify()
        list(queue.completions())
    assert texts(recorder, "decision") == ["kick suppressed: avail_event 100, moved 0 to 1"]
    assert len(texts(recorder, "doorbell")) == 1


def test_interrupts_and_their_vectors() -> None:
    for spec, expected in (
        ("loopback:rng", "interrupt, vector 1: queue 0"),
        ("loopback:rng?msix=off", "interrupt, INTx: the ISR says whose"),
    ):
        recorder = Recorder()
        with guestpv.open(spec, trace=recorder) as transport:
            transport.negotiate(0)
            queue = transport.make_queue(0)
            transport.driver_ok()
            queue.add(writable=[transport.pool.allocate(8)])
            assert not queue.enable_interrupts()
            queue.publish()
            # Asleep, so that it is the interrupt that wakes.
            assert queue.wait(10.0, spin_us=0)
            list(queue.completions())
            while expected not in texts(recorder, "interrupt"):
                time.sleep(0.001)
        assert set(texts(recorder, "interrupt")) == {expected}


def test_vhost_user_messages_rings_and_eventfds(tmp_path: Path) -> None:
    server = VhostUserServer(BlkModel(Store(size=1 << 20)), str(tmp_path / "b.sock")).start()
    try:
        recorder = Recorder()
        spec = f"vhost-user:blk:{server.path}"
        with guestpv.open(spec, trace=recorder) as transport, Blk(transport) as disk:
            disk.read(0, 4096)
        with guestpv.open(spec + "?mode=poll", trace=recorder) as transport, Blk(transport) as disk:
            disk.read(0, 4096)
    finally:
        server.close()
    names = {event.facts["request"] for event in recorder.events if event.kind == "message"}
    assert {"GET_FEATURES", "SET_FEATURES", "SET_VRING_ADDR", "SET_VRING_KICK"} <= names
    assert "device_status = 0x0f ACKNOWLEDGE DRIVER DRIVER_OK FEATURES_OK, kept by the front end" in texts(
        recorder, "status"
    )
    assert texts(recorder, "reap") == ["takes back buffer 0, 4097 bytes written: read: status OK"] * 2
    assert len(texts(recorder, "kick")) == 2
    assert recorder.summary()["exits"] == 0, "the front end is no guest"
    assert [device.name for device in recorder.devices] == [f"vhost-user:{server.path}"] * 2


def test_vfio_user(tmp_path: Path) -> None:
    server = VfioUserServer(make_function("rng"), str(tmp_path / "r.sock"))
    server.start()
    try:
        recorder = Recorder()
        with guestpv.open(f"vfio-user:{server.path}", trace=recorder) as transport, Rng(transport) as rng:
            rng.read(16)
    finally:
        server.close()
    assert texts(recorder, "reap") == ["takes back buffer 0, 16 bytes written: 16 random bytes"]
    assert "write device_status = 0x01 ACKNOWLEDGE" in texts(recorder, "write")


# The command.


def test_live_lines_say_what_where_and_why() -> None:
    done = run("trace", "blk", "read", "loopback:blk", "/dev/null", "--length", "4k")
    assert done.exit_code == 0, done.output
    assert re.search(
        r"├─────┼────▶│  exit  q0 rings queue_notify = 0x0000 queue 0  \[4\.1\.5\.2\]", done.stderr
    )
    assert re.search(r"│◀────┤     │ +q0 kick needed: avail_event 0, moved 0 to 1  \[2\.7\.10", done.stderr)
    assert "configuration space" not in done.stderr
    assert re.search(r"\d+ events; \d+ exits to the hypervisor \(1 of them doorbells\)", done.stderr)
    assert Tracing.recorder is None


def test_the_verbs_exit_code_and_output_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(4095) + b"x")
    done = run("trace", "--quiet", "blk", "verify", "loopback:blk", tmp_path / "other", "--length", "4k")
    assert done.exit_code == 1
    assert "differ" in done.stderr
    data = tmp_path / "data"
    done = run("trace", "--quiet", "--json", "blk", "read", "loopback:blk", data, "--length", "4k")
    assert json.loads(done.stdout)["data"]["exit_status"] == 0
    assert data.read_bytes() == bytes(4096)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("nonsense",), "no verb that can be traced"),
        (("trace", "info", "loopback:net"), "no verb that can be traced"),
        (("net", "up", "loopback:net", "--detach"), "background"),
        (("explain", "features-ok"), "opened no device"),
    ],
)
def test_what_cannot_be_traced_is_refused(words: tuple[str, ...], why: str) -> None:
    done = run("trace", *words)
    assert done.exit_code == 2
    assert why in done.stderr


def test_a_file_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    target = tmp_path / "data"
    done = run(
        "trace", "--html", tmp_path / "no" / "t.html", "blk", "read", "loopback:blk", target, "--length", "4k"
    )
    assert done.exit_code == 1
    assert "No such file or directory" in done.stderr
    assert not target.exists()


def test_html_and_pcapng(tmp_path: Path) -> None:
    page, frames = tmp_path / "t.html", tmp_path / "t.pcapng"
    done = run("trace", "--html", page, "--pcapng", frames, "--limit", 60, "info", "loopback:net")
    assert done.exit_code == 0, done.output
    assert "more events were not kept" in done.stderr
    assert page.stat().st_size > 20_000
    assert frames.read_bytes()[:4] == bytes.fromhex("0a0d0d0a")


# Replay.


def record(path: Path, *words: object) -> Path:
    done = run("trace", "--quiet", "--jsonl", path, *words)
    assert done.exit_code == 0, done.output
    return path


def replayed(*words: object) -> Any:
    return json.loads(run("trace", "replay", "--json", *words).stdout)["data"]


@pytest.mark.parametrize(
    "query", ["", "?packed=on", "?in_order=on", "?indirect_desc=off&event_idx=off", "?packed=on&in_order=on"]
)
def test_a_record_repeats_itself(tmp_path: Path, query: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 4096)
    path = record(tmp_path / "r", "blk", "write", f"loopback:blk{query}", image, "--yes")
    data = replayed(path)
    assert (data["differences"], data["stopped"]) == ([], "")
    assert data["buffers"] > 8
    assert data["spec"] == f"loopback:blk{query}"


@pytest.mark.provokes("what is repeated does not suit another device")
def test_another_device_answers_differently_and_is_told(tmp_path: Path) -> None:
    path = record(tmp_path / "r", "blk", "read", "loopback:blk", "/dev/null", "--length", "64k")
    smaller = replayed(path, "loopback:blk?size=1M")
    assert [one["what"] for one in smaller["differences"]] == ["read capacity (low half)"]
    older = replayed(path, "loopback:blk?event_idx=off")
    assert "did not keep FEATURES_OK" in older["stopped"]
    (image := tmp_path / "image").write_bytes(b"x" * 65536)
    other = replayed(path, f"loopback:blk?file={image}")
    assert {one["recorded"] for one in other["differences"]} >= {"byte 0 of writable element 0 is 00"}
    assert run("trace", "replay", path, "loopback:blk?size=1M").exit_code == 1
    assert "is of a blk device" in run("trace", "replay", path, "loopback:rng").stderr


def test_a_replay_does_no_harm_unasked(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"y" * 4096)
    path = record(tmp_path / "r", "blk", "write", "loopback:blk", image, "--yes")
    done = run("trace", "replay", path, "qtest:virtio-blk-pci")
    assert done.exit_code == 2
    assert "--yes" in done.stderr
