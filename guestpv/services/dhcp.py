"""DHCP for a link of ours: pyroute2's client in a thread, busybox's udhcpc where that one cannot.

Both only say what the server granted, as a ``Settings``; whoever polls them configures the link.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from ..errors import AccessDenied, GuestpvError

FIRST_RETRY: Final = 1.0
"""Seconds until an unanswered message is repeated for the first time."""
STOP_TIME_LIMIT: Final = 3.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a link is to be configured.

    Attributes:
        address: with its prefix length, ``10.0.2.15/24``.
        gateway: of the default route; None for no route.
        dns: addresses of name servers.
        domain: to search names in.
        mtu: bytes, where the server asks for a smaller one than the device's.
        server: DHCP server; None where the settings are a person's.
        lease_seconds: None where they do not expire.
        obtained: when, in seconds since the epoch.
    """

    address: str
    gateway: str | None = None
    dns: tuple[str, ...] = ()
    domain: str | None = None
    mtu: int | None = None
    server: str | None = None
    lease_seconds: int | None = None
    obtained: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"dns": list(self.dns), "by": "dhcp" if self.server else "static"}


class DhcpClient(Protocol):
    """Something that gets and keeps a lease."""

    name: str

    def poll(self) -> list[Settings | None]:
        """What happened since the last call: settings granted or renewed, or None for a lease lost.

        Raises:
            GuestpvError: the client itself came to an end.
        """
        ...

    def close(self) -> None:
        """Release the lease and stop. Idempotent."""
        ...


def with_prefix(address: str, netmask: str | None) -> str:
    """Address and prefix length; the class of the address decides where the server sent no mask."""
    if netmask is None:
        first = int(address.split(".", 1)[0])
        netmask = "8" if first < 128 else "16" if first < 192 else "24"
    return ipaddress.IPv4Interface(f"{address}/{netmask}").with_prefixlen


def settings_of(ack: Any) -> Settings:
    """What a DHCPACK, as pyroute2 decodes it, grants. Every option but the lease time may be missing."""
    options = ack["options"]
    routers = options.get("router") or []
    lease_time = int(options["lease_time"])
    return Settings(
        address=with_prefix(ack["yiaddr"], options.get("subnet_mask")),
        gateway=routers[0] if routers else None,
        dns=tuple(options.get("name_server") or ()),
        domain=options.get("domain_name") or None,
        mtu=options.get("interface_mtu"),
        server=options.get("server_id") or ack.get("siaddr") or "unknown",
        lease_seconds=None if lease_time < 0 else lease_time,
    )


def backoff() -> Iterator[float]:
    """Seconds between repetitions: a TAP link is up in milliseconds, so the first ones come soon."""
    pause = FIRST_RETRY
    while True:
        yield pause
        pause = min(pause * 2, 32.0)


class LibraryClient:
    """pyroute2's client, in a thread with an event loop of its own; it renews while it lives."""

    name = "pyroute2"

    def __init__(self, ifname: str) -> None:
        self._ifname = ifname
        self._news: queue.SimpleQueue[Settings | BaseException | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"dhcp {ifname}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._keep_lease())
        except BaseException as error:
            self._news.put(error)

    async def _keep_lease(self) -> None:
        from pyroute2.dhcp.client import AsyncDHCPClient, ClientConfig
        from pyroute2.dhcp.enums.dhcp import Option
        from pyroute2.dhcp.hooks import Hook, Trigger
        from pyroute2.dhcp.leases import Lease

        class MemoryLease(Lease):  # type: ignore[misc]
            """The library's own lease class writes a file into the working directory."""

            def dump(self) -> None:
                pass

            @classmethod
            def load(cls, interface: str) -> None:
                return None

        async def granted(lease: Lease) -> None:
            self._news.put(settings_of(lease.ack))

        async def lost(lease: Lease) -> None:
            self._news.put(None)

        config = ClientConfig(
            interface=self._ifname,
            lease_type=MemoryLease,
            hooks=[
                Hook(granted, {Trigger.BOUND, Trigger.RENEWED, Trigger.REBOUND}),
                Hook(lost, {Trigger.UNBOUND, Trigger.EXPIRED}),
            ],
            requested_parameters=(
                Option.SUBNET_MASK,
                Option.ROUTER,
                Option.NAME_SERVER,
                Option.DOMAIN_NAME,
                Option.INTERFACE_MTU,
                Option.LEASE_TIME,
                Option.RENEWAL_TIME,
                Option.REBINDING_TIME,
            ),
            retransmission=backoff,
            handle_signals=False,
            vendor_id="guestpv",
        )
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        before = asyncio.all_tasks()
        async with AsyncDHCPClient(config) as client:
            # An exception in one of the library's own tasks would otherwise end it without a word.
            workers = asyncio.all_tasks() - before
            await client.bootstrap()
            stopped = asyncio.create_task(self._stop.wait())
            if self._closing.is_set():
                self._stop.set()
            done, _ = await asyncio.wait({*workers, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped not in done:
                stopped.cancel()
                for worker in done:
                    worker.result()
                raise GuestpvError("the DHCP client lost its link", where=self._ifname)

    def poll(self) -> list[Settings | None]:
        """See ``DhcpClient``."""
        news: list[Settings | None] = []
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._news.get_nowait()
                if isinstance(item, PermissionError):
                    raise AccessDenied(
                        f"the DHCP client may not open a packet socket: {item}",
                        where=self._ifname,
                        hint="run as root, or use --address CIDR",
                    ) from item
                if isinstance(item, BaseException):
                    raise GuestpvError(f"the DHCP client ended: {item!r}", where=self._ifname) from item
                news.append(item)
        return news

    def close(self) -> None:
        """See ``DhcpClient``."""
        self._closing.set()
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_TIME_LIMIT)


HOOK: Final = """#!/bin/sh
{ echo "event=$1"; env; echo "event-end"; } > '{pipe}'
"""


class Udhcpc:
    """busybox's udhcpc as a child process; its script hands its variables back through a pipe.

    Raises:
        GuestpvError: there is no udhcpc.
    """

    name = "udhcpc"

    def __init__(self, ifname: str) -> None:
        command = next(
            (words for words in (["udhcpc"], ["busybox", "udhcpc"]) if shutil.which(words[0])),
            None,
        )
        if command is None:
            raise GuestpvError("there is no udhcpc", hint="apt install busybox   or use --address CIDR")
        self._ifname = ifname
        self._pending = ""
        self._directory = Path(tempfile.mkdtemp(prefix="guestpv-dhcp-"))
        pipe = self._directory / "events"
        os.mkfifo(pipe, 0o600)
        # Opened for both ways, so that it neither blocks now nor ends when one run of the script does.
        self._events = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        hook = self._directory / "hook"
        hook.write_text(HOOK.replace("{pipe}", str(pipe)))
        hook.chmod(0o700)
        self._process = subprocess.Popen(
            [*command, "-f", "-R", "-i", ifname, "-s", str(hook), "-t", "0", "-O", "mtu"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether the program does not run any more."""
        return self._process.poll() is not None

    def poll(self) -> list[Settings | None]:
        """See ``DhcpClient``."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._events, 65536):
                self._pending += chunk.decode(errors="replace")
        *events, self._pending = self._pending.split("event-end\n")
        news: list[Settings | None] = []
        for event in events:
            values = dict(line.split("=", 1) for line in event.splitlines() if "=" in line)
            if values["event"] in ("bound", "renew"):
                news.append(self._settings(values))
            elif values["event"] == "deconfig":
                news.append(None)
        if not news and self.ended:
            raise GuestpvError(f"udhcpc ended with status {self._process.returncode}", where=self._ifname)
        return news

    @staticmethod
    def _settings(values: dict[str, str]) -> Settings:
        return Settings(
            address=with_prefix(values["ip"], values.get("subnet")),
            gateway=next(iter(values.get("router", "").split()), None),
            dns=tuple(values.get("dns", "").split()),
            domain=values.get("domain") or None,
            mtu=int(values["mtu"]) if values.get("mtu", "").isdigit() else None,
            server=values.get("serverid") or "unknown",
            lease_seconds=int(values["lease"]) if values.get("lease", "").isdigit() else None,
        )

    def close(self) -> None:
        """See ``DhcpClient``."""
        if not self.ended:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIME_LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._events >= 0:
            os.close(self._events)
            self._events = -1
            shutil.rmtree(self._directory, ignore_errors=True)
