"""Rules about what is in the packets of network drivers (5.1.9.2, 5.1.9.3)."""

from __future__ import annotations

from typing import Final

from ...devices.evidence import Event
from ...devices.models.packet import ETHERNET, IPV4, IPV6, TCP, UDP, Packet, checksum, network_header
from ...devices.ring import Chain
from ...spec import net
from .rules import Answer, Answers, Watch, presented, rule
from .rules_net import header, model_of, transmits

HEADERS: Final = (10, 12, 20, 24, 32)
"""Lengths that the packet header has with some features, and had in the legacy interface."""
CHECKSUMS: Final = {16: TCP, 6: UDP}
"""csum_offset -> protocol."""
CWR: Final = 0x80

# What a driver gives its user; exercises look.
presented(*(f"DRV-NET-{number}" for number in (11, 12, 74, 77, 79, 176, 177, 184)), needs="user")


@rule("DRV-NET-18", "DRV-NET-72", "DRV-NET-179", on="pop", needs="ring")
def the_frame_is_behind_its_header(watch: Watch, event: Event, chain: Chain) -> Answers:
    """A frame from the driver's own address begins where the negotiated header ends."""
    model = model_of(watch)
    if model is None or not transmits(watch, event, chain):
        return None
    mac, data, size = model.config["mac"], chain.read(), model.header_size

    def has_source(length: int) -> bool:
        return data[length + 6 : length + 12] == mac

    other = [length for length in HEADERS if has_source(length)]
    if not other:
        return None
    right = has_source(size)
    answer: Answer = True if right else f"the header has {other[0]} bytes, {size} were negotiated"
    rules = ("DRV-NET-18", "DRV-NET-72", *(("DRV-NET-179",) if watch.has(net.F_HASH_REPORT) else ()))
    return dict.fromkeys(rules, answer)


@rule("DRV-NET-103", "DRV-NET-104", "DRV-NET-195", on="pop", needs="ring")
def transmit_queues_in_use(watch: Watch, event: Event, chain: Chain) -> Answers:
    """Packets are on the transmit queues that the last command allows; the model finds the breach."""
    model = model_of(watch)
    if model is None or not transmits(watch, event, chain):
        return None
    if not (watch.has(net.F_MQ) or watch.has(net.F_RSS)):
        return None
    return {model.control.transmits[1]: True}


def pseudo_sums(frame: bytes, start: int, offset: int, segmented: bool) -> set[int]:
    """Sums of the pseudo header that may be in the checksum field; empty where the frame says too little.

    For a packet that is to be cut the length may be that of the whole, or left out.
    """
    kind, at = network_header(frame)
    protocol = CHECKSUMS.get(offset)
    if kind == IPV4 and len(frame) >= at + 20:
        head = 4 * (frame[at] & 15)
        named, addresses = frame[at + 9], frame[at + 12 : at + 20]
        length = int.from_bytes(frame[at + 2 : at + 4], "big") - head
    elif kind == IPV6 and len(frame) >= at + 40:
        head, named, addresses = 40, frame[at + 6], frame[at + 8 : at + 40]
        length = int.from_bytes(frame[at + 4 : at + 6], "big")
    else:
        return set()
    if named != protocol or start != at + head:
        return set()
    lengths = {length, len(frame) - start, 0} if segmented else {length}
    return {
        checksum(addresses + number.to_bytes(4, "big") + named.to_bytes(4, "big")) ^ 0xFFFF
        for number in lengths
    }


@rule("DRV-NET-47", on="pop", needs="ring")
def the_checksum_field_has_the_pseudo_header(watch: Watch, event: Event, chain: Chain) -> Answer:
    """With NEEDS_CSUM the checksum field of a TCP or UDP packet holds the sum of its pseudo header."""
    found, model = header(watch, event, chain), model_of(watch)
    if found is None or model is None or not found[0] & net.HDR_F_NEEDS_CSUM:
        return None
    frame = chain.read(offset=model.header_size)
    start, offset = found[4:6]
    sums = pseudo_sums(frame, start, offset, bool(found[1] & ~net.GSO_ECN))
    at = start + offset
    if not sums or at + 2 > len(frame):
        return None
    value = int.from_bytes(frame[at : at + 2], "big")
    # 0 and 0xffff are one number in ones' complement.
    if value % 0xFFFF in {one % 0xFFFF for one in sums}:
        return True
    return f"the checksum field has {value:#06x}, the pseudo header's sum is {min(sums):#06x}"


@rule("DRV-NET-32", on="pop", needs="ring")
def ecn_is_told(watch: Watch, event: Event, chain: Chain) -> Answer:
    """A TCP packet with CWR that the device has to cut carries the ECN bit in gso_type."""
    found, model = header(watch, event, chain), model_of(watch)
    if found is None or model is None or not watch.has(net.F_HOST_ECN):
        return None
    if found[1] & ~net.GSO_ECN not in (net.GSO_TCPV4, net.GSO_TCPV6):
        return None
    flags = chain.read(1, model.header_size + found[4] + 13)
    if not flags or not flags[0] & CWR:
        return None
    return True if found[1] & net.GSO_ECN else f"gso_type {found[1]:#x} of a packet with CWR"


@rule("DRV-NET-08", on=("fill packet", "drop packet", "settled"), needs="ring")
def room_for_the_mtu(watch: Watch, event: Event, packet: Packet) -> Answer:
    """A packet of the MTU that was negotiated has room in the receive buffers."""
    model = model_of(watch)
    if model is None or not watch.has(net.F_MTU):
        return None
    mtu = model.config["mtu"]
    assert isinstance(mtu, int)
    if event.kind == "settled":
        late = [one for one in model.waiting if len(one.data) <= mtu + ETHERNET and not one.gso_type]
        return f"a packet of {len(late[0].data)} bytes has no receive buffers" if late else None
    if packet.gso_type or len(packet.data) > mtu + ETHERNET:
        return None
    if event.kind == "drop":
        return f"receive buffers are too small for {len(packet.data)} bytes"
    return True if len(packet.data) == mtu + ETHERNET else None
