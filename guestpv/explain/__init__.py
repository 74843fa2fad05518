"""What a step, a feature, a register or a requirement is, and where it is done: one source of data.

The tables (``*.tsv``) beside this file are what ``guestpv explain`` answers from, and what the pages
in ``docs/reference`` are made of. Bits, offsets and widths come from ``guestpv.spec``, requirements from its
catalogue, and places in our code, but for the steps', from the code itself.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from typing import Any, Final, Literal

from ..conformance import catalogue
from ..errors import UsageError
from ..spec import features as ft
from ..spec.pci import COMMON_CFG
from .mentions import mentions

Kind = Literal["step", "feature", "register", "requirement"]
KINDS: Final[tuple[Kind, ...]] = ("step", "feature", "register", "requirement")
SUGGESTIONS: Final = 4


@dataclass(frozen=True, slots=True)
class Topic:
    """Something that can be explained.

    Attributes:
        kind: what it is.
        name: what it is called; the standard's name for features (without VIRTIO_..._F_), registers and
            requirements, ours for steps.
        section: sections of VIRTIO 1.4.
        what: what it is.
        breaks: what goes wrong without it; empty for requirements.
        windows: which functions of virtio-win's drivers do it; empty for requirements.
        code: our code, as ``file:name``, below the package.
        device: type of the device whose feature it is, else empty.
        details: what else there is to know, by name: bit, offset, level, ...
        deviations: what shipping Windows drivers do otherwise.
    """

    kind: Kind
    name: str
    section: str
    what: str
    breaks: str = ""
    windows: str = ""
    code: tuple[str, ...] = ()
    device: str = ""
    details: dict[str, str] = field(default_factory=dict)
    deviations: tuple[dict[str, str], ...] = ()

    @property
    def title(self) -> str:
        """The name that is unique: features of devices have the device before theirs."""
        return f"{self.device}:{self.name}" if self.device else self.name

    def describe(self) -> dict[str, Any]:
        """Everything as plain data, with what is found in the code."""
        return asdict(self) | {"title": self.title, "code": list(self.places)}

    @property
    def places(self) -> tuple[str, ...]:
        """Our code: what the table names, or else where the code itself names the topic."""
        if self.code:
            return self.code
        if self.kind == "feature":
            return mentions(f"F_{self.name}", below=_feature_folders(self.device))
        if self.kind == "register":
            return mentions(self.name, below=("transport", "devices"))
        return mentions(self.name)


def _feature_folders(device: str) -> tuple[str, ...]:
    if not device:
        return ("transport", "virtqueue", "devices")
    return tuple(f"{folder}/{device}" for folder in ("drivers", "services", "devices/models"))


def rows(name: str) -> list[dict[str, str]]:
    """A table of ours, row by row."""
    text = files(__name__).joinpath(f"{name}.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


@functools.cache
def topics() -> dict[str, Topic]:
    """Every topic by its title, steps first."""
    return {topic.title: topic for topic in (*_steps(), *_features(), *_registers(), *_requirements())}


def _steps() -> Iterator[Topic]:
    for row in rows("steps"):
        yield Topic(
            "step",
            row["name"],
            row["section"],
            row["what"],
            row["breaks"],
            row["windows"],
            tuple(row["code"].split()),
        )


def _features() -> Iterator[Topic]:
    types = {name: number for number, name in ft.DEVICE_NAMES.items()}
    for row in rows("features"):
        device = "" if row["device"] == "common" else row["device"]
        number = types.get(device)
        bit = ft.feature_bit(number, row["name"])
        needs = ft.DEPENDENCIES.get(number, {}).get(bit, ())
        details = {"bit": str(bit)}
        if needs:
            details["needs"] = ", ".join(
                " or ".join(ft.feature_name(number, one) for one in group) for group in needs
            )
        yield Topic(
            "feature",
            row["name"],
            row["section"],
            row["what"],
            row["breaks"],
            row["windows"],
            device=device,
            details=details,
        )


def _registers() -> Iterator[Topic]:
    for row in rows("registers"):
        details = {}
        if row["name"] in COMMON_CFG:
            place = COMMON_CFG[row["name"]]
            details = {
                "structure": "common configuration",
                "offset": f"{place.offset:#04x}",
                "width": f"{place.width} bytes",
                "driver": "reads and writes" if place.writable else "reads",
            }
            if isinstance(place.feature, int):
                details["exists with"] = ft.feature_name(None, place.feature)
        yield Topic(
            "register",
            row["name"],
            row["section"],
            row["what"],
            row["breaks"],
            row["windows"],
            details=details,
        )


def _requirements() -> Iterator[Topic]:
    for side in catalogue.SIDES:
        for row in catalogue.load(side).values():
            yield Topic(
                "requirement",
                row.id,
                row.section,
                row.requirement,
                details={
                    "level": row.level,
                    "area": row.area,
                    "seen": row.check,
                    "since": row.since,
                    "scope": row.scope,
                },
                deviations=tuple(one for one in rows("deviations") if row.id in one["requirements"].split()),
            )


def find(name: str) -> list[Topic]:
    """Topics with this name, in any case; several where two devices have a feature of one name.

    ``VIRTIO_NET_F_MTU``, ``net:mtu``, ``F_MTU`` and ``mtu`` all mean the same. The name of a function of the
    Windows drivers finds what it does.

    Raises:
        UsageError: there is none; the hint has the names that come nearest.
    """
    wanted = _plain(name)
    found = [topic for topic in topics().values() if wanted in (_plain(topic.title), _plain(topic.name))]
    found = found or [topic for topic in topics().values() if _calls(topic.windows, name.strip())]
    if found:
        return found
    spellings = {_plain(topic.name): topic.title for topic in topics().values()}
    near = get_close_matches(wanted, spellings, SUGGESTIONS, 0.5)
    hint = f"did you mean {', '.join(spellings[one] for one in near)}?" if near else ""
    raise UsageError(
        f"nothing is called {name!r}", hint=hint or "guestpv explain --list shows all there is to explain"
    )


def _calls(windows: str, name: str) -> bool:
    """Whether a Windows column names this function."""
    functions = re.findall(r"`([^`]+)`", windows)
    return name.casefold() in (part.casefold() for one in functions for part in (one, one.split("::")[-1]))


def _plain(name: str) -> str:
    """A name without case, ``VIRTIO_..._F_``, ``F_`` or ``RING_``, and with one kind of dash."""
    plain = name.strip().lower().replace("-", "_")
    device, colon, rest = plain.rpartition(":")
    if match := re.fullmatch(r"virtio_(?:(\w+?)_)?f_(\w+)", rest):
        owner, rest = match.groups()
        if owner in ft.DEVICE_NAMES.values():
            device, colon = owner, ":"
    rest = rest.removeprefix("f_").removeprefix("ring_")
    return f"{device}{colon}{rest}"
