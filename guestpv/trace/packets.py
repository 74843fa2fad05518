"""Frames of a network device, taken out of a record, as pcapng."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ..spec import features as feat
from ..spec import net
from ..wire import pcapng
from .record import Event


@dataclass(frozen=True, slots=True)
class Packet:
    """A frame as the driver gave it to the device, or got it.

    Attributes:
        nanoseconds: since the record began.
        inbound: from the device.
        device, queue: where it passed.
        header: the virtio header.
        frame: Ethernet frame, as far as the record has it.
        length: bytes of the whole frame.
    """

    nanoseconds: int
    inbound: bool
    device: int
    queue: int
    header: np.void
    frame: bytes
    length: int

    @property
    def comment(self) -> str:
        """The virtio header in words."""
        way = "rx" if self.inbound else "tx"
        return " ".join([f"{way} queue {self.queue}", *net.header_words(self.header)])


def packets(events: Iterable[Event]) -> Iterator[Packet]:
    """Every whole frame in a record, oldest first."""
    network: set[int] = set()
    dtypes: dict[int, np.dtype[np.void]] = {}
    parts: dict[tuple[int, int], list[tuple[bytes, int]]] = {}
    for event in events:
        facts = event.facts
        if event.kind == "open" and facts.get("device_type") == feat.NET:
            network.add(event.device)
        if event.device not in network:
            continue
        if event.kind == "queue":
            dtypes[event.device] = net.header_dtype(int(facts["feature_bits"], 16))
            parts[event.device, facts["queue"]] = []
            continue
        outbound = event.kind == "add" and facts["queue"] % 2
        inbound = event.kind == "reap" and not facts["queue"] % 2 and "length" in facts
        if not (outbound or inbound):
            continue
        data = b"".join(bytes.fromhex(text) for text in facts["data"])
        dtype = dtypes[event.device]
        length = facts["length"] if inbound else sum(part[1] for part in facts["elements"] if not part[2])
        have = parts[event.device, facts["queue"]]
        have.append((data, length))
        header = np.frombuffer(have[0][0], dtype, 1)[0] if len(have[0][0]) >= dtype.itemsize else None
        if header is None or (inbound and not length):
            have.clear()
            continue
        if inbound and len(have) < int(header["num_buffers"]):
            continue
        whole, size = b"".join(part for part, _ in have), sum(length for _, length in have)
        have.clear()
        skip = dtype.itemsize
        yield Packet(
            event.nanoseconds,
            bool(inbound),
            event.device,
            facts["queue"],
            header,
            whole[skip:],
            size - skip,
        )


def write(out: BinaryIO, application: str, began: int, events: Iterable[Event]) -> int:
    """Write a pcapng file; how many frames it has.

    Args:
        out: where to.
        application: who wrote it.
        began: when the record began, in nanoseconds since the epoch.
        events: the record.
    """
    events = list(events)
    out.write(pcapng.section(application))
    numbers: dict[int, int] = {}
    for event in events:
        if event.kind == "open" and event.facts.get("device_type") == feat.NET:
            numbers[event.device] = len(numbers)
            out.write(pcapng.interface(str(event.facts["name"]), "virtio-net"))
    count = 0
    for one in packets(events):
        way = pcapng.INBOUND if one.inbound else pcapng.OUTBOUND
        out.write(
            pcapng.packet(
                numbers[one.device], began + one.nanoseconds, one.frame, way, one.comment, length=one.length
            )
        )
        count += 1
    return count
