"""A virtqueue whose every access to shared memory is seen, in order, before it is done.

It runs on the observing build of the core, ``guestpv.core._observing``, the same sources with a hook in
the access macros. On ``loopback:`` this is how a strict device sees order and not only samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guestpv.core._observing import ffi, lib

from .kick import run
from .queue import Virtqueue

KINDS = {
    lib.GPV_SAW_LOAD: "load",
    lib.GPV_SAW_LOAD_ACQUIRE: "load acquire",
    lib.GPV_SAW_STORE: "store",
    lib.GPV_SAW_STORE_RELEASE: "store release",
    lib.GPV_SAW_FENCE: "fence",
}


class Access(NamedTuple):
    """One access of the driver to ring memory.

    Attributes:
        kind: ``load``, ``load acquire``, ``store``, ``store release`` or ``fence``.
        area: ``desc``, ``driver``, ``device`` or ``table``; empty for a fence.
        offset: bytes from the start of the area.
        width: bytes.
        value: what a store stores, and what a load loaded where the queue asks for values; else 0.
    """

    kind: str
    area: str
    offset: int
    width: int
    value: int


class ObservedVirtqueue(Virtqueue):
    """A virtqueue on the observing build.

    Attributes:
        values: of the class: show each load after it was done, with its value, instead of before.
        accesses: every access so far, in order; clear it as you like.
        before_access: called with each access before it is done, or None. A device that runs in there runs
            between two accesses of the driver. What it raises comes out of ``publish``, ``reap_burst`` or
            ``enable_interrupts``, whichever is next.
    """

    core_ffi: ClassVar[Any] = ffi
    core_lib: ClassVar[Any] = lib
    values: ClassVar[bool] = False

    def _build(self, size: int) -> None:
        self.accesses: list[Access] = []
        self.before_access: Callable[[Access], None] | None = None
        self._raised: BaseException | None = None
        super()._build(size)
        self._hook_handle = ffi.new_handle(self)
        start = self._buffers[0].pointer
        self._places = [
            (start + area.offset, start + area.end, name)
            for name, area in (
                ("desc", self.layout.desc),
                ("driver", self.layout.driver),
                ("device", self.layout.device),
            )
        ]
        (lib.gpv_trace_set if self.values else lib.gpv_hook_set)(
            self.handle, lib.gpv_python_access, self._hook_handle
        )

    def _locate(self, address: int) -> tuple[str, int]:
        for start, end, name in self._places:
            if start <= address < end:
                return name, address - start
        return "table", address - self._buffers[1].pointer

    def _seen(self, access: Access) -> None:
        self.accesses.append(access)
        if self.before_access is not None:
            self.before_access(access)

    def publish(self) -> bool:
        kicked = super().publish()
        self._check()
        return kicked

    def reap_burst(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        used = super().reap_burst()
        self._check()
        return used

    def enable_interrupts(self) -> bool:
        pending = super().enable_interrupts()
        self._check()
        return pending

    def _check(self) -> None:
        error, self._raised = self._raised, None
        if error is not None:
            raise error


@ffi.def_extern()  # type: ignore[untyped-decorator]
def gpv_python_access(user: Any, access: Any) -> None:
    """Every access of an observed queue comes through here."""
    queue: ObservedVirtqueue = ffi.from_handle(user)
    area, offset = queue._locate(access.address) if access.width else ("", 0)
    try:
        queue._seen(Access(KINDS[access.what], area, offset, access.width, access.value))
    except BaseException as error:
        queue._raised = error


ffi.def_extern("gpv_python_kick", error=-1)(partial(run, ffi))
