"""``guestpv explain`` and the reference pages: complete, and true of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from guestpv.cli.explain import complete_name
from guestpv.cli.main import main
from guestpv.conformance import catalogue
from guestpv.explain import find, rows, topics
from guestpv.explain.mentions import PACKAGE, mentions, names
from guestpv.explain.pages import HEAD, PAGES
from guestpv.spec import features as ft
from guestpv.spec.pci import COMMON_CFG

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
STANDARD_STEPS = ("reset", "acknowledge", "driver", "features", "features-ok", "queues", "driver-ok")


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["explain", *words])


def explained(name: str) -> list[dict[str, Any]]:
    done = run(name, "--json")
    assert done.exit_code == 0, done.output
    topics: list[dict[str, Any]] = json.loads(done.output)["data"]["topics"]
    return topics


def test_every_feature_register_step_and_requirement_is_there() -> None:
    known = topics()
    for number, table in [(None, ft.COMMON_FEATURES), *ft.DEVICE_FEATURES.items()]:
        device = ft.DEVICE_NAMES[number] if number else ""
        for bit, name in table.items():
            topic = known[f"{device}:{name}" if device else name]
            assert topic.kind == "feature"
            assert topic.details["bit"] == str(bit)
    assert {field.name for field in COMMON_CFG} < {t.name for t in known.values() if t.kind == "register"}
    assert all(known[step].kind == "step" for step in STANDARD_STEPS)
    for side in catalogue.SIDES:
        assert catalogue.load(side).keys() <= known.keys()


def test_no_field_of_a_table_is_empty() -> None:
    for topic in topics().values():
        assert topic.what
        assert re.match(r"\d", topic.section), topic
        if topic.kind != "requirement":
            assert topic.breaks, topic
            assert topic.windows, topic


def test_code_that_steps_name_exists() -> None:
    for row in rows("steps"):
        assert row["code"], row["name"]
        for place in row["code"].split():
            path, _, name = place.partition(":")
            assert (PACKAGE / path).exists(), place
            assert name in names(path), place


def test_code_is_found_where_it_names_the_topic() -> None:
    """What a reader finds with grep, by function."""
    assert "transport/pci.py:PciTransport.set_up_queue" in explained("queue_enable")[0]["code"]
    assert any(place.startswith("drivers/net") for place in explained("net:mrg_rxbuf")[0]["code"])
    assert "transport/base.py:Transport.make_queue" in explained("DEV-PCI-30")[0]["code"]
    assert "core/split.c:gpv_split_publish" in mentions("DEV-SPLIT-18")
    assert mentions("DEV-SPLIT-1") == ()


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("VIRTIO_F_RING_PACKED", ["RING_PACKED"]),
        ("packed", ["RING_PACKED"]),
        ("VIRTIO_RING_F_EVENT_IDX", ["EVENT_IDX"]),
        ("VIRTIO_NET_F_MQ", ["net:MQ"]),
        ("mq", ["net:MQ", "blk:MQ"]),
        ("Queue-Select", ["queue_select"]),
        ("drv-split-14", ["DRV-SPLIT-14"]),
        ("vio_modern_reset", ["reset", "device_status"]),
        ("SetupCSO", ["net:CSUM"]),
    ],
)
def test_names_are_understood_as_people_write_them(name: str, titles: list[str]) -> None:
    assert [topic.title for topic in find(name)] == titles


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("evnt_idx", "EVENT_IDX"), ("queue_enabel", "queue_enable"), ("drv-init-99", "DRV-INIT")],
)
def test_a_wrong_name_gets_the_nearest_ones(wrong: str, meant: str) -> None:
    done = run(wrong)
    assert done.exit_code == 2
    assert f"nothing is called '{wrong}'" in done.stderr
    assert meant in done.stderr


def test_a_name_or_a_list_but_not_both() -> None:
    assert run().exit_code == 2
    assert run("reset", "--list", "step").exit_code == 2
    assert "driver-ok" in run("--list", "step").output


def test_a_requirement_tells_which_windows_driver_does_otherwise() -> None:
    (topic,) = explained("DRV-PCI-25")
    assert topic["details"]["level"] == "MUST"
    assert [one["id"] for one in topic["deviations"]] == ["W-NET-1"]
    text = run("DRV-PCI-25").output
    assert "ParaNdis_ConfigureMSIXVectors" in text
    assert "By reading only" in text


def test_deviations_name_requirements_that_exist() -> None:
    known = {*catalogue.load("driver"), *catalogue.load("device")}
    for row in rows("deviations"):
        assert set(row["requirements"].split()) - {"-"} <= known, row["id"]
        assert re.fullmatch(r"[\w/.-]+\.(c|cpp) [\w:, ]+", row["where"]), row["where"]


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_pages_are_what_the_tables_say(name: str) -> None:
    kept = (REFERENCE / f"{name}.md").read_text(encoding="utf-8")
    assert kept == HEAD.format(name=name) + PAGES[name](), "python -m guestpv.explain.pages docs/reference"


def test_the_shell_completes_names() -> None:
    names = complete_name(None, None, "queue_e")  # type: ignore[arg-type]
    assert names == ["queue_enable"]
    everything = complete_name(None, None, "")  # type: ignore[arg-type]
    assert "features-ok" in everything
    assert "DRV-INIT-01" not in everything
