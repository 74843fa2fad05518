"""All the rules: importing this registers them. And why some requirements have none."""

from typing import Final

from . import (
    rules_balloon,
    rules_blk,
    rules_common,
    rules_net,
    rules_net_packets,
    rules_packed,
    rules_pci,
    rules_ring,
    rules_split,
)

__all__ = [
    "REASONS",
    "rules_balloon",
    "rules_blk",
    "rules_common",
    "rules_net",
    "rules_net_packets",
    "rules_packed",
    "rules_pci",
    "rules_ring",
    "rules_split",
]

REASONS: Final = {
    "DRV-FEAT-06": "every feature that the standard has can be carried over PCI",
    "DRV-FEAT-10": "every feature that the standard has can be carried over PCI",
    "DRV-FEAT-25": "the strict device has no virtual functions",
    "DRV-FEAT-28": "the sum of the rows about each of these features",
    "DRV-SPLIT-55": "a used_event further on is a wish for fewer notifications, which a driver may have",
    "DRV-PACKED-30": "what lies behind the next used position cannot be told from what the device left there",
    "DRV-PACKED-31": "a list without NEXT is two lists, which is another driver's right",
    "DRV-PACKED-32": "ids of the other descriptors of a list are reserved, and may be anything",
    "DRV-BLK-05": "what a driver supports shows only when it meets a disk of that model",
    "DRV-BLK-08": "whether a driver can handle a host-managed disk is known to the driver only",
    "DRV-BLK-09": "whether a driver can handle a host-managed disk is known to the driver only",
    "DRV-BLK-24": "whether a driver relies on stability is known to the driver only",
    "DRV-BLK-27": "whether a driver relies on single segments is known to the driver only",
    "DRV-BLK-28": "sectors are of 512 bytes, so every number is such an address",
    "DRV-BLK-29": "every sector of the disk lies in a zone; beyond it DRV-BLK-13 applies",
    "DRV-BALLOON-03": "what a driver does with its pages' content is not seen",
    "DRV-BALLOON-10": "what a driver does with its pages' content is not seen",
    "DRV-BALLOON-12": "what a driver does with its pages' content is not seen",
    "DRV-BALLOON-31": "what a driver does with its pages' content is not seen",
    "DRV-BALLOON-32": "what a driver does with its pages' content is not seen",
    "DRV-BALLOON-34": "what a driver does with its pages' content is not seen",
    "DRV-BALLOON-37": "what a driver does with its pages' content is not seen",
    "DRV-BALLOON-51": "equal values may be fresh ones",
    "DRV-CONF-07": "the strict device has no legacy interface",
    "DRV-NET-46": "what a driver validated before it sends is known to the driver only",
    "DRV-NET-80": "a frame is handed on with its checksum, whoever relies on it",
    **dict.fromkeys(
        [f"DRV-NET-{n}" for n in (35, 36, 39, 41, 55, 56, 58, 59, 60, 81, 82, 83, 84, 85, 86, 180)],
        "the strict device does not use tunnels itself",
    ),
}
"""Requirement -> why no rule looks at it."""
