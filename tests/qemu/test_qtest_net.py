"""QEMU's network device under the driver: frames over a cable of datagrams, the user network, link state."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from guestpv.drivers.net import Net
from guestpv.pci.qtest import QtestFunction
from guestpv.spec.status import Status
from guestpv.transport.pci import PciTransport

Device = Callable[..., PciTransport]

LIVE = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
LENGTHS = (14, 60, 64, 1000, 1514, 1518)
CABLE_BURST = 8
"""Frames that the cable takes without making QEMU wait for it (net.unix.max_dgram_qlen is 10)."""
ROUTER = bytes((10, 0, 2, 2))


def frames(count: int, seed: int) -> list[bytes]:
    """Ethernet frames, each with its number and random content, of all sorts of lengths."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = LENGTHS[number % len(LENGTHS)]
        head = b"\xff" * 6 + b"\x02\0\0\0\0\1" + (number & 0xFFFF).to_bytes(2, "big")
        made.append(head + random.bytes(length - len(head)))
    return made


def receive(net: Net, count: int) -> list[bytes]:
    """The next ``count`` frames, each of which has to come within a minute of the one before."""
    got: list[bytes] = []
    while len(got) < count:
        more = net.receive_within(60.0)
        assert more, f"{len(got)} of {count} frames came"
        got += more
    return got


def send(net: Net, wanted: list[bytes], wire: Any, burst: int = CABLE_BURST) -> list[bytes]:
    """Send all frames, at most ``burst`` at a time; what came out at the other end."""
    got: list[bytes] = []
    while len(got) < len(wanted):
        started = net.send(wanted[len(got) : len(got) + burst])
        assert started
        got += [wire.receive() for _ in range(started)]
    return got


@pytest.mark.parametrize(("packed", "features"), [("off", ""), ("off", "-event_idx"), ("on", "-event_idx")])
def test_nothing_is_lost_on_a_cable_that_is_too_slow(
    device: Device, wire: Any, packed: str, features: str
) -> None:
    """QEMU has to wait for the cable in the middle of a burst.

    Packed with EVENT_IDX is left out: QEMU then leaves a stale position in its event suppression
    structure, so that the standard forbids the kick it needs, and stalls.
    """
    transport = device(f"virtio-net-pci,packed={packed}", netdev=wire.netdev, features=features)
    with Net(transport) as net:
        outward = frames(1000, 6)
        assert send(net, outward, wire, burst=len(outward)) == outward


@pytest.mark.parametrize("mode", ["msix", "intx"])
@pytest.mark.parametrize("packed", ["off", "on"])
def test_the_link_goes_down_and_up(device: Device, wire: Any, packed: str, mode: str) -> None:
    transport = device(f"virtio-net-pci,packed={packed}", netdev=wire.netdev, mode=mode)
    function = transport.function
    assert isinstance(function, QtestFunction)
    with Net(transport) as net:
        assert net.link_up
        fd = transport.config_fd
        assert fd is not None
        for up in (False, True):
            function.machine.qemu.qmp.execute("set_link", {"name": "dev", "up": up})
            assert select.select([fd], [], [], 60)[0] == [fd]
            assert net.link_up == up
        (frame,) = frames(1, 3)
        assert send(net, [frame], wire) == [frame]


def test_the_mac_address_is_the_configured_one(device: Device, wire: Any) -> None:
    transport = device("virtio-net-pci,mac=52:54:00:aa:bb:cc,host_mtu=1400", netdev=wire.netdev)
    with Net(transport) as net:
        assert net.mac == bytes.fromhex("525400aabbcc")
        assert net.mtu == 1400


@pytest.mark.parametrize("packed", ["off", "on"])
@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_the_user_network_answers_arp(device: Device, machine: str, packed: str) -> None:
    transport = device(f"virtio-net-pci,packed={packed}", netdev="user,restrict=on", machine=machine)
    with Net(transport) as net:
        ours = bytes((10, 0, 2, 15))
        request = bytes.fromhex("0001080006040001") + net.mac + ours + bytes(6) + ROUTER
        net.send([(b"\xff" * 6 + net.mac + b"\x08\x06" + request).ljust(60, b"\0")])
        (reply,) = receive(net, 1)
        assert reply[:6] == net.mac
        assert reply[12:14] == b"\x08\x06"
        assert reply[20:22] == b"\x00\x02"
        assert reply[28:32] == ROUTER
        assert reply[32:38] == net.mac


@pytest.mark.parametrize("packed", ["off", "on"])
def test_frames_wait_while_the_driver_is_slow(device: Device, wire: Any, packed: str) -> None:
    transport = device(f"virtio-net-pci,packed={packed}", netdev=wire.netdev)
    with Net(transport) as net:
        # QEMU drops what comes before it has seen DRIVER_OK, which is a posted write: read it back.
        assert transport.status == LIVE
        inward = frames(net.pairs[0].rx.size + 4, 4)
        for frame in inward:
            wire.send(frame)
        assert receive(net, len(inward)) == inward
        assert net.receive() == []


def test_a_device_goes_on_after_reset_and_function_level_reset(device: Device, wire: Any) -> None:
    transport = device("virtio-net-pci,packed=on", netdev=wire.netdev, root_port="1")
    (frame,) = frames(1, 5)
    for again in (transport.reset, transport.function.reset, transport.reset):
        net = Net(transport)
        assert send(net, [frame], wire) == [frame]
        wire.send(frame)
        assert receive(net, 1) == [frame]
        again()
        assert transport.status == Status.RESET
