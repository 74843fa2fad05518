"""The other end of a network device's cable: our model's, a back end of QEMU's, or any interface."""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

from ..devices.function import SoftwareFunction
from ..devices.models.packet import Packet
from ..errors import Refused
from ..opener import Spec
from ..pci.qtest import QtestFunction
from ..spec import net
from .net_ports import BROADCAST, OUR_MAC, Ports, frame
from .rig import Rig

SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
PACKET_OUTGOING: Final = 4
ETH_P_ALL: Final = 3
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU, IFF_UP = 0x8913, 0x8914, 0x8921, 0x8922, 1
VNET: Final = struct.Struct("<BBHHHH")
"""The header in front of packets of a packet socket: virtio's without num_buffers (packet(7))."""
MOST: Final = 1 << 17
MTU: Final = 65535 - 14


class End(Protocol):
    """One way to hold the cable's other end."""

    def deliver(self, packet: Packet) -> None:
        """Let a packet arrive at the device."""

    def taken(self) -> list[Packet]:
        """Packets of the checks that the device has sent and nobody took yet."""

    def announce(self) -> None:
        """Let the device ask for an announcement."""


class ModelEnd:
    """Our own model's peer."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._sent: list[Packet] = []
        model.peer = self._sent.append
        self.announce: Callable[[], None] = model.announce

    def deliver(self, packet: Packet) -> None:
        """See ``End``."""
        self._model.deliver(packet)

    def taken(self) -> list[Packet]:
        """See ``End``."""
        found, self._sent[:] = list(self._sent), []
        return found


class LinkEnd:
    """A packet socket on a network interface: a TAP that QEMU has the other side of, or any other.

    Args:
        name: the interface.
        offloads: whether the kernel keeps offloads whole between here and the device, as over a TAP.
    """

    def __init__(self, name: str, rig: Rig, *, offloads: bool) -> None:
        self._offloads = offloads
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        except PermissionError as error:
            raise Refused(
                "packet sockets are for root",
                where=name,
                hint="run the checks as root; QEMU's netdev=dgram needs no privilege",
            ) from error
        rig.undo.callback(self._socket.close)
        self._raise(name, rig)
        self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._socket.bind((name, ETH_P_ALL))
        self._socket.setblocking(False)
        self._rig = rig

    def _raise(self, name: str, rig: Rig) -> None:
        """Set the interface up, with the largest MTU and with nothing to say of its own, for the case."""
        quiet = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        with contextlib.suppress(OSError):
            rig.undo.callback(self._back, quiet.write_text, quiet.read_text())
            quiet.write_text("1")
        changes: tuple[tuple[int, int, str, Callable[[int], int]], ...] = (
            (SIOCGIFMTU, SIOCSIFMTU, "i", lambda mtu: max(mtu, MTU)),
            (SIOCGIFFLAGS, SIOCSIFFLAGS, "H", lambda flags: flags | IFF_UP),
        )
        for ask, tell, form, change in changes:
            before = fcntl.ioctl(self._socket, ask, struct.pack("16s24x", name.encode()))
            (value,) = struct.unpack_from(form, before, 16)
            after = bytearray(before)
            struct.pack_into(form, after, 16, change(value))
            rig.undo.callback(self._back, fcntl.ioctl, self._socket, tell, before)
            fcntl.ioctl(self._socket, tell, bytes(after))

    @staticmethod
    def _back(call: Callable[..., object], *arguments: object) -> None:
        """Undo what was done to an interface, which may be gone with the device that brought it."""
        with contextlib.suppress(OSError):
            call(*arguments)

    def deliver(self, packet: Packet) -> None:
        """See ``End``."""
        if packet.needs_csum and not self._offloads:
            self._rig.case.not_observable("offloads do not get over this cable")
        kind = packet.gso_type | (net.GSO_ECN if packet.ecn else 0)
        header = VNET.pack(
            net.HDR_F_NEEDS_CSUM if packet.needs_csum else 0,
            kind,
            packet.header_length if packet.gso_type else 0,
            packet.gso_size,
            packet.csum_start,
            packet.csum_offset,
        )
        self._socket.send(header + packet.data)

    def taken(self) -> list[Packet]:
        """See ``End``."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = self._socket.recvfrom(MOST)
                frame = data[VNET.size :]
                if address[2] == PACKET_OUTGOING or frame[6:12] != OUR_MAC:
                    continue
                flags, kind, _, size, start, offset = VNET.unpack_from(data)
                needs = bool(flags & net.HDR_F_NEEDS_CSUM)
                if not needs:
                    start = offset = 0
                ecn = bool(kind & net.GSO_ECN)
                found.append(Packet(frame, needs, start, offset, kind & ~net.GSO_ECN, ecn, size))
        return found

    def announce(self) -> None:
        """See ``End``."""
        announce(self._rig)


class DatagramEnd:
    """The socket to which QEMU's ``dgram`` back end sends; no offload gets across."""

    def __init__(self, ours: str, theirs: str, rig: Rig) -> None:
        # A case may hold the end twice, one after the other.
        Path(ours).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(ours)
        self._socket.setblocking(False)
        rig.undo.callback(Path(ours).unlink, missing_ok=True)
        rig.undo.callback(self._socket.close)
        self._theirs = theirs
        self._rig = rig

    def deliver(self, packet: Packet) -> None:
        """See ``End``."""
        if packet.needs_csum:
            self._rig.case.not_observable("datagrams carry frames without offloads: use netdev=tap")
        self._socket.sendto(packet.data, self._theirs)

    def taken(self) -> list[Packet]:
        """See ``End``."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(Packet(self._socket.recv(MOST)))
        return [packet for packet in found if packet.data[6:12] == OUR_MAC]

    def announce(self) -> None:
        """See ``End``."""
        announce(self._rig)


def announce(rig: Rig) -> None:
    """Have QEMU's device ask its driver to announce itself, as it does after a migration."""
    inner = rig.function.inner
    if not isinstance(inner, QtestFunction):
        rig.case.not_observable("nobody here can make the device ask for an announcement")
    once = {"initial": 50, "max": 50, "rounds": 1, "step": 50}
    inner.machine.qemu.qmp.execute("announce-self", once)
    field = net.CONFIG["status"]
    rig.wait(
        lambda: bool(rig.transport.read_config(field.offset, field.width) & net.S_ANNOUNCE),
        "ANNOUNCE in status",
    )


def end_of(rig: Rig) -> End | None:
    """The cable's other end, None where nobody here holds it."""
    if rig.wire:
        return LinkEnd(rig.wire, rig, offloads=False)
    inner = rig.function.inner
    if isinstance(inner, SoftwareFunction):
        return ModelEnd(inner.model)
    if not isinstance(inner, QtestFunction):
        return None
    netdev = Spec.parse(rig.spec).params.get("netdev", "")
    if netdev.startswith("tap,") and (name := re.search(",ifname=([^,]+)", netdev)):
        return LinkEnd(name[1], rig, offloads=True)
    paths = re.findall(r",(?:local|remote)\.path=([^,]+)", netdev)
    if netdev.startswith("dgram,") and len(paths) == 2:
        theirs, ours = paths
        return DatagramEnd(ours, theirs, rig)
    return None


class Wire:
    """The other end of the cable, in the hands of a case.

    Args:
        rig: the device, running.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._held = end_of(rig)

    @property
    def end(self) -> End:
        """The other end; without one the case ends NOT_OBSERVABLE."""
        if self._held is None:
            self._rig.case.not_observable("nobody here holds the other end of the cable")
        return self._held

    def deliver(self, packet: bytes | Packet) -> None:
        """Let a packet arrive."""
        whole = Packet(packet) if isinstance(packet, bytes) else packet
        self._rig.case.note(f"# a packet of {len(whole.data)} bytes arrives")
        self.end.deliver(whole)

    def take(self, count: int = 1) -> list[Packet]:
        """Packets that the device has sent since the last call; waits until there are ``count``.

        Raises:
            AssertionError: fewer came.
        """
        found: list[Packet] = []

        def came() -> bool:
            found.extend(self.end.taken())
            return len(found) >= count

        self._rig.wait(came, "packet on the wire")
        return found

    def announce(self) -> None:
        """Let the device ask for an announcement; ends the case where nobody can make it."""
        if not self._rig.transport.has(net.F_STATUS):
            pytest.skip("STATUS is not offered")
        self.end.announce()

    def prompt(self, ports: Ports) -> None:
        """Let any packet arrive: from the cable's other end, or an answer of QEMU's user network to ARP."""
        if self._held is not None or not isinstance(self._rig.function.inner, QtestFunction):
            self.deliver(frame())
            return
        mac = bytes(self._rig.transport.read_config(at, 1) for at in range(6))
        arp = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + mac + bytes([10, 0, 2, 15]) + bytes(6)
        ports.send(BROADCAST + mac + b"\x08\x06" + arp + bytes([10, 0, 2, 2]) + bytes(18))
