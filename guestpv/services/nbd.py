"""The kernel's network block device made local: socket pairs behind ``/dev/nbdN``, set up by netlink."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ..core._core import lib
from ..drivers.blk import Blk
from ..drivers.blk_queue import SLOT, STATUS
from ..errors import AccessDenied, GuestpvError, Refused, TimeLimit
from ..memory import DmaBuffer
from ..spec import features as feat
from ..system import SYSTEM
from ..wire import nbd as wire

NETLINK_GENERIC: Final = 16
ANSWER_LIMIT: Final = 10.0
SLOTS: Final = 64
BUFFER: Final = 64 << 10
SOCKET_BUFFER: Final = 1 << 20
PAUSE_LIMIT: Final = 10.0


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

    Args:
        disk: the disk.
        queue: which of its queues.
        spin_us: look for completions and requests at most so long before sleeping.
        keep: what is in flight when the device breaks the queue waits for ``resume``, or ``stop``; else it is
            answered with errors at once.
    """

    def __init__(self, disk: Blk, queue: int, *, spin_us: int = 0, keep: bool = False) -> None:
        requests = disk.queues[queue]
        self._requests = requests
        self._disk, self._queue = disk, queue
        self._spin_us, self._keep_requests = spin_us, keep
        pool = disk.transport.pool
        size = BUFFER if disk.limits.size_max >= BUFFER else disk.limits.size_max
        size = size // disk.block_size * disk.block_size
        if not size:
            raise Refused(
                f"size_max is {disk.limits.size_max}: one segment cannot hold a block of {disk.block_size}",
                where=disk.transport.name,
            )
        count = max(1, min(SLOTS * BUFFER // size, self._room(), lib.GPV_NBD_SLOTS))
        self._count, self._size = count, size
        self._data = pool.allocate(count * size, align=4096)
        self.largest = count * size
        self.client, self._server = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self.client, self._server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        self._stop = SYSTEM.eventfd()
        self._kicks_before = 0
        self._bound = True
        self._ffi, self._lib = requests.queue.core_ffi, requests.queue.core_lib
        self._export = self._lib.gpv_nbd_new(self._config())
        if self._export == self._ffi.NULL:
            raise MemoryError("no memory for an NBD export")
        self._result: int | None = None
        self._thread = self._make_thread()

    def _make_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name=f"guestpv-nbd-{self._queue}", daemon=True)

    def _room(self) -> int:
        """Requests of three elements that the queue has room for."""
        indirect = self._disk.transport.has(feat.F_INDIRECT_DESC)
        return self._requests.queue.size // (1 if indirect else 3)

    def _config(self) -> Any:
        disk, requests, count, size = self._disk, self._requests, self._count, self._size
        self._keep: list[Any] = []
        headers = _rows(requests.memory, SLOT, count)
        config = self._ffi.new("struct gpv_nbd_config *")
        config.queue = requests.queue.handle
        config.socket, config.stop_fd = self._server.fileno(), self._stop
        config.queue_fd = -1 if requests.queue.interrupt_fd is None else requests.queue.interrupt_fd
        config.slot_count, config.stride = count, SLOT
        config.slots = self._ffi.cast("uint8_t *", requests.memory.pointer)
        config.header_bus = self._array(headers)
        config.status_bus = self._array(headers + np.uint64(STATUS))
        config.data = self._ffi.cast("uint8_t *", self._data.pointer)
        config.data_bus = self._array(_rows(self._data, size, count))
        config.data_size, config.block_size, config.capacity = size, disk.block_size, disk.capacity
        config.read_only, config.volatile_cache = disk.read_only, disk.volatile_cache
        for name, limits in (("discard", disk.limits.discard), ("zeroes", disk.limits.write_zeroes)):
            setattr(config, f"{name}_sectors", limits.max_sectors)
            setattr(config, f"{name}_ranges", 0 if limits.refusal else limits.max_ranges)
        config.spin_ns = self._spin_us * 1000
        config.keep = self._keep_requests
        return config

    def _array(self, array: NDArray[np.uint64]) -> Any:
        held = self._ffi.from_buffer("uint64_t[]", array)
        self._keep.append(held)
        return held

    def _run(self) -> None:
        result = self._lib.gpv_nbd_run(self._export)
        kept = result == lib.GPV_NBD_PAUSED or (self._keep_requests and lib.GPV_NBD_ERRNO < result < 0)
        if not kept:
            self._hang_up()
        self._result = result

    def _hang_up(self) -> None:
        """The client has to learn that nobody serves it any more."""
        with contextlib.suppress(OSError):
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
        if not self._result or self._result == lib.GPV_NBD_PAUSED:
            return
        if self._result == lib.GPV_NBD_PROTOCOL:
            raise GuestpvError("the client does not speak NBD", where="NBD export")
        if self._result <= lib.GPV_NBD_ERRNO:
            code = lib.GPV_NBD_ERRNO - self._result
            raise GuestpvError(f"the NBD socket failed: {os.strerror(code)}", where="NBD export")
        self._requests.own()
        self._requests.queue._fail(self._result)

    def pause(self, patience: float = PAUSE_LIMIT) -> None:
        """Let go of the queue; what the client waits for is kept for ``resume`` or ``give_up``.

        Raises:
            TimeLimit: it does not end, because the client does not take its answers.
        """
        if self._thread.is_alive():
            self._lib.gpv_nbd_pause(self._export)
            os.eventfd_write(self._stop, 1)
            self._thread.join(patience)
            if self._thread.is_alive():
                raise TimeLimit(f"the NBD connection did not pause within {patience:g} s", where="NBD export")
        if self._bound:
            self._kicks_before += self._kicks()
            self._bound = False

    def resume(self) -> None:
        """Go on after ``pause`` and a restart of the disk: what is unanswered is given to it once more.

        That is safe: a read, write, flush, discard or write zeroes that is done twice ends as if it was done
        once, and as nothing was acknowledged nobody relies on an order.

        Raises:
            Refused: the disk came back with limits that are too small.
        """
        self._requests, self._bound = self._disk.queues[self._queue], True
        disk, room = self._disk, self._room()
        if disk.limits.size_max < self._size or self._size % disk.block_size or room < self._count:
            raise Refused(
                f"the disk came back with other limits: size_max {disk.limits.size_max}, blocks of "
                f"{disk.block_size}, room for {room} requests; in use are {self._size} bytes and "
                f"{self._count} requests",
                where=disk.transport.name,
            )
        self._lib.gpv_nbd_rebind(self._export, self._config())
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._stop)
        self._result = None
        self._thread = self._make_thread()
        self._thread.start()

    def resize(self, capacity: int) -> None:
        """The disk has ``capacity`` bytes now."""
        self._lib.gpv_nbd_resize(self._export, capacity)

    def counters(self) -> dict[str, int]:
        """Counters since the start."""
        live = self._lib.gpv_nbd_counters(self._export)
        names = (
            *("reads", "writes", "flushes", "discards", "zeroes", "errors", "bytes_read", "bytes_written"),
            *("requests", "resubmitted", "interrupts", "wakeups"),
        )
        kicks = self._kicks_before + (self._kicks() if self._bound else 0)
        return {name: int(getattr(live, name)) for name in names} | {"kicks": kicks}

    def _kicks(self) -> int:
        queue = self._requests.queue
        return int(self._lib.gpv_kicks(queue.handle)) if queue.handle else 0

    def stop(self, patience: float = 10.0) -> None:
        """End the thread, answering what it has begun: with errors, where the device is not done in time."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join(patience)
        with contextlib.suppress(TimeLimit):
            self.pause()
            # What is kept here nobody will take up any more.
            self._lib.gpv_nbd_give_up(self._export)
        self._hang_up()

    def close(self) -> None:
        """Free it; only after the device was reset."""
        self.client.close()
        if self._export != self._ffi.NULL and not self._thread.is_alive():
            self._server.close()
            self._lib.gpv_nbd_free(self._export)
            self._export = self._ffi.NULL
            SYSTEM.close(self._stop)


def _rows(memory: DmaBuffer, stride: int, count: int) -> NDArray[np.uint64]:
    return np.array([memory[i * stride : (i + 1) * stride].address for i in range(count)], dtype=np.uint64)


def remember(directory: str, index: int) -> str:
    """Leave a record beside the control socket: this process serves ``/dev/nbdN``. Returns its path."""
    path = os.path.join(directory, f"nbd{index}.pid")
    fd = SYSTEM.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        SYSTEM.write(fd, f"{SYSTEM.getpid()}\n".encode())
    finally:
        SYSTEM.close(fd)
    return path


def clear_stale(directory: str) -> list[str]:
    """Take down what processes that were killed left behind: devices that the kernel keeps and nobody serves.

    Only what has a record here, whose process is gone and still is the one that the kernel names, is touched.

    Returns:
        Names of the devices.
    """
    found = []
    for file in SYSTEM.listdir(directory):
        name, suffix = os.path.splitext(file)
        if suffix != ".pid":
            continue
        path = os.path.join(directory, file)
        with contextlib.suppress(OSError):
            pid = SYSTEM.read_text(path)
            if SYSTEM.exists(f"/proc/{pid}"):
                continue
            with contextlib.suppress(OSError):
                if SYSTEM.read_text(f"/sys/block/{name}/pid") == pid:
                    with Netlink() as netlink:
                        netlink.disconnect(int(name.removeprefix("nbd")))
                    found.append(name)
            SYSTEM.unlink(path)
    return found
