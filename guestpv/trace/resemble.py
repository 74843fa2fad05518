"""The specification of a ``loopback:`` device that resembles the device of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlencode

from ..errors import Refused
from ..spec import blk, net
from ..spec import features as feat
from .record import Event
from .replay import check

SWITCHES: Final = {
    "packed": feat.F_RING_PACKED,
    "indirect_desc": feat.F_INDIRECT_DESC,
    "event_idx": feat.F_EVENT_IDX,
    "in_order": feat.F_IN_ORDER,
    "order_platform": feat.F_ORDER_PLATFORM,
    "notification_data": feat.F_NOTIFICATION_DATA,
    "ring_reset": feat.F_RING_RESET,
}
TYPES: Final = (feat.NET, feat.BLK, feat.CONSOLE, feat.RNG, feat.BALLOON)


def loopback_like(events: Sequence[Event], device: int = 0) -> str:
    """The record's own specification if it is of ``loopback:``, else one of the same type, features and size.

    Raises:
        Refused: there is no such device here.
    """
    opened = check(events, device)
    kind = opened.facts["device_type"]
    spec = str(opened.facts.get("spec", ""))
    if spec.startswith("loopback:"):
        # What the driver was asked for is in the record itself.
        body, _, query = spec.partition("?")
        kept = [
            part for part in query.split("&") if part and part.partition("=")[0] not in ("features", "mode")
        ]
        return body + ("?" + "&".join(kept) if kept else "")
    if kind not in TYPES:
        raise Refused(f"there is no loopback: device of type {kind}", hint="name a SPEC to replay it against")
    offered, config, largest = _seen(events, device)
    params: dict[str, Any] = {name: "on" if offered >> bit & 1 else "off" for name, bit in SWITCHES.items()}
    known = feat.DEVICE_FEATURES.get(kind, {})
    params["offer"] = ",".join(
        ("+" if offered >> bit & 1 else "-") + name.lower() for bit, name in sorted(known.items())
    )
    params["translated"] = "on" if opened.facts.get("translated") else "off"
    params["queue_size"] = largest or 256
    if kind == feat.BLK and (sectors := _number(config, blk.CONFIG["capacity"].offset, 8)):
        params["size"] = sectors * blk.SECTOR
    if kind == feat.NET and offered >> net.F_MAC & 1:
        params["mac"] = ":".join(f"{config.get(at, 0):02x}" for at in range(6))
    return f"loopback:{feat.DEVICE_NAMES[kind]}?{urlencode(params, safe=':,')}"


def _seen(events: Sequence[Event], device: int) -> tuple[int, dict[int, int], int]:
    """Offered features, bytes of configuration by offset, the largest queue size."""
    offered = word = largest = 0
    config: dict[int, int] = {}
    for event in events:
        if event.device != device or event.kind not in ("read", "write"):
            continue
        facts = event.facts
        name, value = facts["register"], facts["value"]
        if name == "device_feature_select":
            word = value
        elif name == "device_feature":
            offered |= value << 32 * word
        elif name == "queue_size" and event.kind == "read":
            largest = max(largest, value)
        elif facts["structure"] == "device" and event.kind == "read":
            for byte in range(facts["width"]):
                config[facts["offset"] + byte] = value >> 8 * byte & 0xFF
    return offered, config, largest


def _number(config: dict[int, int], offset: int, width: int) -> int:
    return sum(config.get(offset + byte, 0) << 8 * byte for byte in range(width))
