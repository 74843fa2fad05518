"""A block device shown to the guest as ``/dev/nbdN``: what ``guestpv blk up`` runs."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import Any, Final

from ..drivers.blk import Blk
from ..errors import GuestpvError, Refused, UsageError
from ..spec import blk as spec
from ..system import SYSTEM
from ..transport.base import Transport
from ..wire import nbd as wire
from .health import LOOK, Health
from .nbd import Export, Netlink

MOST_QUEUES: Final = 4
SETTLE_WAIT: Final = 0.5
ANSWER_PATIENCE: Final = 10.0
"""Seconds that the disk may take at the end for what it was given."""
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
        restarts: ``restart`` may be called after an error of the device; until then, or ``close``, requests
            in flight wait, where they would get errors at once.

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
        restarts: bool = False,
    ) -> None:
        self.transport = transport
        self.exports: list[Export] = []
        self.index: int | None = None
        self._last: dict[str, Any] = {}
        self._closed = False
        self._broken = False
        self._health = Health(transport)
        self._device_fd: int | None = None
        self._settling: Settling | None = None
        try:
            load_module()
            if poll:
                transport.mode = "poll"
            self.disk = Blk(transport, queues=queues or self._default_queues(), staging=STAGING)
            if self.disk.model == spec.Z_HM:
                raise Refused("a host-managed zoned disk is no ordinary block device", where=transport.name)
            for number in range(len(self.disk.queues)):
                self.exports.append(Export(self.disk, number, spin_us=spin_us, keep=restarts))
            for export in self.exports:
                export.start()
            with Netlink() as netlink:
                self.index = netlink.connect(
                    index,
                    self._size,
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

    @property
    def _size(self) -> int:
        """Bytes of the block device: whole blocks."""
        return self.disk.capacity // self.disk.block_size * self.disk.block_size

    def restart(self) -> None:
        """Reset the disk and go on with the same block device; what is unanswered is given to it once more.

        What was acknowledged and not yet flushed is as safe as the host's cache, as in any other reset.

        Raises:
            Refused, FeaturesRefused, DeviceViolation: the disk did not come back as it was.
            TimeLimit, DeviceGone: it never left reset, or is gone.
        """
        for export in self.exports:
            export.pause()
        before = self.disk.features, self.disk.block_size, self.disk.read_only, self.disk.volatile_cache
        size = self._size
        self.disk.restart(settle=False)
        after = self.disk.features, self.disk.block_size, self.disk.read_only, self.disk.volatile_cache
        if before != after:
            raise Refused("the disk came back as another one", where=self.transport.name)
        for export in self.exports:
            export.resume()
        self._broken = False
        if self._size != size:
            self._resize()

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
        try:
            return self._watch(timeout, wake_fd)
        except BaseException:
            # Nobody waits for a device in trouble to be done.
            self._broken = True
            raise

    def _watch(self, timeout: float, wake_fd: int | None) -> list[str]:
        config = self.transport.config_fd
        request, error = self.transport.release_fds()
        fds = [fd for fd in (config, request, error, wake_fd) if fd is not None]
        ready = SYSTEM.poll(fds, min(timeout, LOOK))
        events = []
        for fd, text in ((request, "release requested"), (error, "bus error")):
            if fd is not None and fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                events.append(text)
        self._broken |= "bus error" in events
        changed = config is None or config in ready
        if not events:
            self._health.check(changed)
            if changed and self.disk.refresh() and self.index is not None:
                events.append(self._resize())
        for export in self.exports:
            export.check()
        if self.exports and all(export.over for export in self.exports):
            events.append("disconnected")
        return events

    def _resize(self) -> str:
        assert self.index is not None
        size = self._size
        for export in self.exports:
            export.resize(size)
        with Netlink() as netlink:
            netlink.resize(self.index, size)
        return f"capacity is now {size} bytes"

    def stats(self) -> dict[str, Any]:
        """Counters in all and for every connection; after ``close`` the last ones."""
        if self._closed:
            return self._last
        queues = [export.counters() for export in self.exports]
        total = {name: sum(queue[name] for queue in queues) for name in (queues[0] if queues else {})}
        return {"mode": self.transport.mode, "capacity": self.disk.capacity, **total, "queues": queues}

    def settle(self, patience: float = SETTLE_WAIT) -> bool:
        """Claim the block device for ourselves and write out what the kernel has in memory for it.

        Afterwards nothing can be mounted on it; ``close`` ends that.

        Args:
            patience: seconds; somebody has to ``watch`` the disk while it is written to.

        Returns:
            Whether everything is written. Call it again where it is not.

        Raises:
            Refused: it is mounted, or something else claims it.
            GuestpvError: not everything could be written.
        """
        if self.index is None:
            return True
        if self._device_fd is None:
            access = os.O_RDONLY if self.disk.read_only else os.O_RDWR
            try:
                self._device_fd = os.open(self.path, access | os.O_EXCL | os.O_CLOEXEC)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise Refused(
                        f"{self.path} is in use: mounted, or claimed by RAID or LVM",
                        hint=f"umount {self.path}",
                    ) from None
                if error.errno == errno.ENOENT:
                    return True
                raise GuestpvError(f"{self.path} could not be opened: {error.strerror}") from error
            self._settling = Settling(self._device_fd)
        return self._settling is None or self._settling.over(patience, self.path)

    def close(self) -> None:
        """Disconnect, stop the connections, reset the device, free its memory. Idempotent."""
        if self._closed:
            return
        with contextlib.ExitStack() as stack:
            for export in self.exports:
                stack.callback(export.close)
            stack.callback(self.transport.close)
            if self._settling is not None:
                stack.callback(self._settling.close)
            if self.index is not None:
                with contextlib.suppress(OSError), Netlink() as netlink:
                    netlink.disconnect(self.index)
            for export in self.exports:
                export.stop(0.0 if self._broken else ANSWER_PATIENCE)
            if self.exports:
                self._last = self.stats()
            self._closed = True


class Settling:
    """Writes out, in a thread of its own, what the kernel has in memory for a block device.

    Args:
        fd: the device, opened; closed once the thread is done with it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="guestpv-settle", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._error = error

    def over(self, patience: float, path: str) -> bool:
        """Whether it is done.

        Raises:
            GuestpvError: not everything could be written.
        """
        self._thread.join(patience)
        if self._error is not None:
            raise GuestpvError(f"{path} could not be flushed: {self._error.strerror}") from self._error
        return not self._thread.is_alive()

    def close(self) -> None:
        """Close the device; once nobody serves it, nothing is waited for in vain."""
        self._thread.join(ANSWER_PATIENCE)
        os.close(self._fd)


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
