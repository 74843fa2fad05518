"""The kernel's network block device made local: socket pairs behind ``/dev/nbdN``, set up by netlink."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ..core._core import ffi, lib
from ..drivers.blk import Blk
from ..drivers.blk_queue import SLOT, STATUS
from ..errors import AccessDenied, GuestpvError, Refused
from ..memory import DmaBuffer
from ..spec import features as feat
from ..system import SYSTEM
from ..wire import nbd as wire

NETLINK_GENERIC: Final = 16
ANSWER_LIMIT: Final = 10.0
SLOTS: Final = 64
BUFFER: Final = 64 << 10
SOCKET_BUFFER: Final = 1 << 20


class Netlink:
    """The kernel's ``nbd`` family.

    Raises:
        GuestpvError: the kernel has no network block device.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self._socket.settimeout(ANSWER_LIMIT)
        self._sequence = 0
        try:
            self._family = self._find()
        except BaseException:
            self._socket.close()
            raise

    def _find(self) -> int:
        name = wire.attribute(wire.CTRL_ATTR_FAMILY_NAME, wire.FAMILY.encode() + b"\0")
        try:
            answer = self._ask(wire.GENL_ID_CTRL, wire.CTRL_CMD_GETFAMILY, name)
        except FileNotFoundError as error:
            raise GuestpvError(
                "the kernel has no network block device", where="netlink family nbd", hint="modprobe nbd"
            ) from error
        return int(struct.unpack("=H", answer[wire.CTRL_ATTR_FAMILY_ID])[0])

    def _ask(self, family: int, command: int, attributes: bytes) -> dict[int, bytes]:
        """Send a request; the attributes of its answer, if there is one besides the acknowledgement."""
        self._sequence += 1
        self._socket.send(wire.message(family, command, wire.FAMILY_VERSION, attributes, self._sequence))
        found: dict[int, bytes] = {}
        while True:
            for kind, sequence, body in wire.messages(self._socket.recv(65536)):
                if sequence != self._sequence:
                    continue
                if kind != wire.NLMSG_ERROR:
                    found = wire.attributes(body[wire.GENERIC.size :])
                    continue
                code = -struct.unpack_from("=i", body)[0]
                if code:
                    raise OSError(code, os.strerror(code))
                return found

    def connect(self, index: int | None, size: int, block_size: int, flags: int, sockets: list[int]) -> int:
        """Set up ``/dev/nbdN`` with our sockets; returns N.

        Raises:
            AccessDenied: not permitted.
            Refused: that device is taken.
        """
        try:
            answer = self._ask(
                self._family, wire.CMD_CONNECT, wire.connect(index, size, block_size, flags, sockets)
            )
        except PermissionError as error:
            raise AccessDenied(
                "not allowed to set up a network block device", hint="run the command as root, or with sudo"
            ) from error
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Refused(
                    f"/dev/nbd{index} is in use", hint="leave out --index to take a free one"
                ) from None
            raise GuestpvError(
                f"the kernel does not set up a network block device: {error.strerror}",
                where="netlink family nbd",
            ) from error
        return int(struct.unpack("=I", answer[wire.ATTR_INDEX])[0])

    def resize(self, index: int, size: int) -> None:
        """Give ``/dev/nbdN`` another size in bytes."""
        self._ask(self._family, wire.CMD_RECONFIGURE, wire.resize(index, size))

    def disconnect(self, index: int) -> None:
        """Take ``/dev/nbdN`` down; what is still open gets errors."""
        self._ask(self._family, wire.CMD_DISCONNECT, wire.disconnect(index))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Export:
    """One connection wired to one queue of the disk, in a thread of its own that runs C only.

    Attributes:
        client: the kernel's end of the socket pair; close it once the kernel has it.
        largest: bytes of the longest read or write that it takes.
    """

    def __init__(self, disk: Blk, queue: int, *, spin_us: int = 0) -> None:
        requests = disk.queues[queue]
        self._requests = requests
        pool = disk.transport.pool
        size = BUFFER if disk.limits.size_max >= BUFFER else disk.limits.size_max
        size = size // disk.block_size * disk.block_size
        if not size:
            raise Refused(
                f"size_max is {disk.limits.size_max}: one segment cannot hold a block of {disk.block_size}",
                where=disk.transport.name,
            )
        indirect = disk.transport.has(feat.F_INDIRECT_DESC)
        room = requests.queue.size // (1 if indirect else 3)
        count = max(1, min(SLOTS * BUFFER // size, room, lib.GPV_NBD_SLOTS))
        self._data = pool.allocate(count * size, align=4096)
        self.largest = count * size
        self.client, self._server = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self.client, self._server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        self._stop = SYSTEM.eventfd()
        self._keep: list[Any] = []
        headers = _rows(requests.memory, SLOT, count)
        config = ffi.new("struct gpv_nbd_config *")
        config.queue = requests.queue.handle
        config.socket, config.stop_fd = self._server.fileno(), self._stop
        config.queue_fd = -1 if requests.queue.interrupt_fd is None else requests.queue.interrupt_fd
        config.slot_count, config.stride = count, SLOT
        config.slots = ffi.cast("uint8_t *", requests.memory.pointer)
        config.header_bus = self._array(headers)
        config.status_bus = self._array(headers + np.uint64(STATUS))
        config.data = ffi.cast("uint8_t *", self._data.pointer)
        config.data_bus = self._array(_rows(self._data, size, count))
        config.data_size, config.block_size, config.capacity = size, disk.block_size, disk.capacity
        config.read_only, config.volatile_cache = disk.read_only, disk.volatile_cache
        for name, limits in (("discard", disk.limits.discard), ("zeroes", disk.limits.write_zeroes)):
            setattr(config, f"{name}_sectors", limits.max_sectors)
            setattr(config, f"{name}_ranges", 0 if limits.refusal else limits.max_ranges)
        config.spin_ns = spin_us * 1000
        self._export = lib.gpv_nbd_new(config)
        if self._export == ffi.NULL:
            raise MemoryError("no memory for an NBD export")
        self._result: int | None = None
        self._thread = threading.Thread(target=self._run, name=f"guestpv-nbd-{queue}", daemon=True)

    def _array(self, array: NDArray[np.uint64]) -> Any:
        held = ffi.from_buffer("uint64_t[]", array)
        self._keep.append(held)
        return held

    def _run(self) -> None:
        self._result = lib.gpv_nbd_run(self._export)
        # The client has to learn that nobody serves it any more.
        self._server.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether it serves no more: disconnected, stopped or failed."""
        return self._result is not None

    def check(self) -> None:
        """Raise what ended the export, if it failed.

        Raises:
            DeviceViolation: the device broke the queue.
            GuestpvError: the socket failed.
        """
        if not self._result:
            return
        if self._result == lib.GPV_NBD_PROTOCOL:
            raise GuestpvError("the client does not speak NBD", where="NBD export")
        if self._result <= lib.GPV_NBD_ERRNO:
            code = lib.GPV_NBD_ERRNO - self._result
            raise GuestpvError(f"the NBD socket failed: {os.strerror(code)}", where="NBD export")
        self._requests.own()
        self._requests.queue._fail(self._result)

    def resize(self, capacity: int) -> None:
        """The disk has ``capacity`` bytes now."""
        lib.gpv_nbd_resize(self._export, capacity)

    def counters(self) -> dict[str, int]:
        """Counters since the start."""
        live = lib.gpv_nbd_counters(self._export)
        names = (
            *("reads", "writes", "flushes", "discards", "zeroes", "errors", "bytes_read", "bytes_written"),
            *("requests", "interrupts", "wakeups"),
        )
        return {name: int(getattr(live, name)) for name in names} | {
            "kicks": int(lib.gpv_kicks(self._requests.queue.handle))
        }

    def stop(self, patience: float = 10.0) -> None:
        """End the thread, answering what it has begun; a device that hangs is not waited for long."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join(patience)

    def close(self) -> None:
        """Free it; only after the device was reset."""
        self.client.close()
        if self._export != ffi.NULL and not self._thread.is_alive():
            self._server.close()
            lib.gpv_nbd_free(self._export)
            self._export = ffi.NULL
            SYSTEM.close(self._stop)


def _rows(memory: DmaBuffer, stride: int, count: int) -> NDArray[np.uint64]:
    return np.array([memory[i * stride : (i + 1) * stride].address for i in range(count)], dtype=np.uint64)
