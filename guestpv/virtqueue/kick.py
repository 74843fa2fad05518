"""How a virtqueue notifies its device (2.9). The C core sends the kick; Python only says which kind it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from guestpv.core._core import ffi, lib


class Kick:
    """One of: a store to a mapped doorbell, a write to an eventfd, a call into Python.

    Make one with :meth:`mmio`, :meth:`eventfd` or :meth:`call`.

    Attributes:
        value: notification value without NOTIFICATION_DATA: queue_notif_config_data, or None for the index of
            the virtqueue (4.1.5.2).
        error: what the Python callable raised, until the queue raises it again from ``publish``.
    """

    def __init__(
        self,
        kind: int,
        *,
        pointer: int = 0,
        fd: int = -1,
        target: Callable[[int], object] | None = None,
        value: int | None = None,
    ) -> None:
        self.kind = kind
        self.pointer = pointer
        self.fd = fd
        self.target = target
        self.value = value
        self.error: BaseException | None = None

    @classmethod
    def mmio(cls, pointer: int, width: int, value: int | None = None) -> Kick:
        """A store of ``width`` bytes (2; 4 with NOTIFICATION_DATA) to the doorbell mapped there."""
        if width not in (2, 4):
            raise ValueError(
                f"a notification is 2 or 4 bytes wide, not {width} (VIRTIO 1.4 section 4.1.5.2.1)"
            )
        return cls(lib.GPV_KICK_MMIO16 if width == 2 else lib.GPV_KICK_MMIO32, pointer=pointer, value=value)

    @classmethod
    def eventfd(cls, fd: int) -> Kick:
        """A write of 1 to an eventfd, as vhost-user and ioeventfd have it. The fd stays the caller's."""
        return cls(lib.GPV_KICK_EVENTFD, fd=fd)

    @classmethod
    def call(cls, target: Callable[[int], object], value: int | None = None) -> Kick:
        """Call ``target(notification value)``, for doorbells that are not mapped."""
        return cls(lib.GPV_KICK_CALL, target=target, value=value)

    def fill(self, kick: Any, index: int, ffi: Any = ffi, lib: Any = lib) -> object:
        """Write this kick to a ``struct gpv_kick`` of virtqueue ``index``.

        Args:
            kick: the struct, of the core module that ``ffi`` and ``lib`` belong to.

        Returns:
            What has to live as long as the struct is used.
        """
        handle = ffi.new_handle(self)
        kick.kind = self.kind
        kick.fd = self.fd
        kick.doorbell = ffi.cast("void *", self.pointer)
        kick.value = index if self.value is None else self.value
        kick.call = lib.gpv_python_kick
        kick.user = handle
        return handle


def run(ffi: Any, user: Any, value: int) -> int:
    """The C core's way into Python; an exception cannot cross C, so it waits in the kick."""
    kick: Kick = ffi.from_handle(user)
    assert kick.target is not None
    try:
        kick.target(value)
    except BaseException as error:
        kick.error = error
        return -1
    return 0


ffi.def_extern("gpv_python_kick", error=-1)(partial(run, ffi))
