"""What a block device allows in one request, and the splitting that honours it (5.2.4, 5.2.6.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import Refused, UsageError
from ..memory import DmaBuffer
from ..spec import blk as spec

DEFAULT_SIZE_MAX: Final = 1 << 20
"""Bytes of a data segment where SIZE_MAX is not offered."""
DEFAULT_SEG_MAX: Final = 1
"""Data segments of a request where SEG_MAX is not offered: the one that every device must take."""
MOST_BYTES: Final = 4 << 20
"""Bytes of one request at most, whatever the device allows: what is in flight stays bounded."""
LARGEST_BLOCK: Final = 1 << 20
LARGEST_CAPACITY: Final = 1 << 54
"""Sectors: 2^63 bytes, beyond which offsets no longer fit a signed 64-bit number."""
MOST_RANGES: Final = 32
"""Ranges in one discard, write zeroes or secure erase request: their segments fit into one sector."""
HEADER_AND_STATUS: Final = 2

Piece = tuple[int, list[DmaBuffer]]
"""Sector and data buffers of one request."""


@dataclass(frozen=True, slots=True)
class RangeLimits:
    """Limits of discard, write zeroes or secure erase.

    Attributes:
        max_sectors: 512-byte sectors of one range.
        max_ranges: ranges of one request.
        alignment: sectors that a range had better start and end at a multiple of.
        refusal: why such requests are not sent, naming the field; empty when they are.
    """

    max_sectors: int = 0
    max_ranges: int = 0
    alignment: int = 1
    refusal: str = ""

    def split(self, sector: int, count: int) -> Iterator[list[tuple[int, int]]]:
        """Cut ``count`` sectors into requests, each a list of ranges (sector, sectors).

        Cuts are made at multiples of ``alignment`` where a range is long enough for that.
        """
        ranges: list[tuple[int, int]] = []
        while count:
            length = min(count, self.max_sectors)
            if length < count and (over := (sector + length) % self.alignment) < length:
                length -= over
            ranges.append((sector, length))
            sector += length
            count -= length
            if len(ranges) == self.max_ranges:
                yield ranges
                ranges = []
        if ranges:
            yield ranges


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may look like.

    Attributes:
        block_size: bytes that offsets and lengths are multiples of.
        size_max: bytes of one data segment.
        seg_max: data segments of one request.
        boundary: bytes at whose multiples a request has to end (zones of a host-managed disk), 0 for nowhere.
        discard, write_zeroes, secure_erase: limits of these requests.
    """

    block_size: int = spec.SECTOR
    size_max: int = DEFAULT_SIZE_MAX
    seg_max: int = DEFAULT_SEG_MAX
    boundary: int = 0
    discard: RangeLimits = RangeLimits()
    write_zeroes: RangeLimits = RangeLimits()
    secure_erase: RangeLimits = RangeLimits()

    @classmethod
    def read(cls, config: dict[str, int], *, queue_size: int, where: str) -> Limits:
        """The limits in a device's configuration; fields of features that are not there are missing.

        Raises:
            Refused: a limit is zero or absurd, so that no request could be made; the field is named.
        """

        def refuse(name: str, why: str) -> Refused:
            return Refused(f"{name} is {config[name]}: {why} (VIRTIO 1.4 section 5.2.4)", where=where)

        block = config.get("blk_size", spec.SECTOR)
        if block < spec.SECTOR or block & (block - 1) or block > LARGEST_BLOCK:
            raise refuse("blk_size", f"no power of two from {spec.SECTOR} to {LARGEST_BLOCK}")
        if config["capacity"] > LARGEST_CAPACITY:
            raise refuse("capacity", "more than 2^63 bytes")
        if config.get("size_max", spec.SECTOR) < spec.SECTOR:
            raise refuse("size_max", "a segment cannot hold one sector")
        if config.get("seg_max", 1) < 1:
            raise refuse("seg_max", "no request could carry data")
        if queue_size < HEADER_AND_STATUS + 1:
            raise Refused(
                f"queue_size is {queue_size}: a request needs 3 descriptors: header, data and status",
                where=where,
            )
        size_max = min(config.get("size_max", DEFAULT_SIZE_MAX), MOST_BYTES) // spec.SECTOR * spec.SECTOR
        seg_max = min(config.get("seg_max", DEFAULT_SEG_MAX), queue_size - HEADER_AND_STATUS)
        if size_max * seg_max < block:
            raise refuse(
                "size_max", f"{seg_max} segments of that size do not hold one block of {block} bytes"
            )
        ranges = {
            name: _ranges(config, name, alignment, block)
            for name, alignment in (
                ("discard", "discard_sector_alignment"),
                ("write_zeroes", ""),
                ("secure_erase", "secure_erase_sector_alignment"),
            )
        }
        managed = config.get("model", spec.Z_NONE) == spec.Z_HM
        boundary = config["zone_sectors"] * spec.SECTOR if managed else 0
        return cls(block, size_max, seg_max, boundary, **ranges)

    @property
    def request_bytes(self) -> int:
        """Bytes of the largest request made of longest segments, a multiple of the block size."""
        return min(self.size_max * self.seg_max, MOST_BYTES) // self.block_size * self.block_size

    def split(self, offset: int, buffers: Sequence[DmaBuffer]) -> Iterator[Piece]:
        """Cut a transfer of ``buffers``, one after the other, at ``offset`` bytes into requests.

        Raises:
            UsageError: the scatter list is so fine that ``seg_max`` elements do not fill one block.
        """
        parts = list(_contiguous(buffers))
        number = start = 0
        sector = offset // spec.SECTOR
        while number < len(parts):
            request: list[DmaBuffer] = []
            total, ahead, at = 0, number, start
            most = MOST_BYTES
            if self.boundary:
                most = min(most, self.boundary - sector * spec.SECTOR % self.boundary)
            while ahead < len(parts) and len(request) < self.seg_max and total < most:
                part = parts[ahead]
                length = min(self.size_max, part.nbytes - at, most - total)
                request.append(part if length == part.nbytes else part[at : at + length])
                total, at = total + length, at + length
                if at == part.nbytes:
                    ahead, at = ahead + 1, 0
            over = total % self.block_size
            if over == total:
                raise UsageError(
                    f"{len(request)} scatter elements hold {total} bytes, no block of {self.block_size}, and "
                    f"the device takes at most seg_max = {self.seg_max} in a request"
                )
            whole = total - over
            while over:
                last = request.pop()
                if last.nbytes > over:
                    request.append(last[: last.nbytes - over])
                over -= min(over, last.nbytes)
            yield sector, request
            sector += whole // spec.SECTOR
            while whole:
                step = min(whole, parts[number].nbytes - start)
                whole, start = whole - step, start + step
                if start == parts[number].nbytes:
                    number, start = number + 1, 0


def _contiguous(buffers: Sequence[DmaBuffer]) -> Iterator[DmaBuffer]:
    """The buffers cut where they continue elsewhere on the bus."""
    for buffer in buffers:
        if len(buffer.segments) == 1:
            yield buffer
            continue
        start = 0
        for segment in buffer.segments:
            yield buffer[start : start + segment.length]
            start += segment.length


def _ranges(config: dict[str, int], name: str, alignment: str, block: int) -> RangeLimits:
    if f"max_{name}_sectors" not in config:
        return RangeLimits(refusal=f"{name.upper()} was not negotiated")
    most, ranges = config[f"max_{name}_sectors"], config[f"max_{name}_seg"]
    for field, value in ((f"max_{name}_sectors", most), (f"max_{name}_seg", ranges)):
        if value == 0:
            return RangeLimits(refusal=f"{field} is 0: the device takes no such request")
    step = block // spec.SECTOR
    if most < step:
        return RangeLimits(refusal=f"max_{name}_sectors is {most}: less than one block of {block} bytes")
    # An alignment of 0 is seen on real devices; it is advice, so the block takes its place.
    return RangeLimits(most // step * step, min(ranges, MOST_RANGES), max(config.get(alignment, 0), step))
