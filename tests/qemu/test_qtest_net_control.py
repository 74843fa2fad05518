"""The control queue of QEMU's network device: what QEMU itself says of its filter, and which frames come."""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guestpv.devices.models.net_hash import hash_of
from guestpv.drivers.net import FILTERS, RECEIVE_OFFLOADS, SEND_OFFLOADS, Net
from guestpv.drivers.net_control import CommandRefused, ControlQueue, Rss
from guestpv.pci.qtest import QtestFunction
from guestpv.spec import net as spec
from guestpv.transport.pci import PciTransport
from guestpv.virtqueue.queue import Virtqueue

Device = Callable[..., PciTransport]

OWN, OTHER = bytes.fromhex("525400aabb01"), bytes.fromhex("525400aabb02")
GROUP = bytes.fromhex("01005e000001")
KEY = bytes(range(1, 41))
ETH_P_IP = 0x0800
ETH_P_TEST = 0x88B5
PATIENCE = 60.0


def control_of(net: Net) -> ControlQueue:
    assert net.control is not None
    return net.control


def qemu_of(net: Net) -> Any:
    function = net.transport.function  # type: ignore[attr-defined]
    assert isinstance(function, QtestFunction)
    return function.machine.qemu.qmp


def rx_filter(net: Net) -> dict[str, Any]:
    (answer,) = qemu_of(net).execute("query-rx-filter", {"name": "dev"})
    return answer  # type: ignore[no-any-return]


def frame(destination: bytes, number: int, vlan: int | None = None) -> bytes:
    tag = b"" if vlan is None else struct.pack("!HH", 0x8100, vlan)
    return (destination + OTHER + tag + struct.pack("!HI", ETH_P_TEST, number)).ljust(64, b"\0")


def comes(net: Net, wire: Any, wanted: bytes, *unwanted: bytes) -> None:
    """Of these frames only ``wanted`` comes; it is put on the cable last."""
    for data in (*unwanted, wanted):
        wire.send(data)
    assert net.receive_within(PATIENCE) == [wanted]


@pytest.mark.parametrize("packed", ["off", "on"])
def test_the_receive_filter(device: Device, wire: Any, packed: str) -> None:
    transport = device(
        f"virtio-net-pci,packed={packed},mac={OWN.hex(':')}", netdev=wire.netdev, features="+ctrl_vlan"
    )
    with Net(transport, offloads=FILTERS) as net:
        control = control_of(net)
        # QEMU receives everything until it is told anything.
        assert rx_filter(net)["promiscuous"]
        for mode in ("promisc", "allmulti"):
            control.set_mode(mode, False)
        control.set_filter([OTHER], [GROUP])
        control.add_vlan(5)
        said = rx_filter(net)
        assert (said["promiscuous"], said["multicast"], said["unicast"]) == (False, "normal", "normal")
        assert (said["unicast-table"], said["multicast-table"]) == ([OTHER.hex(":")], [GROUP.hex(":")])
        assert said["vlan-table"] == [5]
        stranger = bytes.fromhex("525400aabb99")
        comes(net, wire, frame(OWN, 1), frame(stranger, 2), frame(OWN, 3, vlan=6))
        comes(net, wire, frame(OTHER, 4))
        comes(net, wire, frame(GROUP, 5))
        comes(net, wire, frame(OWN, 6, vlan=5))
        control.set_filter()
        control.remove_vlan(5)
        control.set_mac(stranger)
        assert rx_filter(net)["main-mac"] == stranger.hex(":")
        assert net.transport.config(spec.CONFIG, "mac")["mac"] == stranger
        comes(net, wire, frame(stranger, 7), frame(OWN, 8), frame(OTHER, 9), frame(stranger, 10, vlan=5))
        control.set_mode("alluni", True)
        comes(net, wire, frame(OWN, 11))
        control.set_mode("nobcast", True)
        comes(net, wire, frame(OWN, 12), frame(b"\xff" * 6, 13))


def test_without_the_filters_features_everything_comes(device: Device, wire: Any) -> None:
    with Net(device("virtio-net-pci", netdev=wire.netdev)) as net:
        # QEMU drops what comes before it has seen DRIVER_OK, which is a posted write: read something back.
        assert net.link_up
        for number, target in enumerate((OWN, OTHER, GROUP)):
            comes(net, wire, frame(target, number))


def test_qemu_refuses_by_class_and_command(device: Device, wire: Any) -> None:
    with Net(device("virtio-net-pci", netdev=wire.netdev)) as net:
        for kind, command, data in [(77, 0, b""), (spec.CTRL_RX, 99, b"\0"), (spec.CTRL_MQ, 0, b"\x09\x00")]:
            with pytest.raises(CommandRefused, match=f"class {kind} command {command}"):
                control_of(net).command(kind, command, data)


@pytest.mark.requirement("DRV-NET-97")
def test_an_announcement_asked_for_by_qemu(device: Device, wire: Any) -> None:
    with Net(device("virtio-net-pci", netdev=wire.netdev)) as net:
        fd = net.transport.config_fd
        assert fd is not None
        rounds = {"initial": 1, "max": 1, "rounds": 1, "step": 1}
        qemu_of(net).execute("announce-self", rounds)
        assert select.select([fd], [], [], PATIENCE)[0] == [fd]
        assert net.state.announce
        control_of(net).acknowledge_announce()
        assert not net.state.announce


def test_speed_and_duplex_of_qemu(device: Device, wire: Any) -> None:
    with Net(device("virtio-net-pci,speed=2500,duplex=half", netdev=wire.netdev)) as net:
        assert (net.state.speed, net.state.duplex) == (2500, "half")


@pytest.fixture
def tap(own_network: None) -> Iterator[socket.socket]:
    """A TAP of two queues in a network of the test's own, and a raw socket on the link."""
    for words in (
        *("tuntap add dev tap0 mode tap multi_queue vnet_hdr", "link set lo up"),
        *("link set tap0 addrgenmode none", "link set tap0 up"),
    ):
        subprocess.run(["ip", *words.split()], check=True)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_TEST)) as wire:
        wire.bind(("tap0", ETH_P_TEST))
        wire.settimeout(PATIENCE)
        yield wire


TAP = "tap,ifname=tap0,script=no,downscript=no,vhost=off,queues=2"


def udp(port: int, number: int = 0) -> bytes:
    ends = bytes((10, 0, 0, 1, 10, 0, 0, 2))
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 46, 1, 0, 64, 17, 0) + ends
    return OWN + OTHER + b"\x08\x00" + ip + struct.pack("!HHHHI", port, 53, 26, 0, number) + bytes(14)


@pytest.mark.requirement("DRV-NET-147", "DRV-NET-179", "DRV-NET-193", "DRV-NET-194")
def test_rss_and_reported_hashes_are_those_of_the_standard(device: Device, tap: socket.socket) -> None:
    """QEMU's own hash decides where a flow goes, and is reported; ours of the same packet agrees."""
    body = "virtio-net-pci,mq=on,rss=on,hash=on,vectors=6"
    transport = device(body, netdev=TAP, features="+rss,+hash_report")
    with Net(transport, queue_pairs=2, offloads=RECEIVE_OFFLOADS | SEND_OFFLOADS) as net:
        types = spec.HASH_TYPES["udpv4"]
        control_of(net).set_rss(Rss(KEY, [1, 0, 0, 1], types))
        expected: tuple[list[tuple[int, bytes]], ...] = ([], [])
        for port in range(1000, 1024):
            data = udp(port)
            value, _ = hash_of(data, KEY, types)
            expected[[1, 0, 0, 1][value % 4]].append((value, data))
            tap.send(data)
        assert all(expected)
        for pair, wanted in enumerate(expected):
            got: list[tuple[int, bytes]] = []
            while len(got) < len(wanted):
                assert net.pairs[pair].rx.wait(PATIENCE)
                burst = net.receive_burst(pair=pair, headers=True)
                assert burst.headers is not None
                for row in range(len(burst)):
                    if burst[row][:6] == OWN:
                        assert spec.HASH_REPORTS[burst.headers["hash_report"][row]] == "udpv4"
                        got.append((int(burst.headers["hash_value"][row]), burst[row]))
            assert got == wanted


@pytest.mark.parametrize("packed", ["off", "on"])
def test_frames_steered_to_a_full_queue_come_once_there_is_room(
    device: Device, tap: socket.socket, packed: str
) -> None:
    """QEMU stops reading a queue of its TAP when the receive queue that a frame is steered to is full.

    It goes on when the receive queue of the TAP queue's number is notified, which no rule asks for.
    So it is where QEMU steers by itself, as with reported hashes; else it may leave that to the kernel.
    """
    body = f"virtio-net-pci,mq=on,rss=on,hash=on,packed={packed},vectors=6"
    transport = device(body, netdev=TAP, features="+rss,+hash_report")
    with Net(transport, queue_pairs=2, rss=Rss(KEY, [1])) as net:
        assert net.link_up  # the register is read behind the posted write of DRIVER_OK
        receive = net.pairs[1].rx
        frames = {udp(1000 + number % 64, number) for number in range(3 * receive.size)}
        for data in frames:
            # As IP, or the kernel takes all of them for one flow, which is one queue of the TAP.
            tap.sendto(data, ("tap0", ETH_P_IP))
        end = time.monotonic() + PATIENCE
        while not is_used_up(receive):
            assert time.monotonic() < end
            time.sleep(0.01)
        while frames:
            assert receive.wait(PATIENCE)
            burst = net.receive_burst(pair=1)
            frames -= {burst[row] for row in range(len(burst))}


def is_used_up(queue: Virtqueue) -> bool:
    """Whether a queue that nothing was taken from yet has no buffer left for the device."""
    if queue.packed:
        return int(queue.desc["flags"][-1]) & 0x8080 == 0x8080
    return int(queue.device["idx"]) == queue.size


def test_queue_pairs_and_offloads_at_run_time(device: Device, tap: socket.socket) -> None:
    transport = device("virtio-net-pci,mq=on,vectors=6", netdev=TAP)
    with Net(transport, queue_pairs=2, offloads=RECEIVE_OFFLOADS | SEND_OFFLOADS) as net:
        control = control_of(net)
        control.set_offloads(0)
        control.set_offloads(net.features & sum(1 << bit for bit in spec.RECEIVE_OFFLOADS))
        control.set_pairs(1)
        tap.send(frame(OWN, 1))
        got: list[bytes] = []
        while frame(OWN, 1) not in got:
            more = net.receive_within(PATIENCE)
            assert more
            got += more
        control.set_pairs(2)
        outward = frame(b"\xff" * 6, 2)
        assert net.send([outward]) == 1
        assert tap.recv(2048) == outward
