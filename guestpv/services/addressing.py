"""The address of a link: given, or asked of a DHCP server and kept; with default route and name servers."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..errors import GuestpvError, TimeLimit, UsageError
from ..system import SYSTEM
from .dhcp import DhcpClient, LibraryClient, Settings, Udhcpc
from .resolver import Resolver

DHCP_TIME_LIMIT: Final = 30.0
ROUTE_METRIC: Final = 1024
"""Of our default route. A default route that the machine has already is mostly its owner's way in."""
LOWEST_MTU: Final = 576


class Link(Protocol):
    """What is done to a network link."""

    name: str

    def has_carrier(self) -> bool:
        """Whether it is connected."""
        ...

    def configure(self, settings: Settings) -> None:
        """Set address, default route and a smaller MTU. What is there already stays."""
        ...

    def deconfigure(self, settings: Settings) -> None:
        """Take address and default route away; what is gone already is well."""
        ...


class KernelLink:
    """A link of the kernel, by rtnetlink."""

    def __init__(self, name: str) -> None:
        self.name = name

    def has_carrier(self) -> bool:
        """See ``Link``."""
        try:
            return SYSTEM.read_text(f"/sys/class/net/{self.name}/carrier") == "1"
        except OSError:
            return False

    def configure(self, settings: Settings) -> None:
        """See ``Link``."""
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        own = ipaddress.ip_interface(settings.address)
        with IPRoute() as netlink:
            index = self._index(netlink)
            try:
                netlink.addr("replace", index=index, address=str(own.ip), prefixlen=own.network.prefixlen)
                if settings.mtu is not None:
                    link = netlink.get_links(index)[0]
                    if LOWEST_MTU <= settings.mtu < link.get_attr("IFLA_MTU"):
                        netlink.link("set", index=index, mtu=settings.mtu)
                if settings.gateway is not None:
                    netlink.route("replace", **self._route(index, settings, own))
            except NetlinkError as error:
                raise GuestpvError(
                    f"the kernel does not take {settings.address}"
                    + (f" with gateway {settings.gateway}" if settings.gateway else "")
                    + f": {error}",
                    where=self.name,
                ) from error

    def deconfigure(self, settings: Settings) -> None:
        """See ``Link``."""
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        own = ipaddress.ip_interface(settings.address)
        with IPRoute() as netlink:
            if not netlink.link_lookup(ifname=self.name):
                return
            index = self._index(netlink)
            try:
                # The routes through the address go with it.
                netlink.addr("del", index=index, address=str(own.ip), prefixlen=own.network.prefixlen)
            except NetlinkError as error:
                if error.code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                    raise

    def _index(self, netlink: Any) -> int:
        found = netlink.link_lookup(ifname=self.name)
        if not found:
            raise GuestpvError("there is no such link any more", where=self.name)
        return int(found[0])

    @staticmethod
    def _route(
        index: int, settings: Settings, own: ipaddress.IPv4Interface | ipaddress.IPv6Interface
    ) -> dict[str, Any]:
        route: dict[str, Any] = {
            "dst": "default",
            "gateway": settings.gateway,
            "oif": index,
            "priority": ROUTE_METRIC,
        }
        if ipaddress.ip_address(settings.gateway or "") not in own.network:
            route["flags"] = ["onlink"]
        return route


def static(address: str, gateway: str | None = None, dns: tuple[str, ...] = ()) -> Settings:
    """Settings that a person gives.

    Raises:
        UsageError: one of them is not an address.
    """
    try:
        own = ipaddress.ip_interface(address)
        for other in (gateway, *dns):
            if other is not None:
                ipaddress.ip_address(other)
    except ValueError as error:
        raise UsageError(
            str(error), hint="--address takes 192.0.2.5/24, --gateway and --dns 192.0.2.1"
        ) from None
    if "/" not in address:
        raise UsageError(f"{address} has no prefix length", hint=f"--address {address}/24")
    return Settings(address=own.with_prefixlen, gateway=gateway, dns=dns)


class Addressing:
    """Keeps a link configured, from ``poll`` to ``poll``, until ``close``.

    Args:
        link: the link, which is up.
        settings: what to configure; None asks a DHCP server.
        resolver: where name servers go.
        clients: DHCP clients in the order they are tried in.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        link: Link,
        settings: Settings | None,
        resolver: Resolver,
        *,
        clients: tuple[Callable[[str], DhcpClient], ...] = (LibraryClient, Udhcpc),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._resolver = resolver
        self._clients = list(clients)
        self._clock = clock
        self._client: DhcpClient | None = None
        self._deadline = clock() + DHCP_TIME_LIMIT
        self.settings: Settings | None = None
        if settings is not None:
            self._configure(settings)
        else:
            self._client = self._clients.pop(0)(link.name)

    @property
    def ready(self) -> bool:
        """Whether the link has its address."""
        return self.settings is not None

    def poll(self) -> list[str]:
        """Carry out what the DHCP server granted or took away since the last call; returns it in words.

        Raises:
            TimeLimit: no server has answered in time.
            GuestpvError: no DHCP client works here, or the link could not be configured.
        """
        if self._client is None:
            return []
        try:
            news = self._client.poll()
        except GuestpvError as error:
            return [str(error), *self._fall_back(error)]
        events = []
        for settings in news:
            events += self._lost() if settings is None else self._granted(settings)
        if not self.ready and not events and self._deadline is not None and self._clock() > self._deadline:
            why = "" if self._link.has_carrier() else ": the link has no carrier"
            raise TimeLimit(
                f"no DHCP server answered within {DHCP_TIME_LIMIT:g} s{why}",
                where=self._link.name,
                hint="give an address with --address CIDR, or none with --no-address",
            )
        return events

    def _fall_back(self, error: GuestpvError) -> list[str]:
        assert self._client is not None
        self._client.close()
        if not self._clients:
            raise error
        self._client = self._clients.pop(0)(self._link.name)
        return [f"trying {self._client.name} instead"]

    def _granted(self, settings: Settings) -> list[str]:
        renewed = self.settings is not None and self.settings.address == settings.address
        if self.settings is not None and not renewed:
            self._link.deconfigure(self.settings)
        event = f"lease of {settings.address} renewed" if renewed else f"address {settings.address}"
        return [event, *self._configure(settings)]

    def _configure(self, settings: Settings) -> list[str]:
        self._link.configure(settings)
        self.settings = settings
        try:
            self._resolver.apply(settings.dns, settings.domain)
        except (OSError, GuestpvError) as error:
            return [f"name servers {' '.join(settings.dns)} not set: {error}"]
        return []

    def _lost(self) -> list[str]:
        if self.settings is None:
            return []
        lost, self.settings = self.settings, None
        self._deadline = float("inf")
        self._link.deconfigure(lost)
        self._resolver.restore()
        return [f"lease of {lost.address} lost, asking for a new one"]

    def close(self) -> None:
        """Release the lease, remove address, route and name servers. Idempotent."""
        client, self._client = self._client, None
        settings, self.settings = self.settings, None
        if client is not None:
            client.close()
        if settings is not None:
            with contextlib.suppress(OSError, GuestpvError):
                self._resolver.restore()
            with contextlib.suppress(Exception):
                # The link goes away next, and its addresses with it, whatever netlink says now.
                self._link.deconfigure(settings)
