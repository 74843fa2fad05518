"""A TAP link that carries the virtio header, so that offloads pass through it untouched."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
import struct
from types import TracebackType
from typing import Any, Final, Self

from ..errors import AccessDenied, GuestpvError, UsageError
from ..spec import net as spec
from ..spec.features import mask
from ..system import SYSTEM, System

DEVICE: Final = "/dev/net/tun"
IFNAMSIZ: Final = 16

TUNSETIFF: Final = 0x400454CA
TUNSETVNETHDRSZ: Final = 0x400454D8
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETCARRIER: Final = 0x400454E2

SIOCETHTOOL: Final = 0x8946
ETHTOOL_SSET: Final = 2
ETHTOOL_CMD: Final = struct.Struct("=I8xHB13xH14x")
"""``struct ethtool_cmd``: cmd, speed, duplex, speed_hi."""
SPEED_UNKNOWN: Final = 0xFFFFFFFF
DUPLEX_UNKNOWN: Final = 0xFF

SIOCSIFHWADDR: Final = 0x8924
ARPHRD_ETHER: Final = 1
IFF_UP: Final = 1

IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
IFF_MULTI_QUEUE: Final = 0x0100
IFF_TUN_EXCL: Final = 0x8000

TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08
TUN_F_UFO: Final = 0x10
TUN_F_USO4: Final = 0x20
TUN_F_USO6: Final = 0x40

LENT: Final = "pv0"
"""Name of a link in examples."""

UDP_SEGMENTATION_SINCE: Final = (6, 2)
"""Release of Linux."""

_OFFLOADS: Final = (
    (spec.F_CSUM, TUN_F_CSUM),
    (spec.F_HOST_TSO4, TUN_F_TSO4),
    (spec.F_HOST_TSO6, TUN_F_TSO6),
    (spec.F_HOST_ECN, TUN_F_TSO_ECN),
    (spec.F_HOST_UFO, TUN_F_UFO),
    (spec.F_HOST_USO, TUN_F_USO4 | TUN_F_USO6),
)


def offload_flags(features: int) -> int:
    """TUN_F_* flags: what the kernel may leave undone in frames it sends to us, as the device allows it."""
    flags = 0
    for bit, flag in _OFFLOADS:
        if features >> bit & 1:
            flags |= flag
    return flags


def unsupported_offloads() -> int:
    """Receive offloads, a mask of features, whose frames this kernel's TAP does not take.

    It refuses such frames one by one, so they must not be asked of the device. Before there is a link,
    nothing but the release tells it.
    """
    release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    return 0 if release >= UDP_SEGMENTATION_SINCE else mask((spec.F_GUEST_USO4, spec.F_GUEST_USO6))


class Tap:
    """A TAP network interface of this process; it goes away when its file descriptors close.

    One that was there before and belongs to this user (``ip tuntap add NAME mode tap user USER``, with
    ``multi_queue`` for several queue pairs) is used as it is, without CAP_NET_ADMIN, and stays.

    Args:
        name: interface name, or a pattern such as ``pv%d`` that the kernel completes.
        mac: 6 bytes.
        mtu: bytes of payload.
        queues: file descriptors to attach, one a queue pair.
        header_size: bytes of the virtio header before every frame.
        features: negotiated net features, which decide on the offloads.

    Raises:
        AccessDenied: CAP_NET_ADMIN or the device node is missing.
        UsageError: the name is in use or not usable.
    """

    def __init__(
        self,
        name: str,
        *,
        mac: bytes,
        mtu: int,
        queues: int,
        header_size: int,
        features: int,
        system: System = SYSTEM,
    ) -> None:
        if not 0 < len(name.encode()) < IFNAMSIZ:
            raise UsageError(f"{name!r} is no interface name: 1 to {IFNAMSIZ - 1} bytes")
        self._system = system
        self.fds: list[int] = []
        self.name = name
        self.mtu = mtu
        self.ifindex = 0
        try:
            for _ in range(queues):
                self._attach(queues, header_size)
            self._set_offloads(offload_flags(features))
            # Through the descriptor, as it is allowed to the owner of a link that somebody else made.
            address = struct.pack("16sH6s16x", self.name.encode(), ARPHRD_ETHER, mac)
            self._system.ioctl(self.fds[0], SIOCSIFHWADDR, bytearray(address))
            with _route() as route:
                self.ifindex = int(route.link_lookup(ifname=self.name)[0])
                self._set_up_mtu(route, mtu)
        except BaseException:
            self.close()
            raise

    def _set_up_mtu(self, route: Any, mtu: int) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            route.link("set", index=self.ifindex, mtu=mtu)
        except NetlinkError as error:
            if error.code != errno.EPERM:
                raise
            self.mtu = int(route.get_links(self.ifindex)[0].get_attr("IFLA_MTU"))
            if self.mtu > mtu:
                raise AccessDenied(
                    f"not allowed to set the MTU of {self.name}: it is {self.mtu}, the device takes {mtu}",
                    hint=f"as root: ip link set {self.name} mtu {mtu}",
                ) from error

    def _attach(self, queues: int, header_size: int) -> None:
        try:
            fd = self._system.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise AccessDenied(
                    f"cannot open {DEVICE}: {error.strerror}",
                    hint="run as root, or give this user the node and CAP_NET_ADMIN",
                ) from error
            raise GuestpvError(f"cannot open {DEVICE}: {error.strerror}", hint="modprobe tun") from error
        self.fds.append(fd)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
        request = bytearray(struct.pack("16sH22x", self.name.encode(), flags))
        try:
            self._system.ioctl(fd, TUNSETIFF, request)
        except OSError as error:
            if error.errno == errno.EPERM:
                raise AccessDenied(
                    f"not allowed to make the TAP link {self.name}",
                    hint="run as root or with CAP_NET_ADMIN (setcap, AmbientCapabilities=CAP_NET_ADMIN),\n"
                    "or have root make the link and name it, with --no-address:\n"
                    f"ip tuntap add {LENT} mode tap user $USER && ip link set {LENT} up",
                ) from error
            raise UsageError(
                f"cannot make the TAP link {self.name}: {error.strerror}",
                where="TUNSETIFF",
                hint="`ip link` shows whether the name is taken; choose another with --name",
            ) from error
        self.name = bytes(request[:IFNAMSIZ]).split(b"\0", 1)[0].decode()
        self._system.ioctl(fd, TUNSETVNETHDRSZ, bytearray(struct.pack("i", header_size)))

    def _set_offloads(self, flags: int) -> None:
        for unsupported in (0, TUN_F_USO4 | TUN_F_USO6):
            try:
                self._system.ioctl(self.fds[0], TUNSETOFFLOAD, flags & ~unsupported)
                return
            except OSError as error:
                # USO came with Linux 6.2; an older kernel then simply segments UDP itself.
                if error.errno != errno.EINVAL:
                    raise
        raise GuestpvError(f"the kernel refuses the TAP offloads {flags:#x}", where="TUNSETOFFLOAD")

    def up(self) -> None:
        """Set the interface administratively up.

        Raises:
            AccessDenied: it is down, and without CAP_NET_ADMIN.
        """
        from pyroute2.netlink.exceptions import NetlinkError

        with _route() as route:
            try:
                route.link("set", index=self.ifindex, state="up")
            except NetlinkError as error:
                if error.code != errno.EPERM:
                    raise
                if not route.get_links(self.ifindex)[0]["flags"] & IFF_UP:
                    raise AccessDenied(
                        f"not allowed to set the link {self.name} up",
                        hint=f"as root: ip link set {self.name} up",
                    ) from error

    def set_mtu(self, mtu: int) -> None:
        """Set the interface's MTU in bytes."""
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            with _route() as route:
                route.link("set", index=self.ifindex, mtu=mtu)
        except NetlinkError as error:
            raise GuestpvError(
                f"the kernel does not take an MTU of {mtu}: {error}", where=self.name
            ) from error
        self.mtu = mtu

    def set_speed(self, speed: int | None, duplex: str | None) -> None:
        """Have ``ethtool`` and bonds see this speed in Mbit/s; None where it is unknown."""
        value = SPEED_UNKNOWN if speed is None else speed
        shown = {"half": 0, "full": 1}.get(duplex or "", DUPLEX_UNKNOWN)
        command = bytearray(ETHTOOL_CMD.pack(ETHTOOL_SSET, value & 0xFFFF, shown, value >> 16))
        memory = (ctypes.c_char * len(command)).from_buffer(command)
        request = bytearray(struct.pack("16sQ16x", self.name.encode(), ctypes.addressof(memory)))
        # It is for show, and a link in another namespace cannot be reached: no reason to stop.
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            self._system.ioctl(any_socket.fileno(), SIOCETHTOOL, request)

    def set_carrier(self, up: bool) -> None:
        """Show the device's link state as the interface's carrier."""
        self._system.ioctl(self.fds[0], TUNSETCARRIER, bytearray(struct.pack("i", int(up))))

    def close(self) -> None:
        """Close the file descriptors; the kernel removes the interface. Idempotent."""
        while self.fds:
            self._system.close(self.fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _route() -> Any:
    # pyroute2 takes a third of a second to import: only those who need a link pay for it.
    from pyroute2 import IPRoute

    return IPRoute()
