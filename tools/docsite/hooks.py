"""What mkdocs calls while it builds: pages from outside of ``docs/``, and links that lead there."""

from __future__ import annotations

import posixpath
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from docsite import commands  # noqa: E402
from docsite.links import EXTERNAL, LINK  # noqa: E402

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""File of the repository -> page of the site."""

API = {
    "opener": "Opening devices",
    "transport.base": "Transports",
    "transport.pci": "virtio-pci",
    "memory": "DMA memory",
    "virtqueue.queue": "Virtqueues",
    "virtqueue.layout": "Ring layout",
    "virtqueue.raw": "Rings by hand",
    "drivers.rng": "Entropy driver",
    "drivers.net": "Network driver",
    "drivers.blk": "Block driver",
    "drivers.balloon": "Balloon driver",
    "devices.loopback": "Software devices",
    "devices.model": "Device models",
    "devices.scripted": "A driver by hand",
    "serve.vfio_user": "vfio-user server",
    "trace": "Pictures of rings",
    "errors": "Errors",
}
"""Module below guestpv -> title of its page."""


def on_config(config: Any, **_: Any) -> Any:
    """Put pages that the navigation does not name at its end."""
    named = set(_leaves(config["nav"]))
    docs = Path(config["docs_dir"])
    rest = sorted(
        path.relative_to(docs).as_posix()
        for path in docs.rglob("*.md")
        if path.relative_to(docs).as_posix() not in named
    )
    if rest:
        config["nav"].append({"More": rest})
    config["nav"].append({"API": [f"api/{module}.md" for module in API]})
    return config


def _leaves(nav: Any) -> Any:
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for value in entry.values():
                yield from _leaves([value] if isinstance(value, str) else value)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages that are not in ``docs/``."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relink(text, source, page)))
    files.append(File.generated(config, "reference/cli.md", content=commands.page()))
    for module, title in API.items():
        text = f"# {title}\n\n`guestpv.{module}`\n\n::: guestpv.{module}\n"
        files.append(File.generated(config, f"api/{module}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files outside of ``docs/`` to their pages, or make plain text of them."""
    path = page.file.src_uri
    if path in PAGES.values() or path.startswith("api/") or path == "reference/cli.md":
        return markdown
    return relink(markdown, f"docs/{path}", path)


def relink(text: str, source: str, page: str) -> str:
    """Text of a file of the repository as text of a page of the site."""

    def change(match: Any) -> str:
        whole, target = match[0], match[1]
        if EXTERNAL.match(target) or target.startswith("#"):
            return str(whole)
        path, hash_, anchor = target.partition("#")
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        site = PAGES.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        if site is None or (ROOT / inside).is_dir():
            return str(whole)[: whole.index("](")].lstrip("!")[1:]
        link = posixpath.relpath(site, str(PurePosixPath(page).parent))
        return str(whole).replace(f"({target}", f"({link}{hash_}{anchor}")

    return LINK.sub(change, text)
