"""A virtqueue that tells its trace of every access to its rings and of every kick."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

from guestpv.core._core import lib

from ..memory import DmaPool
from ..spec import features as feat
from ..transport.vhost_user_ring import PolledQueue
from ..virtqueue.kick import Kick
from ..virtqueue.observed import Access, ObservedVirtqueue
from ..virtqueue.queue import Virtqueue
from .follow import follow
from .meaning import Meanings, Memory
from .record import DeviceTrace
from .relay import Relay


class TracedVirtqueue(ObservedVirtqueue):
    """See ``Virtqueue``. Make a class of one device with ``queue_class``.

    Attributes:
        trace: of the device.
    """

    trace: ClassVar[DeviceTrace]
    values: ClassVar[bool] = True

    def __init__(self, index: int, size: int, features: int, pool: DmaPool, kick: Kick, **rest: Any) -> None:
        self.trace.features = features
        self._memory = Memory(pool)
        self._relay: Relay | None = None
        if kick.kind == lib.GPV_KICK_EVENTFD:
            kick = self._told(kick)
            if (source := rest.get("interrupt_fd")) is not None:
                self._relay = Relay()
                rest["interrupt_fd"] = self._relay.add(source, self._interrupted)
        super().__init__(index, size, features, pool, kick, **rest)

    def _told(self, kick: Kick) -> Kick:
        """A kick by an eventfd of which nobody else would hear."""
        fd = kick.fd

        def send(value: int) -> None:
            self.trace.tell("kick", f"kick of queue {self.index}: eventfd {fd}", "2.9", queue=self.index)
            os.eventfd_write(fd, 1)

        return Kick.call(send)

    def _interrupted(self) -> None:
        text = f"used buffer notification of queue {self.index}"
        self.trace.tell("interrupt", text, "2.3, 2.7.7", queue=self.index)

    def _build(self, size: int) -> None:
        super()._build(size)
        # The device type's part of the mask, and where each area is: what a replay needs.
        at, layout = self.addresses, self.layout
        names = feat.feature_names(self.trace.device_type, self.features)
        kind = "packed" if self.packed else "split"
        self._follower = follow(self.trace, self, Meanings(self.trace.device_type, self._memory))
        self.trace.tell(
            "queue",
            f"makes queue {self.index}: {kind}, {size} entries",
            "2.8" if self.packed else "2.7",
            queue=self.index,
            size=size,
            format=kind,
            features=names,
            feature_bits=f"{self.features:#x}",
            areas={
                name: [address, getattr(layout, name).size]
                for name, address in (("desc", at.desc), ("driver", at.driver), ("device", at.device))
            },
        )

    def _seen(self, access: Access) -> None:
        self._follower.access(access)

    def close(self) -> None:
        """As the queue does it, and the end of the relay."""
        if self.handle:
            self._follower.flush()
            self.trace.tell("queue-gone", f"frees queue {self.index}", "", queue=self.index)
        super().close()
        if self._relay is not None:
            self._relay.close()
            self._relay = None


def queue_class(trace: DeviceTrace) -> type[TracedVirtqueue]:
    """The class of a device's queues."""
    return type("TracedVirtqueue", (TracedVirtqueue,), {"trace": trace})


def polled_class(trace: DeviceTrace) -> type[Virtqueue]:
    """The class of a vhost-user device's queues that have no interrupt."""
    made: Callable[..., type[Virtqueue]] = type
    return made("TracedPolledQueue", (PolledQueue, TracedVirtqueue), {"trace": trace})
