"""Block device (5.2) without zones."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ...errors import UsageError
from ...spec import blk
from ...spec import features as ft
from ...spec.layout import Field
from ..evidence import DriverFault
from ..model import DEFAULT_QUEUE_SIZE, Model
from ..queue import DeviceQueue
from ..ring import Chain, cut
from .blk_store import Store

HEADER = struct.Struct("<IIQ")
RANGE = struct.Struct("<QII")
UNMAP = 1
NEEDS = {
    blk.T_FLUSH: blk.F_FLUSH,
    blk.T_GET_LIFETIME: blk.F_LIFETIME,
    blk.T_DISCARD: blk.F_DISCARD,
    blk.T_WRITE_ZEROES: blk.F_WRITE_ZEROES,
    blk.T_SECURE_ERASE: blk.F_SECURE_ERASE,
}
LIMITS = {
    blk.T_DISCARD: ("max_discard_seg", "max_discard_sectors", "DRV-BLK-20", "DRV-BLK-55"),
    blk.T_WRITE_ZEROES: ("max_write_zeroes_seg", "max_write_zeroes_sectors", "DRV-BLK-22", "DRV-BLK-56"),
}


class Failure(Exception):
    """A request ends with this status; with a requirement, because the driver did something wrong."""

    def __init__(self, status: int, requirement: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.requirement = requirement
        self.message = message


class Blk(Model):
    """A disk.

    Args:
        store: the sectors.
        read_only: offer RO and refuse writes.
        num_queues: request queues; more than one offers MQ.
        serial: device ID string, up to 20 bytes.
        block_size: logical block size in bytes, a power of two from 512 on.
        seg_max: most data segments a request; 0 takes the queue size less two.
        size_max: longest data segment in bytes; 0 offers no limit.
        depth: queue size offered.

    Attributes:
        fail_next: status with which the next requests end, without being carried out.
        flushes, requests: how many there were.
        discarded: ranges (sector, count) that were discarded; they keep their data.
    """

    device_type = ft.BLK
    pci_class = 0x018000
    layout = blk.CONFIG

    def __init__(
        self,
        store: Store,
        *,
        read_only: bool = False,
        num_queues: int = 1,
        serial: bytes = b"guestpv",
        block_size: int = blk.SECTOR,
        seg_max: int = 0,
        size_max: int = 0,
        depth: int = DEFAULT_QUEUE_SIZE,
    ) -> None:
        super().__init__(depth)
        if len(serial) > blk.ID_BYTES:
            raise UsageError(f"serial {serial!r} is longer than {blk.ID_BYTES} bytes")
        if block_size < blk.SECTOR or block_size & (block_size - 1):
            raise UsageError(f"block size {block_size} is no power of two from 512 on")
        if not 1 <= num_queues <= 0xFFFF:
            raise UsageError(f"{num_queues} request queues are not between 1 and 65535")
        self.store = store
        self.serial = serial
        self._num_queues = num_queues
        self.offered = ft.mask((blk.F_SEG_MAX, blk.F_BLK_SIZE, blk.F_TOPOLOGY, blk.F_FLUSH, blk.F_CONFIG_WCE))
        self.offered |= 1 << blk.F_RO if read_only else ft.mask((blk.F_DISCARD, blk.F_WRITE_ZEROES))
        self.offered |= (1 << blk.F_MQ if num_queues > 1 else 0) | (1 << blk.F_SIZE_MAX if size_max else 0)
        self.config = {
            "capacity": store.sectors,
            "size_max": size_max,
            "seg_max": seg_max or max(depth - 2, 1),
            "blk_size": block_size,
            "min_io_size": 1,
            "opt_io_size": 0,
            "writeback": 1,
            "num_queues": num_queues,
            "max_discard_sectors": 1 << 16,
            "max_discard_seg": 16,
            "discard_sector_alignment": block_size // blk.SECTOR,
            "max_write_zeroes_sectors": 1 << 16,
            "max_write_zeroes_seg": 16,
            "write_zeroes_may_unmap": 0,
        }
        self.fail_next: list[int] = []
        self.requests = self.flushes = 0
        self.discarded: list[tuple[int, int]] = []

    @property
    def num_queues(self) -> int:
        """Request queues (5.2.2)."""
        return self._num_queues

    def queue_size(self, index: int, features: int) -> int:
        """Without MQ there is one queue."""
        return self.depth if index < (self._num_queues if features >> blk.F_MQ & 1 else 1) else 0

    def _has(self, bit: int) -> bool:
        return bool(self.device.features >> bit & 1)

    def reset(self) -> None:
        """The cache is a writeback one again."""
        self.config["writeback"] = 1

    def negotiated(self) -> None:
        """Without FLUSH the cache has to be writethrough (5.2.5.2)."""
        if not self._has(blk.F_FLUSH):
            self.config["writeback"] = 0

    def config_read(self, field: Field) -> None:
        """5.2.5.1: writeback means something only once features are negotiated."""
        if field.name == "writeback" and not self.device.features:
            self.device.find("DRV-BLK-04", "read before FEATURES_OK", "writeback")

    def config_written(self, field: Field, value: int) -> None:
        """The driver sets the cache mode; going to writethrough commits what was written."""
        if value > 1 or not self._has(blk.F_CONFIG_WCE):
            self.device.find("DRV-BLK-60", f"{value} written, or without CONFIG_WCE", field.name)
            return
        if value == 0 and self.config["writeback"]:
            self.store.flush()
        super().config_written(field, value)

    def resize(self, size: int) -> None:
        """Give the disk another size in bytes; the driver is notified."""
        with self.device.executor:
            self.store.resize(size)
            self.change_config(capacity=self.store.sectors)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def handle(self, queue: DeviceQueue, chain: Chain) -> None:
        """5.2.6: header, data, status byte, in whatever descriptors."""
        if chain.readable_bytes < HEADER.size:
            text = f"request with {chain.readable_bytes} device-readable bytes"
            self.device.fault(DriverFault("DRV-BLK-47", text), queue.where)
            return
        if not chain.writable_bytes:
            fault = DriverFault("DRV-BLK-48", "request without room for the status byte")
            self.device.fault(fault, queue.where)
            return
        kind, _, sector = HEADER.unpack(chain.read(HEADER.size))
        room = chain.writable_bytes - 1
        self.requests += 1
        status = blk.S_OK
        try:
            if self.fail_next:
                raise Failure(self.fail_next.pop(0))
            self._request(chain, kind, sector, room)
        except Failure as failure:
            status = failure.status
            if failure.requirement:
                self.device.find(failure.requirement, failure.message, queue.where)
        except OSError:
            status = blk.S_IOERR
        if status != blk.S_OK and room:
            # The status byte lies behind the data: a used length that covers it needs all of it written.
            for piece in cut(chain.writable, 0, room):
                piece[:] = bytes(len(piece))
        chain.write(bytes([status]), room)
        queue.complete(chain, room + 1)

    def _request(self, chain: Chain, kind: int, sector: int, room: int) -> None:
        data = chain.readable_bytes - HEADER.size
        if kind in NEEDS and not self._has(NEEDS[kind]):
            raise Failure(blk.S_UNSUPP, "DRV-BLK-51", f"request type {kind} without its feature")
        if kind not in (blk.T_IN, blk.T_OUT) and sector:
            rule = "DRV-BLK-15" if kind == blk.T_FLUSH else "DRV-BLK-53"
            self.device.find(rule, f"sector {sector} in a request of type {kind}")
        if kind == blk.T_IN:
            self._check_transfer(chain, sector, room, writable=True)
            self.store.read(sector * blk.SECTOR, list(cut(chain.writable, 0, room)))
        elif kind == blk.T_OUT:
            if self.device.offered >> blk.F_RO & 1:
                raise Failure(blk.S_IOERR)
            self._check_transfer(chain, sector, data, writable=False)
            self.store.write(sector * blk.SECTOR, list(cut(chain.readable, HEADER.size, data)))
            if not self.config["writeback"] or not self._has(blk.F_FLUSH):
                self.store.flush()
        elif kind == blk.T_FLUSH:
            self.flushes += 1
            self.store.flush()
        elif kind == blk.T_GET_ID:
            self._get_id(chain, room)
        elif kind in LIMITS:
            self._ranges(chain, kind, data)
        else:
            raise Failure(blk.S_UNSUPP)

    def _check_transfer(self, chain: Chain, sector: int, length: int, writable: bool) -> None:
        if length % blk.SECTOR:
            raise Failure(blk.S_IOERR, "DRV-BLK-17", f"{length} bytes of data are no multiple of 512")
        if sector + length // blk.SECTOR > self.store.sectors:
            text = f"{length} bytes at sector {sector} of {self.store.sectors}"
            raise Failure(blk.S_IOERR, "DRV-BLK-13", text)
        sizes = [element.length for element in chain.elements if element.writable == writable]
        limit = self.config["size_max"]
        assert isinstance(limit, int)
        if self._has(blk.F_SIZE_MAX) and max(sizes) > limit:
            raise Failure(blk.S_IOERR, "DRV-BLK-57", f"a segment of {max(sizes)} bytes, size_max {limit}")
        most = self.config["seg_max"]
        assert isinstance(most, int)
        # Header and status may share a descriptor with data, so up to one more on this side is none.
        if self._has(blk.F_SEG_MAX) and len(sizes) - 1 > most:
            raise Failure(blk.S_IOERR, "DRV-BLK-58", f"{len(sizes)} segments, seg_max {most}")

    def _get_id(self, chain: Chain, room: int) -> None:
        if room != blk.ID_BYTES:
            self.device.find("DRV-BLK-19", f"room for {room} bytes of ID")
        chain.write(self.serial.ljust(max(room, blk.ID_BYTES), b"\0")[:room])

    def _ranges(self, chain: Chain, kind: int, data: int) -> None:
        """Discard or write zeroes: all segments are looked at before any is carried out."""
        if self.device.offered >> blk.F_RO & 1:
            raise Failure(blk.S_IOERR)
        if not data or data % RANGE.size:
            raise Failure(blk.S_IOERR, "DRV-BLK-18", f"{data} bytes of segments")
        wanted = list(self._segments(chain, kind, data))
        for sector, count in wanted:
            if kind == blk.T_WRITE_ZEROES:
                self.store.zero(sector * blk.SECTOR, count * blk.SECTOR)
            else:
                self.discarded.append((sector, count))

    def _segments(self, chain: Chain, kind: int, data: int) -> Iterator[tuple[int, int]]:
        seg_field, sector_field, seg_rule, sector_rule = LIMITS[kind]
        most_segments, most_sectors = self.config[seg_field], self.config[sector_field]
        assert isinstance(most_segments, int)
        assert isinstance(most_sectors, int)
        count = data // RANGE.size
        if count > most_segments:
            raise Failure(blk.S_IOERR, seg_rule, f"{count} segments, at most {most_segments}")
        raw = chain.read(data, HEADER.size)
        for sector, length, flags in RANGE.iter_unpack(raw):
            if flags & ~UNMAP or (kind == blk.T_DISCARD and flags):
                rule = "DRV-BLK-25" if kind == blk.T_DISCARD else "DRV-BLK-54"
                raise Failure(blk.S_UNSUPP, rule, f"flags {flags:#x} in a segment")
            if length > most_sectors:
                raise Failure(blk.S_IOERR, sector_rule, f"{length} sectors, at most {most_sectors}")
            if sector + length > self.store.sectors:
                text = f"{length} sectors at {sector} of {self.store.sectors}"
                raise Failure(blk.S_IOERR, "DRV-BLK-13", text)
            yield sector, length
