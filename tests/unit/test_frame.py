"""Checksums that a device vouches for but does not put into the frame."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from guestpv.core._core import ffi, lib

from guestpv.spec import net

TCP, UDP = 6, 17
ETHERNET = bytes(12)
PAYLOAD = b"an odd number of bytes, 37 of them..."


def ones_complement(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2 + len(data) % 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet(
    version: int, protocol: int, *, tag: bytes = b"", fragment: int = 0, options: bytes = b""
) -> bytes:
    """An Ethernet frame with an empty transport checksum."""
    transport = (bytes(12) + b"\x50" + bytes(7) if protocol == TCP else bytes(8)) + PAYLOAD
    source, target = bytes(range(1, 17)), bytes(range(101, 117))
    if version == 4:
        head = 20 + len(options)
        ip = struct.pack(
            "!BBHHHBBH4s4s", 0x40 | head // 4, 0, head + len(transport), 1, fragment, 64, protocol, 0,
            source[:4], target[:4],
        )  # fmt: skip
        return ETHERNET + tag + b"\x08\x00" + ip + options + transport
    ip = struct.pack("!IHBB16s16s", 0x60000000, len(transport), protocol, 64, source, target)
    return ETHERNET + tag + b"\x86\xdd" + ip + transport


def pseudo_header(version: int, protocol: int, transport: bytes) -> bytes:
    width = 4 if version == 4 else 16
    return (
        bytes(range(1, 1 + width))
        + bytes(range(101, 101 + width))
        + struct.pack("!HH", protocol, len(transport))
    )


def treat(
    frame: bytes, flags: int, size: int | None = None, told: tuple[int, ...] = (0,) * 6
) -> tuple[int, Any, bytes]:
    """What becomes of a frame with these flags; ``told`` is the rest of its header."""
    header = ffi.new("uint8_t[12]", struct.pack("<BBHHHHH", flags, *told))
    data = ffi.new("uint8_t[]", frame)
    changed = lib.gpv_leave_checksum_open(header, data, len(frame) if size is None else size)
    return changed, struct.unpack("<BBHHHHH", bytes(ffi.buffer(header))), bytes(ffi.buffer(data, len(frame)))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("tag", [b"", b"\x81\x00\x00\x05"], ids=["plain", "vlan"])
@pytest.mark.parametrize("options", [b"", bytes(8)], ids=["short", "options"])
def test_finishing_the_open_checksum_gives_the_true_one(
    version: int, protocol: int, tag: bytes, options: bytes
) -> None:
    frame = packet(version, protocol, tag=tag, options=options if version == 4 else b"")
    changed, (flags, _, _, _, start, offset, _), data = treat(frame, net.HDR_F_DATA_VALID)
    assert (changed, flags) == (1, net.HDR_F_NEEDS_CSUM)
    transport = frame[start:]
    expected = 0xFFFF ^ ones_complement(pseudo_header(version, protocol, transport) + transport)
    # What the kernel does with NEEDS_CSUM: the sum from csum_start to the end, with what stands there.
    finished = 0xFFFF ^ ones_complement(data[start:])
    assert finished == expected
    assert data[: start + offset] == frame[: start + offset]
    assert data[start + offset + 2 :] == frame[start + offset + 2 :]


@pytest.mark.parametrize(
    ("frame", "flags"),
    [
        (packet(4, TCP), 0),
        (packet(4, TCP), net.HDR_F_NEEDS_CSUM),
        (packet(4, TCP), net.HDR_F_NEEDS_CSUM | net.HDR_F_DATA_VALID),
        (packet(4, 1), net.HDR_F_DATA_VALID),
        (packet(4, UDP, fragment=0x2000), net.HDR_F_DATA_VALID),
        (packet(4, UDP, fragment=0x0005), net.HDR_F_DATA_VALID),
        (ETHERNET + b"\x08\x06" + bytes(60), net.HDR_F_DATA_VALID),
    ],
    ids=["no flag", "needs", "both", "icmp", "first fragment", "later fragment", "arp"],
)
def test_every_other_frame_is_left_alone(frame: bytes, flags: int) -> None:
    changed, header, data = treat(frame, flags)
    assert (changed, header[0], data) == (0, flags, frame)


@pytest.mark.parametrize("version", [4, 6])
def test_a_frame_cut_anywhere_is_never_written_beyond_its_end(version: int) -> None:
    frame = packet(version, UDP)
    for size in range(len(frame)):
        _, _, data = treat(frame, net.HDR_F_DATA_VALID, size)
        assert data[size:] == frame[size:]


RSC = net.HDR_F_RSC_INFO


@pytest.mark.requirement("DRV-NET-77")
@pytest.mark.parametrize("flags", [RSC, RSC | net.HDR_F_DATA_VALID, RSC | net.HDR_F_NEEDS_CSUM])
@pytest.mark.parametrize("version", [4, 6])
def test_joined_segments_are_described_so_that_they_can_be_cut_again(version: int, flags: int) -> None:
    """csum_start tells their number, csum_offset duplicate acknowledgements (5.1.9.4)."""
    kind = net.GSO_TCPV4 if version == 4 else net.GSO_TCPV6
    frame = packet(version, TCP)
    changed, header, data = treat(frame, flags, told=(kind, 0, 0, 3, 5, 1))
    start = 34 if version == 4 else 54
    assert changed == 1
    assert header == (net.HDR_F_NEEDS_CSUM, kind, 0, -(-len(PAYLOAD) // 3), start, 16, 1)
    assert data[start + 16 : start + 18] != bytes(2)


def test_a_size_that_the_device_gave_is_kept_and_a_lone_segment_is_none() -> None:
    _, header, _ = treat(packet(4, TCP), RSC, told=(net.GSO_TCPV4, 0, 1448, 3, 0, 1))
    assert header[3] == 1448
    _, header, _ = treat(packet(4, TCP), RSC, told=(net.GSO_TCPV4, 0, 0, 1, 0, 1))
    assert header[1] == net.GSO_NONE


@pytest.mark.parametrize("frame", [b"", bytes(14), bytes(60), packet(4, 47), packet(4, TCP)[:40]])
def test_what_cannot_have_been_joined_is_refused(frame: bytes) -> None:
    changed, _, data = treat(frame, RSC, told=(net.GSO_TCPV4, 0, 0, 3, 0, 1))
    assert (changed, data) == (-1, frame)


@pytest.mark.requirement("DRV-NET-79")
@pytest.mark.parametrize(("told", "kept"), [(0, 0), (13, 0), (14, 14), (60, 60), (61, 0), (0xFFFF, 0)])
def test_a_header_length_that_cannot_be_is_forgotten(told: int, kept: int) -> None:
    header = ffi.new("uint8_t[12]", struct.pack("<BBHHHHH", 0, 0, told, 1, 2, 3, 4))
    lib.gpv_forget_wrong_length(header, 60)
    assert struct.unpack("<BBHHHHH", bytes(ffi.buffer(header))) == (0, 0, kept, 1, 2, 3, 4)
