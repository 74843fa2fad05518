"""Rules of network devices (5.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ...devices.evidence import Event
from ...devices.models.net import HEADER, Net
from ...devices.models.net_hash import TABLE_MOST
from ...devices.ring import Chain
from ...spec import features as ft
from ...spec import net
from ...spec.status import Status
from .rules import Answer, Answers, Watch, exercised, rule
from .rules_common import STATUS, goes_live, is_config, sets

F_GUEST_TUNNEL, F_GUEST_TUNNEL_CSUM, F_HOST_TUNNEL, F_HOST_TUNNEL_CSUM = 65, 66, 67, 68
TUNNEL_IPV4, TUNNEL_IPV6, HDR_F_TUNNEL_CSUM = 0x20, 0x40, 8
HOST_OFFLOADS: Final = (net.F_HOST_TSO4, net.F_HOST_TSO6, net.F_HOST_UFO, net.F_HOST_USO)

Needs = tuple[tuple[int, ...], ...]
"""All of these groups have to be accepted with a feature, of each group one bit."""

NEEDS: Final[dict[str, tuple[int, Needs]]] = {
    "DRV-NET-149": (net.F_GUEST_TSO4, ((net.F_GUEST_CSUM,),)),
    "DRV-NET-150": (net.F_GUEST_TSO6, ((net.F_GUEST_CSUM,),)),
    "DRV-NET-151": (net.F_GUEST_UFO, ((net.F_GUEST_CSUM,),)),
    "DRV-NET-152": (net.F_GUEST_USO4, ((net.F_GUEST_CSUM,),)),
    "DRV-NET-153": (net.F_GUEST_USO6, ((net.F_GUEST_CSUM,),)),
    "DRV-NET-154": (net.F_GUEST_ECN, ((net.F_GUEST_TSO4, net.F_GUEST_TSO6),)),
    "DRV-NET-155": (net.F_HOST_TSO4, ((net.F_CSUM,),)),
    "DRV-NET-156": (net.F_HOST_TSO6, ((net.F_CSUM,),)),
    "DRV-NET-157": (net.F_HOST_UFO, ((net.F_CSUM,),)),
    "DRV-NET-158": (net.F_HOST_USO, ((net.F_CSUM,),)),
    "DRV-NET-159": (net.F_HOST_ECN, ((net.F_HOST_TSO4, net.F_HOST_TSO6),)),
    "DRV-NET-160": (net.F_CTRL_RX, ((net.F_CTRL_VQ,),)),
    "DRV-NET-161": (net.F_CTRL_VLAN, ((net.F_CTRL_VQ,),)),
    "DRV-NET-162": (net.F_GUEST_ANNOUNCE, ((net.F_CTRL_VQ,),)),
    "DRV-NET-163": (net.F_MQ, ((net.F_CTRL_VQ,),)),
    "DRV-NET-164": (net.F_CTRL_MAC_ADDR, ((net.F_CTRL_VQ,),)),
    "DRV-NET-165": (net.F_RSS, ((net.F_CTRL_VQ,),)),
    "DRV-NET-166": (
        net.F_RSC_EXT,
        ((net.F_HOST_TSO4, net.F_HOST_TSO6, net.F_GUEST_TSO4, net.F_GUEST_TSO6),),
    ),
    "DRV-NET-171": (
        F_GUEST_TUNNEL,
        ((net.F_GUEST_TSO4,), (net.F_GUEST_TSO6,), (net.F_GUEST_USO4,), (net.F_GUEST_USO6,)),
    ),
    "DRV-NET-172": (F_GUEST_TUNNEL_CSUM, ((F_GUEST_TUNNEL,),)),
    "DRV-NET-173": (F_HOST_TUNNEL, ((net.F_HOST_TSO4,), (net.F_HOST_TSO6,), (net.F_HOST_USO,))),
    "DRV-NET-174": (F_HOST_TUNNEL_CSUM, ((F_HOST_TUNNEL,),)),
}
"""Requirement -> feature and what it is accepted with only (5.1.3.1)."""


def model_of(watch: Watch) -> Net | None:
    """The network card, if the device is one."""
    model = watch.device.model
    return model if isinstance(model, Net) else None


@rule(*NEEDS, on=STATUS)
def features_with_what_they_need(watch: Watch, event: Event, subject: Any) -> Answers:
    """Features are accepted together with those that they need."""
    if model_of(watch) is None or not sets(watch, event, Status.FEATURES_OK):
        return None
    accepted, answers = watch.device.accepted, dict[str, Answer]()
    for requirement, (bit, needs) in NEEDS.items():
        if not watch.offers(bit):
            continue
        lacking = [group for group in needs if not any(accepted >> other & 1 for other in group)]
        broken = accepted >> bit & 1 and lacking
        answers[requirement] = (
            f"{ft.feature_name(ft.NET, bit)} accepted without what it needs" if broken else True
        )
    return answers


# Configuration and queues

exercised("DRV-NET-01", on=STATUS, when=lambda w, e, s: model_of(w) and goes_live(w, e, s))


@rule("DRV-NET-175", on="read")
def fields_where_they_are(watch: Watch, event: Event, subject: Any) -> Answer:
    """A read of the configuration hits one field."""
    if model_of(watch) is None or not is_config(watch, event):
        return None
    field = net.CONFIG[event.name]
    across = event.offset + event.width > (field.end if field.count == 1 else event.offset + 1)
    return f"{event.width} bytes at {event.offset}" if across else True


@rule("DRV-NET-03", on="told mac", needs="user")
def the_address_is_the_devices(watch: Watch, event: Event, subject: Any) -> Answer:
    """The interface has the address that the device gives."""
    model = model_of(watch)
    if model is None or not watch.has(net.F_MAC):
        return None
    mac = model.config["mac"]
    assert isinstance(mac, bytes)
    said = event.value.to_bytes(6, "little")
    return True if said == mac else f"the driver has {said.hex(':')}, the device says {mac.hex(':')}"


@rule("DRV-NET-147", "DRV-NET-148", on="write queue_enable")
def queues_have_their_numbers(watch: Watch, event: Event, subject: Any) -> Answers:
    """Receive and transmit queues take turns, the control queue comes after them, with CTRL_VQ only."""
    model = model_of(watch)
    if model is None:
        return None
    pairs = model.pairs if watch.has(net.F_MQ) or watch.has(net.F_RSS) else 1
    if event.queue < 2 * pairs:
        return {"DRV-NET-147": True}
    if event.queue > 2 * pairs:
        return {"DRV-NET-147": f"queue {event.queue}, the control queue would be {2 * pairs}"}
    return {"DRV-NET-148": True if watch.has(net.F_CTRL_VQ) else f"queue {event.queue} without CTRL_VQ"}


# Packets


def transmits(watch: Watch, event: Event, chain: Chain) -> bool:
    """Whether a chain is a packet to be sent."""
    model = model_of(watch)
    if model is None or event.queue == model.control_index(watch.device.features):
        return False
    return event.queue % 2 == 1 and chain.readable_bytes >= HEADER.size


def header(watch: Watch, event: Event, chain: Chain) -> tuple[int, ...] | None:
    """flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers of a packet to be sent."""
    return HEADER.unpack(chain.read(HEADER.size)) if transmits(watch, event, chain) else None


def without(bit: int) -> Callable[[Watch, Event, Any], object]:
    """Packets to be sent where a feature was not negotiated."""
    return lambda watch, event, chain: transmits(watch, event, chain) and not watch.has(bit)


def with_gso(watch: Watch, event: Event, chain: Chain) -> bool:
    """Packets that the device has to cut."""
    found = header(watch, event, chain)
    return found is not None and bool(found[1] & ~net.GSO_ECN)


def with_checksum(watch: Watch, event: Event, chain: Chain) -> bool:
    """Packets whose checksum the device has to complete."""
    found = header(watch, event, chain)
    return found is not None and bool(found[0] & net.HDR_F_NEEDS_CSUM)


def to_send(*requirements: str, when: Callable[[Watch, Event, Any], object] = transmits) -> None:
    """Register requirements that packets exercise; the model finds the breach."""
    exercised(*requirements, on="pop", when=when, needs="ring")


to_send("DRV-NET-19", "DRV-NET-64", "DRV-NET-178", "DRV-NET-182", "DRV-NET-183")
to_send("DRV-NET-09", when=lambda w, e, chain: transmits(w, e, chain) and w.has(net.F_MTU))
to_send("DRV-NET-20", when=without(net.F_CSUM))
to_send("DRV-NET-24", when=without(net.F_HOST_TSO4))
to_send("DRV-NET-26", when=without(net.F_HOST_TSO6))
to_send("DRV-NET-28", when=without(net.F_HOST_UFO))
to_send("DRV-NET-30", when=without(net.F_HOST_USO))
to_send("DRV-NET-50", "DRV-NET-51", when=with_gso)
to_send("DRV-NET-48", when=with_checksum)


def receives(watch: Watch, event: Event, chain: Chain) -> bool:
    """Whether a chain is a receive buffer."""
    model = model_of(watch)
    return (
        model is not None
        and not event.queue % 2
        and event.queue != model.control_index(watch.device.features)
    )


exercised("DRV-NET-185", on="pop", when=receives, needs="ring")
exercised(
    "DRV-NET-71",
    on="pop",
    when=lambda w, e, chain: receives(w, e, chain) and w.has(net.F_MRG_RXBUF),
    needs="ring",
)


@rule(
    *("DRV-NET-34", "DRV-NET-37", "DRV-NET-38", "DRV-NET-40", "DRV-NET-42", "DRV-NET-43", "DRV-NET-44"),
    *("DRV-NET-49", "DRV-NET-61", "DRV-NET-62", "DRV-NET-65"),
    on="pop",
    needs="ring",
)
def headers_that_may_be(watch: Watch, event: Event, chain: Chain) -> Answers:
    """Flags and gso_type of a packet fit each other and the negotiated features."""
    found = header(watch, event, chain)
    if found is None:
        return None
    flags, kind = found[:2]
    tunnel, base = kind & (TUNNEL_IPV4 | TUNNEL_IPV6), kind & ~(TUNNEL_IPV4 | TUNNEL_IPV6 | net.GSO_ECN)
    outer = bool(flags & HDR_F_TUNNEL_CSUM)
    text = f"flags {flags:#x}, gso_type {kind:#x}"

    def unless(broken: object) -> Answer:
        return text if broken else True

    answers: dict[str, Answer] = {
        "DRV-NET-42": unless(tunnel and base == net.GSO_UDP),
        "DRV-NET-43": unless(tunnel == TUNNEL_IPV4 | TUNNEL_IPV6),
        "DRV-NET-65": unless(tunnel and flags & net.HDR_F_DATA_VALID),
        "DRV-NET-37": unless(outer and not (watch.has(F_HOST_TUNNEL) and watch.has(F_HOST_TUNNEL_CSUM))),
    }
    answers |= dict.fromkeys(("DRV-NET-38", "DRV-NET-44"), unless(outer and not tunnel))
    if not watch.has(F_HOST_TUNNEL):
        answers |= dict.fromkeys(("DRV-NET-34", "DRV-NET-61"), unless(tunnel))
    if not watch.has(F_HOST_TUNNEL_CSUM):
        answers |= dict.fromkeys(("DRV-NET-40", "DRV-NET-62"), unless(outer))
    if not any(map(watch.has, HOST_OFFLOADS)):
        answers["DRV-NET-49"] = unless(kind & ~net.GSO_ECN)
    return answers


# The control queue

CLASSES: Final[dict[int, tuple[str, ...]]] = {
    net.CTRL_RX: ("DRV-NET-90", "DRV-NET-188"),
    net.CTRL_MAC: ("DRV-NET-92", "DRV-NET-94", "DRV-NET-189"),
    net.CTRL_VLAN: ("DRV-NET-190",),
    net.CTRL_ANNOUNCE: ("DRV-NET-191",),
    net.CTRL_MQ: ("DRV-NET-101", "DRV-NET-102", "DRV-NET-192"),
    net.CTRL_GUEST_OFFLOADS: ("DRV-NET-114", "DRV-NET-199"),
}
"""Class of a command -> requirements that it exercises; the model finds the breach."""


def command_of(watch: Watch, event: Event, chain: Chain) -> tuple[int, int, bytes] | None:
    """Class, command and data of a control request."""
    model = model_of(watch)
    if model is None or event.queue != model.control_index(watch.device.features) or chain.readable_bytes < 2:
        return None
    data = chain.read()
    return data[0], data[1], data[2:]


@rule(
    "DRV-NET-186",
    "DRV-NET-187",
    *(name for names in CLASSES.values() for name in names),
    on="pop",
    needs="ring",
)
def commands(watch: Watch, event: Event, chain: Chain) -> Answers:
    """A command is of a class that the standard has."""
    found = command_of(watch, event, chain)
    if found is None:
        return None
    known: dict[str, Answer] = dict.fromkeys(("DRV-NET-186", *CLASSES.get(found[0], ())), True)
    wrong = found[0] > net.CTRL_RSS_CTX
    return known | {"DRV-NET-187": f"class {found[0]}" if wrong else True}


@rule("DRV-NET-91", on="pop", needs="ring")
def extra_modes(watch: Watch, event: Event, chain: Chain) -> Answer:
    """The further receive modes need CTRL_RX_EXTRA; the model finds the breach."""
    found = command_of(watch, event, chain)
    return True if found and found[0] == net.CTRL_RX and found[1] > net.CTRL_RX_ALLMULTI else None


@rule(
    *("DRV-NET-105", "DRV-NET-106", "DRV-NET-107", "DRV-NET-108", "DRV-NET-109", "DRV-NET-110"),
    *("DRV-NET-193", "DRV-NET-194", "DRV-NET-196", "DRV-NET-197", "DRV-NET-198"),
    on="pop",
    needs="ring",
)
def steering(watch: Watch, event: Event, chain: Chain) -> Answers:
    """RSS and hash configurations stay within the device's limits, and their length is right."""
    found, model = command_of(watch, event, chain), model_of(watch)
    if found is None or model is None or found[0] != net.CTRL_MQ or found[1] == net.CTRL_MQ_VQ_PAIRS_SET:
        return None
    data, rss = found[2], found[1] == net.CTRL_MQ_RSS_CONFIG
    types, mask = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:6], "little")
    key = 8 + 2 * (mask + 1) + 2 if rss else 12
    supported, most = model.config.get("supported_hash_types", 0), model.config.get("rss_max_key_size", 0)
    assert isinstance(supported, int)
    assert isinstance(most, int)
    length = data[key] if key < len(data) else 0
    undefined = types & ~sum(net.HASH_TYPES.values())
    answers: dict[str, Answer] = {
        "DRV-NET-110": f"hash types {types:#x}, the device has {supported:#x}"
        if types & ~supported
        else True,
        "DRV-NET-197": f"hash types {types:#x}" if undefined else True,
        "DRV-NET-196": f"a key of {length} bytes, at most {most}" if length > most else True,
    }
    if not rss:
        answers["DRV-NET-105"] = f"reserved bytes {data[4:12].hex()}" if any(data[4:12]) else True
        answers["DRV-NET-198"] = True
        return answers
    answers |= {
        "DRV-NET-106": True,
        "DRV-NET-107": True,
        "DRV-NET-193": True,
        "DRV-NET-108": f"a table of {mask + 1}" if mask + 1 & mask else True,
        "DRV-NET-109": f"indirection_table_mask {mask}" if mask >= TABLE_MOST else True,
        "DRV-NET-194": reserved_bits(data[6 : key - 2]),
    }
    return answers


def reserved_bits(data: bytes) -> Answer:
    """Receive queue ids leave bit 15 alone."""
    words = [int.from_bytes(data[at : at + 2], "little") for at in range(0, len(data), 2)]
    wrong = [word for word in words if word >> 15]
    return f"receive queue id {wrong[0]:#06x}" if wrong else True


@rule("DRV-NET-97", on=("interrupt configuration change", "pop", "settled"), needs="ring")
def announcements(watch: Watch, event: Event, subject: Any) -> Answer:
    """The driver acknowledges the wish that it announce itself."""
    model = model_of(watch)
    if model is None or not watch.has(net.F_GUEST_ANNOUNCE):
        return None
    if event.kind == "pop":
        found = command_of(watch, event, subject)
        return True if found and found[0] == net.CTRL_ANNOUNCE else None
    status = model.config["status"]
    assert isinstance(status, int)
    if event.kind == "settled" and watch.device.running and status & net.S_ANNOUNCE:
        return "the device asked for an announcement, ANNOUNCE_ACK did not come"
    return None
