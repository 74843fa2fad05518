"""Traditional memory balloon (5.5)."""

from __future__ import annotations

import struct
from collections.abc import Callable

from ...spec import balloon
from ...spec import features as ft
from ...spec.layout import Field
from ...spec.status import Status
from ..model import DEFAULT_QUEUE_SIZE, Model
from ..queue import DeviceQueue
from ..ring import Chain

STAT = struct.Struct("<HQ")
STATISTICS = (
    "swap_in",
    "swap_out",
    "majflt",
    "minflt",
    "memfree",
    "memtot",
    "avail",
    "caches",
    "htlb_pgalloc",
    "htlb_pgfail",
)
"""Names of the statistics by tag (5.5.6.4)."""
CMD_STOP, CMD_DONE, CMD_FIRST = 0, 1, 2
QUEUE_FEATURES = {
    balloon.STATSQ: balloon.F_STATS_VQ,
    balloon.FREE_PAGE_VQ: balloon.F_FREE_PAGE_HINT,
    balloon.REPORTING_VQ: balloon.F_PAGE_REPORTING,
}


class Balloon(Model):
    """A balloon in the guest's memory. It keeps page numbers and touches no page.

    Attributes:
        pages: page frame numbers in the balloon now, in 4096-byte units.
        statistics: last values by name (``memfree``, ...), bytes or counts; unknown tags are ignored.
        statistics_seen: called with them whenever a buffer with new ones came.
        reported: (bus address, length) of every free page report.
        hinted: (bus address, length) of free page hints with the current command id.
    """

    device_type = ft.BALLOON
    pci_class = 0x00FF00
    layout = balloon.CONFIG

    def __init__(self, depth: int = DEFAULT_QUEUE_SIZE) -> None:
        super().__init__(depth)
        self.offered = ft.mask(
            (
                balloon.F_MUST_TELL_HOST,
                balloon.F_STATS_VQ,
                balloon.F_DEFLATE_ON_OOM,
                balloon.F_PAGE_REPORTING,
            )
        )
        self.config = {"num_pages": 0, "actual": 0, "free_page_hint_cmd_id": CMD_STOP, "poison_val": 0}
        self.pages: set[int] = set()
        self.statistics: dict[str, int] = {}
        self.statistics_seen: Callable[[dict[str, int]], None] | None = None
        self.reported: list[tuple[int, int]] = []
        self.hinted: list[tuple[int, int]] = []
        self._stats_chain: Chain | None = None
        self._tags: set[int] | None = None
        self._hint_id: int | None = None

    @property
    def num_queues(self) -> int:
        """inflateq, deflateq, statsq, free_page_vq, reporting_vq (5.5.2)."""
        return 5

    def queue_size(self, index: int, features: int) -> int:
        """The last three exist only with their features; the numbers do not move."""
        feature = QUEUE_FEATURES.get(index)
        return self.depth if feature is None or features >> feature & 1 else 0

    def reset(self) -> None:
        """The guest has all its memory again."""
        self.pages.clear()
        self.config["actual"] = 0
        self.config["poison_val"] = 0
        self._stats_chain = None
        self._tags = None
        self._hint_id = None
        self.hinted.clear()

    def queue_reset(self, queue: DeviceQueue) -> None:
        """The statistics buffer goes with its queue."""
        if queue.index == balloon.STATSQ:
            self._stats_chain = None

    def config_written(self, field: Field, value: int) -> None:
        """5.5.6.6.1: poison_val is settled before DRIVER_OK."""
        if field.name == "poison_val" and self.device.status & Status.DRIVER_OK:
            self.device.find("DRV-BALLOON-36", "written while DRIVER_OK is set", field.name)
            return
        super().config_written(field, value)

    # From outside

    def set_target(self, pages: int) -> None:
        """Ask for a balloon of so many 4096-byte pages; the driver is notified."""
        self.change_config(num_pages=pages)

    def ask_statistics(self) -> bool:
        """Ask for new statistics by using the driver's buffer; False while there is none (5.5.6.3)."""
        with self.device.executor:
            chain, self._stats_chain = self._stats_chain, None
            if chain is None:
                return False
            self.device.queues[balloon.STATSQ].complete(chain, 0)
            return True

    def hint(self, command: int) -> None:
        """Set free_page_hint_cmd_id: 0 stop, 1 done, from 2 on a round of hints (5.5.6.5)."""
        self.change_config(free_page_hint_cmd_id=command)

    # Queues

    def handle(self, queue: DeviceQueue, chain: Chain) -> None:
        """One buffer of any of the queues."""
        match queue.index:
            case balloon.INFLATEQ:
                self._inflate(queue, chain)
            case balloon.DEFLATEQ:
                self._deflate(queue, chain)
            case balloon.STATSQ:
                self._stats(queue, chain)
            case balloon.FREE_PAGE_VQ:
                self._free_pages(queue, chain)
            case _:
                self.reported += [(part.address, part.length) for part in chain.elements]
                queue.complete(chain, 0)

    def _numbers(self, queue: DeviceQueue, chain: Chain) -> tuple[int, ...]:
        """The page frame numbers of a request (5.5.6)."""
        data = chain.read()
        if chain.writable_bytes or not data or len(data) % 4:
            text = f"{len(data)} readable and {chain.writable_bytes} writable bytes"
            self.device.find("DRV-BALLOON-47", text, queue.where)
        return tuple(number for (number,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4]))

    def _inflate(self, queue: DeviceQueue, chain: Chain) -> None:
        for number in self._numbers(queue, chain):
            if number in self.pages:
                self.device.find("", f"page {number:#x} inflated twice", queue.where)
            self.pages.add(number)
        queue.complete(chain, 0)

    def _deflate(self, queue: DeviceQueue, chain: Chain) -> None:
        for number in self._numbers(queue, chain):
            if number not in self.pages:
                self.device.find("DRV-BALLOON-49", f"page {number:#x} is not in the balloon", queue.where)
            self.pages.discard(number)
        queue.complete(chain, 0)

    def _stats(self, queue: DeviceQueue, chain: Chain) -> None:
        """Read the statistics and keep the buffer until new ones are wanted."""
        if self._stats_chain is not None:
            self.device.find("DRV-BALLOON-16", "a second statistics buffer", queue.where)
            queue.complete(self._stats_chain, 0)
        data = chain.read()
        if chain.writable_bytes or len(data) % STAT.size:
            self.device.find("DRV-BALLOON-20", f"a statistics buffer of {len(data)} bytes", queue.where)
        entries = list(STAT.iter_unpack(data[: len(data) // STAT.size * STAT.size]))
        tags = {tag for tag, _ in entries}
        if self._tags and tags != self._tags:
            self.device.find("DRV-BALLOON-23", f"tags {tags} after {self._tags}", queue.where)
        self._tags = tags or self._tags
        self.statistics = {STATISTICS[tag]: value for tag, value in entries if tag < len(STATISTICS)}
        self._stats_chain = chain
        if self.statistics_seen is not None:
            self.statistics_seen(self.statistics)

    def _free_pages(self, queue: DeviceQueue, chain: Chain) -> None:
        """A command id, or pages hinted under the last one (5.5.6.5)."""
        if chain.readable_bytes:
            if chain.readable_bytes != 4:
                self.device.find("DRV-BALLOON-24", f"{chain.readable_bytes} bytes of command id", queue.where)
            command = int.from_bytes(chain.read(4), "little")
            if command == self._hint_id and command >= CMD_FIRST:
                self.device.find("DRV-BALLOON-26", f"command id {command} sent twice", queue.where)
            self._hint_id = command
        elif self._hint_id == self.config["free_page_hint_cmd_id"] and self._hint_id:
            self.hinted += [(part.address, part.length) for part in chain.elements]
        elif self._hint_id is None:
            self.device.find("DRV-BALLOON-25", "a hint before any command id", queue.where)
        queue.complete(chain, 0)
