"""Entropy device (5.4)."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable

from ...spec import features as ft
from ..model import DEFAULT_QUEUE_SIZE, Model
from ..queue import DeviceQueue
from ..ring import Chain


class Rng(Model):
    """Fills buffers with random bytes.

    Args:
        seed: makes the bytes reproducible; None takes them from the operating system.
        most: bytes put into one buffer at most, 0 for no limit: the device may return fewer than asked
            for, but at least one (5.4.6.2).
        depth: queue size offered.
    """

    device_type = ft.RNG

    def __init__(self, seed: int | None = None, most: int = 0, depth: int = DEFAULT_QUEUE_SIZE) -> None:
        super().__init__(depth)
        self.most = most
        self._bytes: Callable[[int], bytes] = (
            secrets.token_bytes if seed is None else random.Random(seed).randbytes
        )

    def handle(self, queue: DeviceQueue, chain: Chain) -> None:
        """5.4.6: the driver gives device-writable buffers only."""
        if chain.readable_bytes:
            self.device.find("", f"chain {chain.id} has device-readable elements (5.4.6.1)", queue.where)
        size = min(chain.writable_bytes, self.most) if self.most else chain.writable_bytes
        queue.complete(chain, chain.write(self._bytes(size)))
