"""A queue of ours with our device's ring half on the other side, moved by hand, on memory that repeats.

Addresses and contents depend on what is done only, so that the same steps give the same bytes everywhere.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from ..devices.dma import SoftwareDma
from ..devices.packed import PackedRing
from ..devices.ring import Chain, Ring
from ..devices.split import SplitRing
from ..memory import DmaBuffer, DmaPool
from ..spec import features as ft
from ..virtqueue.kick import Kick
from ..virtqueue.layout import ring_layout
from ..virtqueue.queue import Virtqueue

QUEUE_INDEX: Final = 1
SIZE: Final = 8
SECTOR: Final = 512
READ, WRITE = 0, 1
"""VIRTIO_BLK_T_IN and VIRTIO_BLK_T_OUT (5.2.6)."""


class Stage:
    """A queue, and the device's half of it on the same memory, each moved by hand.

    Args:
        features: names of negotiated features, besides VERSION_1.
        size: queue size.

    Attributes:
        kicks: notification values that the driver sent.
        interrupts: for each publish of the device, whether the driver asked for an interrupt.
        names: buffer id -> what the request is called.
    """

    def __init__(self, *features: str, size: int = SIZE) -> None:
        bits = [ft.F_VERSION_1, *(ft.feature_bit(None, name) for name in features)]
        self.memory = SoftwareDma()
        self.kicks: list[int] = []
        self.interrupts: list[bool] = []
        self.names: dict[int, str] = {}
        self.pool = DmaPool(self.memory)
        kick = Kick.call(self.kicks.append)
        self.queue = Virtqueue(QUEUE_INDEX, size, ft.mask(bits), self.pool, kick, indirect_entries=4)
        self.device = self.attach()

    def attach(self) -> Ring:
        """The device's half, at the addresses that the driver would program."""
        queue, layout = self.queue, ring_layout(self.queue.size, self.queue.packed)
        desc, driver, device = (
            self.memory.view(address, area.size, write=True)
            for address, area in (
                (queue.addresses.desc, layout.desc),
                (queue.addresses.driver, layout.driver),
                (queue.addresses.device, layout.device),
            )
        )
        kind = PackedRing if queue.packed else SplitRing
        return kind(queue.size, queue.features, self.memory, (desc, driver, device))

    def request(self, name: str, kind: int, sector: int, sectors: int = 1) -> None:
        """Add a block request: 16 bytes of header, the data, 1 byte of status (5.2.6)."""
        header, data, status = (self.pool.allocate(size) for size in (16, sectors * SECTOR, 1))
        header.write(struct.pack("<IIQ", kind, 0, sector))
        readable: list[DmaBuffer] = [header] if kind == READ else [header, data]
        writable: list[DmaBuffer] = [data, status] if kind == READ else [status]
        token = self.queue.add(readable, writable)
        self.names[token & 0xFFFF] = name

    def two_requests(self) -> None:
        """The page's example: A reads a sector, B writes eight."""
        self.request("A (read)", READ, 0)
        self.request("B (write)", WRITE, 64, 8)

    def small(self, *names: str) -> None:
        """Add a buffer of one element for each name: 64 bytes for the device to write."""
        for name in names:
            token = self.queue.add(writable=[self.pool.allocate(64)])
            self.names[token & 0xFFFF] = name

    def take(self) -> list[Chain]:
        """The device takes every available buffer."""
        return list(iter(self.device.pop, None))

    def use(self, *chains: Chain) -> None:
        """The device fills the writable part of these, and shows them to the driver together."""
        for chain in chains:
            self.device.push(chain, chain.write(bytes(chain.writable_bytes)))
        self.interrupts.append(self.device.publish())

    def reap(self) -> None:
        """The driver takes back what was used."""
        for token, _length in self.queue.completions():
            self.names.pop(token & 0xFFFF, None)

    def run(self, count: int) -> None:
        """So many buffers of one element go to the device and come back."""
        buffer = self.pool.allocate(64)
        while count:
            burst = min(count, self.queue.size)
            addresses = np.full((burst, 1), buffer.address, np.uint64)
            self.queue.add_burst(addresses, np.full((burst, 1), 64, np.uint32), 0)
            self.queue.publish()
            self.use(*self.take())
            count -= len(self.queue.reap_burst()[0])

    def publish(self) -> str:
        """The driver publishes. Returns what became of the notification, for a note."""
        before = len(self.kicks)
        self.queue.publish()
        if len(self.kicks) == before:
            return "The device asked for no notification, so the driver sent none."
        digits = 8 if self.queue.features >> ft.F_NOTIFICATION_DATA & 1 else 4
        return (
            f"The driver sent an available buffer notification with the value 0x{self.kicks[-1]:0{digits}x}."
        )
