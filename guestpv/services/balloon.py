"""A balloon that follows the host's wishes as far as the guest can bear: what ``guestpv balloon up`` runs."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Final

from ..drivers.balloon import Balloon
from ..drivers.balloon_pages import HUGE_BYTES
from ..errors import DeviceGone, DeviceViolation, GuestpvError, TimeLimit
from ..spec import balloon as spec
from ..system import SYSTEM, System
from ..transport.base import Transport
from .health import LOOK, Health
from .pressure import Pressure

STEP: Final = (16 << 20) >> spec.PAGE_SHIFT
"""Pages moved before the device, statistics and the guest's memory are looked at again."""
GRAIN: Final = HUGE_BYTES >> spec.PAGE_SHIFT
"""The balloon grows by no less at a time, unless less is missing: requests cost more than pages."""
DEFAULT_RATE: Final = 256 << 20
"""Bytes a second that the balloon grows by at most. It shrinks as fast as it can."""
CHUNKS_PER_GUEST: Final = (256, 4096)
"""A chunk is no more than the first part of the guest's memory, so that little lies between host and kernel,
and no less than the second, so that the number of mappings is bounded for any guest."""
QUICK_CHUNK: Final = 8 << 20
"""Chunks of this size make most of what a mapping costs whatever its size; larger ones gain little."""
CALM: Final = 10.0
"""Seconds without pressure before the balloon grows again."""
FASTEST_HOG: Final = 1 << 30
"""Bytes a second at which applications are expected to take memory: decides how often we look."""
NAP: Final = (0.05, 1.0)
"""Shortest and longest time between looks, in seconds."""


def default_keep_free(total: int) -> int:
    """Bytes to leave to the guest when nobody says: 5 % of its memory, at least 64 MiB."""
    return max(64 << 20, total // 20)


def chunk_bytes(total: int) -> int:
    """Size of a chunk for a guest with ``total`` bytes: a power of two, at least a huge page."""
    most, least = (1 << (total // part - 1).bit_length() for part in CHUNKS_PER_GUEST)
    return max(HUGE_BYTES, min(QUICK_CHUNK, most), least)


class BalloonService:
    """Follows ``num_pages``; answers statistics at once; gives memory back when the guest runs short.

    Everything happens in ``watch``, in the caller's thread; ``stats`` may be called from any.

    Args:
        transport: an opened balloon; closed with the service.
        keep_free: bytes that stay available to the guest whatever the host wants; ``default_keep_free``
            when None.
        rate: bytes a second that the balloon grows by at most.

    Raises:
        Refused: the device or the kernel does not let a balloon be driven; the message says why.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        keep_free: int | None = None,
        rate: int = DEFAULT_RATE,
        system: System = SYSTEM,
    ) -> None:
        self.transport = transport
        self._system = system
        self._rate = rate >> spec.PAGE_SHIFT
        self._closed = False
        self._health = Health(transport)
        self._poison = 0 if transport.feature_filter.required >> spec.F_PAGE_POISON & 1 else None
        with contextlib.ExitStack() as undo:
            undo.callback(transport.close)
            self.pressure = Pressure(system)
            undo.callback(self.pressure.close)
            total = self.pressure.total
            self.keep_free = default_keep_free(total) if keep_free is None else keep_free
            size = chunk_bytes(total)
            self._chunk = size >> spec.PAGE_SHIFT
            self.balloon = Balloon(transport, chunk_bytes=size, poison=self._poison, system=system)
            self.target = self.balloon.target
            self._available = self.pressure.available
            self._held = ""
            self._calm_at = 0.0
            self._credit = 0.0
            self._refilled = system.monotonic()
            self._given_back = 0
            self._alarms = 0
            self._last = self._snapshot()
            undo.pop_all()

    @property
    def features(self) -> int:
        """Mask of the negotiated features."""
        return self.balloon.features

    def restart(self) -> None:
        """Reset the device and go on with what is in the balloon, towards the target as it is now.

        Raises:
            Refused, FeaturesRefused, DeviceViolation: the device did not come back as it was.
            TimeLimit, DeviceGone: it never left reset, or is gone.
        """
        self.balloon.restart()
        self.target = self.balloon.target
        self._held = ""
        self._last = self._snapshot()

    def watch(self, timeout: float, wake_fd: int | None = None) -> list[str]:
        """Look after the balloon for up to ``timeout`` seconds.

        Args:
            timeout: seconds.
            wake_fd: a descriptor that ends the wait early when readable.

        Returns:
            What happened: a new target, a target reached, what holds the balloon back, memory given back
            under pressure, ``release requested``, ``bus error``. Empty when nothing did.

        Raises:
            DeviceGone: the function is gone.
            DeviceViolation: the device broke a queue or asks to be reset.
            TimeLimit: the device does not answer.
        """
        config, (request, error) = self.transport.config_fd, self.transport.release_fds()
        statsq = self.balloon.statsq
        statistics = statsq.interrupt_fd if statsq is not None else None
        watched = [
            self.pressure.fd,
            *(fd for fd in (config, request, error, wake_fd, statistics) if fd is not None),
        ]
        deadline = self._system.monotonic() + timeout
        events: list[str] = []
        while not events:
            self.balloon.answer_statistics()
            if self.balloon.lent:
                self.balloon.follow_hints()
            busy = self._step(events)
            left = deadline - self._system.monotonic()
            if events or left <= 0:
                break
            ready = self._system.poll(watched, 0 if busy else min(left, self._nap(), LOOK))
            for fd, text in ((request, "release requested"), (error, "bus error")):
                if fd is not None and fd in ready:
                    _clear(fd)
                    events.append(text)
            if events or (wake_fd is not None and wake_fd in ready):
                break
            changed = config is None or config in ready
            self._health.check(changed)
            if changed:
                if config is not None:
                    _clear(config)
                self._look_at_device(events)
        self._last = self._snapshot()
        return events

    def _look_at_device(self, events: list[str]) -> None:
        self.balloon.follow_hints()
        self._retarget(events)

    def _retarget(self, events: list[str]) -> None:
        target = self.balloon.target
        if target != self.target:
            self.target = target
            self._held = ""
            events.append(f"target {mib(target)}")

    # The policy.

    def _step(self, events: list[str]) -> bool:
        """Move a little towards the target, or away from trouble. Returns whether there is more to do now."""
        balloon = self.balloon
        now = self._system.monotonic()
        self._available = self.pressure.available
        if balloon.pages > self.target:
            balloon.deflate(min(STEP, balloon.pages - self.target))
            self._arrived(events)
            return balloon.pages != self.target
        alarmed = self.pressure.alarmed()
        if alarmed:
            self._alarms += 1
            self._calm_at = now + CALM
        short = self.keep_free - self._available
        if (alarmed or short > 0) and balloon.pages:
            self._calm_at = now + CALM
            return self._relieve(max(short, self.keep_free if alarmed else 0), events)
        if balloon.pages < self.target:
            return self._grow(now, events)
        balloon.report_free()
        return False

    def _relieve(self, short: int, events: list[str]) -> bool:
        """Give memory back to the guest that the host would like to keep (DEFLATE_ON_OOM)."""
        if not self.transport.has(spec.F_DEFLATE_ON_OOM):
            self._hold(
                "memory is short, but the device does not allow giving any back (no DEFLATE_ON_OOM)", events
            )
            return False
        # Memory goes by the chunk, too: pages that only leave the balloon help nobody.
        chunks = -(-short // (self._chunk << spec.PAGE_SHIFT))
        wanted = max(0, chunks * self._chunk - self.balloon.free_pages)
        pages = self.balloon.deflate(min(max(STEP, self._chunk), wanted))
        self._given_back += pages
        self._hold("memory is short: giving some back to the guest", events)
        return True

    def _grow(self, now: float, events: list[str]) -> bool:
        self._credit = min(self._credit + (now - self._refilled) * self._rate, max(STEP, self._rate * NAP[0]))
        self._refilled = now
        if now < self._calm_at:
            self._hold(f"waiting for {CALM:g} s without memory pressure", events)
            return False
        missing = self.target - self.balloon.pages
        # Memory comes by the chunk, and all of it has to be spare.
        chunks = max(0, self._available - self.keep_free) // (self._chunk << spec.PAGE_SHIFT)
        spare = self.balloon.free_pages + chunks * self._chunk
        if spare < min(missing, GRAIN):
            group = self.pressure.limited_by
            owner = f"below the limit of {group}" if group else "for the guest"
            self._hold(f"{mib(self.keep_free >> spec.PAGE_SHIFT)} stay free {owner}", events)
            return False
        pages = min(missing, spare, STEP, int(self._credit))
        if pages < min(missing, GRAIN):
            return False
        self._credit -= pages
        try:
            self.balloon.inflate(pages)
        except (DeviceGone, DeviceViolation, TimeLimit):
            raise
        except GuestpvError as shortage:
            self._calm_at = now + CALM
            self._hold(shortage.message, events)
            return False
        self._held = ""
        self._arrived(events)
        return self.balloon.pages != self.target

    def _arrived(self, events: list[str]) -> None:
        if self.balloon.pages == self.target:
            events.append(f"balloon at its target, {mib(self.target)}")

    def _hold(self, reason: str, events: list[str]) -> None:
        """Say once what keeps the balloon from its target."""
        if reason != self._held:
            self._held = reason
            events.append(f"balloon held at {mib(self.balloon.pages)} of {mib(self.target)}: {reason}")

    def _nap(self) -> float:
        """How long nothing can go wrong: until a fast application could have used up what is spare."""
        growing = self.target > self.balloon.pages and not self._held
        spare = (self._available - self.keep_free) / FASTEST_HOG
        return NAP[0] if growing else min(max(spare, NAP[0]), NAP[1])

    # Reports.

    def stats(self) -> dict[str, Any]:
        """How it stood when ``watch`` last looked; amounts in 4096-byte pages unless the name says bytes.

        ``{"target_pages", "pages", "actual_pages", "free_pages", "held", "memory": {...}, "pool": {...},
        "counters": {...}, "mode", "numbering"}``; ``actual_pages`` is what the device shows the host.
        """
        return self._last

    def _snapshot(self) -> dict[str, Any]:
        balloon = self.balloon
        size = balloon.pages + balloon.free_pages
        return {
            "mode": self.transport.mode,
            "numbering": balloon.numbering,
            "target_pages": self.target,
            "pages": balloon.pages,
            "actual_pages": balloon.actual,
            "free_pages": balloon.free_pages,
            "held": self._held,
            "memory": {
                "available_bytes": self._available,
                "limited_by": self.pressure.limited_by or None,
                "keep_free_bytes": self.keep_free,
                "pressure_avg10": self.pressure.average(),
                "alarms": self._alarms,
            },
            "pool": {
                "bytes": size << spec.PAGE_SHIFT,
                "huge_bytes": balloon.huge_bytes,
                "small_bytes": (size << spec.PAGE_SHIFT) - balloon.huge_bytes,
            },
            "counters": {
                "inflated": balloon.inflated,
                "deflated": balloon.deflated,
                "given_back": self._given_back,
                "reported": balloon.reported,
                "hinted": balloon.hinted,
                "statistics": balloon.answered,
                "requests": balloon.requests,
                "kicks": balloon.kicks,
            },
        }

    def close(self) -> None:
        """Take every page back, reset the device, give it back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self.pressure.close)
            stack.callback(self.balloon.close)


def mib(pages: int) -> str:
    """An amount of 4096-byte pages for people."""
    return f"{pages / 256:g} MiB" if pages % 256 == 0 else f"{pages / 256:.2f} MiB"


def _clear(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
