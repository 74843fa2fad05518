"""Steps of a ring, each with the memory before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from ..devices.function import SoftwareFunction
from ..devices.loopback import open_function
from ..devices.ring import Chain
from ..pci.function import PciFunction
from ..spec import features as ft
from ..spec.ring import DESC_F_INDIRECT, DESC_F_NEXT
from ..transport.pci import PciTransport
from .stage import QUEUE_INDEX, Stage

FORMAT = "guestpv.vector/1"
DESC_BYTES = 16
SECTIONS = {
    "add": ("2.7.13.1", "2.8.21.1"),
    "publish": ("2.7.13.3", "2.8.21.1.1"),
    "reap": ("2.7.14", "2.8.22"),
    "disable-interrupts": ("2.7.7", "2.8.10"),
    "enable-interrupts": ("2.7.7", "2.8.10"),
    "device-use": ("2.7.8", "2.8.6"),
    "device-disable-notifications": ("2.7.10", "2.8.10"),
    "device-enable-notifications": ("2.7.10", "2.8.10"),
    "cycle": ("2.7.13", "2.8.21"),
}
"""Operation -> section for the split and for the packed format."""


def vector(
    name: str, kind: str, title: str, section: str, features: int, device_type: int | None = None
) -> dict[str, Any]:
    """The members that all vectors have; ``section`` may name several."""
    return {
        "schema": FORMAT,
        "name": name,
        "kind": kind,
        "title": title,
        "standard": "VIRTIO 1.4",
        "section": section,
        "features": ft.feature_names(device_type, features),
        "feature_bits": f"{features:#x}",
    }


def software(device: str, params: dict[str, str]) -> tuple[SoftwareFunction, PciTransport]:
    """A device of ``loopback:`` that can be watched, and the driver's way to it."""
    function = open_function(device, params)
    return function, PciTransport(cast(PciFunction, function))


class Recorder:
    """Moves a stage and keeps what each move did to memory.

    Args:
        features: names of negotiated features, besides VERSION_1.
        size: queue size.
    """

    def __init__(self, *features: str, size: int = 8) -> None:
        self.stage = Stage(*features, size=size)
        self.queue = self.stage.queue
        self.steps: list[dict[str, Any]] = []
        self._chains: dict[int, Chain] = {}
        self._owned: dict[int, list[int]] = {}
        self._place = 0
        self._held: int | None = None
        self.start = self._image()

    # Memory.

    def _areas(self) -> dict[str, tuple[int, int]]:
        """Area -> bus address, bytes."""
        queue, layout = self.queue, self.queue.layout
        areas = {
            "desc": (queue.addresses.desc, layout.desc.size),
            "driver": (queue.addresses.driver, layout.driver.size),
            "device": (queue.addresses.device, layout.device.size),
        }
        if len(queue._buffers) > 1:
            areas["tables"] = (queue._buffers[1].address, queue._buffers[1].nbytes)
        return areas

    def _image(self) -> dict[str, str]:
        memory = self.stage.memory
        return {name: memory.view(*where).hex() for name, where in self._areas().items()}

    @contextmanager
    def _step(self, op: str, **facts: Any) -> Iterator[dict[str, Any]]:
        step: dict[str, Any] = {"op": op, "section": SECTIONS[op][self.queue.packed], **facts}
        before = self._image()
        yield step
        self.steps.append(step | {"before": before, "after": self._image(), "ignore": self._ignored()})

    def _ignored(self) -> list[dict[str, Any]]:
        """Bytes that the standard leaves to the driver now, so that another one may have others there."""
        ignored: list[tuple[str, int, int]] = []
        desc = self.queue.desc
        owned = {place: number for slots in self._owned.values() for number, place in enumerate(slots)}
        last = {slots[-1] for slots in self._owned.values()}
        for place in range(self.queue.size):
            at = DESC_BYTES * place
            if self.queue.packed:
                if place not in owned:
                    ignored.append(("desc", at, 14))
                elif place == self._held:
                    ignored.append(("desc", at + 14, 2))
                if place in owned and place not in last:
                    ignored.append(("desc", at + 12, 2))
            elif place not in owned:
                ignored.append(("desc", at, DESC_BYTES))
            elif not int(desc[place]["flags"]) & DESC_F_NEXT:
                ignored.append(("desc", at + 14, 2))
        ignored += self._ignored_tables()
        return [{"area": area, "offset": offset, "length": length} for area, offset, length in ignored]

    def _ignored_tables(self) -> Iterator[tuple[str, int, int]]:
        """All of a table that is not in use, and ``next`` of the last entry (split) or every id (packed)."""
        if len(self.queue._buffers) < 2:
            return
        memory, entries = self.queue._buffers[1], self.queue._indirect_entries
        for table in range(memory.nbytes // (DESC_BYTES * entries)):
            start = table * entries * DESC_BYTES
            used = 0
            for place in self._owned.get(table, ()):
                row = self.queue.desc[place]
                if int(row["flags"]) & DESC_F_INDIRECT and int(row["addr"]) == memory.address + start:
                    used = int(row["len"])
            if used and self.queue.packed:
                for at in range(start, start + used, DESC_BYTES):
                    yield "tables", at + 12, 2
            elif used:
                yield "tables", start + used - 2, 2
            if rest := entries * DESC_BYTES - used:
                yield "tables", start + used, rest

    # Moves of the driver.

    def add(self, readable: Sequence[int] = (), writable: Sequence[int] = ()) -> int:
        """Place a buffer of elements of so many bytes; returns its id."""
        parts = [[self.stage.pool.allocate(size) for size in sizes] for sizes in (readable, writable)]
        free = self.queue.free_slots
        first = self.queue.core_lib.gpv_unpublished(self.queue.handle) == 0
        with self._step(
            "add",
            readable=[{"address": part.address, "length": part.nbytes} for part in parts[0]],
            writable=[{"address": part.address, "length": part.nbytes} for part in parts[1]],
        ) as step:
            step["id"] = self.queue.add(*parts) & 0xFFFF
            step["descriptors"] = self._slots(step["id"], free - self.queue.free_slots)
            self._owned[step["id"]] = step["descriptors"]
            if self.queue.packed and first:
                self._held = step["descriptors"][0]
        number: int = step["id"]
        return number

    def _slots(self, head: int, count: int) -> list[int]:
        if self.queue.packed:
            slots = [(self._place + number) % self.queue.size for number in range(count)]
            self._place = (self._place + count) % self.queue.size
            return slots
        slots = [head]
        while len(slots) < count:
            slots.append(int(self.queue.desc[slots[-1]]["next"]))
        return slots

    def publish(self) -> None:
        """Make what was placed available, with the decision whether to notify."""
        with self._step("publish") as step:
            step["notified"] = self.queue.publish()
            step["notification"] = self.stage.kicks[-1] if step["notified"] else None
            self._held = None
        self._take()

    def _take(self) -> None:
        for chain in self.stage.take():
            self._chains[chain.id] = chain

    def reap(self) -> None:
        """Take back everything that was used."""
        with self._step("reap") as step:
            ids, lengths = self.queue.reap_burst()
            step["returned"] = [
                {"id": int(number), "length": int(length)}
                for number, length in zip(ids, lengths, strict=True)
            ]
            for number in ids.tolist():
                del self._owned[number]

    def disable_interrupts(self) -> None:
        """The driver wants no used buffer notifications."""
        with self._step("disable-interrupts"):
            self.queue.disable_interrupts()

    def enable_interrupts(self) -> None:
        """The driver wants them again, and looks once more."""
        with self._step("enable-interrupts") as step:
            step["pending"] = self.queue.enable_interrupts()

    # Moves of the device.

    def use(self, *ids: int, lengths: Sequence[int] | None = None) -> None:
        """The device shows these buffers as used together, by default with all of them written."""
        chains = [self._chains.pop(number) for number in ids]
        sizes = [chain.writable_bytes for chain in chains] if lengths is None else list(lengths)
        with self._step("device-use") as step:
            for chain, length in zip(chains, sizes, strict=True):
                self.stage.device.push(chain, length)
            step["used"] = [
                {"id": number, "length": length} for number, length in zip(ids, sizes, strict=True)
            ]
            step["interrupt"] = self.stage.device.publish()

    def device_disable(self) -> None:
        """The device wants no available buffer notifications."""
        with self._step("device-disable-notifications"):
            self.stage.device.suppress_kicks()

    def device_enable(self) -> None:
        """The device wants them from the next buffer on."""
        with self._step("device-enable-notifications"):
            self.stage.device.enable_kicks()

    def cycle(self, count: int) -> None:
        """So many buffers of one device-writable element go round, at most the queue size at a time."""
        with self._step("cycle", count=count, burst=self.queue.size, length=64) as step:
            self.stage.run(count)
            step["address"] = int(self.queue.desc[0]["addr"])
        self._place = (self._place + count) % self.queue.size

    # The result.

    def vector(self, name: str, title: str, section: str) -> dict[str, Any]:
        """Everything as one vector."""
        queue = self.queue
        return vector(name, "ring", title, section, queue.features) | {
            "queue": {
                "index": QUEUE_INDEX,
                "size": queue.size,
                "format": "packed" if queue.packed else "split",
                "areas": {
                    area: {"address": address, "length": length}
                    for area, (address, length) in self._areas().items()
                },
                "table_entries": queue._indirect_entries if len(queue._buffers) > 1 else 0,
            },
            "start": self.start,
            "steps": self.steps,
        }
