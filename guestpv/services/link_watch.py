"""What others do to our link: `ip link set`, a bridge, a macvlan on top (rtnetlink)."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field
from typing import Any, Final

IFF_UP: Final = 0x1
RTMGRP_LINK: Final = 1
NOTICE: Final = 65536


@dataclass(frozen=True, slots=True)
class LinkView:
    """What the kernel knows of a link.

    Attributes:
        name: current name.
        mac: 6 bytes.
        up: administratively up.
        promiscuous: somebody listens to everything: tcpdump, a bridge.
        unicast: further addresses that links on top of it have.
        around: indices of the links on top of it and of the bridge or bond that it is in.
    """

    name: str
    mac: bytes
    mtu: int
    up: bool = True
    promiscuous: bool = False
    unicast: frozenset[bytes] = frozenset()
    around: frozenset[int] = field(default=frozenset(), compare=False)


class LinkWatch:
    """Notices of changes to links. What changed is not taken from the notice but looked up: one that got lost
    does no harm.

    Args:
        index: interface index of the link; names change.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
        )
        self._socket.bind((0, RTMGRP_LINK))

    def fileno(self) -> int:
        """Readable when some link changed."""
        return self._socket.fileno()

    def look(self) -> LinkView | None:
        """The link as it is now, None where it is gone, or in another network namespace."""
        while True:
            try:
                self._socket.recv(NOTICE)
            except BlockingIOError:
                break
            except OSError as error:
                # An overrun of the socket's buffer is told once, and a notice like any other.
                if error.errno != errno.ENOBUFS:
                    raise
        return look_up(self.index)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


def look_up(index: int) -> LinkView | None:
    """A link of this network namespace by its interface index."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        links: dict[int, Any] = {link["index"]: link for link in route.get_links()}
        link = links.get(index)
        if link is None:
            return None
        mac = unpacked(link.get_attr("IFLA_ADDRESS"))
        others = (unpacked(entry.get_attr("NDA_LLADDR")) for entry in fdb(route, index))
        around = {number for number, other in links.items() if other.get_attr("IFLA_LINK") == index}
        master = link.get_attr("IFLA_MASTER")
        return LinkView(
            name=link.get_attr("IFLA_IFNAME"),
            mac=mac,
            mtu=link.get_attr("IFLA_MTU"),
            up=bool(link["flags"] & IFF_UP),
            promiscuous=bool(link.get_attr("IFLA_PROMISCUITY")),
            unicast=frozenset(other for other in others if other != mac and not other[0] & 1),
            around=frozenset(around | ({master} if master else set())),
        )


def fdb(route: Any, index: int) -> list[Any]:
    """The link's address lists; a kernel without bridge support may have none to tell."""
    try:
        return [
            entry
            for entry in route.fdb("dump", ifindex=index)
            if entry["ifindex"] == index and entry.get_attr("NDA_LLADDR")
        ]
    except Exception:
        return []


def unpacked(text: str) -> bytes:
    """A MAC address as bytes."""
    return bytes.fromhex(text.replace(":", ""))
