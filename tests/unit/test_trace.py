"""The trace of rings and of its files: what the standard says should be seen, seen."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from guestpv.spec import features as feat
from guestpv.trace.live import line
from guestpv.trace.packets import packets, write
from guestpv.trace.page import PLACE, page
from guestpv.trace.queue import queue_class
from guestpv.trace.record import LANES, BadRecord, Event, Recorder, read
from guestpv.trace.words import Registers
from guestpv.wire import pcapng
from ringpeer import Bench, bench, mask

ROOT = Path(__file__).parents[2]
CORE = ROOT / "guestpv" / "core"
FORMATS = pytest.mark.parametrize("packed", [(), ("RING_PACKED",)], ids=["split", "packed"])


def traced(features: int, size: int = 8, device_type: int = feat.RNG) -> tuple[Bench, Recorder]:
    recorder = Recorder()
    kind = queue_class(recorder.device("bench", device_type))
    return bench(features, size, queue_type=kind), recorder


def told(recorder: Recorder, *kinds: str) -> list[str]:
    return [event.text for event in recorder.events if not kinds or event.kind in kinds]


def lone(b: Bench, length: int = 5) -> None:
    """One buffer there and back."""
    b.queue.add([], [b.pool.allocate(16)])
    b.queue.publish()
    chain = b.peer.pop()
    assert chain is not None
    b.peer.push(chain, length)
    b.queue.reap_burst()


@pytest.mark.requirement("DRV-SPLIT-32", "DRV-SPLIT-33")
def test_a_lone_request_in_a_split_ring() -> None:
    """2.7.13 and 2.7.14, in their order."""
    b, recorder = traced(mask("EVENT_IDX"))
    lone(b)
    kinds = [event.kind for event in recorder.events]
    assert kinds == ["queue", "add", "publish", "fence", "decision", "used", "reap", "want", "fence"]
    assert told(recorder)[1:] == [
        "places buffer 0: 16 random bytes wanted",
        "avail idx 0 to 1",
        "full fence: idx is visible before the device's wish for a kick is read",
        "kick needed: avail_event 0, moved 0 to 1",
        "used idx 0 to 1",
        "takes back buffer 0, 5 bytes written: 5 random bytes",
        "used_event 1: interrupt when used idx moves past 1",
        "full fence: the wish for an interrupt is visible before used idx is read again",
    ]
    sections = [event.section.split(",")[0] for event in recorder.events]
    assert sections == [
        "2.7",
        "2.7.13.1",
        "2.7.13.3",
        "2.7.13.4.1",
        "2.7.10",
        "2.7.8",
        "2.7.14",
        "2.7.7",
        "2.7.14",
    ]
    stamps = [event.nanoseconds for event in recorder.events]
    assert stamps == sorted(stamps)


@pytest.mark.requirement("DRV-PACKED-35")
def test_a_lone_request_in_a_packed_ring() -> None:
    b, recorder = traced(mask("RING_PACKED"))
    lone(b)
    kinds = [event.kind for event in recorder.events]
    assert kinds == ["queue", "add", "publish", "fence", "decision", "used", "reap"]
    add, publish = recorder.events[1], recorder.events[2]
    # Until the release store the head says "available a lap ago" (2.8.1), which is nothing.
    assert (add.facts["desc"][0][4] & 0x8080, publish.facts["flags"] & 0x8080) == (0x8000, 0x0080)
    assert told(recorder, "decision") == ["kick needed: device event flags ENABLE"]


def test_a_suppressed_kick_says_why() -> None:
    b, recorder = traced(mask("EVENT_IDX"))
    for _ in range(2):
        lone(b)
    b.queue.device["avail_event"] = 41
    b.queue.add([], [b.pool.allocate(4)])
    b.queue.add([], [b.pool.allocate(4)])
    kicks = b.queue.kicks
    assert b.queue.publish() is False
    assert b.queue.kicks == kicks
    assert told(recorder, "decision")[-1] == "kick suppressed: avail_event 41, moved 2 to 4"
    assert recorder.events[-1].facts["kick"] is False


@FORMATS
@pytest.mark.parametrize("event", [(), ("EVENT_IDX",)], ids=["flags", "event_idx"])
def test_every_decision_is_the_cores_own(packed: tuple[str, ...], event: tuple[str, ...]) -> None:
    """Through wraps, with a device that asks for a kick now and then."""
    b, recorder = traced(mask(*packed, *event), 4)
    kicked: list[bool] = []
    for number in range(40):
        b.peer.suppress(number % 3 == 0)
        for _ in range(1 + number % 3):
            b.queue.add([], [b.pool.allocate(4)])
        kicked.append(b.queue.publish())
        while (chain := b.peer.pop()) is not None:
            b.peer.push(chain, 4)
        b.queue.reap_burst()
    decided = [e.facts["kick"] for e in recorder.events if e.kind == "decision"]
    assert decided == kicked
    assert len(set(decided)) == 2
    assert recorder.summary()["reap"] == recorder.summary()["add"] == sum(1 + n % 3 for n in range(40))


@FORMATS
@pytest.mark.parametrize(
    "more", [(), ("INDIRECT_DESC",), ("IN_ORDER",)], ids=["chains", "indirect", "in_order"]
)
def test_chains_are_what_was_added(packed: tuple[str, ...], more: tuple[str, ...]) -> None:
    """Elements, contents and descriptors, also where the ring wraps."""
    b, recorder = traced(mask(*packed, *more), 8, device_type=0)
    for number in range(20):
        out, back = b.pool.allocate(10 + number), b.pool.allocate(3)
        out.write(bytes([number]) * (10 + number))
        b.queue.add([out], [back])
        b.queue.publish()
        chain = b.peer.pop()
        assert chain is not None
        back.write(b"yes")
        b.peer.push(chain, 3)
        b.queue.reap_burst()
        add = next(e for e in reversed(recorder.events) if e.kind == "add")
        reap = next(e for e in reversed(recorder.events) if e.kind == "reap")
        assert add.facts["elements"] == [[out.address, out.nbytes, False], [back.address, 3, True]]
        assert add.facts["data"] == [(bytes([number]) * (10 + number)).hex()]
        assert len(add.facts["desc"]) == chain.count
        assert ("table" in add.facts) == bool(more == ("INDIRECT_DESC",))
        assert (reap.facts["id"], reap.facts["data"], reap.facts["length"]) == (
            add.facts["id"],
            [b"yes".hex()],
            3,
        )
        b.pool.free(out)
        b.pool.free(back)


def test_buffers_used_together_come_back_one_by_one() -> None:
    """IN_ORDER: one used entry for a batch (2.7.9)."""
    b, recorder = traced(mask("IN_ORDER"))
    for _ in range(3):
        b.queue.add([], [b.pool.allocate(4)])
    b.queue.publish()
    chains = [b.peer.pop() for _ in range(3)]
    assert all(chains)
    b.queue.device["ring"][0] = (chains[-1].id, 2)  # type: ignore[union-attr]
    b.queue.device["idx"] = 3
    assert len(b.queue.reap_burst()[0]) == 3
    assert [e.facts["length"] for e in recorder.events if e.kind == "reap"] == [4, 4, 2]


def test_bursts_are_seen_too() -> None:
    from guestpv.virtqueue.burst import Burst

    b, recorder = traced(mask())
    burst = Burst(b.queue, 4, 1, 0)
    burst.addresses[:, 0] = [b.pool.allocate(4).address for _ in range(4)]
    burst.lengths[:] = 4
    assert burst.submit(3) == 3
    while (chain := b.peer.pop()) is not None:
        b.peer.push(chain, 2)
    assert burst.reap() == 3
    assert [event.facts["length"] for event in recorder.events if event.kind == "reap"] == [2, 2, 2]
    assert type(Burst(bench(mask(), 8).queue, 1, 1, 0)) is Burst


def test_idle_looks_are_counted_not_told_one_by_one() -> None:
    b, recorder = traced(mask())
    for _ in range(1000):
        assert not b.queue.pending()
    b.queue.disable_interrupts()
    assert [(e.kind, e.facts.get("count")) for e in recorder.events[1:]] == [("poll", 1000), ("want", None)]


@pytest.mark.requirement("DRV-INIT-01")
def test_status_is_decoded_step_by_step() -> None:
    """3.1.1: each write adds one bit, and names its step."""
    registers = Registers(feat.BLK, [_capability(1, 0, 64)])
    seen = [registers.access(0, 20, 1, value, write=True) for value in (0, 1, 3, 11, 15)]
    assert [one.section for one in seen] == [
        "3.1.1 step 1, 2.4",
        "3.1.1 step 2",
        "3.1.1 step 3",
        "3.1.1 steps 5 and 6",
        "3.1.1 step 8",
    ]
    assert seen[-1].meaning == "ACKNOWLEDGE DRIVER DRIVER_OK FEATURES_OK, sets DRIVER_OK"


def _capability(kind: int, offset: int, length: int) -> Any:
    from guestpv.pci.capabilities import VirtioCapability

    return VirtioCapability(kind, 0, 0, offset, length, 0x40)


def test_registers_have_names_bits_and_sections() -> None:
    registers = Registers(
        feat.BLK, [_capability(1, 0, 64), _capability(4, 0x100, 96), _capability(2, 0x200, 8)]
    )
    registers.access(0, 0, 4, 1, write=True)
    feature = registers.access(0, 4, 4, 1 << 0 | 1 << 2, write=False)
    assert (feature.name, feature.meaning) == ("device_feature", "VERSION_1 RING_PACKED")
    registers.access(0, 22, 2, 3, write=True)
    high = registers.access(0, 36, 4, 7, write=True)
    assert (high.name, high.meaning) == ("queue_desc (high half)", "queue 3")
    assert registers.access(0, 26, 2, 0xFFFF, write=False).meaning == "queue 3: no vector"
    capacity = registers.access(0, 0x100, 4, 9, write=False)
    assert (capacity.structure, capacity.name) == ("device", "capacity (low half)")
    assert capacity.section.startswith("5.2.4")
    registers.access(0, 30, 2, 0, write=False)
    assert registers.access(0, 0x200, 2, 3, write=True).meaning == "queue 3"
    assert registers.access(1, 5, 1, 0, write=False).name == "BAR1+0x5"


def test_the_limit_counts_what_it_drops() -> None:
    recorder = Recorder(3)
    trace = recorder.device("x", None)
    for _ in range(5):
        trace.tell("fence", "full fence")
    assert (len(recorder.events), recorder.dropped, recorder.summary()["dropped"]) == (3, 2, 2)


def test_a_record_survives_its_file() -> None:
    b, recorder = traced(mask())
    lone(b)
    lines = [json.dumps(recorder.head()), *(json.dumps(event.to_json()) for event in recorder.events)]
    head, events = read(iter(lines))
    assert head["schema"] == "guestpv.trace/1"
    assert events == recorder.events


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("{}\n", "line 1"),
        ('{"schema": "guestpv.vector/1"}\n', "guestpv.vector/1"),
        ('{"schema": "guestpv.trace/1"}\n{"kind": "add"}\n', "line 2"),
        ('{"schema": "guestpv.trace/1"}\n[]\nnonsense', "line"),
    ],
)
def test_what_is_no_record_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadRecord, match=re.escape(why)):
        read(iter(text.splitlines()))


def test_the_page_is_one_file_with_everything_in_it() -> None:
    b, recorder = traced(mask("EVENT_IDX"))
    recorder.devices[0].tell("open", "opens </script><script>alert(1)</script>", bus="pci")
    lone(b)
    text = page(recorder, ["blk", "read", "</code>"])
    (data,) = re.findall(r'<script type="application/json" id="record">(.*?)</script>', text, re.DOTALL)
    found = json.loads(data)
    assert [event["n"] for event in found["events"]] == list(range(len(recorder.events)))
    assert found["verb"] == "blk read </code>"
    assert {event["kind"] for event in found["events"]} <= set(found["lanes"])
    assert not re.search(r'(?:src|href)="|url\(|https?://', text.replace(data, "")), "nothing from elsewhere"
    # Every kind has its place in a filter and every id that the script asks for is there.
    groups = text[text.index("const GROUPS") : text.index("const groupOf")]
    assert set(re.findall(r'"([a-z-]+)"', groups)) >= set(LANES) - {"looks"}
    assert set(re.findall(r'\$\("([a-z-]+)"\)', text)) <= set(re.findall(r'id="([a-z-]+)"', text)) | {
        "tab",
        "donut",
    }


def test_the_example_in_the_documents_is_made_by_this_version() -> None:
    """Another one: the command is in docs/trace.md."""
    template = files("guestpv.trace").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split(PLACE)
    example = (ROOT / "docs" / "examples" / "trace.html").read_text(encoding="utf-8")
    assert example.startswith(before)
    assert example.endswith(after)
    assert {event["kind"] for event in json.loads(example[len(before) : -len(after)])["events"]} > {
        "add",
        "reap",
    }


def test_every_kind_is_drawn_in_a_terminal() -> None:
    for kind in LANES:
        event = Event(0, 1_500_000, 0, kind, "what", "2.7", {"queue": 1})
        text = line(event).plain
        assert "1.500" in text
        assert "what" in text
        assert ("exit" in text) == (kind in {"read", "write", "config-read", "config-write", "doorbell"})


def _net_events() -> Iterator[Event]:
    header = bytes(10) + b"\x02\x00"
    yield Event(0, 0, 0, "open", "", "", {"device_type": feat.NET, "name": "n"})
    for queue in (0, 1, 2):
        yield Event(0, 0, 0, "queue", "", "", {"queue": queue, "feature_bits": f"{1 << 32 | 1 << 15:#x}"})
    yield Event(
        0,
        5,
        0,
        "add",
        "",
        "",
        {"queue": 1, "elements": [[0, 26, False]], "data": [(bytes(12) + b"A" * 14).hex()]},
    )
    yield Event(0, 6, 0, "add", "", "", {"queue": 2, "elements": [[0, 2, False]], "data": ["0000"]})
    yield Event(0, 7, 0, "reap", "", "", {"queue": 0, "length": 32, "data": [(header + b"B" * 20).hex()]})
    yield Event(0, 9, 0, "reap", "", "", {"queue": 0, "length": 500, "data": [(b"C" * 30).hex()]})


def test_frames_are_put_together_for_wireshark() -> None:
    """One frame out, one in two mergeable buffers of which the record has only the beginning."""
    out, back = packets(_net_events())
    assert (out.inbound, out.frame, out.length) == (False, b"A" * 14, 14)
    assert (back.inbound, back.frame, back.length) == (True, b"B" * 20 + b"C" * 30, 520)
    assert back.comment == "rx queue 0 num_buffers=2"
    file = io.BytesIO()
    assert write(file, "test", 1000, _net_events()) == 2
    blocks, rest = [], file.getvalue()
    while rest:
        kind, size = struct.unpack_from("<II", rest)
        blocks.append((kind, rest[8 : size - 4]))
        rest = rest[size:]
    assert [kind for kind, _ in blocks] == [
        pcapng.SECTION_HEADER,
        1,
        pcapng.ENHANCED_PACKET,
        pcapng.ENHANCED_PACKET,
    ]
    _, high, low, kept, original = struct.unpack_from("<IIIII", blocks[3][1])
    assert (high << 32 | low, kept, original) == (1009, 50, 520)


def test_the_glossary_names_what_the_page_looks_up() -> None:
    from guestpv.cli.trace import _glossary

    known = _glossary()
    text = files("guestpv.trace").joinpath("page.html").read_text(encoding="utf-8")
    topics = re.search(r"const TOPICS = \{(.*?)\};", text)
    assert topics is not None
    assert set(re.findall(r'"([a-z_-]+)"', topics[1])) <= set(known)
    assert {"reset", "acknowledge", "driver", "features-ok", "driver-ok", "failed", "queue_notify"} <= set(
        known
    )


@pytest.mark.parametrize(
    "name", sorted(path.name for path in CORE.glob("*.c") if not path.name.startswith("_"))
)
def test_the_ordinary_core_has_no_hook_to_pass(name: str) -> None:
    """Compiled without GPV_OBSERVING it knows of no observer: a trace that is off costs nothing."""

    def preprocessed(*more: str) -> str:
        words = ["gcc", "-std=gnu11", "-E", "-P", *more, name]
        return subprocess.run(words, cwd=CORE, capture_output=True, text=True, check=True).stdout

    assert "gpv_observe" not in preprocessed()
    assert "trace" not in preprocessed()
    if name in ("split.c", "packed.c"):
        assert "gpv_observe_loaded" in preprocessed("-DGPV_OBSERVING")


def test_nothing_is_traced_unless_asked_for() -> None:
    """Off, the hot path is the same machine code on the same objects: no class of the trace is in it."""
    from guestpv.core import _core
    from guestpv.transport.pci import PciTransport
    from guestpv.transport.vhost_user import VhostUserTransport
    from guestpv.transport.vhost_user_ring import PolledQueue
    from guestpv.virtqueue.queue import Virtqueue

    assert Virtqueue.core_lib is _core.lib
    assert not hasattr(_core.lib, "gpv_trace_set")
    assert PciTransport.queue_class is VhostUserTransport.queue_class is Virtqueue
    assert PolledQueue.__mro__[1] is VhostUserTransport.polled_class.__mro__[1] is Virtqueue
