"""A network device joined to a TAP link: what ``guestpv net up`` runs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

from ..core._core import ffi, lib
from ..drivers.net import FILTERS, RECEIVE_OFFLOADS, SEND_OFFLOADS, Net
from ..drivers.net_control import Rss
from ..drivers.net_port import NetPort
from ..errors import GuestpvError
from ..system import SYSTEM
from ..transport.base import Transport
from .health import LOOK, Health
from .link_follow import LinkFollower, speed_text
from .tap import Tap, unsupported_offloads

DEFAULT_NAME = "pv%d"

COUNTERS = tuple(field for field, _ in ffi.typeof("struct gpv_pump_counters").fields)


class Pump:
    """One queue pair wired to one TAP queue, in a thread of its own that runs C only."""

    def __init__(self, port: NetPort, tap_fd: int, *, spin: bool) -> None:
        self.port = port
        self._stop = SYSTEM.eventfd()
        self._ffi, self._lib = port.core_ffi, port.core_lib
        config = self._ffi.new("struct gpv_pump_config *")
        config.port, config.rx, config.tx = port.handle, port.rx.handle, port.tx.handle
        config.tap_fd, config.stop_fd = tap_fd, self._stop
        config.rx_fd = -1 if spin else port.rx.fileno()
        config.tx_fd = -1 if spin else port.tx.fileno()
        config.header, config.rx_number = port.header.itemsize, port.rx.index
        self._pump = self._lib.gpv_pump_new(config)
        if self._pump == self._ffi.NULL:
            SYSTEM.close(self._stop)
            raise MemoryError("no memory for a TAP pump")
        self._result: int | None = None
        self._thread = threading.Thread(target=self._run, name="guestpv-pump", daemon=True)

    def _run(self) -> None:
        self._result = self._lib.gpv_pump_run(self._pump)

    def start(self) -> None:
        """Hand the receive buffers to the device and begin."""
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the pump to end by itself."""
        self._thread.join(timeout)

    def check(self) -> None:
        """Raise what ended the pump, if it ended by itself.

        Raises:
            DeviceViolation: the device broke one of the queues.
            GuestpvError: a system call on the TAP failed.
        """
        if self._result is None or self._result == 0:
            return
        if self._result <= lib.GPV_PUMP_ERRNO:
            code = lib.GPV_PUMP_ERRNO - self._result
            raise GuestpvError(f"the TAP link failed: {os.strerror(code)}", where="TAP pump")
        self.port.check(self._result)

    def counters(self) -> dict[str, int]:
        """Counters since the start; ``rx`` is device to TAP, ``tx`` TAP to device."""
        live = self._lib.gpv_pump_counters(self._pump)
        result = self.port.counters
        result |= {name: int(getattr(live, name)) for name in COUNTERS}
        result["rx_dropped"] += result["rx_malformed"]
        for way, queue in (("rx", self.port.rx), ("tx", self.port.tx)):
            result[f"{way}_kicks"] = int(self._lib.gpv_kicks(queue.handle))
            result[f"{way}_outstanding"] = int(self._lib.gpv_outstanding(queue.handle))
            result[f"{way}_size"] = queue.size
        return result

    def capture(self, fd: int) -> None:
        """Send a copy of every frame to this socket, which the pump closes; -1: no more."""
        self._lib.gpv_pump_capture(self._pump, fd)

    def stop(self) -> None:
        """End the thread. The queues are the caller's again."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join()

    def close(self) -> None:
        """Free the pump; its thread must have ended and its counters are gone."""
        self.stop()
        if self._pump != self._ffi.NULL:
            self._lib.gpv_pump_free(self._pump)
            self._pump = self._ffi.NULL
            SYSTEM.close(self._stop)


class NetService:
    """Drives a network device and shows it to the guest as a TAP link with its MAC, MTU and carrier.

    Args:
        transport: an opened network device; closed with the service.
        ifname: name of the link, a pattern with ``%d`` allowed.
        poll: spin instead of waiting for interrupts.
        queue_pairs: number of queue pairs, each with its own pump and TAP queue.
        rss: how received packets are steered, where RSS is required of the transport.

    Raises:
        GuestpvError: negotiation or the TAP link failed; the device is reset and given back.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        ifname: str | None = None,
        poll: bool = False,
        queue_pairs: int = 1,
        rss: Rss | None = None,
    ) -> None:
        self.transport = transport
        self.pumps: list[Pump] = []
        self._tap: Tap | None = None
        self._follower: LinkFollower | None = None
        self._last: dict[str, Any] = {}
        self._closed = False
        self._poll = poll
        self._health = Health(transport)
        self._before: list[dict[str, int]] = []
        try:
            if poll:
                transport.mode = "poll"
            self.net = Net(
                transport,
                queue_pairs=queue_pairs,
                offloads=(RECEIVE_OFFLOADS & ~unsupported_offloads()) | SEND_OFFLOADS | FILTERS,
                started=False,
                rss=rss,
            )
            self._tap = Tap(
                ifname or DEFAULT_NAME,
                mac=self.net.mac,
                mtu=self.net.mtu,
                queues=queue_pairs,
                header_size=self.net.header_size,
                features=self.net.features,
            )
            self._make_pumps()
            self._tap.up()
            self._follower = LinkFollower(self.net, self._tap)
            for pump in self.pumps:
                pump.start()
        except BaseException:
            self.close()
            raise

    def _make_pumps(self) -> None:
        assert self._tap is not None
        for port, fd in zip(self.net.pairs, self._tap.fds, strict=True):
            self.pumps.append(Pump(port, fd, spin=self._poll))

    def restart(self) -> None:
        """Reset the device and go on with the same link; frames on their way are lost. Captures end.

        Raises:
            Refused, FeaturesRefused, DeviceViolation: the device did not come back as it was.
            TimeLimit, DeviceGone: it never left reset, or is gone.
        """
        assert self._follower is not None
        if self.pumps:
            for pump in self.pumps:
                pump.stop()
            self._before = self._counters()
        while self.pumps:
            self.pumps.pop().close()
        self.net.restart()
        self._make_pumps()
        self._follower.begin()
        self._follower.link_changed()
        for pump in self.pumps:
            pump.start()

    @property
    def ifname(self) -> str:
        """Name of the TAP link."""
        return self._tap.name if self._tap else ""

    @property
    def link_up(self) -> bool:
        """Whether the device said that its link is up when it was last asked."""
        return self._follower is not None and self._follower.state.up

    @property
    def mac(self) -> str:
        """MAC address as text."""
        return self.net.mac.hex(":")

    @property
    def mtu(self) -> int:
        """MTU of the link in bytes."""
        return self.net.mtu

    @property
    def features(self) -> int:
        """Mask of the negotiated features."""
        return self.net.features

    def watch(self, timeout: float, wake_fd: int | None = None) -> list[str]:
        """Look after the device for up to ``timeout`` seconds.

        Args:
            timeout: seconds.
            wake_fd: a descriptor that ends the wait early when readable.

        Returns:
            What happened: ``link up``, ``link down``, ``release requested`` (the host unplugs the
            function or somebody unbinds it), ``bus error``, what was done to the link, what the device
            refused. Empty when nothing did.

        Raises:
            DeviceGone: the function is gone.
            DeviceViolation: the device broke a queue or asks to be reset.
            GuestpvError: the TAP link failed.
        """
        deadline = time.monotonic() + timeout
        while True:
            events, woken = self._look_after(max(0.0, deadline - time.monotonic()), wake_fd)
            if events or woken or time.monotonic() >= deadline:
                return events

    def _look_after(self, timeout: float, wake_fd: int | None) -> tuple[list[str], bool]:
        assert self._follower is not None
        config, link = self.transport.config_fd, self._follower.fileno()
        request, error = self.transport.release_fds()
        fds = [fd for fd in (config, link, request, error, wake_fd) if fd is not None]
        ready = SYSTEM.poll(fds, min(timeout, LOOK))
        events = []
        for fd, text in ((request, "release requested"), (error, "bus error")):
            if fd is not None and fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                events.append(text)
        if config is not None and config in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(config)
        # With an interrupt for changes the configuration is left alone until it comes: each look is an exit.
        changed = config is None or config in ready
        if not events:
            self._health.check(changed)
            events += self._follower.device_changed() if changed else []
        if link in ready:
            events += self._follower.link_changed()
        events += self._follower.troubles()
        for pump in self.pumps:
            pump.check()
        return events, wake_fd in ready

    def stats(self) -> dict[str, Any]:
        """Counters in all and for every queue pair; after ``close`` the last ones.

        ``{"mode", "link", "mac", "speed", "rx": {"packets", "bytes", "dropped", "interrupts", "kicks"}, "tx":
        {...}, "queues": [...]}`` with rx from device to link; ``dropped`` has the malformed ones in it.
        """
        if self._closed:
            return self._last
        queues = self._counters()
        names = ("packets", "bytes", "dropped", "interrupts", "kicks")
        return {
            "mode": self.transport.mode,
            "link": "up" if self.link_up else "down",
            "mac": self.mac,
            "speed": speed_text(self._follower.state) if self._follower else "unknown",
            **{way: {n: sum(q[f"{way}_{n}"] for q in queues) for n in names} for way in ("rx", "tx")},
            "queues": queues,
        }

    def _counters(self) -> list[dict[str, int]]:
        """Of every queue pair since the start, restarts included."""
        live = [pump.counters() for pump in self.pumps]
        if not self._before or not live:
            return live or self._before
        now = ("rx_outstanding", "tx_outstanding", "rx_size", "tx_size")
        return [
            {name: value + (0 if name in now else old[name]) for name, value in queue.items()}
            for queue, old in zip(live, self._before, strict=True)
        ]

    def capture(self, fd: int) -> None:
        """Send a copy of every frame to this socket until its other end closes (``services.capture``).

        Whoever captured before gets no more. The descriptor stays the caller's.
        """
        if not self._closed:
            for pump in self.pumps:
                pump.capture(os.dup(fd))

    def close(self) -> None:
        """Stop the pumps, remove the link, reset the device, free its memory. Idempotent."""
        if self._closed:
            return
        with contextlib.ExitStack() as stack:
            stack.callback(self.transport.close)
            if self._tap is not None:
                stack.callback(self._tap.close)
            if self._follower is not None:
                stack.callback(self._follower.close)
            for pump in self.pumps:
                pump.stop()
            if (self.pumps or self._before) and self._tap is not None:
                self._last = self.stats()
            self._closed = True
            for pump in self.pumps:
                stack.callback(pump.close)
