"""Making a device change its configuration by itself, where the scheme gives a hand on the other side."""

from __future__ import annotations

from typing import Any

from ..devices.function import SoftwareFunction
from ..errors import GuestpvError
from ..pci.qtest import QtestFunction
from ..spec import balloon, blk, net
from ..spec import features as ft
from ..spec.layout import Field
from .rig import Rig

Change = tuple[Field, int]
"""A field of the device configuration, and the value that it has to have now."""

STEP = 1 << 20


def change_config(rig: Rig) -> Change:
    """Change the device's configuration from outside; a configuration change is due (3.2.1).

    The case ends NOT_OBSERVABLE where that is impossible. Call it again for another change.
    """
    inner = rig.function.inner
    if isinstance(inner, SoftwareFunction):
        change = _software(inner, rig)
    elif isinstance(inner, QtestFunction):
        change = _qemu(inner, rig)
    else:
        rig.case.not_observable("nobody here can make the device change its configuration")
    rig.case.note(f"# the device's {change[0].name} is changed to {change[1]:#x} from outside")
    return change


def _software(function: SoftwareFunction, rig: Rig) -> Change:
    model: Any = function.model
    if model.device_type == ft.BLK:
        field = blk.CONFIG["capacity"]
        value = int(model.config["capacity"]) ^ 0x10
    elif model.device_type == ft.NET:
        field = net.CONFIG["status"]
        value = int(model.config.get("status", 0)) ^ net.S_LINK_UP
    elif model.device_type == ft.BALLOON:
        field = balloon.CONFIG["num_pages"]
        value = int(model.config.get("num_pages", 0)) ^ 0x100
    else:
        rig.case.not_observable("the device type has no configuration that changes")
    rig.undo.callback(model.change_config, **{field.name: model.config.get(field.name, 0)})
    model.change_config(**{field.name: value})
    return field, value


def _qemu(function: QtestFunction, rig: Rig) -> Change:
    def qmp(command: str, **arguments: object) -> Any:
        return function.machine.qemu.qmp.execute(command, arguments)

    kind = rig.transport.device_type
    if kind == ft.BALLOON:
        field = balloon.CONFIG["num_pages"]
        pages = 512 if rig.transport.read_config(field.offset, field.width) == 256 else 256
        qmp("balloon", value=function.machine.qemu.ram.size - pages * balloon.PAGE_BYTES)
        return field, pages
    if kind == ft.NET:
        field = net.CONFIG["status"]
        up = not rig.transport.read_config(field.offset, field.width) & net.S_LINK_UP
        (card, *_) = qmp("query-rx-filter")
        # A link that stays down would be there for the cases that follow.
        rig.undo.callback(qmp, "set_link", name=card["name"], up=True)
        qmp("set_link", name=card["name"], up=up)
        return field, net.S_LINK_UP if up else 0
    if kind != ft.BLK:
        rig.case.not_observable("the device type has no configuration that changes")
    field = blk.CONFIG["capacity"]
    size = rig.transport.read_config(field.offset, field.width) * blk.SECTOR + STEP
    (disk, *_) = (one for one in qmp("query-block") if one.get("qdev"))
    try:
        qmp("block_resize", **{"node-name": disk["inserted"]["node-name"], "size": size})
    except GuestpvError as error:
        rig.case.not_observable(f"this disk cannot change its size: {error.message}")
    return field, size // blk.SECTOR
