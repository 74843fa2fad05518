"""The vhost-user front end: a device of another process, its rings in memory both share.

The protocol carries no device status unless the back end offers STATUS, no queue sizes and no reset that
every back end knows; what it lacks is kept here. A life of the device is a life of the connection: after a
reset the next negotiation connects anew, so a request of the old life cannot reach the new one's rings.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from ..errors import BackEndGone, DeviceGone, GuestpvError, Refused, UsageError
from ..memory import DmaPool
from ..spec import balloon, blk, net
from ..spec import features as feat
from ..spec.layout import Layout
from ..spec.status import Status
from ..system import SYSTEM
from ..virtqueue.queue import Virtqueue
from ..wire.vhost_user import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    Config,
    Inflight,
    MemoryTable,
    Request,
    VringAddress,
    VringState,
)
from ..wire.vhost_user import ProtocolFeature as PF
from .base import InterruptMode, Transport
from .vhost_user_control import NEEDS_BACK_END, ControlRing
from .vhost_user_control import SIZE as CONTROL_SIZE
from .vhost_user_memory import Arena, MemfdSpace
from .vhost_user_ring import PolledQueue, Ring, fresh_base, used_base
from .vhost_user_session import Session

CONFIG_LAYOUTS: Final[dict[int, Layout]] = {
    feat.NET: net.CONFIG,
    feat.BLK: blk.CONFIG,
    feat.BALLOON: balloon.CONFIG,
}
"""Virtio device id -> layout of its configuration, to know how much of it to ask for."""

FIXED_QUEUES: Final = {feat.NET: 2, feat.BLK: 1, feat.BALLOON: 5, feat.RNG: 1}
"""Queues of a device type whose back end does not tell (no MQ)."""

LARGEST_QUEUE: Final = 1024
"""Entries. The protocol has no way to ask; this is what libvhost-user and with it QEMU and passt can take."""

CONFIG_BORNE: Final = {
    feat.NET: feat.mask((net.F_MAC, net.F_STATUS, net.F_MTU, net.F_SPEED_DUPLEX)),
}
"""Features that mean nothing without device configuration."""

CONTROL: Final = feat.mask((net.F_CTRL_VQ, net.F_MQ))
"""Features that the front end brings for a back end with several queue pairs."""

REVIVE_LIMIT: Final = 3.0
"""Seconds that ``revive`` waits for a back end that was started again."""

PAIRS_FIELD: Final = net.CONFIG["max_virtqueue_pairs"]

NOT_CARRIED: Final = feat.mask(
    (
        F_LOG_ALL,
        F_PROTOCOL_FEATURES,
        feat.F_ACCESS_PLATFORM,
        feat.F_NOTIFICATION_DATA,
        feat.F_NOTIF_CONFIG_DATA,
    )
)
"""Bits of GET_FEATURES that are vhost's own, that need an IOTLB, or data beside an eventfd's kick."""


class VhostUserTransport(Transport):
    """A vhost-user back end as a virtio device.

    Args:
        device_type: what it is; the socket does not tell.
        path: its UNIX socket.
        largest_queue: maximum queue size in entries, as ``queue_max_size`` shows it.

    Attributes:
        session: the connection, None while there is none.
        space: the memory table.
        session_class, queue_class, polled_class: what connections, queues and queues without an interrupt are
            made of.

    Raises:
        GuestpvError: nobody listens there.
        ProtocolError, TimeLimit, DeviceGone: who listens there does not speak vhost-user.
        Refused: the back end lacks what this device type cannot do without.
    """

    session_class: type[Session] = Session
    queue_class: type[Virtqueue] = Virtqueue
    polled_class: type[Virtqueue] = PolledQueue

    def __init__(self, device_type: int, path: str, *, largest_queue: int = LARGEST_QUEUE) -> None:
        self.path = path
        self.session: Session | None = None
        self.space = MemfdSpace(self._announce)
        super().__init__(
            f"vhost-user:{feat.DEVICE_NAMES[device_type]}:{path}", device_type, DmaPool(self.space)
        )
        self.mode: InterruptMode = "msix"
        self._largest_queue = largest_queue
        self._rings: dict[int, Ring] = {}
        self._rings_lock = threading.Lock()
        self._announced: set[int] = set()
        self._unsubmitted: dict[int, list[int]] = {}
        self._local_status = 0
        self._pairs = 1
        self._features_refused = ""
        self._config = b""
        self._config_changes = 0
        self._inflight: tuple[Inflight, int] | None = None
        self._config_event = SYSTEM.eventfd()
        try:
            self._connected()
        except BaseException:
            self.release()
            raise

    # The connection.

    def _connected(self) -> Session:
        """The session, made anew where there is none.

        Raises:
            BackEndGone: the back end died while the device was in use.
        """
        if self.session is not None:
            if self.session.death:
                raise BackEndGone(
                    self.session.death,
                    where=self.name,
                    hint="start the back end again; `up --restart` goes on with it, a program with "
                    "restart() or reconnect()",
                )
            return self.session
        session = self.session_class(self.path, self._config_changed, self._died)
        if self.device_type == feat.BLK and not session.has(PF.CONFIG):
            session.close()
            raise Refused(
                "the back end lacks the protocol feature CONFIG, so a block device's capacity is unknown",
                where=self.name,
                hint="such as qemu-storage-daemon --export type=vhost-user-blk,... has it",
            )
        self.session = session
        return session

    def _disconnect(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None
        self._announced.clear()

    def _config_changed(self) -> None:
        os.eventfd_write(self._config_event, 1)

    def _died(self) -> None:
        # Whoever sleeps on the configuration learns it from the status, on a queue from ``_check_alive``.
        os.eventfd_write(self._config_event, 1)
        with self._rings_lock:
            for ring in self._rings.values():
                os.eventfd_write(ring.call, 1)

    def _check_alive(self) -> None:
        if self.session is not None:
            self._connected()

    # Status and features.

    def read_status(self) -> int:
        if self.session is None:
            return self._local_status
        session = self._connected()
        if session.has(PF.STATUS):
            status = session.ask(Request.GET_STATUS, None, U64).value & 0xFF
        else:
            status = self._local_status
        return status & ~Status.FEATURES_OK if self._features_refused else status

    def write_status(self, value: int) -> None:
        if value == 0:
            self._stop()
            return
        session = self._connected()
        before, self._local_status = self._local_status, value
        if value & ~before & Status.DRIVER_OK:
            self._go_live()
        if session.has(PF.STATUS):
            session.tell(Request.SET_STATUS, U64(value))

    def _stop(self) -> None:
        """Stop the rings and forget the device's life."""
        self._local_status = 0
        self._features_refused = ""
        self._unsubmitted.clear()
        self._pairs = 1
        session = self.session
        with self._rings_lock:
            rings = list(self._rings.values())
            self._rings.clear()
        self._drop_inflight()
        try:
            if session is None or session.death:
                self._disconnect()
                return
            for ring in rings:
                self._stop_ring(ring)
            if session.has(PF.RESET_DEVICE) and session.has(PF.REPLY_ACK):
                session.tell(Request.RESET_DEVICE)
            elif rings:
                self._disconnect()
            elif session.has(PF.STATUS):
                session.tell(Request.SET_STATUS, U64(0))
        except GuestpvError:
            # A back end that does not even stop loses the connection, and the device its life with it.
            self._disconnect()
        finally:
            for ring in rings:
                ring.close()

    def read_features(self) -> int:
        session = self._connected()
        offered = session.features & ~NOT_CARRIED
        if not session.has(PF.CONFIG):
            offered &= ~CONFIG_BORNE.get(self.device_type, 0)
        if self.device_type == feat.NET:
            offered &= ~(NEEDS_BACK_END | CONTROL)
            if self._most_pairs > 1:
                offered |= CONTROL
        return offered

    def write_features(self, features: int) -> None:
        session = self._connected()
        own = session.features & 1 << F_PROTOCOL_FEATURES
        # The control queue is played here: the back end need not have heard of it.
        theirs = features & ~(CONTROL & ~session.features) if self.device_type == feat.NET else features
        try:
            session.tell(Request.SET_FEATURES, U64(theirs | own))
        except DeviceGone:
            raise
        except GuestpvError as error:
            self._features_refused = error.message

    # Memory.

    def _announce(self, arena: Arena) -> None:
        """A new arena: a back end that has the others is told at once."""
        if self._announced:
            self._send_memory([*self.space.arenas, arena])

    def _send_memory(self, arenas: list[Arena]) -> None:
        session = self._connected()
        new = [arena for arena in arenas if arena.fd not in self._announced]
        if len(arenas) > session.max_regions:
            raise GuestpvError(
                f"the back end takes {session.max_regions} memory regions at most, {len(arenas)} are needed",
                where=self.name,
                hint="allocate less, or before the first queue is made",
            )
        if session.has(PF.CONFIGURE_MEM_SLOTS):
            for arena in new:
                session.tell(Request.ADD_MEM_REG, arena.slot, (arena.fd,))
        elif new:
            table = MemoryTable(tuple(arena.slot.region for arena in arenas))
            session.tell(Request.SET_MEM_TABLE, table, tuple(arena.fd for arena in arenas))
        self._announced.update(arena.fd for arena in arenas)

    # Queues.

    @property
    def num_queues(self) -> int:
        session = self._connected()
        if self.device_type == feat.NET:
            # For network devices the protocol counts pairs.
            return 2 * self._most_pairs + (self._control_index is not None)
        if session.queue_num is None:
            return FIXED_QUEUES.get(self.device_type, 1)
        return session.queue_num

    @property
    def _most_pairs(self) -> int:
        """Queue pairs that a network back end has."""
        session = self._connected()
        return max(1, session.queue_num or 1) if session.features >> net.F_MQ & 1 else 1

    @property
    def _control_index(self) -> int | None:
        """Number of the control queue (5.1.2), where one was negotiated."""
        if self.device_type != feat.NET or not self.has(net.F_CTRL_VQ):
            return None
        return 2 * (self._most_pairs if self.has(net.F_MQ) else 1)

    def _set_pairs(self, pairs: int) -> bool:
        """VQ_PAIRS_SET: let the back end use the first ``pairs`` pairs; False: there are not so many."""
        if not 1 <= pairs <= self._most_pairs or 2 * pairs > len(self._rings):
            return False
        self._pairs = pairs
        for ring in self._rings.values():
            self._enable(ring)
        return True

    def queue_max_size(self, index: int) -> int:
        if index == self._control_index:
            return CONTROL_SIZE
        return self._largest_queue if 0 <= index < self.num_queues else 0

    def set_up_queue(self, index: int, size: int, features: int) -> Virtqueue:
        if index == self._control_index:
            name = f"{self.name} control queue"
            return ControlRing(
                index, size, self.pool, self.space.look, self._set_pairs, name, self.queue_class
            ).queue
        polled = self.mode == "poll"
        ring = Ring.make(
            index,
            size,
            features,
            self.pool,
            f"{self.name} queue {index}",
            self._check_alive,
            kind=self.polled_class if polled else self.queue_class,
            polled=polled,
        )
        try:
            self._send_memory(self.space.arenas)
            with self._rings_lock:
                self._rings[index] = ring
            self._describe_ring(ring)
            if self._local_status & Status.DRIVER_OK:
                self._start_ring(ring)
        except BaseException:
            self._remove_ring(index)
            ring.close()
            ring.queue.close()
            raise
        return ring.queue

    def _describe_ring(self, ring: Ring) -> None:
        session, queue = self._connected(), ring.queue
        index, at = queue.index, queue.addresses
        desc, driver, device = (self.space.user_address(a) for a in (at.desc, at.driver, at.device))
        session.tell(Request.SET_VRING_NUM, VringState(index, queue.size))
        session.tell(Request.SET_VRING_BASE, VringState(index, ring.base))
        session.tell(Request.SET_VRING_ADDR, VringAddress(index, 0, desc, device, driver))
        session.tell(Request.SET_VRING_ERR, U64(index), (ring.error,))
        # Also when nobody waits for it: libvhost-user gives up on a queue that it cannot notify.
        session.tell(Request.SET_VRING_CALL, U64(index), (ring.call,))

    def _start_ring(self, ring: Ring) -> None:
        session, index = self._connected(), ring.queue.index
        ring.started, ring.enabled = True, False
        session.tell(Request.SET_VRING_KICK, U64(index), (ring.kick,))
        self._enable(ring)

    def _enable(self, ring: Ring) -> None:
        """Enable a ring, unless it belongs to a queue pair that the driver has not asked for yet."""
        session, index = self._connected(), ring.queue.index
        waits = self.device_type == feat.NET and self.has(net.F_MQ) and index // 2 >= self._pairs
        if ring.started and ring.enabled == waits and session.features >> F_PROTOCOL_FEATURES & 1:
            ring.enabled = not waits
            session.tell(Request.SET_VRING_ENABLE, VringState(index, int(ring.enabled)))

    def _stop_ring(self, ring: Ring) -> None:
        """Stop a ring; its next available index comes back with the answer and is not needed."""
        if not ring.started:
            return
        session, index = self._connected(), ring.queue.index
        ring.started = False
        if ring.enabled:
            ring.enabled = False
            session.tell(Request.SET_VRING_ENABLE, VringState(index, 0))
        session.ask(Request.GET_VRING_BASE, VringState(index, 0), VringState)

    def _go_live(self) -> None:
        """What DRIVER_OK means without a status register: from here on the back end may touch the rings."""
        session = self._connected()
        if session.has(PF.INFLIGHT_SHMFD) and self._rings:
            if self._inflight is None:
                largest = max(ring.queue.size for ring in self._rings.values())
                wish = Inflight(0, 0, max(self._rings) + 1, largest)
                self._inflight = session.ask_with_fd(Request.GET_INFLIGHT_FD, wish, Inflight)
            description, fd = self._inflight
            session.tell(Request.SET_INFLIGHT_FD, description, (fd,))
        for ring in self._rings.values():
            self._start_ring(ring)

    def _remove_ring(self, index: int) -> None:
        with self._rings_lock:
            self._rings.pop(index, None)

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            SYSTEM.close(self._inflight[1])
            self._inflight = None

    def request_queue_reset(self, index: int) -> None:
        if index == self._control_index:
            return
        ring = self._rings[index]
        self._remove_ring(index)
        try:
            self._stop_ring(ring)
        finally:
            ring.close()

    def queue_reset_done(self, index: int) -> bool:
        return index not in self._rings

    # A back end that died.

    def reconnect(self, timeout: float = 10.0) -> dict[int, list[int]]:
        """Go on with a back end that was started again after it died.

        Used buffers are completed: take them before. What remains in flight is known from our own shadow of
        the rings. A back end with INFLIGHT_SHMFD, and only such a one, knows it too and goes on with it by
        itself; for any other the rings begin anew and the caller submits the requests again.

        Args:
            timeout: seconds within which the back end has to be there.

        Returns:
            Tokens by queue number, oldest first, of buffers that have to be added and published again; the
            old back end may or may not have carried them out. ``Virtqueue.cookie`` still knows their objects.

        Raises:
            UsageError: the device is not live, or completions wait to be taken.
            Refused: the back end that is there now offers less than was negotiated.
            GuestpvError: nobody listens after ``timeout`` seconds.
        """
        if not self._local_status & Status.DRIVER_OK:
            raise UsageError("there is nothing to reconnect: the device is not live", where=self.name)
        for ring in self._rings.values():
            if ring.queue.pending():
                raise UsageError(
                    f"queue {ring.queue.index} has completions: take them before reconnect()", where=self.name
                )
        self._disconnect()
        self._await_backend(timeout)
        session = self._connected()
        if lost := self.features & ~self.read_features():
            raise Refused(
                "the back end no longer offers "
                + " ".join(feat.feature_names(self.device_type, lost))
                + ", which was negotiated before",
                where=self.name,
                hint="start it as it was before, or reset() and negotiate again",
            )
        if self._rings and max(self._rings) >= self.num_queues:
            raise Refused(
                f"the back end has {self.num_queues} queues now, queue {max(self._rings)} is in use",
                where=self.name,
                hint="start it as it was before, or reset() and negotiate again",
            )
        self.write_features(self.features)
        if self._features_refused:
            raise Refused(self._features_refused, where=self.name)
        tracked = self._inflight is not None and session.has(PF.INFLIGHT_SHMFD)
        if not tracked:
            self._drop_inflight()
        self._send_memory(self.space.arenas)
        for index, ring in self._rings.items():
            queue = ring.queue
            if tracked:
                ring.base = used_base(queue)
            else:
                self._unsubmitted.setdefault(index, []).extend(queue.drain())
                ring.base = fresh_base(queue)
            self._describe_ring(ring)
        self._go_live()
        if session.has(PF.STATUS):
            session.tell(Request.SET_STATUS, U64(self._local_status))
        again, self._unsubmitted = self._unsubmitted, {}
        return again

    def revive(self) -> None:
        super().revive()
        try:
            self._await_backend(REVIVE_LIMIT)
        except Refused:
            raise
        except GuestpvError as error:
            raise BackEndGone(
                f"no back end has taken the place of the one that ended: {error.message}",
                where=self.name,
                hint=error.hint,
            ) from error

    def _await_backend(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._connected()
            except GuestpvError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    # Interrupts.

    def set_up_interrupts(self) -> None:
        if self.mode == "intx":
            raise UsageError("vhost-user has eventfds only: mode is msix or poll", where=self.name)

    @property
    def config_fd(self) -> int | None:
        return self._config_event

    # Device configuration.

    @property
    def config_length(self) -> int:
        layout = CONFIG_LAYOUTS.get(self.device_type)
        if layout is None:
            return 0
        if not self._connected().has(PF.CONFIG):
            return PAIRS_FIELD.end if self.device_type == feat.NET and self._most_pairs > 1 else 0
        # Back ends refuse to answer for more than they have, so no more than the features bring is asked for.
        return max((field.end for field in layout if field.exists(self.offered)), default=0)

    def config_generation(self) -> int:
        """Take the configuration as a whole; the protocol has no generation, so its content decides."""
        length = self.config_length
        config = b""
        if length and not self._connected().has(PF.CONFIG):
            # What the protocol itself tells, where a driver looks for it.
            config = bytes(PAIRS_FIELD.offset) + self._most_pairs.to_bytes(PAIRS_FIELD.width, "little")
        elif length:
            asked = Config(0, bytes(length))
            config = self._connected().ask(Request.GET_CONFIG, asked, Config).data
            if len(config) < length:
                raise GuestpvError(
                    f"the back end refused GET_CONFIG for {length} bytes, which its features promise",
                    where=self.name,
                )
        if config != self._config:
            self._config = config
            self._config_changes += 1
        return self._config_changes

    def read_config(self, offset: int, width: int) -> int:
        if not self._config:
            self.config_generation()
        return int.from_bytes(self._config[offset : offset + width], "little")

    def write_config(self, offset: int, width: int, value: int) -> None:
        session = self._connected()
        if not session.has(PF.CONFIG):
            raise UsageError("the back end has no device configuration", where=self.name)
        session.tell(Request.SET_CONFIG, Config(offset, value.to_bytes(width, "little")))
        # What the back end made of it is asked for by the next read.
        self._config = b""

    # The end.

    def silence(self) -> None:
        self._disconnect()

    def release(self) -> None:
        self._disconnect()
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()
        self._drop_inflight()
        self.space.close()
        if self._config_event >= 0:
            SYSTEM.close(self._config_event)
            self._config_event = -1


def open_transport(
    body: str, params: dict[str, str], kind: type[VhostUserTransport] = VhostUserTransport
) -> VhostUserTransport:
    """Open ``TYPE:PATH``, such as ``blk:/run/blk.sock``.

    ``queue-size=N`` is the largest queue size in entries, for back ends that take less or more than 1024.

    Raises:
        UsageError: the specification is not well formed.
    """
    type_name, colon, path = body.partition(":")
    types = {name: number for number, name in feat.DEVICE_NAMES.items()}
    if not colon or not path or type_name not in types:
        raise UsageError(
            f"vhost-user:{body} is not vhost-user:TYPE:PATH",
            hint="such as vhost-user:blk:/run/blk.sock; types: " + " ".join(types),
        )
    text = params.pop("queue-size", str(LARGEST_QUEUE))
    if not text.isdigit() or not 1 <= int(text) <= 32768:
        raise UsageError(f"queue-size is 1 to 32768, not {text!r}", where=f"vhost-user:{body}")
    if params:
        raise UsageError(
            f"unknown parameter {' '.join(params)}",
            where=f"vhost-user:{body}",
            hint="known: queue-size, features, mode",
        )
    return kind(types[type_name], path, largest_queue=int(text))
