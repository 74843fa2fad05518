"""A driver that does nothing by itself: registers and rings by hand, right or wrong, on any PCI function.

It is the counterpart with which the device half is tried, and shares no code with the driver half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..memory import DmaBuffer, DmaPool
from ..pci.function import PciFunction
from ..spec import features as ft
from ..spec import pci
from ..spec import ring as rs
from ..spec.pci import CfgType
from ..spec.status import Status
from ..virtqueue.layout import PackedRings, RingLayout, SplitRings, ring_layout, ring_views

Part = tuple[int, int, bool]
"""Bus address, length in bytes, whether the device writes it."""


class ScriptedDriver:
    """Walks a PCI function through initialization and hands out raw queues.

    Args:
        function: any PCI function with the virtio structures.
    """

    def __init__(self, function: PciFunction) -> None:
        self.function = function
        self.pool = DmaPool(function.dma)
        self.places: dict[int, tuple[int, int]] = {}
        self.multiplier = 0
        self.features = 0
        at = function.config_read(pci.PCI_CONFIG_CAPABILITIES, 1)
        while at:
            if function.config_read(at, 1) == pci.PCI_CAP_VENDOR:
                kind = function.config_read(at + 3, 1)
                self.places[kind] = (function.config_read(at + 4, 1), function.config_read(at + 8, 4))
                if kind == CfgType.NOTIFY:
                    self.multiplier = function.config_read(at + 16, 4)
            at = function.config_read(at + 1, 1)
        function.config_write(pci.PCI_CONFIG_COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)

    def read_at(self, kind: CfgType, offset: int, width: int) -> int:
        """One read in a virtio structure."""
        bar, start = self.places[kind]
        return self.function.bar(bar).read(start + offset, width)

    def write_at(self, kind: CfgType, offset: int, width: int, value: int) -> None:
        """One write in a virtio structure."""
        bar, start = self.places[kind]
        self.function.bar(bar).write(start + offset, width, value)

    def read(self, name: str) -> int:
        """A register of the common configuration, by its natural width."""
        field = pci.COMMON_CFG[name]
        if field.width < 8:
            return self.read_at(CfgType.COMMON, field.offset, field.width)
        low, high = (self.read_at(CfgType.COMMON, field.offset + part, 4) for part in (0, 4))
        return low | high << 32

    def write(self, name: str, value: int) -> None:
        """Write a register of the common configuration by its natural width."""
        field = pci.COMMON_CFG[name]
        if field.width < 8:
            self.write_at(CfgType.COMMON, field.offset, field.width, value)
        else:
            self.write_at(CfgType.COMMON, field.offset, 4, value & 0xFFFFFFFF)
            self.write_at(CfgType.COMMON, field.offset + 4, 4, value >> 32)

    def offered(self) -> int:
        """All feature words up to bit 127."""
        result = 0
        for word in range(4):
            self.write("device_feature_select", word)
            result |= self.read("device_feature") << 32 * word
        return result

    def reset(self) -> None:
        """Write 0 to device_status and read it until it is 0, at most a thousand times."""
        self.write("device_status", 0)
        for _ in range(1000):
            if self.read("device_status") == 0:
                break

    def begin(self) -> None:
        """Steps 1 to 3 of 3.1.1: reset, ACKNOWLEDGE, DRIVER."""
        self.reset()
        self.write("device_status", Status.ACKNOWLEDGE)
        self.write("device_status", Status.ACKNOWLEDGE | Status.DRIVER)

    def negotiate(self, features: int) -> bool:
        """Steps 1 to 6 of 3.1.1; whether FEATURES_OK stayed."""
        self.begin()
        self.offered()
        for word in range(4):
            self.write("driver_feature_select", word)
            self.write("driver_feature", features >> 32 * word & 0xFFFFFFFF)
        self.write("device_status", Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        self.features = features
        return bool(self.read("device_status") & Status.FEATURES_OK)

    def set_status(self, bit: Status) -> None:
        """Add a bit to device_status."""
        self.write("device_status", self.read("device_status") | bit)

    def driver_ok(self) -> None:
        """The last step of initialization."""
        self.set_status(Status.DRIVER_OK)

    def queue(self, index: int, size: int | None = None, vector: int = pci.NO_VECTOR) -> RawQueue:
        """Allocate rings, tell the device, enable."""
        self.write("queue_select", index)
        largest = self.read("queue_size")
        size = size or largest
        queue = RawQueue(self, index, size)
        self.write("queue_size", size)
        self.write("queue_msix_vector", vector)
        self.read("queue_msix_vector")
        for name, area in (
            ("desc", queue.layout.desc),
            ("driver", queue.layout.driver),
            ("device", queue.layout.device),
        ):
            self.write(f"queue_{name}", queue.memory.address + area.offset)
        self.write("queue_enable", 1)
        return queue

    def start(self, features: int, sizes: dict[int, int | None]) -> list[RawQueue]:
        """Negotiate, enable these queues with these sizes (None: the largest), set DRIVER_OK."""
        if not self.negotiate(features):
            raise AssertionError(f"FEATURES_OK refused for {features:#x}")
        queues = [self.queue(index, size) for index, size in sizes.items()]
        self.driver_ok()
        return queues


class RawQueue:
    """Ring memory and positions of one virtqueue; nothing is checked.

    Attributes:
        rings: numpy views of the three areas.
        heads: how often ``add`` was called.
        skip: packed: descriptors of each buffer id given out.
    """

    rings: Any

    def __init__(self, driver: ScriptedDriver, index: int, size: int) -> None:
        self.driver = driver
        self.index = index
        self.size = size
        self.packed = bool(driver.features >> ft.F_RING_PACKED & 1)
        self.layout: RingLayout = ring_layout(size, self.packed)
        self.memory: DmaBuffer = driver.pool.allocate(self.layout.total)
        rings: SplitRings | PackedRings = ring_views(self.memory.array, self.layout)
        self.rings = rings
        self.position = 0
        self.heads = 0
        self.seen = 0
        self.skip: dict[int, int] = {}

    def buffer(self, size: int, fill: bytes = b"") -> DmaBuffer:
        """Memory that the device can reach."""
        buffer = self.driver.pool.allocate(size)
        if fill:
            buffer.write(fill)
        return buffer

    def parts(self, readable: Sequence[DmaBuffer], writable: Sequence[DmaBuffer]) -> list[Part]:
        """Elements of a chain, segment by segment."""
        return [
            (segment.address, segment.length, write)
            for buffers, write in ((readable, False), (writable, True))
            for buffer in buffers
            for segment in buffer.segments
        ]

    def add(
        self,
        readable: Sequence[DmaBuffer] = (),
        writable: Sequence[DmaBuffer] = (),
        *,
        indirect: bool = False,
        publish: bool = True,
        id: int | None = None,
    ) -> int:
        """Make one buffer available; returns head or buffer id."""
        parts = self.parts(readable, writable)
        return (self._add_packed if self.packed else self._add_split)(parts, indirect, publish, id)

    def _table(self, parts: list[Part]) -> Part:
        table = self.buffer(16 * len(parts))
        records = table.array.view(rs.PACKED_DESC if self.packed else rs.SPLIT_DESC)
        for place, (address, length, write) in enumerate(parts):
            flags = rs.DESC_F_WRITE if write else 0
            if self.packed:
                records[place] = (address, length, 0, flags)
            else:
                more = place < len(parts) - 1
                flags |= rs.DESC_F_NEXT if more else 0
                records[place] = (address, length, flags, place + 1 if more else 0)
        return table.address, 16 * len(parts), False

    def _add_split(self, parts: list[Part], indirect: bool, publish: bool, id: int | None) -> int:
        desc, avail = self.rings.desc, self.rings.avail
        flag = 0
        if indirect:
            parts, flag = [self._table(parts)], rs.DESC_F_INDIRECT
        head = self.position % self.size
        for place, (address, length, write) in enumerate(parts):
            slot = (self.position + place) % self.size
            more = rs.DESC_F_NEXT if place < len(parts) - 1 else 0
            following = (slot + 1) % self.size if more else 0
            desc[slot] = (address, length, flag | more | (rs.DESC_F_WRITE if write else 0), following)
        self.position += len(parts)
        avail["ring"][self.heads % self.size] = head
        self.heads += 1
        if publish:
            avail["idx"] = self.heads & 0xFFFF
        return head

    def _add_packed(self, parts: list[Part], indirect: bool, publish: bool, id: int | None) -> int:
        desc = self.rings.desc
        flag = 0
        if indirect:
            parts, flag = [self._table(parts)], rs.DESC_F_INDIRECT
        id = self.heads % self.size if id is None else id
        written = []
        for place, (address, length, write) in enumerate(parts):
            slot, wrap = self.position % self.size, 1 - self.position // self.size % 2
            flags = flag | (rs.DESC_F_NEXT if place < len(parts) - 1 else 0)
            flags |= (rs.DESC_F_WRITE if write else 0) | self.marks(wrap)
            written.append((slot, (address, length, id, flags)))
            self.position += 1
        for slot, record in reversed(written):
            desc[slot] = record
        self.skip[id] = len(parts)
        self.heads += 1
        return id

    @staticmethod
    def marks(wrap: int) -> int:
        """AVAIL and USED bits of an available descriptor."""
        return rs.PACKED_DESC_F_AVAIL if wrap else rs.PACKED_DESC_F_USED

    def kick(self, value: int | None = None, width: int | None = None) -> None:
        """Send the notification that the negotiated features ask for, or another value and width."""
        driver = self.driver
        with_data = driver.features >> ft.F_NOTIFICATION_DATA & 1
        driver.write("queue_select", self.index)
        token = self.index
        if driver.features >> ft.F_NOTIF_CONFIG_DATA & 1:
            token = driver.read("queue_notif_config_data")
        if with_data:
            token |= self.notification_data() << 16
        offset = driver.read("queue_notify_off") * driver.multiplier
        value = token if value is None else value
        driver.write_at(CfgType.NOTIFY, offset, width or (4 if with_data else 2), value)

    def notification_data(self) -> int:
        """next_off and next_wrap (2.9)."""
        if not self.packed:
            return self.heads & 0xFFFF
        return self.position % self.size | (1 - self.position // self.size % 2) << 15

    def used(self) -> list[tuple[int, int]]:
        """New used elements as (id, length)."""
        return self._used_packed() if self.packed else self._used_split()

    def _used_split(self) -> list[tuple[int, int]]:
        used = self.rings.used
        found = []
        while (int(used["idx"]) - self.seen) & 0xFFFF:
            element = used["ring"][self.seen % self.size]
            found.append((int(element["id"]), int(element["len"])))
            self.seen += 1
        return found

    def _used_packed(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        both = rs.PACKED_DESC_F_AVAIL | rs.PACKED_DESC_F_USED
        while True:
            record = self.rings.desc[self.seen % self.size]
            wrap = 1 - self.seen // self.size % 2
            if int(record["flags"]) & both != (both if wrap else 0):
                return found
            id = int(record["id"])
            found.append((id, int(record["len"])))
            self.seen += self.skip[id]
