"""``guestpv info``: what one device offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .completion import complete_address
from .report import Report, reporting

if TYPE_CHECKING:
    from ..opener import Spec
    from ..pci.capabilities import VirtioCapability
    from ..transport.base import Transport
    from ..vfio.survey import Function

EXAMPLE = """\b
Examples:
  guestpv info 0000:01:00.0
  guestpv info loopback:net --json
"""


@click.command(epilog=EXAMPLE)
@click.argument("spec", shell_complete=complete_address)
@reporting
def info(report: Report, spec: str) -> None:
    """Show what the device SPEC offers: structures, features, queues, configuration.

    The device is opened for it, and reset. One that the kernel's driver has is left alone, and only
    what the kernel says about it is shown.
    """
    from ..opener import Spec
    from ..vfio.survey import VFIO_DRIVER, look_up

    parsed = Spec.parse(spec)
    if parsed.scheme == "vfio" and (function := look_up(parsed.body)).driver != VFIO_DRIVER:
        data = of_kernel(parsed, function)
    else:
        from ..opener import open as open_transport

        with open_transport(spec) as transport:
            data = of_device(spec, transport)
    report.done(data, lambda: show(data))


def of_device(spec: str, transport: Transport) -> dict[str, Any]:
    """What an opened device says about itself."""
    from ..pci.capabilities import type_name
    from ..transport.pci import PciTransport

    data = {
        "spec": spec,
        "name": transport.name,
        "type": transport.device_type,
        "type_name": type_name(transport.device_type),
        "source": "device",
        "driver": None,
        "features": names(transport.device_type, transport.offered),
        "feature_mask": hex(transport.offered),
        "queues": [
            {"index": index, "max_size": transport.queue_max_size(index)}
            for index in range(transport.num_queues)
        ],
        "balloon_queues": balloon_queues(transport),
        "config": configuration(transport),
        "config_length": transport.config_length,
        "capabilities": [],
        "msix_vectors": None,
        "vfio_backend": None,
    }
    if isinstance(transport, PciTransport):
        data["vfio_backend"] = getattr(transport.function, "backend", None)
        data["capabilities"] = [structure(cap) for cap in transport.capabilities]
        data["msix_vectors"] = transport.function.msix_vectors
    return data


def of_kernel(spec: Spec, function: Function) -> dict[str, Any]:
    """What the kernel shows of a function whose driver has it."""
    from ..pci.capabilities import virtio_capabilities
    from ..vfio.survey import DEVICES
    from .checks import sysfs_features

    with open(f"{DEVICES}/{function.address}/config", "rb") as file:
        config = file.read(256)
    config += bytes(256 - len(config))
    offered = sysfs_features(function.address)
    return {
        "spec": f"vfio:{spec.body}",
        "name": function.address,
        "type": function.type,
        "type_name": function.name,
        "source": "kernel",
        "driver": function.driver,
        "features": None if offered is None else names(function.type, offered),
        "feature_mask": None if offered is None else hex(offered),
        "queues": None,
        "balloon_queues": None,
        "config": None,
        "config_length": None,
        "capabilities": [
            structure(cap)
            for cap in virtio_capabilities(
                lambda offset, width: int.from_bytes(config[offset : offset + width], "little")
            )
        ],
        "msix_vectors": None,
        "vfio_backend": None,
    }


def balloon_queues(transport: Transport) -> dict[str, Any] | None:
    """Which number each of a balloon's queues has, and what is odd about it; None for other devices."""
    from ..drivers.balloon_queues import QUIRKS, find_numbering
    from ..errors import DeviceViolation
    from ..spec.features import BALLOON

    if transport.device_type != BALLOON:
        return None
    offered = transport.offered
    try:
        found = find_numbering(offered, offered, transport.queue_max_size, transport.name)
    except DeviceViolation as error:
        return {"numbering": None, "numbers": {}, "quirk": error.message}
    return {"numbering": found.name, "numbers": found.by_name, "quirk": QUIRKS[found.name]}


def names(device_type: int, features: int) -> list[str]:
    """Features by name."""
    from ..spec.features import feature_names

    return feature_names(device_type, features)


def structure(capability: VirtioCapability) -> dict[str, Any]:
    """One virtio structure and where it lies."""
    from ..spec.pci import CfgType

    return {
        "structure": CfgType(capability.cfg_type).name,
        "bar": capability.bar,
        "offset": capability.offset,
        "length": capability.length,
        "notify_off_multiplier": capability.extra if capability.cfg_type == CfgType.NOTIFY else None,
    }


def configuration(transport: Transport) -> dict[str, int | str]:
    """Device configuration by field name; an address as text."""
    from ..spec import balloon, blk, features, net

    layouts = {features.NET: net.CONFIG, features.BLK: blk.CONFIG, features.BALLOON: balloon.CONFIG}
    if transport.device_type not in layouts:
        return {}
    values = transport.config(layouts[transport.device_type])
    return {name: value.hex(":") if isinstance(value, bytes) else value for name, value in values.items()}


def meaning(device_type: int, field: str, value: int | str) -> str:
    """A field's value for a person."""
    from ..spec import features, net

    if isinstance(value, str):
        return value
    if device_type == features.NET and field == "status":
        flags = ["link up" if value & net.S_LINK_UP else "link down"]
        flags += ["announce"] if value & net.S_ANNOUNCE else []
        return f"{value:#x} ({', '.join(flags)})"
    if device_type == features.NET and field == "speed":
        return "unknown" if value >= 0x80000000 else f"{value} Mbit/s"
    if device_type == features.NET and field == "duplex":
        return {0: "half", 1: "full"}.get(value, "unknown")
    if device_type == features.BLK and field == "capacity":
        return f"{value} sectors ({value * 512 / (1 << 30):.2f} GiB)"
    if field.startswith("supported_"):
        return hex(value)
    return str(value)


def show(data: dict[str, Any]) -> None:
    """For a person."""
    from .tables import console, indented, pairs, table

    out = console()
    unknown = "shown once it is bound"
    features = data["features"]
    rows = [
        ("device", f"{data['name']}, virtio {data['type_name']} (type {data['type']})"),
        ("features", unknown if features is None else " ".join(features)),
        ("", "" if features is None else f"mask {data['feature_mask']}"),
    ]
    if data["msix_vectors"] is not None:
        rows.append(
            ("interrupts", f"MSI-X, {data['msix_vectors']} vectors" if data["msix_vectors"] else "INTx")
        )
    if data["vfio_backend"]:
        rows.append(("VFIO", data["vfio_backend"]))
    if data["queues"] is not None:
        sizes = ", ".join(f"{queue['index']}: {queue['max_size']}" for queue in data["queues"])
        rows.append(("queues", f"{len(data['queues'])}; largest sizes {sizes}"))
    if balloon := data["balloon_queues"]:
        places = ", ".join(f"{name} {number}" for name, number in balloon["numbers"].items())
        rows += [("", places)] + ([("quirk", balloon["quirk"])] if balloon["quirk"] else [])
    out.print(pairs([row for row in rows if any(row)]))
    if data["config"]:
        out.print("configuration")
        fields = [(name, meaning(data["type"], name, value)) for name, value in data["config"].items()]
        out.print(indented(pairs(fields)))
    if data["capabilities"]:
        out.print("structures")
        lines = [
            (
                cap["structure"],
                str(cap["bar"]),
                f"{cap['offset']:#x}",
                f"{cap['length']:#x}",
                "" if cap["notify_off_multiplier"] is None else f"multiplier {cap['notify_off_multiplier']}",
            )
            for cap in data["capabilities"]
        ]
        out.print(indented(table(("STRUCTURE", "BAR", "OFFSET", "LENGTH", ""), lines)))
    if data["source"] == "kernel":
        out.print(f"The kernel's driver {data['driver'] or '(none)'} has it; this is what the kernel tells.")
        out.print(f"  -> guestpv bind {data['name']}   to see queues and configuration")
