"""The network device (5.1): frames in and out.

``Net`` sets the device up and moves frames, in bursts or one by one. What carries a link's traffic is the
C pump of ``services.net``, which takes over the same queue pairs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, SupportsBytes

from ..errors import UsageError
from ..spec import net as spec
from ..spec.features import mask
from ..transport.base import Transport
from .net_config import DEFAULT_MTU, LinkState, NetConfig
from .net_control import ControlQueue, Rss
from .net_port import HOST_SEGMENTATION, Frames, NetPort

BASE_FEATURES = mask(
    (
        *(spec.F_MAC, spec.F_STATUS, spec.F_MTU, spec.F_MRG_RXBUF, spec.F_MQ, spec.F_SPEED_DUPLEX),
        *(spec.F_CTRL_VQ, spec.F_GUEST_ANNOUNCE, spec.F_NOTF_COAL, spec.F_VQ_NOTF_COAL, spec.F_DEVICE_STATS),
    )
)
"""Features that ask nothing of the user: frames are as they are on the wire."""

RECEIVED = 32
"""Frames that ``receive`` takes from the core at once."""
FILTERS = mask((spec.F_CTRL_RX, spec.F_CTRL_RX_EXTRA, spec.F_CTRL_MAC_ADDR))
"""Features with which the device keeps frames away that were not asked for."""

ON_REQUEST = FILTERS | mask(
    (
        *(spec.F_CTRL_VLAN, spec.F_HASH_REPORT, spec.F_HASH_TUNNEL, spec.F_RSS, spec.F_RSC_EXT),
        spec.F_STANDBY,
    )
)
"""Features that are taken only where the user requires them (``features=+rss``): filters drop frames, that
for VLANs all tagged ones at first; a reported hash lengthens the header; a standby device is half a pair."""

RECEIVE_OFFLOADS = mask((*spec.RECEIVE_OFFLOADS, spec.F_CTRL_GUEST_OFFLOADS))
SEND_OFFLOADS = mask((spec.F_CSUM, spec.F_HOST_ECN, *HOST_SEGMENTATION))
"""Features under which frames carry a meaning in the virtio header; for users that look at it."""


class Net:
    """A virtio network device.

    >>> with guestpv.open("vfio:0000:01:00.0") as t, Net(t) as net:   # doctest: +SKIP
    ...     net.send([frame])
    ...     net.receive()

    Args:
        transport: an opened network device; negotiated here, closed with the driver.
        queue_pairs: how many pairs to use; more than one needs MQ or RSS (5.1.5).
        offloads: mask of further features that the user handles: checksum and segmentation, filters.
        started: whether receive buffers are handed out at once; the pump does that itself.
        rss: how received packets are steered where RSS is required; evenly by a random key by default.

    Attributes:
        config: what the device says of itself.
        mac: address in use, 6 bytes.
        mtu: largest payload in bytes.
        pairs: the queue pairs in use.
        control: the control queue, None without CTRL_VQ.

    Raises:
        Refused, FeaturesRefused: negotiation failed.
        DeviceViolation: the device's configuration cannot be.
        UsageError: the device has fewer queue pairs.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        queue_pairs: int = 1,
        offloads: int = 0,
        started: bool = True,
        rss: Rss | None = None,
    ) -> None:
        self.transport = transport
        self.pairs: list[NetPort] = []
        self.control: ControlQueue | None = None
        self.mac = b""
        self._queue_pairs, self._offloads, self._rss = queue_pairs, offloads, rss
        self._start()
        if started:
            for port in self.pairs:
                port.start()

    def _start(self) -> None:
        transport, queue_pairs = self.transport, self._queue_pairs
        wanted = BASE_FEATURES | self._offloads | (ON_REQUEST & transport.feature_filter.required)
        if queue_pairs == 1:
            # Multi-queue would only move the control queue.
            wanted &= ~(mask((spec.F_MQ,)) & ~transport.feature_filter.required)
        self.features = transport.negotiate(supported=wanted)
        with transport.failing():
            self.header_size = spec.header_dtype(self.features).itemsize
            self.config = NetConfig.read(transport)
            self._check_pairs(queue_pairs)
            self.mac = self.config.mac or self.mac or random_mac()
            self.mtu = self.config.mtu or DEFAULT_MTU
            self.pairs = [NetPort(transport, number, self.mtu) for number in range(queue_pairs)]
            self._received = self.pairs[0].table(RECEIVED)
            if transport.has(spec.F_RSS):
                for port in self.pairs:
                    port.remind([other for other in self.pairs if other is not port])
            if transport.has(spec.F_CTRL_VQ):
                self.control = ControlQueue(transport, self.config, 2 * self.config.max_pairs, queue_pairs)
            transport.driver_ok()
            self._steer(queue_pairs, self._rss)

    def restart(self) -> None:
        """Reset the device and start over with the same features and queues, in the thread that calls.

        Nobody may use the queue pairs meanwhile; frames that the device had are lost.
        ``pairs`` and ``control`` are new ones; receive buffers are not handed out yet.

        Raises:
            Refused, FeaturesRefused, DeviceViolation: it did not come back as it was.
            TimeLimit, DeviceGone: it never left reset, or is gone.
        """
        features = self.features
        self.transport.revive()
        while self.pairs:
            self.pairs.pop().free(self.transport.pool)
        if self.control is not None:
            self.control.free()
            self.control = None
        self._start()
        self.transport.check_same(features)

    # Set-up.

    def _check_pairs(self, wanted: int) -> None:
        most = self.config.max_pairs
        if not 1 <= wanted <= most:
            raise UsageError(
                f"{wanted} queue pairs asked for, the device has {most}",
                where=self.transport.name,
                hint="QEMU: -device virtio-net-pci,mq=on and queues=N at the netdev" if wanted > most else "",
            )

    def _steer(self, pairs: int, rss: Rss | None) -> None:
        if rss is not None and not self.transport.has(spec.F_RSS):
            raise UsageError(
                "RSS was not negotiated", where=self.transport.name, hint="require it: features=+rss"
            )
        if self.control is None:
            return
        if self.transport.has(spec.F_RSS):
            self.control.set_rss(rss or Rss.even(os.urandom(spec.RSS_KEY_MIN), pairs))
        elif pairs > 1:
            self.control.set_pairs(pairs)
        if self.transport.has(spec.F_HASH_REPORT) and not self.transport.has(spec.F_RSS):
            self.control.set_hash(os.urandom(spec.RSS_KEY_MIN))

    # State.

    @property
    def state(self) -> LinkState:
        """What the device says of its link now; read anew each time."""
        return LinkState.read(self.transport)

    @property
    def link_up(self) -> bool:
        """Whether the device says that its link is up; always True without F_STATUS (5.1.5)."""
        return self.state.up

    # Frames in bursts.

    def send_burst(self, frames: Frames, *, pair: int = 0) -> int:
        """Send a table of frames, as ``NetPort.send``."""
        return self.pairs[pair].send(frames)

    def receive_burst(
        self, most: int = 64, *, headers: bool = False, out: Frames | None = None, pair: int = 0
    ) -> Frames:
        """A table of received frames, as ``NetPort.receive``."""
        return self.pairs[pair].receive(most, headers=headers, out=out)

    # Frames, one at a time.

    def send(self, frames: Iterable[SupportsBytes]) -> int:
        """Send Ethernet frames without their checksum; returns how many the device was given.

        A frame is bytes or anything that ``bytes`` makes a frame of, such as a packet of scapy's.

        Fewer than asked when the transmit queue is full; send the rest later.

        Raises:
            UsageError: a frame is shorter than its header or longer than the MTU allows; nothing was sent.
        """
        return self.pairs[0].send(Frames.of([bytes(frame) for frame in frames]))

    def receive(self) -> list[bytes]:
        """All whole frames that have come in, oldest first, without the virtio header.

        Raises:
            DeviceViolation: the device broke the queue, or ``num_buffers`` is impossible.
        """
        frames: list[bytes] = []
        port = self.pairs[0]
        while got := port.receive(out=self._received):
            frames += [got[row] for row in range(len(got))]
        return frames

    def receive_packets(self) -> list[Any]:
        """As ``receive``, as packets of scapy's (``Ether``).

        Raises:
            UsageError: scapy is not installed.
        """
        try:
            from scapy.layers.l2 import Ether
        except ImportError:
            raise UsageError("scapy is not installed", hint="pip install 'guestpv[scapy]'") from None
        return [Ether(frame) for frame in self.receive()]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until something was received; False when ``timeout`` seconds went by."""
        return self.pairs[0].rx.wait(timeout)

    def receive_within(self, timeout: float) -> list[bytes]:
        """The first frames that come within ``timeout`` seconds, or an empty list."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if self.wait(left) and (frames := self.receive()):
                return frames
        return []

    def close(self) -> None:
        """Reset the device and give everything back."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def random_mac() -> bytes:
    """A locally administered unicast address, for a device that has none (5.1.5, DRV-NET-04)."""
    address = bytearray(os.urandom(6))
    address[0] = address[0] & 0xFC | 0x02
    return bytes(address)
