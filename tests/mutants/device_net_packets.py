"""Broken devices: packets, filters and commands of a network device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as other
from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.spec import net

from .device import mutant, replace
from .device_net import MANY, NET

FLAGS, KIND, SIZE, START, BUFFERS = 0, 1, 4, 6, 10


def on_put(function: SoftwareFunction, edit: Callable[[Any, Any], Any]) -> None:
    """Let ``edit(done, packet)`` change the (chain, length) pairs of a packet before they are shown."""

    def make(inner: Any) -> Any:
        def put(queue: Any, spare: Any, packet: Any) -> None:
            show = queue.complete_together
            queue.complete_together = lambda done: show(edit(done, packet) or done)
            try:
                inner(queue, spare, packet)
            finally:
                del queue.complete_together

        return put

    replace(function.model, "_put", make)


def header(function: SoftwareFunction, offset: int, value: Callable[[int], int], when: Any = None) -> None:
    """Let a byte of the header of received packets be ``value(the right one)``."""

    def edit(done: Any, packet: Any) -> None:
        if when is None or when(packet):
            view = done[0][0].writable[0]
            view[offset] = value(view[offset])

    on_put(function, edit)


def transmit(function: SoftwareFunction, change: Callable[[bytearray, bytes], bytes]) -> None:
    """Let ``change(header, frame)`` say what goes out."""
    replace(
        function.model,
        "_parse",
        lambda inner: lambda queue, head, frame: inner(queue, head, change(bytearray(head), frame)),
    )


@mutant("DEV-NET-216", spec=NET)
def headers_are_alone(function: SoftwareFunction) -> None:
    """A transmit buffer of four descriptors loses its first."""

    def make(inner: Any) -> Any:
        def send(queue: Any, chain: Any) -> None:
            if len(chain.elements) > 3:
                chain.readable.insert(0, chain.readable.pop(1))
                chain.readable.pop()
            inner(queue, chain)

        return send

    replace(function.model, "_transmit", make)


@mutant("DEV-NET-217", spec=NET)
def counts_what_it_sends(function: SoftwareFunction) -> None:
    """The used length of transmit buffers is that of the packet."""

    def make(inner: Any) -> Any:
        def send(queue: Any, chain: Any) -> None:
            tell = queue.complete
            queue.complete = lambda one, _=0: tell(one, one.readable_bytes)
            try:
                inner(queue, chain)
            finally:
                del queue.complete

        return send

    replace(function.model, "_transmit", make)


@mutant("DEV-NET-16", spec=NET)
def unknown_flags_are_errors(function: SoftwareFunction) -> None:
    """A packet with an unknown flag goes out empty."""
    transmit(function, lambda head, frame: bytes(60) if head[FLAGS] & 0xF0 else frame)


@mutant("DEV-NET-17", spec=NET)
def checksums_always(function: SoftwareFunction) -> None:
    """A checksum is written at csum_start + csum_offset whatever the flags say."""

    def change(head: bytearray, frame: bytes) -> bytes:
        at = head[START] + head[START + 2]
        return frame[:at] + b"\0\0" + frame[at + 2 :] if at else frame

    transmit(function, change)


@mutant("DEV-NET-22", spec=NET)
def believes_hdr_len(function: SoftwareFunction) -> None:
    """A packet with a hdr_len beyond its end goes out empty."""
    transmit(function, lambda head, frame: bytes(60) if head[3] > 8 else frame)


@mutant("DEV-NET-07", spec=MANY)
def the_mtu_counts_the_header(function: SoftwareFunction) -> None:
    """Frames are cut to mtu bytes with their Ethernet header."""
    transmit(function, lambda _, frame: frame[: function.model.config["mtu"]])  # type: ignore[index,arg-type]


@mutant("DEV-NET-211", "DEV-NET-212", spec=MANY)
def a_short_header(function: SoftwareFunction) -> None:
    """The frame begins two bytes early."""

    def edit(done: Any, _: Any) -> None:
        view = done[0][0].writable[0]
        view[10:62] = bytes(view[12:64])

    on_put(function, edit)


@mutant("DEV-NET-219", spec=NET)
def lengths_without_the_header(function: SoftwareFunction) -> None:
    """The used length of receive buffers leaves out the header."""
    on_put(function, lambda done, _: [(chain, length - 12) for chain, length in done])


@mutant("DEV-NET-40", spec=NET)
def always_valid(function: SoftwareFunction) -> None:
    """DATA_VALID is set without GUEST_CSUM."""
    header(function, FLAGS, lambda flags: flags | net.HDR_F_DATA_VALID)


@mutant("DEV-NET-61", "DEV-NET-215", spec=NET)
def unknown_gso_type(function: SoftwareFunction) -> None:
    """gso_type is 2 where it should be 0."""
    header(function, KIND, lambda kind: kind or 2)


@mutant("DEV-NET-67", spec=NET)
def rsc_without_asking(function: SoftwareFunction) -> None:
    """RSC_INFO is set."""
    header(function, FLAGS, lambda flags: flags | net.HDR_F_RSC_INFO)


@mutant("DEV-NET-36", "DEV-NET-31", "DEV-NET-37", spec=NET)
def no_number_of_buffers(function: SoftwareFunction) -> None:
    """num_buffers stays 0."""
    header(function, BUFFERS, lambda _: 0)


@mutant("DEV-NET-32", spec=NET)
def two_buffers_each(function: SoftwareFunction) -> None:
    """A packet takes a second buffer, without MRG_RXBUF, too."""

    def make(inner: Any) -> Any:
        def put(queue: Any, spare: Any, packet: Any) -> None:
            inner(queue, spare, packet)
            chain = queue.pop()
            if chain is not None:
                queue.complete(chain, 12)

        return put

    replace(function.model, "_put", make)


@mutant("DEV-NET-38", "DEV-NET-218", spec=NET)
def buffers_with_room(function: SoftwareFunction) -> None:
    """The buffers of a packet are not filled."""

    def edit(done: Any, _: Any) -> Any:
        return [(chain, length - 12 if len(done) > 1 else length) for chain, length in done]

    on_put(function, edit)


@mutant("DEV-NET-39", spec=NET)
def buffers_one_by_one(function: SoftwareFunction) -> None:
    """The first buffer of a packet is shown, and the rest with the next packet."""
    kept: list[Any] = []

    def edit(done: Any, _: Any) -> Any:
        first, later = kept + done[:1], done[1:]
        kept[:] = later
        return first

    on_put(function, edit)


@mutant("DEV-NET-222", spec=MANY)
def hashes_from_the_start(function: SoftwareFunction) -> None:
    """hash_report is not 0 before a hash was configured."""
    header(function, 16, lambda _: 1)


def segmentation(requirement: str, bit: int) -> None:
    def turn_on(function: SoftwareFunction) -> None:
        """The receive offload is on without being negotiated."""
        control: Any = function.model.control  # type: ignore[attr-defined]
        replace(
            control,
            "start",
            lambda inner: (
                lambda features: (
                    inner(features),
                    setattr(control, "offloads", control.offloads | 1 << bit),
                )
            ),
        )

    turn_on.__name__ = f"bit_{bit}_is_always_on"
    mutant(requirement, spec=NET)(turn_on)


segmentation("DEV-NET-42", net.F_GUEST_TSO4)
segmentation("DEV-NET-44", net.F_GUEST_TSO6)


def invented(requirement: str, kind: int, bits: int) -> None:
    def invent(function: SoftwareFunction) -> None:
        """gso_type has a value that was not negotiated."""
        header(function, KIND, lambda right: right | bits, lambda packet: len(packet.data) > 500)

    invent.__name__ = f"gso_type_{kind}_uninvited"
    mutant(requirement, spec=NET)(invent)


invented("DEV-NET-43", 3, net.GSO_UDP)
invented("DEV-NET-45", 5, net.GSO_UDP_L4)
invented("DEV-NET-46", 0x20, 0x20)


@mutant("DEV-NET-62", spec=NET)
def segments_without_checksums(function: SoftwareFunction) -> None:
    """NEEDS_CSUM is clear though gso_type is not NONE."""
    header(function, FLAGS, lambda flags: 0, lambda packet: packet.gso_type)


@mutant("DEV-NET-63", spec=NET)
def segments_of_no_size(function: SoftwareFunction) -> None:
    """gso_size is 0."""

    def edit(done: Any, _: Any) -> None:
        done[0][0].writable[0][SIZE : SIZE + 2] = b"\0\0"

    on_put(function, edit)


@mutant("DEV-NET-54", spec=NET)
def no_pseudo_header(function: SoftwareFunction) -> None:
    """The checksum field of a segment is 0 instead of the pseudo header sum."""

    def edit(done: Any, packet: Any) -> None:
        if packet.needs_csum:
            at = 12 + packet.csum_start + packet.csum_offset
            done[0][0].writable[0][at : at + 2] = b"\0\0"

    on_put(function, edit)


@mutant("DEV-NET-55", spec=NET)
def checksums_in_the_wrong_place(function: SoftwareFunction) -> None:
    """csum_start counts from behind the Ethernet header."""
    header(function, START, lambda start: start - 14, lambda packet: packet.needs_csum)


@mutant("DEV-NET-53", spec=NET)
def checksums_left_undone(function: SoftwareFunction) -> None:
    """A checksum that was left to do arrives so without GUEST_CSUM."""
    replace(
        function.model,
        "_adapted",
        lambda inner: (
            lambda packet: [other(packet, needs_csum=False)] if not packet.gso_type else inner(packet)
        ),
    )


@mutant("DEV-NET-49", spec=NET)
def ecn_is_lost(function: SoftwareFunction) -> None:
    """The ECN bit is left out."""
    header(function, KIND, lambda kind: kind & ~net.GSO_ECN)


def accepts(function: SoftwareFunction, change: Callable[[Any, bytes, bool], bool]) -> None:
    """Let ``change(control, frame, right answer)`` be the receive filter."""
    control: Any = function.model.control  # type: ignore[attr-defined]
    replace(control, "accepts", lambda inner: lambda data: change(control, data, inner(data)))


@mutant("DEV-NET-106", spec=NET)
def drops_tagged_frames(function: SoftwareFunction) -> None:
    """Tagged frames do not arrive without CTRL_VLAN."""
    accepts(function, lambda _, data, right: right and data[12:14] != b"\x81\x00")


@mutant("DEV-NET-107", spec=NET)
def vlan_table_is_empty(function: SoftwareFunction) -> None:
    """No tag is ever let through with CTRL_VLAN."""
    accepts(function, lambda control, data, right: right and not control.vlans)


@mutant("DEV-NET-228", spec=NET)
def vlan_table_is_full(function: SoftwareFunction) -> None:
    """Every tag is let through from the start."""
    accepts(function, lambda control, data, right: right or data[12:14] == b"\x81\x00")


@mutant("DEV-NET-103", spec=NET)
def address_table_does_nothing(function: SoftwareFunction) -> None:
    """Addresses of the table are no better than others."""
    accepts(function, lambda control, data, right: right and data[:6] not in control.table)


@mutant("DEV-NET-102", spec=NET)
def address_table_survives(function: SoftwareFunction) -> None:
    """The address table is kept over a reset."""
    control: Any = function.model.control  # type: ignore[attr-defined]

    def make(inner: Any) -> Any:
        def reset() -> None:
            kept = control.table
            inner()
            control.table = kept

        return reset

    replace(control, "reset", make)


def commands(function: SoftwareFunction, change: Callable[[int, int, Any], Any]) -> None:
    """Let ``change(class, command, right result)`` be the result of a command."""
    control: Any = function.model.control  # type: ignore[attr-defined]
    replace(
        control,
        "command",
        lambda inner: lambda request: change(request[0], request[1], inner(request)),
    )


def refuses(requirement: str, kind: int, command: int) -> None:
    def refuse(function: SoftwareFunction) -> None:
        """The command is refused."""
        commands(
            function,
            lambda given, verb, right: (False, "", "") if (given, verb) == (kind, command) else right,
        )

    refuse.__name__ = f"refuses_class_{kind}_command_{command}"
    mutant(requirement, spec=NET)(refuse)


refuses("DEV-NET-88", net.CTRL_RX, net.CTRL_RX_PROMISC)
refuses("DEV-NET-89", net.CTRL_RX, net.CTRL_RX_ALLMULTI)
refuses("DEV-NET-93", net.CTRL_RX, net.CTRL_RX_NOUNI)
refuses("DEV-NET-226", net.CTRL_MAC, net.CTRL_MAC_ADDR_SET)


@mutant("DEV-NET-224", spec=NET)
def accepts_everything(function: SoftwareFunction) -> None:
    """Commands that do not exist are answered with OK."""
    commands(function, lambda kind, verb, right: (True, "", ""))


@mutant("DEV-NET-223", spec=NET)
def refuses_with_255(function: SoftwareFunction) -> None:
    """A refusal is the byte 255."""
    edit_ack(function, lambda ack: 255 if ack else 0)


def edit_ack(function: SoftwareFunction, change: Callable[[int], int], length: int | None = None) -> None:
    """Change the status, and the used length, of control buffers."""

    def make(inner: Any) -> Any:
        def command(queue: Any, chain: Any) -> None:
            show = queue.complete

            def tell(one: Any, told: int = 0) -> None:
                one.writable[-1][-1] = change(one.writable[-1][-1])
                show(one, told if length is None else length)

            queue.complete = tell
            try:
                inner(queue, chain)
            finally:
                del queue.complete

        return command

    replace(function.model, "_command", make)


@mutant("DEV-NET-225", spec=NET)
def answers_of_no_length(function: SoftwareFunction) -> None:
    """The used length of control buffers is 0."""
    edit_ack(function, lambda ack: ack, 0)


@mutant("DEV-NET-104", "DEV-NET-227", spec=NET)
def address_set_in_vain(function: SoftwareFunction) -> None:
    """MAC_ADDR_SET leaves mac as it is."""
    model: Any = function.model

    def change(kind: int, verb: int, right: Any) -> Any:
        if (kind, verb) == (net.CTRL_MAC, net.CTRL_MAC_ADDR_SET):
            model.config["mac"] = b"\x52\x54\0\0\0\1"
        return right

    commands(function, change)


@mutant("DEV-NET-234", spec=NET)
def offloads_set_in_vain(function: SoftwareFunction) -> None:
    """GUEST_OFFLOADS_SET changes nothing."""
    control: Any = function.model.control  # type: ignore[attr-defined]

    def change(kind: int, verb: int, right: Any) -> Any:
        if kind == net.CTRL_GUEST_OFFLOADS:
            control.start(function.device.features)
        return right

    commands(function, change)


@mutant("DEV-NET-115", "DEV-NET-116", "DEV-NET-229", spec=MANY)
def all_pairs_at_once(function: SoftwareFunction) -> None:
    """Packets are spread over all receive queues from the start, and always."""
    model: Any = function.model
    turn = [0]

    def steer(_: Any) -> Any:
        turn[0] += 1
        queue = model.device.queues[2 * (turn[0] % 2)]
        return queue if queue.enabled else model.device.queues[0]

    model._steer = steer


@mutant("DEV-NET-109", spec=NET)
def announces_for_ever(function: SoftwareFunction) -> None:
    """ANNOUNCE_ACK does not clear the bit."""
    function.model.acknowledge_announce = lambda: None  # type: ignore[attr-defined]


@mutant("DEV-NET-06", spec=MANY)
def the_mtu_is_for_sending(function: SoftwareFunction) -> None:
    """Frames of any length arrive."""
    function.model._too_long = lambda packet: False  # type: ignore[attr-defined]


@mutant("DEV-NET-70", spec=NET)
def all_checksums_are_valid(function: SoftwareFunction) -> None:
    """DATA_VALID is set without a look at the checksum."""
    header(function, FLAGS, lambda flags: flags | net.HDR_F_DATA_VALID)
