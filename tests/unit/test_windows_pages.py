"""The pages for writers of Windows drivers: what they say of our code is there, and pictures are drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docsite.windows_names import wrong
from guestpv.conformance import catalogue
from guestpv.explain import rows
from guestpv.explain.lifecycle import MODELS, picture
from guestpv.explain.mentions import PACKAGE, names, sources
from guestpv.explain.pages import REVISION

DOCS = Path(__file__).parents[2] / "docs"
WINDOWS = DOCS / "windows"
PAGES = sorted(WINDOWS.glob("*.md"))
OURS = re.compile(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.(?:py|c)):([\w.]+)`")


def check_place(path: str, name: str) -> None:
    assert (PACKAGE / path).exists(), path
    assert name in names(path) or re.search(rf"^{name}\b", sources()[path], re.MULTILINE), f"{path}:{name}"


@pytest.mark.parametrize("model", MODELS)
def test_the_pictures_are_what_the_code_draws(model: str) -> None:
    kept = (WINDOWS / f"{model}.svg").read_text(encoding="utf-8")
    assert kept == picture(model), "python -m guestpv.explain.lifecycle docs/windows"
    assert f"]({model}.svg)" in (WINDOWS / f"{model}.md").read_text()


def test_each_model_begins_and_ends() -> None:
    for model in MODELS:
        phases = [row["phase"] for row in rows("lifecycles") if row["model"] == model]
        assert phases[0] == "load"
        for phase in ("discover", "features", "driver-ok", "complete", "surprise removal"):
            assert any(phase in one for one in phases), (model, phase)


def test_code_beside_the_callbacks_exists() -> None:
    for row in rows("lifecycles"):
        for place in row["code"].replace("-", " ", row["code"] == "-").split():
            check_place(*place.split(":"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_a_page_names_exists(page: Path) -> None:
    for path, name in OURS.findall(page.read_text()):
        check_place(path, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_ids_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    known = {row["id"] for row in rows("deviations")}
    assert set(re.findall(r"\bW-[A-Z]+-\d+", text)) <= known
    assert set(re.findall(r"\bDRV-[A-Z]+-\d+", text)) <= set(catalogue.load("driver"))
    assert REVISION[:12] in text
    assert "by reading only" in text


def test_every_deviation_has_a_page_that_mentions_its_family() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for family in {row["id"].rsplit("-", 1)[0] for row in rows("deviations")}:
        assert family in text


def test_names_that_the_drivers_do_not_have_are_found(tmp_path: Path) -> None:
    """The check that is run against a checkout of the drivers, against one that has nothing."""
    found = wrong(tmp_path)
    assert "steps: reset: no vio_modern_reset" in found
    assert any(line.startswith("deviations: W-NET-1: NetKVM/wlh/ParaNdis6_Impl.cpp has no") for line in found)
    assert len(found) > 200
    names = " ".join(line.rpartition(" ")[2] for line in found)
    (tmp_path / "all.c").write_text(names)
    assert {line.split(":")[0] for line in wrong(tmp_path)} == {"deviations"}
