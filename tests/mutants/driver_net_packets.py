"""Network drivers with one mistake in what is in their packets (5.1.9.2, 5.1.9.3)."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from guestpv.conformance.driver.exercises_net import frame_from
from guestpv.conformance.net_ports import tcp
from guestpv.devices.scripted import RawQueue
from guestpv.drivers.net_port import NetPort
from guestpv.spec import features as ft
from guestpv.spec import net
from guestpv.transport.base import Transport

from .driver_bench import Bench, healthy, mutant
from .driver_net import CARD, HASHES, PAIRS, command, start, steer
from .driver_patched import patched

MAC = b"\x52\x54\0\0\0\1"
ECN = ft.mask((net.F_CSUM, net.F_HOST_TSO4, net.F_HOST_TSO6, net.F_HOST_ECN))
STEERED = "net?pairs=2"
SMALL = "net?mtu=1000"


def packet(queue: RawQueue, frame: bytes, length: int = 12, **fields: int) -> None:
    """Send a frame behind a header of ``length`` bytes."""
    names = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset", "num_buffers")
    head = struct.pack("<BBHHHHH", *(fields.get(name, 0) for name in names)).ljust(length, b"\0")[:length]
    queue.add([queue.buffer(length + len(frame), head + frame)], [])
    queue.kick()


# How long the header is


@healthy(CARD)
def a_header_of_12_bytes(b: Bench) -> None:
    packet(start(b)[1], frame_from(MAC, 1, 60))


@healthy(CARD)
def a_header_of_20_bytes_with_hashes(b: Bench) -> None:
    packet(start(b, HASHES, 2)[1], frame_from(MAC, 1, 60), 20)


@mutant("DRV-NET-18", "DRV-NET-19", "DRV-NET-72", spec=CARD)
def a_legacy_header(b: Bench) -> None:
    packet(start(b)[1], frame_from(MAC, 1, 60), 10)


@mutant("DRV-NET-18", "DRV-NET-72", "DRV-NET-179", spec=CARD)
def a_header_without_its_hash(b: Bench) -> None:
    packet(start(b, HASHES, 2)[1], frame_from(MAC, 1, 60))


# Checksums and segmentation


def offloaded(b: Bench, *, v6: bool = False, cwr: bool = False, spoil: int = 0, **fields: int) -> None:
    """A TCP packet that is to be checksummed, or cut where ``fields`` say so."""
    frame, place = tcp(bytes(400), v6=v6)
    data = bytearray(frame)
    data[place + 13] |= 0x80 * cwr
    data[place + 16] ^= spoil
    packet(start(b, ECN)[1], bytes(data), flags=1, csum_start=place, csum_offset=16, **fields)


@healthy(CARD)
def checksums_left_to_the_device(b: Bench) -> None:
    offloaded(b)


@healthy(CARD)
def checksums_left_to_the_device_over_ipv6(b: Bench) -> None:
    offloaded(b, v6=True)


@healthy(CARD)
def cwr_is_told(b: Bench) -> None:
    offloaded(b, cwr=True, gso_type=net.GSO_TCPV4 | net.GSO_ECN, gso_size=100)


@mutant("DRV-NET-47", spec=CARD)
def no_pseudo_header(b: Bench) -> None:
    offloaded(b, spoil=0x55)


@mutant("DRV-NET-32", spec=CARD)
def cwr_is_not_told(b: Bench) -> None:
    offloaded(b, v6=True, cwr=True, gso_type=net.GSO_TCPV6, gso_size=100)


# Room for what comes in


def fed(b: Bench, *sizes: int, merge: bool = False) -> None:
    """Receive buffers of these sizes, and a packet of the MTU."""
    rx = start(b, ft.mask((net.F_MTU, *((net.F_MRG_RXBUF,) if merge else ()))))[0]
    for size in sizes:
        b.one(rx, size)
    b.model.deliver(frame_from(MAC, 1, 1000))
    b.watch.settle()


@healthy(SMALL)
def room_in_one_buffer(b: Bench) -> None:
    fed(b, 1026)


@healthy(SMALL)
def room_in_several_buffers(b: Bench) -> None:
    fed(b, 300, 300, 300, 300, merge=True)


@mutant("DRV-NET-08", spec=SMALL)
def buffers_without_room_for_the_header(b: Bench) -> None:
    fed(b, 1014)


@mutant("DRV-NET-08", spec=SMALL)
def too_few_buffers(b: Bench) -> None:
    fed(b, 300, 300, merge=True)


# Queues


def paired(b: Bench, features: int = 0) -> list[RawQueue]:
    """Go live with two pairs of queues."""
    return b.start(ft.mask((net.F_MQ, net.F_CTRL_VQ)) | features, dict.fromkeys(range(5), 8))


@healthy(PAIRS)
def sends_on_the_first_pair_at_first(b: Bench) -> None:
    packet(paired(b)[1], frame_from(MAC, 1, 60))


@healthy(STEERED)
def sends_on_as_many_queues_as_rss_says(b: Bench) -> None:
    queues = paired(b, 1 << net.F_RSS)
    command(b, queues[4], net.CTRL_MQ, net.CTRL_MQ_RSS_CONFIG, steer(table=(0, 1), mask=1))
    packet(queues[1], frame_from(MAC, 1, 60))


@mutant("DRV-NET-104", spec=PAIRS)
def sends_above_the_pairs_that_it_set(b: Bench) -> None:
    queues = paired(b)
    command(b, queues[4], net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, b"\1\0")
    packet(queues[3], frame_from(MAC, 1, 60))


@mutant("DRV-NET-195", spec=STEERED)
def sends_above_max_tx_vq(b: Bench) -> None:
    queues = paired(b, 1 << net.F_RSS)
    command(b, queues[4], net.CTRL_MQ, net.CTRL_MQ_RSS_CONFIG, steer(table=(0, 1), mask=1))
    packet(queues[3], frame_from(MAC, 1, 60))


@mutant("DRV-NET-194", "DRV-NET-107", spec=STEERED)
def sets_the_reserved_bit_of_a_queue_id(b: Bench) -> None:
    queues = paired(b, 1 << net.F_RSS)
    command(b, queues[4], net.CTRL_MQ, net.CTRL_MQ_RSS_CONFIG, steer(table=(0x8001,)))


# Our own driver with one function broken


def received(patch: pytest.MonkeyPatch, keep: Any) -> None:
    """Let ``keep(frames with headers)`` be what comes in."""
    receive = NetPort.receive

    def taken(self: NetPort, most: int = 64, *, headers: bool = False, out: Any = None) -> Any:
        # The caller's own table has no room for headers.
        return keep(receive(self, most, headers=True))

    patch.setattr(NetPort, "receive", taken)


def without(frames: Any, wrong: Any) -> Any:
    """The frames for whose header ``wrong`` is not true."""
    kept = ~np.asarray(wrong, bool)
    return type(frames)(frames.data[kept], frames.lengths[kept], frames.headers[kept])


@patched("DRV-NET-74", scenario="unknown-flags", kind="net")
def minds_unknown_flags(patch: pytest.MonkeyPatch) -> None:
    received(patch, lambda frames: without(frames, frames.headers["flags"] & 0x80))


@patched("DRV-NET-79", scenario="wrong-hdr-len", kind="net")
def believes_hdr_len(patch: pytest.MonkeyPatch) -> None:
    received(patch, lambda frames: without(frames, frames.headers["hdr_len"] > frames.lengths))


@patched("DRV-NET-77", scenario="stray-checksum", kind="net")
def completes_checksums_unasked(patch: pytest.MonkeyPatch) -> None:
    def complete(frames: Any) -> Any:
        for row, head in enumerate(frames.headers):
            frames.data[row, int(head["csum_start"]) + int(head["csum_offset"])] ^= 0xFF
        return frames

    received(patch, complete)


@patched("DRV-NET-184", scenario="merged-packets", kind="net")
def puts_the_last_buffer_first(patch: pytest.MonkeyPatch) -> None:
    def swap(frames: Any) -> Any:
        for row, length in enumerate(frames.lengths):
            if length > 4096:
                frames.data[row, :length] = np.roll(frames.data[row, :length], 100)
        return frames

    received(patch, swap)


def read_otherwise(*breaks: str, name: str, config: str, value: Any) -> None:
    """``value(right value)`` is what the driver takes a field of the configuration for."""

    def misread(patch: pytest.MonkeyPatch) -> None:
        read = Transport.config

        def other(self: Transport, layout: Any, *names: str) -> Any:
            values = read(self, layout, *names)
            if isinstance(values.get(config), int):
                values = dict(values) | {config: value(values[config])}
            return values

        patch.setattr(Transport, "config", other)

    misread.__name__ = name
    patched(*breaks, scenario="link-states", kind="net")(misread)


read_otherwise("DRV-NET-176", name="every_bit_of_status_counts", config="status", value=lambda s: int(s == 1))
read_otherwise(
    "DRV-NET-11",
    name="large_speeds_are_wrapped",
    config="speed",
    value=lambda s: s if s == 0xFFFFFFFF else s & 0x7FFFFFFF,
)
read_otherwise(
    "DRV-NET-12", name="other_duplex_is_full", config="duplex", value=lambda d: d if d in (0, 0xFF) else 1
)
read_otherwise(
    "DRV-NET-177",
    name="duplex_is_the_other_way_round",
    config="duplex",
    value=lambda d: {0: 1, 0xFF: 2}.get(d, d),
)
