"""What only the host's side of a balloon can say or do, where the scheme gives a hand there."""

from __future__ import annotations

from typing import Any

from ..devices.function import SoftwareFunction
from ..memory import DmaBuffer
from ..pci.qtest import QtestFunction
from ..spec import balloon
from .rig import Rig

QEMU_NAMES = {
    "swap_in": "stat-swap-in",
    "swap_out": "stat-swap-out",
    "majflt": "stat-major-faults",
    "minflt": "stat-minor-faults",
    "memfree": "stat-free-memory",
    "memtot": "stat-total-memory",
    "avail": "stat-available-memory",
    "caches": "stat-disk-caches",
}


class Host:
    """The host's side of the balloon under test."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._inner = rig.function.inner

    @property
    def model(self) -> Any:
        """The model of our own device half; else the case ends NOT_OBSERVABLE."""
        if not isinstance(self._inner, SoftwareFunction):
            self._rig.case.not_observable("nobody here has a hand on the host's side for this")
        return self._inner.model

    def released(self, page: DmaBuffer) -> bool:
        """Whether the host has taken a page that was filled before it was inflated."""
        if isinstance(self._inner, SoftwareFunction):
            return page.address >> balloon.PAGE_SHIFT in self._inner.model.pages
        if not isinstance(self._inner, QtestFunction):
            self._rig.case.not_observable("nobody here sees what the host does with a page")
        return not page.array.any()

    def ask_statistics(self) -> None:
        """Let the host want new statistics."""
        if isinstance(self._inner, QtestFunction):
            # It asks by itself, every second from the moment that somebody is interested.
            self._qom("qom-set", "guest-stats-polling-interval", value=1)
            return
        assert self.model.ask_statistics(), "the host has no statistics buffer"

    def statistics(self) -> dict[str, int]:
        """Statistics as the host knows them, by the names of the standard in small letters."""
        if isinstance(self._inner, QtestFunction):
            stats = self._qom("qom-get", "guest-stats")["stats"]
            return {ours: stats[theirs] for ours, theirs in QEMU_NAMES.items() if theirs in stats}
        return dict(self.model.statistics)

    def hint(self, command: int) -> None:
        """Set ``free_page_hint_cmd_id``."""
        self.model.hint(command)

    def hinted(self) -> list[tuple[int, int]]:
        """(bus address, length) of the hints that count."""
        return list(self.model.hinted)

    def _qom(self, command: str, name: str, **more: object) -> Any:
        assert isinstance(self._inner, QtestFunction)
        qmp = self._inner.machine.qemu.qmp
        paths = [
            f"{folder}/{child['name']}"
            for folder in ("/machine/peripheral", "/machine/peripheral-anon")
            for child in qmp.execute("qom-list", {"path": folder})
            if child["type"].startswith("child<virtio-balloon")
        ]
        if not paths:
            self._rig.case.not_observable("QEMU has no balloon that can be asked")
        return qmp.execute(command, {"path": paths[0], "property": name, **more})
