"""What a network device says of itself (5.1.4), and what of that cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ..errors import DeviceViolation
from ..spec import net as spec
from ..transport.base import Transport

DEFAULT_MTU = 1500


@dataclass(frozen=True, slots=True)
class NetConfig:
    """Device configuration, read consistently and checked; None where the feature is missing.

    Attributes:
        mac: 6 bytes, unicast.
        max_pairs: queue pairs that the device has, 1 without MQ and RSS.
        mtu: bytes of payload.
        rss_key_size: longest Toeplitz key in bytes.
        rss_table_length: most entries of the indirection table.
        hash_types: mask of ``spec.HASH_TYPES`` that the device can hash over.
        tunnel_types: mask of encapsulations whose inner header it can hash over.
    """

    mac: bytes | None = None
    max_pairs: int = 1
    mtu: int | None = None
    rss_key_size: int = 0
    rss_table_length: int = 0
    hash_types: int = 0
    tunnel_types: int = 0

    @classmethod
    def read(cls, transport: Transport) -> Self:
        """The configuration of a negotiated device.

        Raises:
            DeviceViolation: a field has a value that the standard excludes; the message names it.
        """
        values = transport.config(spec.CONFIG)

        def number(name: str) -> int | None:
            value = values.get(name)
            return value if isinstance(value, int) else None

        def require(holds: bool, message: str, requirement: str = "", section: str = "5.1.4.1") -> None:
            if not holds:
                raise DeviceViolation(message, requirement=requirement, section=section, where=transport.name)

        mac = values.get("mac")
        if isinstance(mac, bytes):
            require(not mac[0] & 1, f"mac is {mac.hex(':')}, a multicast address", section="5.1.4")
            require(any(mac), "mac is 00:00:00:00:00:00", section="5.1.4")
        pairs, mtu = number("max_virtqueue_pairs"), number("mtu")
        if pairs is not None:
            require(
                1 <= pairs <= spec.MQ_PAIRS_MAX,
                f"max_virtqueue_pairs is {pairs}, outside 1 to {spec.MQ_PAIRS_MAX}",
                "DEV-NET-02",
            )
        if mtu is not None:
            require(mtu >= spec.MTU_MIN, f"mtu is {mtu}, outside {spec.MTU_MIN} to 65535", "DEV-NET-03")
        key, table = number("rss_max_key_size"), number("rss_max_indirection_table_length")
        if key is not None:
            require(key >= spec.RSS_KEY_MIN, f"rss_max_key_size is {key}, below 40", "DEV-NET-08")
        if table is not None:
            require(
                table >= spec.RSS_TABLE_MIN,
                f"rss_max_indirection_table_length is {table}, below 128",
                "DEV-NET-09",
            )
        known = sum(spec.HASH_TYPES.values())
        return cls(
            mac=mac if isinstance(mac, bytes) else None,
            max_pairs=pairs or 1,
            mtu=mtu,
            rss_key_size=key or 0,
            rss_table_length=table or 0,
            hash_types=(number("supported_hash_types") or 0) & known,
            tunnel_types=number("supported_tunnel_types") or 0,
        )


@dataclass(frozen=True, slots=True)
class LinkState:
    """What can change while the device runs (5.1.4).

    Attributes:
        up: whether the link is up; always True without STATUS (DRV-NET-05).
        announce: the device asks the driver to announce itself to the network.
        speed: Mbit/s, None where unknown.
        duplex: ``full``, ``half``, or None where unknown.
    """

    up: bool = True
    announce: bool = False
    speed: int | None = None
    duplex: str | None = None

    @classmethod
    def read(cls, transport: Transport) -> Self:
        """The state of a negotiated device, now."""
        values = transport.config(spec.CONFIG, "status", "speed", "duplex")
        status, speed, duplex = (values.get(name) for name in ("status", "speed", "duplex"))
        return cls(
            up=not isinstance(status, int) or bool(status & spec.S_LINK_UP),
            announce=isinstance(status, int) and bool(status & spec.S_ANNOUNCE),
            speed=speed if isinstance(speed, int) and speed <= spec.SPEED_MAX else None,
            duplex={0: "half", 1: "full"}.get(duplex) if isinstance(duplex, int) else None,
        )
