"""The rings of a replay: what a record wrote to its rings, written again to rings of our own."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

from guestpv.core._core import lib

from ..memory import DmaBuffer, DmaPool
from ..spec import features as feat
from ..spec.ring import PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED
from ..virtqueue.layout import PackedRings, ring_layout, ring_views

USED_AND_AVAIL = PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED
Facts = dict[str, Any]


class LateDevice(Exception):
    """The device did not use a buffer in time."""


class ReplayRing:
    """One virtqueue of a replay.

    Args:
        pool: where rings and buffers come from.
        facts: of the event that told of the queue.
        timeout: seconds the device has for each buffer.

    Attributes:
        index: of the queue.
        features: negotiated.
        addresses: bus addresses of ``desc``, ``driver`` and ``device``.
    """

    def __init__(self, pool: DmaPool, facts: Facts, timeout: float) -> None:
        self.index = int(facts["queue"])
        self.features = int(facts["feature_bits"], 16)
        self._pool = pool
        self._timeout = timeout
        self._size = int(facts["size"])
        self._packed = facts["format"] == "packed"
        self._event_idx = bool(self.features >> feat.F_EVENT_IDX & 1)
        self._in_order = bool(self.features >> feat.F_IN_ORDER & 1)
        layout = ring_layout(self._size, self._packed)
        self._memory = pool.allocate(layout.total)
        self._rings: Any = ring_views(self._memory.array, layout)
        self.addresses = {
            name: self._memory[area.offset : area.end].address
            for name, area in (("desc", layout.desc), ("driver", layout.driver), ("device", layout.device))
        }
        self._out: OrderedDict[int, tuple[Facts, list[DmaBuffer], int]] = OrderedDict()
        self._back: dict[int, int] = {}
        self._seen = 0
        self._wrap = 1
        self._old = self._new = 0
        self._added = 0
        self._next, self._next_wrap = 0, 1

    def close(self) -> None:
        """Give the ring back; buffers that never came back stay until the pool goes."""
        self._pool.free(self._memory)

    def add(self, facts: Facts) -> None:
        """Place a buffer of the same shape and content in the same descriptors."""
        content = iter(facts["data"])
        buffers: list[DmaBuffer] = []
        for _, length, write in facts["elements"]:
            buffer = self._pool.allocate(length)
            if not write:
                buffer.write(bytes.fromhex(next(content)))
            buffers.append(buffer)
        rows = facts["desc"]
        parts = list(buffers)
        if "table" in facts:
            # Each element is one segment, as it was in the record: a pool gives nothing else for its size.
            table = self._pool.allocate(16 * len(facts["table"]))
            for number, row in enumerate(facts["table"]):
                self._row(table.array.view(self._rings.desc.dtype), number, buffers[number].address, row)
            buffers.append(table)
            parts = [table]
        for (slot, *row), part in reversed(list(zip(rows, parts, strict=True))):
            # The head is stored last: its flags hand the list to the device (2.8.21.1.1).
            self._row(self._rings.desc, slot, part.address, row)
        if "avail" in facts:
            position, head = facts["avail"]
            self._rings.avail["ring"][position] = head
        else:
            self._next, self._next_wrap = facts["position"], facts["wrap"]
            self._added += len(rows)
        self._out[facts["id"]] = (facts, buffers, len(rows))

    def _row(self, desc: Any, slot: int, address: int, row: list[int]) -> None:
        entry = desc[slot]
        entry["addr"], entry["len"] = address, row[1]
        if self._packed:
            entry["id"] = row[2]
            lib.gpv_fence()
            entry["flags"] = row[3]
        else:
            entry["flags"], entry["next"] = row[2], row[3]

    def publish(self, facts: Facts) -> None:
        """Make available what was placed."""
        lib.gpv_fence()
        if self._packed:
            self._rings.desc[facts["slot"]]["flags"] = facts["flags"]
        else:
            self._old, self._new = facts["old"], facts["new"]
            self._rings.avail["idx"] = self._new
        lib.gpv_fence()

    def want(self, facts: Facts) -> None:
        """Say for which used buffers an interrupt is wanted."""
        if self._packed:
            name, field = ("event", "desc") if "event" in facts else ("flags", "flags")
            self._rings.driver[field] = facts[name]
        elif "used_event" in facts:
            self._rings.avail["used_event"] = facts["used_event"]
        else:
            self._rings.avail["flags"] = facts["flags"]

    def wants_kick(self) -> bool:
        """Whether this device asks for a notification of what was published last."""
        if not self._packed:
            if not self._event_idx:
                return not int(self._rings.used["flags"]) & 1
            event = int(self._rings.used["avail_event"])
            return (self._new - event - 1) & 0xFFFF < (self._new - self._old) & 0xFFFF
        assert isinstance(self._rings, PackedRings)
        added, self._added = self._added, 0
        flags, event = int(self._rings.device["flags"]), int(self._rings.device["desc"])
        if flags < 2:
            return flags == 0
        lap = self._size if event >> 15 != self._next_wrap else 0
        return 0 < self._next - (event & 0x7FFF) + lap <= added

    def take(self, number: int, recorded: list[str]) -> tuple[int, list[str]]:
        """Wait for a buffer to come back.

        Args:
            number: its id.
            recorded: what the device wrote to it then, which says how much of it is to be compared.

        Returns:
            Used length, and hexadecimal content of the writable elements.

        Raises:
            LateDevice: it did not come back in time.
        """
        deadline = time.monotonic() + self._timeout
        while number not in self._back:
            if not self._look():
                if time.monotonic() > deadline:
                    raise LateDevice(f"queue {self.index}: the device did not use buffer {number}")
                time.sleep(0.0005)
        length = self._back.pop(number)
        facts, buffers, _ = self._out.pop(number)
        writable = [
            buffer for buffer, (_, _, write) in zip(buffers, facts["elements"], strict=False) if write
        ]
        data, left = [], length
        for buffer, text in zip(writable, recorded, strict=False):
            # As much as the record has, as far as this device wrote.
            take = max(0, min(len(text) // 2, left))
            data.append(buffer.array[:take].tobytes().hex())
            left -= buffer.nbytes
        for buffer in buffers:
            self._pool.free(buffer)
        return length, data

    def _look(self) -> bool:
        """Take one used entry, if there is one."""
        if self._packed:
            entry = self._rings.desc[self._seen]
            if int(entry["flags"]) & USED_AND_AVAIL != (USED_AND_AVAIL if self._wrap else 0):
                return False
        else:
            if int(self._rings.used["idx"]) == self._seen & 0xFFFF:
                return False
            entry = self._rings.used["ring"][self._seen % self._size]
        lib.gpv_fence()
        number, length = int(entry["id"]), int(entry["len"])
        if number not in self._out:
            raise LateDevice(f"queue {self.index}: the device used buffer {number}, which it does not have")
        waiting = [one for one in self._out if one not in self._back]
        skipped = waiting[: waiting.index(number)] if self._in_order and number in waiting else []
        for one in skipped:
            self._back[one] = sum(part[1] for part in self._out[one][0]["elements"] if part[2])
        self._back[number] = length
        for one in [*skipped, number]:
            self._seen += self._out[one][2] if self._packed else 1
        if self._packed and self._seen >= self._size:
            self._seen -= self._size
            self._wrap ^= 1
        return True
