"""Pictures of queues: they show what is there, and the documentation's are what the code draws."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import guestpv
from guestpv.cli.main import main
from guestpv.cli.ring_scenarios import SCENARIOS, Stage
from guestpv.devices.ring import Chain
from guestpv.errors import UsageError
from guestpv.trace import ring_picture
from guestpv.trace.rings import State, ring_state

from .test_ring_model import CORE, ORDER, ORDERS

pytestmark = pytest.mark.usefixtures("strict")

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "how-a-virtqueue-works.md"
FORMATS = [(), ("RING_PACKED",)]
OPTIONS = [(), ("IN_ORDER",), ("INDIRECT_DESC",), ("EVENT_IDX", "IN_ORDER", "INDIRECT_DESC")]
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    """Every text in a picture; it has to be well-formed for that."""
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def table(heading: str) -> Iterator[list[str]]:
    """Cells of the rows of the page's table that begins with this heading."""
    lines = iter(PAGE.read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |"):
            next(lines)
            break
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# The documentation.


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_pages_pictures_are_what_the_code_draws(name: str) -> None:
    kept = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    again = f"draw it again: guestpv ring-picture {name} -o docs/pictures/{name}.svg"
    assert SCENARIOS[name]().svg() == kept, again


def test_the_page_shows_every_picture_and_describes_it() -> None:
    shown = dict(re.findall(r"!\[([^]]+)\]\(pictures/([^)]+)\.svg\)", PAGE.read_text()))
    assert sorted(shown.values()) == sorted(SCENARIOS)
    kinds = ("split-", "packed-", "queue-")
    drawn = {path.stem for path in (DOCS / "pictures").glob("*.svg") if path.stem.startswith(kinds)}
    assert drawn == set(SCENARIOS)
    assert all(len(text) > 20 for text in shown)


def test_links_within_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    wanted = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert wanted
    assert wanted <= anchors


def test_functions_and_files_that_the_page_names_exist() -> None:
    text = PAGE.read_text()
    package = DOCS.parent / "guestpv"
    sources = "".join(path.read_text() for path in CORE.glob("*.[ch]") if not path.name.startswith("_"))
    for name in set(re.findall(r"`(gpv_\w+|next_entry)`", text)):
        assert f"{name}(" in sources, name
    for name in set(re.findall(r"`((?:core|devices|guestpv|tests)/[\w/.]+\.\w+)`", text)):
        assert (package / name).exists() or (package.parent / name).exists(), name


@pytest.mark.requirement("DRV-SPLIT-27", "DRV-SPLIT-28")
def test_the_pages_event_arithmetic_is_the_cores() -> None:
    rows = list(table("old"))
    assert len(rows) == 6
    for old, new, event, after, count, notify in rows:
        first, last, wanted = (int(value, 16) for value in (old, new, event))
        assert [int(after), int(count)] == [(last - wanted - 1) % 65536, (last - first) % 65536]
        stage = Stage("EVENT_IDX")
        stage.run(first)
        stage.queue.device["avail_event"] = wanted
        stage.small(*"DEF"[: int(count)])
        assert stage.queue.publish() == (notify == "yes")
        assert int(stage.queue.driver["idx"]) == last


@pytest.mark.requirement("DRV-PACKED-45")
def test_the_pages_event_positions_are_the_cores() -> None:
    rows = list(table("next_avail"))
    assert len(rows) == 5
    for place, count, event, distance, notify in rows:
        offset, wrap, event_offset, event_wrap = map(int, re.findall(r"\d+", place + event))
        assert int(distance.split("=")[1]) == offset - event_offset + 8 * (wrap != event_wrap)
        stage = Stage("RING_PACKED", "EVENT_IDX")
        stage.run(offset + 8 - int(count))
        stage.queue.device["desc"] = event_offset | event_wrap << 15
        stage.queue.device["flags"] = 2
        stage.small(*"DEF"[: int(count)])
        assert stage.queue.publish() == (notify == "yes")
        assert ring_state(stage.queue).next_avail == (offset, wrap)


def test_the_pages_notification_values_are_the_cores() -> None:
    rows = list(table("Queue 1 is"))
    assert len(rows) == 4
    for what, index, offset, wrap, value in rows:
        assert int(value, 16) == int(index) | int(offset) << 16 | int(wrap) << 31
        numbers = re.findall(r"0x\w+|\d+", what)
        packed = len(numbers) == 2
        stage = Stage("NOTIFICATION_DATA", *FORMATS[packed])
        stage.run(int(numbers[0], 0) + 8 * (packed and numbers[1] == "0"))
        stage.queue.notify()
        assert stage.kicks[-1] == int(value, 16)


def test_the_pages_fences_are_the_cores() -> None:
    found = []
    for file in ("split.c", "packed.c"):
        function = ""
        for line in (CORE / file).read_text().splitlines():
            start = re.match(r"(?:\w[\w *]*?[ *])(\w+)\(.*[^;]$", line)
            function = start[1] if start else function
            found += [(function, f"GPV_{match[1]}") for match in [ORDER.search(line)] if match]
    assert sorted((row[0].strip("`"), row[1].strip("`")) for row in table("In")) == sorted(found)


@pytest.mark.timeout(400)
@pytest.mark.requirement("DRV-SPLIT-32", "DRV-SPLIT-33", "DRV-PACKED-19", "DRV-PACKED-20")
def test_the_model_finds_what_the_page_says_without_a_fence(model: Path) -> None:
    told = []
    for param in ORDERS:
        file, line = param.values
        done = subprocess.run([model, str(file), str(line)], capture_output=True, text=True, timeout=300)
        told.append(done.stdout.splitlines()[-1])
    assert [row[-1].strip("`") for row in table("In")] == told


# The pictures.


def test_a_picture_is_told_in_words_too() -> None:
    root = ElementTree.fromstring(SCENARIOS["split-used"]().svg())
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("role") == "img"
    assert title is not None
    assert title.text == "Used: B came back before A"
    assert description is not None
    assert "B (write): 3 descriptors" in (description.text or "")
    assert "used.idx is 0x0001." in (description.text or "")


def test_a_picture_has_colours_for_light_and_dark() -> None:
    svg = SCENARIOS["packed-used"]().svg()
    light, dark = svg.split("@media (prefers-color-scheme:dark)")
    names = set(re.findall(r'class="[^"]*f-(\w+)', svg))
    assert names
    assert all(f".f-{name}{{" in light and f".f-{name}{{" in dark for name in names)


@pytest.mark.parametrize("packed", [False, True])
def test_a_queue_of_a_driver_can_be_drawn(packed: bool) -> None:
    with guestpv.open(f"loopback:rng?packed={'on' if packed else 'off'}") as transport:
        transport.negotiate(supported=0)
        queue = transport.make_queue(0)
        before = queue.desc.tobytes(), queue.driver.tobytes(), queue.device.tobytes()
        queue.add(writable=[transport.pool.allocate(64)])
        after = queue.desc.tobytes(), queue.driver.tobytes(), queue.device.tobytes()
        found = texts(ring_picture(queue, names={0: "a <name> & more"}))
        assert "a <name> …: placed" in found
        assert queue.name in found
        assert (queue.desc.tobytes(), queue.driver.tobytes(), queue.device.tobytes()) == after != before
        assert queue.outstanding == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_large_ring_is_drawn_around_what_is_in_use(format: tuple[str, ...]) -> None:
    stage = Stage(*format, size=32768)
    stage.run(1000)
    stage.request("A", 0, 0)
    svg = stage.queue and ring_picture(stage.queue, names=stage.names)
    found = texts(svg)
    assert found.count("A: placed") == 3
    assert "⋮" in found
    assert len(svg) < 60_000


def test_many_buffers_and_tables_are_counted_where_they_are_not_drawn() -> None:
    stage = Stage("INDIRECT_DESC", size=16)
    for number in range(10):
        stage.request(f"R{number}", 0, number)
    found = texts(ring_picture(stage.queue, names=stage.names))
    assert "and 2 more in flight" in found
    assert "6 more indirect tables are not drawn." in found


def test_a_closed_queue_has_no_picture() -> None:
    stage = Stage()
    stage.queue.close()
    with pytest.raises(UsageError, match="closed"):
        ring_picture(stage.queue)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", OPTIONS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_memory_full_of_nonsense_can_be_drawn(
    format: tuple[str, ...], options: tuple[str, ...], seed: int
) -> None:
    stage = Stage(*format, *options)
    stage.two_requests()
    stage.publish()
    memory = stage.queue._buffers[0].array
    rng = np.random.default_rng(seed)
    memory[:] = rng.integers(0, 256 if seed % 2 else 4, memory.size, np.uint8)
    assert texts(ring_picture(stage.queue))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", OPTIONS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_states_follow_a_queue_at_work(
    format: tuple[str, ...], options: tuple[str, ...], data: st.DataObject
) -> None:
    """A queue of random work, and beside it plain records of where each buffer is."""
    stage = Stage(*format, *options)
    queue = stage.queue
    expected: dict[int, State] = {}
    taken: list[Chain] = []
    for _ in range(data.draw(st.integers(1, 40))):
        step = data.draw(
            st.sampled_from(["add", "add", "publish", "take", "use", "use all", "reap one", "reap"])
        )
        if step == "add":
            count = data.draw(st.integers(1, 3))
            if queue.free_slots >= count:
                token = queue.add(writable=[stage.pool.allocate(32) for _ in range(count)])
                expected[token & 0xFFFF] = State.PLACED
        elif step == "publish":
            queue.publish()
            expected = {id: State.DEVICE if s is State.PLACED else s for id, s in expected.items()}
        elif step == "take":
            taken += stage.take()
        elif step.startswith("use") and taken:
            some = taken[:] if step == "use all" else [taken[0 if "IN_ORDER" in options else -1]]
            stage.use(*some)
            taken = [chain for chain in taken if chain not in some]
            expected |= {chain.id: State.USED for chain in some}
        elif step.startswith("reap"):
            for token, _length in queue.completions():
                del expected[token & 0xFFFF]
                if step == "reap one":
                    break
        state = ring_state(queue)
        assert {buffer.id: buffer.state for buffer in state.buffers} == expected
        free = sum(row.state is State.FREE for row in state.rows)
        assert free == state.free_rows == queue.free_slots
        placed = sum(buffer.count for buffer in state.buffers if buffer.state is State.PLACED)
        assert sum(row.state is State.PLACED for row in state.rows) == placed
        if not state.packed:
            for buffer in state.buffers:
                assert sum(row.owner == buffer.id for row in state.rows) == buffer.count
            assert sorted(state.free) == [n for n, row in enumerate(state.rows) if row.state is State.FREE]
        else:
            assert not set(state.free) & set(expected)
    assert texts(ring_picture(queue))


# The verb.


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["ring-picture", *words])


def test_the_verb_lists_its_scenarios() -> None:
    done = run()
    assert done.exit_code == 0
    assert all(name in done.stdout for name in SCENARIOS)
    assert list(json.loads(run("--json").stdout)["data"]["scenarios"]) == list(SCENARIOS)


def test_the_verb_draws(tmp_path: Path) -> None:
    svg = SCENARIOS["packed-used"]().svg()
    assert run("packed-used").stdout == svg
    assert json.loads(run("packed-used", "--json").stdout)["data"] == {"svg": svg}
    path = tmp_path / "x.svg"
    assert run("packed-used", "-o", str(path)).stdout == f"{path}\n"
    assert path.read_text(encoding="utf-8") == svg
    assert run("--all", str(tmp_path)).exit_code == 0
    assert sorted(p.stem for p in tmp_path.glob("*.svg") if p != path) == sorted(SCENARIOS)


@pytest.mark.parametrize("words", [("nonsense",), ("--all", ".", "packed-used")])
def test_the_verb_refuses_what_makes_no_sense(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert "guestpv ring-picture" in done.stderr
