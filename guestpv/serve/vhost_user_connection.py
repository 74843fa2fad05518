"""One front end of a vhost-user back end: what it said, and what the device does about it."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from ..devices.evidence import DriverFault
from ..devices.interrupts import signal
from ..devices.models.net import Net
from ..errors import GuestpvError
from ..spec import features as ft
from ..spec import net
from ..spec.status import Status
from ..wire.stream import ProtocolError
from ..wire.vhost_user import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    MAX_CONFIG,
    REQUESTS,
    U64,
    VRING_INDEX_MASK,
    AnyPayload,
    BackendRequest,
    Channel,
    Config,
    Inflight,
    MemorySlot,
    MemoryTable,
    Message,
    Request,
    VringAddress,
    VringState,
)
from ..wire.vhost_user import ProtocolFeature as PF
from .inflight import Memory, region_size
from .vhost_user_rings import ResumedPacked, ResumedSplit, enable

if TYPE_CHECKING:
    from .vhost_user import VhostUserServer

MEMORY_SLOTS: Final = 512
NEGOTIATED: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK


class Objection(Exception):
    """A request cannot be carried out; the front end is told. Never leaves this module."""


@dataclass(slots=True)
class Vring:
    """What the front end said about one ring.

    Attributes:
        kick, call, error: eventfds, -1 where there is none.
        kick_given: whether SET_VRING_KICK came, with a descriptor or without.
    """

    index: int
    num: int = 0
    base: int = 0
    address: VringAddress | None = None
    enabled: bool = False
    started: bool = False
    kick_given: bool = False
    kick: int = -1
    call: int = -1
    error: int = -1
    end_record: Callable[[], None] = lambda: None

    def replace(self, name: str, fd: int) -> None:
        """Put a descriptor, or -1, in the place of an older one."""
        if (old := getattr(self, name)) >= 0:
            os.close(old)
        setattr(self, name, fd)


@dataclass(slots=True)
class Region:
    """A mapped row of the memory table."""

    slot: MemorySlot
    memory: memoryview = field(repr=False)


class Connection:
    """A connected front end.

    Args:
        server: whose device it uses.
        channel: the connected socket, owned from here on.
    """

    def __init__(self, server: VhostUserServer, channel: Channel) -> None:
        self.server = server
        self.device = server.device
        self.channel = channel
        self.protocol_features = 0
        self.rings = [Vring(index) for index in range(len(self.device.queues))]
        self._ring_enable = False
        self._status = 0
        self._regions: list[Region] = []
        self._told = b""
        self._inflight: Memory | None = None
        self._inflight_stride = 0
        self._back: Channel | None = None

    def has(self, feature: PF) -> bool:
        """Whether a protocol feature was negotiated."""
        return bool(self.protocol_features >> feature & 1)

    # Messages.

    def serve(self) -> None:
        """Receive one request and carry it out.

        Raises:
            DeviceGone: the front end closed the connection.
            ProtocolError: it sent what cannot be answered by an error.
        """
        message = self.channel.receive()
        answer: AnyPayload | None = None
        fds: list[int] = []
        failure = ""
        try:
            answer = self._carry_out(message, fds)
        except (Objection, ProtocolError) as error:
            failure = str(error)
            self.device.find("", failure, "vhost-user")
        finally:
            message.close_fds()
        always = message.request in REQUESTS and REQUESTS[Request(message.request)].answers is not None
        try:
            if always and (answer is not None or message.request == Request.GET_CONFIG):
                self.channel.send(message.answer(answer.pack() if answer else b"", tuple(fds)))
            elif message.wants_reply and self.has(PF.REPLY_ACK) and not always:
                self.channel.send(message.answer(U64(1 if failure else 0).pack()))
            elif failure:
                raise ProtocolError(failure, where=self.channel.name)
        finally:
            for fd in fds:
                os.close(fd)

    def _carry_out(self, message: Message, fds: list[int]) -> AnyPayload | None:
        try:
            request = Request(message.request)
        except ValueError:
            raise Objection(f"request {message.request} is not understood") from None
        exchange = REQUESTS[request]
        if exchange.needs is not None and not self.has(exchange.needs):
            raise Objection(f"{request.name} without the protocol feature {exchange.needs.name}")
        least, most = exchange.fds
        if not least <= len(message.fds) <= most:
            raise Objection(f"{request.name} came with {len(message.fds)} descriptors")
        payload = exchange.sends.unpack(message.payload) if exchange.sends else None
        with self.device.executor:
            if "VRING" in request.name:
                return self._ring_request(request, payload, message.fds)
            if "MEM" in request.name:
                return self._memory_request(request, payload, message.fds)
            if "INFLIGHT" in request.name and isinstance(payload, Inflight):
                return self._inflight_request(request, payload, message.fds, fds)
            return self._device_request(request, payload, message.fds)

    # The device.

    def _device_request(
        self, request: Request, payload: AnyPayload | None, fds: tuple[int, ...]
    ) -> AnyPayload | None:
        match request, payload:
            case Request.GET_FEATURES, _:
                return U64(self.server.offered | 1 << F_PROTOCOL_FEATURES)
            case Request.SET_FEATURES, U64(value):
                self._negotiate(value)
            case Request.GET_PROTOCOL_FEATURES, _:
                return U64(self.server.protocol_features)
            case Request.SET_PROTOCOL_FEATURES, U64(value):
                if value & ~self.server.protocol_features:
                    raise Objection(f"protocol features {value:#x} were not offered")
                self.protocol_features = value
            case Request.GET_QUEUE_NUM, _:
                # For network devices the protocol counts pairs; the control queue is the front end's.
                return U64(
                    len(self.rings) // 2 if self.device.model.device_type == ft.NET else len(self.rings)
                )
            case Request.SET_BACKEND_REQ_FD, _:
                self._back = self.server.backend_channel(os.dup(fds[0]))
            case Request.GET_CONFIG, Config() as config:
                return self._get_config(config)
            case Request.SET_CONFIG, Config() as config:
                self._set_config(config)
            case Request.RESET_DEVICE, _:
                self._reset()
            case Request.GET_STATUS, _:
                return U64(self._shown_status())
            case Request.SET_STATUS, U64(value):
                self._set_status(value)
            case ((Request.SET_OWNER | Request.RESET_OWNER), _):
                pass
            case _:
                raise Objection(f"{request.name} is not supported")
        return None

    def _negotiate(self, value: int) -> None:
        features = value & ~(1 << F_PROTOCOL_FEATURES)
        self._ring_enable = features != value
        if isinstance(self.device.model, Net) and features >> net.F_MQ & 1:
            features |= 1 << net.F_CTRL_VQ
        if any(ring.started for ring in self.rings):
            if features & ~(1 << F_LOG_ALL) != self.device.features:
                raise Objection(f"features changed to {features:#x} while rings are started")
            return
        device = self.device
        device.write_status(0)
        device.write_status(Status.ACKNOWLEDGE)
        device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        for word in range(2):
            device.accept(word, features >> (32 * word) & 0xFFFFFFFF)
        device.write_status(NEGOTIATED)
        if not device.status & Status.FEATURES_OK:
            names = " ".join(ft.feature_names(device.model.device_type, features))
            raise Objection(f"the device does not work with {names}")

    def _shown_status(self) -> int:
        status = self._status | (self.device.status & Status.NEEDS_RESET)
        return status if self.device.status & Status.FEATURES_OK else status & ~Status.FEATURES_OK

    def _set_status(self, value: int) -> None:
        self._status = value
        if value == 0:
            self._reset()
        for ring in self.rings:
            self._try_start(ring)

    def _reset(self) -> None:
        for ring in self.rings:
            self._stop(ring)
            ring.enabled = ring.kick_given = False
        self._status = 0
        self.device.write_status(0)

    def _config_block(self) -> bytes:
        return self.server.registers.config_bytes().ljust(MAX_CONFIG, b"\0")

    def _get_config(self, asked: Config) -> Config:
        end = asked.offset + len(asked.data)
        if end > MAX_CONFIG:
            raise Objection(f"GET_CONFIG up to byte {end}")
        block = self._told = self._config_block()
        return Config(asked.offset, block[asked.offset : end], asked.flags)

    def _set_config(self, config: Config) -> None:
        if config.flags:
            raise Objection("SET_CONFIG for migration")
        for item in self.device.model.layout or ():
            at = item.offset - config.offset
            if item.writable and at >= 0 and at + item.width <= len(config.data):
                value = int.from_bytes(config.data[at : at + item.width], "little")
                self.server.registers.config_write(item.offset, item.width, value)

    # Memory.

    def _memory_request(
        self, request: Request, payload: AnyPayload | None, fds: tuple[int, ...]
    ) -> AnyPayload | None:
        match request, payload:
            case Request.GET_MAX_MEM_SLOTS, _:
                return U64(MEMORY_SLOTS)
            case Request.SET_MEM_TABLE, MemoryTable(regions):
                if len(regions) != len(fds):
                    raise Objection(f"{len(regions)} memory regions with {len(fds)} descriptors")
                # Rings keep views of the old mappings: the same memory, whatever the table says now.
                while self._regions:
                    self._remove_region(self._regions[-1])
                for row, fd in zip(regions, fds, strict=True):
                    slot = MemorySlot(row.guest_address, row.size, row.user_address, row.mmap_offset)
                    self._add_region(slot, fd)
            case Request.ADD_MEM_REG, MemorySlot() as slot:
                self._add_region(slot, fds[0])
            case Request.REM_MEM_REG, MemorySlot() as slot:
                known = [r for r in self._regions if r.slot.guest_address == slot.guest_address]
                if not known:
                    raise Objection(f"no memory region at {slot.guest_address:#x}")
                self._remove_region(known[0])
        return None

    def _add_region(self, slot: MemorySlot, fd: int) -> None:
        try:
            backing = mmap.mmap(fd, slot.mmap_offset + slot.size)
            memory = memoryview(backing)[slot.mmap_offset :]
            self.device.memory.add(slot.guest_address, memory)
        except (OSError, ValueError, GuestpvError) as error:
            raise Objection(f"memory region at {slot.guest_address:#x}: {error}") from None
        self._regions.append(Region(slot, memory))

    def _remove_region(self, region: Region) -> None:
        self.device.memory.remove(region.slot.guest_address, region.slot.size)
        self._regions.remove(region)

    def _guest_address(self, user_address: int) -> int:
        for region in self._regions:
            offset = user_address - region.slot.user_address
            if 0 <= offset < region.slot.size:
                return region.slot.guest_address + offset
        raise DriverFault("", f"user address {user_address:#x} lies in no memory region")

    # Rings.

    def _ring_request(
        self, request: Request, payload: AnyPayload | None, fds: tuple[int, ...]
    ) -> AnyPayload | None:
        index = payload.value & VRING_INDEX_MASK if isinstance(payload, U64) else getattr(payload, "index", 0)
        if index >= len(self.rings):
            raise Objection(f"{request.name} for ring {index} of {len(self.rings)}")
        ring = self.rings[index]
        fd = os.dup(fds[0]) if fds else -1
        match request, payload:
            case Request.SET_VRING_NUM, VringState(_, num):
                ring.num = num
            case Request.SET_VRING_BASE, VringState(_, num):
                ring.base = num
            case Request.SET_VRING_ADDR, VringAddress() as address:
                ring.address = address
            case Request.GET_VRING_BASE, _:
                self._stop(ring)
                ring.kick_given = False
                return VringState(index, ring.base)
            case Request.SET_VRING_ENABLE, VringState(_, num):
                ring.enabled = bool(num)
                if not num:
                    self._stop(ring)
                if isinstance(self.device.model, Net):
                    # What the control queue's VQ_PAIRS_SET is otherwise.
                    receiving = self.rings[: 2 * self.device.model.pairs : 2]
                    self.device.model.control.use_pairs(max(1, sum(each.enabled for each in receiving)))
            case Request.SET_VRING_KICK, _:
                self.server.forget_kick(ring)
                ring.replace("kick", fd)
                ring.kick_given = True
                self.server.watch_kick(ring)
            case Request.SET_VRING_CALL, _:
                ring.replace("call", fd)
            case Request.SET_VRING_ERR, _:
                ring.replace("error", fd)
        self._try_start(ring)
        return None

    def _try_start(self, ring: Vring) -> None:
        ready = ring.address is not None and ring.num and ring.kick_given and not ring.started
        ready = ready and (ring.enabled or not self._ring_enable)
        live = not self.has(PF.STATUS) or self._status & Status.DRIVER_OK
        if ready and live and self.device.status & Status.FEATURES_OK:
            self._start(ring)

    def _start(self, ring: Vring) -> None:
        device, queue = self.device, self.device.queues[ring.index]
        assert ring.address is not None
        packed = bool(device.features >> ft.F_RING_PACKED & 1)
        if not device.status & Status.DRIVER_OK:
            device.write_status(NEGOTIATED | Status.DRIVER_OK)
            if self._told and self._told != self._config_block():
                # It changed while there was no driver to notify; front ends keep what they were told.
                self.interrupt(None)
        record = None
        if self._inflight is not None:
            stride = self._inflight_stride
            record = self._inflight[ring.index * stride : (ring.index + 1) * stride]
            if len(record) < region_size(ring.num, packed):
                raise Objection(f"the in-flight buffer has no room for ring {ring.index}")
        try:
            queue.size = ring.num
            queue.desc = self._guest_address(ring.address.descriptor)
            queue.driver = self._guest_address(ring.address.available)
            queue.device = self._guest_address(ring.address.used)
            ring.end_record = enable(queue, packed, ring.base, record)
        except DriverFault as fault:
            device.fault(fault, queue.where)
            raise Objection(f"{queue.where}: {fault.message}") from None
        ring.started = True
        device.kick(ring.index)

    def _stop(self, ring: Vring, *, finish: bool = True) -> None:
        """Finish what was taken, and remember where to go on."""
        if not ring.started:
            return
        queue = self.device.queues[ring.index]
        if finish:
            queue.release()
        self.device.model.queue_reset(queue)
        if isinstance(queue.ring, ResumedSplit | ResumedPacked):
            ring.base = queue.ring.base
        ring.end_record()
        queue.reset()
        ring.started = False

    # Requests in flight.

    def _inflight_request(
        self, request: Request, payload: Inflight, fds: tuple[int, ...], answered: list[int]
    ) -> AnyPayload | None:
        packed = bool(self.device.features >> ft.F_RING_PACKED & 1)
        stride = region_size(payload.queue_size, packed)
        if request == Request.SET_INFLIGHT_FD:
            if payload.num_queues * stride > payload.mmap_size:
                raise Objection(f"an in-flight buffer of {payload.mmap_size} bytes is too small")
            try:
                backing = mmap.mmap(fds[0], payload.mmap_offset + payload.mmap_size)
            except (OSError, ValueError) as error:
                raise Objection(f"in-flight buffer: {error}") from None
            self._inflight = np.frombuffer(backing, np.uint8)[payload.mmap_offset :]
            self._inflight_stride = stride
            return None
        size = payload.num_queues * stride
        fd = os.memfd_create("guestpv-inflight", os.MFD_CLOEXEC)
        answered.append(fd)
        os.ftruncate(fd, size)
        return Inflight(size, 0, payload.num_queues, payload.queue_size)

    # Notifications.

    def interrupt(self, index: int | None) -> None:
        """Signal a ring's call descriptor, or a configuration change (None)."""
        if index is not None:
            if self.rings[index].call >= 0:
                signal(self.rings[index].call)
            return
        if self.device.status & Status.NEEDS_RESET:
            for ring in self.rings:
                if ring.error >= 0:
                    signal(ring.error)
        if self._back is not None:
            # The front end may be gone already; the connection's own end tells.
            with contextlib.suppress(GuestpvError):
                self._back.send(Message(BackendRequest.CONFIG_CHANGE_MSG))

    def close(self) -> None:
        """The front end is gone: the device is reset and its memory given up."""
        with self.device.executor:
            for ring in self.rings:
                # Nobody waits for completions any more, and the rings may be in use for something else.
                self._stop(ring, finish=False)
                self.server.forget_kick(ring)
                for name in ("kick", "call", "error"):
                    ring.replace(name, -1)
            self.device.write_status(0)
            while self._regions:
                self._remove_region(self._regions[-1])
        if self._back is not None:
            self._back.close()
        self.channel.close()
