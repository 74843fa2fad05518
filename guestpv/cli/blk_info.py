"""``guestpv blk info``: what a disk is and what it takes."""

from __future__ import annotations

from typing import Any

import click

from ..errors import GuestpvError
from .completion import complete_address
from .report import Report, reporting

MODELS = ("none", "host-managed", "host-aware")


@click.command(epilog="\b\nExample:\n  guestpv blk info 0000:03:00.0")
@click.argument("spec", shell_complete=complete_address)
@reporting
def info(report: Report, spec: str) -> None:
    """Show the disk SPEC: size, identity, cache, and the limits that requests are cut to.

    A function of the kernel's is taken for a moment and given back.
    """
    from ..spec import blk as spec_blk
    from ..spec import features as feat
    from .blk_disk import opened

    with opened(spec) as disk:
        try:
            identity = disk.get_id()
        except GuestpvError:
            identity = ""
        ranges = {
            name: {
                "refusal": limits.refusal,
                "max_sectors": limits.max_sectors,
                "max_ranges": limits.max_ranges,
            }
            for name in ("discard", "write_zeroes", "secure_erase")
            if (limits := getattr(disk.limits, name))
        }
        data: dict[str, Any] = {
            "device": disk.transport.name,
            "capacity": disk.capacity,
            "block_size": disk.block_size,
            "id": identity,
            "read_only": disk.read_only,
            "cache": "write-back" if disk.volatile_cache else "write-through",
            "queues": disk.most_queues,
            "size_max": disk.limits.size_max,
            "seg_max": disk.limits.seg_max,
            "zoned": MODELS[disk.model],
            **ranges,
            "features": feat.feature_names(feat.BLK, disk.features),
            "config": disk.config,
        }
        if disk.transport.has(spec_blk.F_LIFETIME):
            life = disk.get_lifetime()
            data["lifetime"] = {
                "pre_eol_info": life.pre_eol_info,
                "type_a": life.type_a,
                "type_b": life.type_b,
            }
    report.done(data, lambda: show(data))


def show(data: dict[str, Any]) -> None:
    """For a person."""
    from .counters import amount
    from .tables import console, pairs

    rows = [
        ("device", data["device"]),
        ("size", f"{amount(data['capacity'], 'B', 1024)} ({data['capacity']} bytes)"),
        ("block", f"{data['block_size']} bytes"),
        ("ID", data["id"] or "none"),
        ("cache", "read-only disk" if data["read_only"] else data["cache"]),
        ("queues", str(data["queues"])),
        ("request", f"{data['seg_max']} segments of {amount(data['size_max'], 'B', 1024)}"),
    ]
    for name in ("discard", "write_zeroes", "secure_erase"):
        limits = data[name]
        rows.append(
            (
                name.replace("_", " "),
                limits["refusal"] or f"{limits['max_ranges']} ranges of {limits['max_sectors']} sectors",
            )
        )
    rows += [("zones", data["zoned"]), ("features", " ".join(data["features"]))]
    console().print(pairs(rows))
