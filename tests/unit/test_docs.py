"""The documentation: links lead somewhere, the site builds strictly and agrees with the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from docsite import commands
from docsite.links import anchors, broken, links
from guestpv.cli.main import main

ROOT = Path(__file__).parents[2]
CONTEXTS = list(commands.contexts())
LOADS = re.compile(r"""<(?:script|link|img|iframe)[^>]*\s(?:src|href)=["'](?:https?:)?//""")


def test_no_link_in_the_repository_is_broken() -> None:
    assert broken(ROOT) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# A `b` heading\n\n# Twice\n\n# Twice\n")
    page = tmp_path / "README.md"
    page.write_text(
        "[fine](docs/other.md#a-b-heading) [again](docs/other.md#twice-1) [web](https://example.org/x)\n"
        "`[code](nowhere)` ![no](docs/no.svg)\n\n```\n[fenced](nowhere)\n```\n"
        "[one [nested] more](docs/other.md#no) [out](../elsewhere)\n"
    )
    assert broken(tmp_path) == [
        "README.md:2: docs/no.svg: no such file",
        "README.md:7: docs/other.md#no: no such heading",
        "README.md:7: ../elsewhere: no such file",
    ]
    assert len(list(links(page))) == 6
    assert anchors(tmp_path / "docs" / "other.md") >= {"a-b-heading", "twice", "twice-1"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly with a network that answers nothing."""
    target = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    environment["https_proxy"] = environment["http_proxy"]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_site_builds_and_loads_nothing_from_elsewhere(site: Path) -> None:
    html = sorted(site.rglob("*.html"))
    assert len(html) > 30
    for page in html:
        assert not LOADS.search(page.read_text(encoding="utf-8")), page


def test_public_functions_are_on_the_api_pages(site: Path) -> None:
    text = (site / "api" / "transport.base.html").read_text(encoding="utf-8")
    for name in ("negotiate", "make_queue", "driver_ok", "reset_queue"):
        assert f"guestpv.transport.base.Transport.{name}" in text
    assert "the device never left reset" in text


def test_links_out_of_the_documents_lead_to_pages_of_the_site(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="contributing.html"' in text
    assert 'href="guestpv/' not in text
    assert 'src="demo.svg"' in text


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.command_path)
def test_the_page_and_the_manual_agree_with_help(context: click.Context) -> None:
    path = context.command_path
    shown = CliRunner().invoke(main, [*path.split()[1:], "--help"], terminal_width=commands.WIDTH).output
    assert f"## {path}\n\n```text\n{shown.strip()}\n```" in commands.page()
    manual = commands.man_page(context).replace("\\-", "-")
    for option in re.findall(r"--[a-z][a-z-]+", shown):
        assert option in manual, option
    assert f'.TH "{path.replace(" ", "-").upper()}"' in manual
