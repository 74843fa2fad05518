"""A block device shown to the guest as ``/dev/nbdN``: what ``guestpv blk up`` runs."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Any, Final

from ..drivers.blk import Blk
from ..errors import DeviceViolation, GuestpvError, Refused, UsageError
from ..spec import blk as spec
from ..spec.status import Status
from ..system import SYSTEM
from ..transport.base import Transport
from ..wire import nbd as wire
from .nbd import Export, Netlink

MOST_QUEUES: Final = 4
CONFIG_POLL: Final = 1.0
"""Seconds between looks at the capacity where no configuration interrupt announces a change."""
MODULE_LIMIT: Final = 30.0
STAGING: Final = 256 << 10
SPIN_US: Final = 300
"""How long to look for completions and requests before sleeping."""


class BlkService:
    """Drives a disk and shows it to the guest as a network block device over socket pairs.

    Args:
        transport: an opened block device; closed with the service.
        index: of ``/dev/nbdN``; None takes a free one.
        queues: connections, each with its own queue and thread; None takes as many as device and processors
            have, at most four.
        poll: spin instead of waiting for interrupts.
        spin_us: look for completions and requests at most so long before sleeping.

    Raises:
        GuestpvError: negotiation or the set-up failed; the device is reset and given back.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        index: int | None = None,
        queues: int | None = None,
        poll: bool = False,
        spin_us: int = SPIN_US,
    ) -> None:
        self.transport = transport
        self.exports: list[Export] = []
        self.index: int | None = None
        self._last: dict[str, Any] = {}
        self._closed = False
        self._device_fd: int | None = None
        try:
            load_module()
            if poll:
                transport.mode = "poll"
            self.disk = Blk(transport, queues=queues or self._default_queues(), staging=STAGING)
            if self.disk.model == spec.Z_HM:
                raise Refused("a host-managed zoned disk is no ordinary block device", where=transport.name)
            for number in range(len(self.disk.queues)):
                self.exports.append(Export(self.disk, number, spin_us=spin_us))
            for export in self.exports:
                export.start()
            with Netlink() as netlink:
                self.index = netlink.connect(
                    index,
                    self.disk.capacity // self.disk.block_size * self.disk.block_size,
                    self.disk.block_size,
                    self._flags(),
                    [export.client.fileno() for export in self.exports],
                )
            for export in self.exports:
                # The kernel has its own reference; ours would hide the end of the connection.
                export.client.close()
            # A scheduler would hand each request to a worker; whatever sorts them is behind the disk.
            with contextlib.suppress(OSError):
                SYSTEM.write_text(f"/sys/block/{self.name}/queue/scheduler", "none")
        except BaseException:
            self.close()
            raise

    def _default_queues(self) -> int:
        offered = self.transport.config(spec.CONFIG, "num_queues").get("num_queues", 1)
        return max(1, min(int(offered), len(os.sched_getaffinity(0)), MOST_QUEUES))

    def _flags(self) -> int:
        disk = self.disk
        flags = wire.FLAG_HAS_FLAGS | wire.FLAG_CAN_MULTI_CONN
        flags |= wire.FLAG_READ_ONLY if disk.read_only else 0
        flags |= wire.FLAG_SEND_FLUSH | wire.FLAG_SEND_FUA if disk.volatile_cache else 0
        flags |= 0 if disk.limits.discard.refusal else wire.FLAG_SEND_TRIM
        flags |= 0 if disk.limits.write_zeroes.refusal else wire.FLAG_SEND_WRITE_ZEROES
        return flags

    @property
    def name(self) -> str:
        """Name of the block device, such as ``nbd0``."""
        return f"nbd{self.index}"

    @property
    def path(self) -> str:
        """Its node."""
        return f"/dev/{self.name}"

    @property
    def features(self) -> int:
        """Mask of the negotiated features."""
        return self.disk.features

    def watch(self, timeout: float, wake_fd: int | None = None) -> list[str]:
        """Look after the disk for up to ``timeout`` seconds.

        Args:
            timeout: seconds.
            wake_fd: a descriptor that ends the wait early when readable.

        Returns:
            What happened: ``capacity is now N bytes``, ``release requested``, ``bus error``,
            ``disconnected``.

        Raises:
            DeviceGone: the function is gone.
            DeviceViolation: the device broke a queue or asks to be reset.
            GuestpvError: a connection failed.
        """
        config = self.transport.config_fd
        request, error = self.transport.release_fds()
        fds = [fd for fd in (config, request, error, wake_fd) if fd is not None]
        ready = SYSTEM.poll(fds, timeout if config is not None else min(timeout, CONFIG_POLL))
        events = []
        for fd, text in ((request, "release requested"), (error, "bus error")):
            if fd is not None and fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                events.append(text)
        if not events and (config is None or config in ready):
            events += self._look()
        for export in self.exports:
            export.check()
        if self.exports and all(export.over for export in self.exports):
            events.append("disconnected")
        return events

    def _look(self) -> list[str]:
        if self.transport.status & Status.NEEDS_RESET:
            raise DeviceViolation(
                "the device set DEVICE_NEEDS_RESET: it met an error that it cannot recover from",
                section="2.1.2",
                where=self.transport.name,
            )
        if not self.disk.refresh() or self.index is None:
            return []
        size = self.disk.capacity // self.disk.block_size * self.disk.block_size
        for export in self.exports:
            export.resize(size)
        with Netlink() as netlink:
            netlink.resize(self.index, size)
        return [f"capacity is now {size} bytes"]

    def stats(self) -> dict[str, Any]:
        """Counters in all and for every connection; after ``close`` the last ones."""
        if self._closed:
            return self._last
        queues = [export.counters() for export in self.exports]
        total = {name: sum(queue[name] for queue in queues) for name in (queues[0] if queues else {})}
        return {"mode": self.transport.mode, "capacity": self.disk.capacity, **total, "queues": queues}

    def settle(self) -> None:
        """Claim the block device for ourselves and write out what the kernel has in memory for it.

        Afterwards nothing can be mounted on it; ``close`` ends that.

        Raises:
            Refused: it is mounted, or something else claims it.
            GuestpvError: not everything could be written.
        """
        if self._device_fd is not None or self.index is None:
            return
        access = os.O_RDONLY if self.disk.read_only else os.O_RDWR
        try:
            self._device_fd = os.open(self.path, access | os.O_EXCL | os.O_CLOEXEC)
            os.fsync(self._device_fd)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Refused(
                    f"{self.path} is in use: mounted, or claimed by RAID or LVM", hint=f"umount {self.path}"
                ) from None
            if error.errno == errno.ENOENT:
                return
            raise GuestpvError(f"{self.path} could not be flushed: {error.strerror}") from error

    def close(self) -> None:
        """Disconnect, stop the connections, reset the device, free its memory. Idempotent."""
        if self._closed:
            return
        with contextlib.ExitStack() as stack:
            for export in self.exports:
                stack.callback(export.close)
            stack.callback(self.transport.close)
            if self._device_fd is not None:
                stack.callback(os.close, self._device_fd)
            if self.index is not None:
                with contextlib.suppress(OSError), Netlink() as netlink:
                    netlink.disconnect(self.index)
            for export in self.exports:
                export.stop()
            if self.exports:
                self._last = self.stats()
            self._closed = True


def load_module() -> None:
    """Load the kernel's module ``nbd`` if it is not there.

    Raises:
        GuestpvError: it cannot be had.
    """
    if SYSTEM.exists("/sys/module/nbd"):
        return
    try:
        status, text = SYSTEM.run(["modprobe", "nbd", "nbds_max=16"], timeout=MODULE_LIMIT)
    except FileNotFoundError:
        status, text = 127, "there is no modprobe"
    if status:
        raise UsageError(
            f"the kernel module nbd cannot be loaded: {text.strip()}",
            hint="Debian's kernels have it; in a container load it on the host: modprobe nbd",
        )
