"""``loopback:`` - the device half in the same process, for drivers without a VM and without privilege."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UsageError
from ..spec import features as ft
from ..spec.blk import SECTOR
from .function import SoftwareFunction
from .model import DEFAULT_QUEUE_SIZE, Model
from .models.balloon import Balloon
from .models.blk import Blk
from .models.blk_store import Store
from .models.blk_volatile import VolatileStore
from .models.blk_zoned import ZonedBlk
from .models.console import Console
from .models.net import Net
from .models.rng import Rng
from .models.wire import SOCKETS, echo

DEFAULT_DISK = 64 << 20
SWITCHES = {
    "packed": ft.F_RING_PACKED,
    "indirect_desc": ft.F_INDIRECT_DESC,
    "event_idx": ft.F_EVENT_IDX,
    "in_order": ft.F_IN_ORDER,
    "order_platform": ft.F_ORDER_PLATFORM,
    "notification_data": ft.F_NOTIFICATION_DATA,
    "notif_config_data": ft.F_NOTIF_CONFIG_DATA,
    "ring_reset": ft.F_RING_RESET,
}
"""Parameter -> feature that ``on`` offers and ``off`` does not."""


class Params:
    """Parameters of a specification, taken one by one; what is left at the end nobody knew."""

    def __init__(self, text: dict[str, str], where: str) -> None:
        self._left = dict(text)
        self._where = where

    def number(self, name: str, default: int) -> int:
        """An integer, decimal or 0x, with an optional suffix K, M or G (powers of 1024)."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        shift = {"K": 10, "M": 20, "G": 30}.get(value[-1:].upper(), 0)
        try:
            return int(value[:-1] if shift else value, 0) << shift
        except ValueError:
            raise UsageError(f"{name}={value!r} is no number", where=self._where) from None

    def switch(self, name: str, default: bool) -> bool:
        """``on`` or ``off``."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if value not in ("on", "off"):
            raise UsageError(f"{name} is on or off, not {value!r}", where=self._where)
        return value == "on"

    def text(self, name: str, default: str = "") -> str:
        """Anything."""
        return self._left.pop(name, default)

    def done(self, known: str) -> None:
        """Complain about parameters that nobody took."""
        if self._left:
            names = ", ".join(sorted(self._left))
            raise UsageError(f"unknown parameter {names}", where=self._where, hint=known)


def _rng(params: Params, depth: int) -> Model:
    seed = params.text("seed")
    return Rng(int(seed, 0) if seed else None, params.number("most", 0), depth)


def _net(params: Params, depth: int) -> Model:
    mac = params.text("mac", "52:54:00:00:00:01")
    try:
        address = bytes.fromhex(mac.replace(":", ""))
    except ValueError:
        raise UsageError(f"mac={mac!r} is no MAC address") from None
    model = Net(
        address,
        mtu=params.number("mtu", 0),
        pairs=params.number("pairs", 1),
        offloads=params.switch("offloads", True),
        depth=depth,
        backlog=params.number("backlog", 1024),
    )
    kind, _, name = params.text("peer", "echo").partition(":")
    if kind == "echo" and not name:
        echo(model)
    elif kind == "wire" and name:
        SOCKETS.plug(name, model)
    elif kind != "sink" or name:
        raise UsageError("peer is echo, sink or wire:NAME", where="loopback:net")
    return model


def _store(params: Params, path: str, read_only: bool) -> Store:
    size, cache = params.number("size", 0 if path else DEFAULT_DISK), params.text("cache", "none")
    seed = params.number("seed", 0)
    if cache == "none":
        return Store(path, size, read_only)
    if cache != "volatile":
        raise UsageError(f"cache is none or volatile, not {cache!r}", where="loopback:blk")
    if read_only:
        raise UsageError("a disk with ro=on has no use for cache=volatile", where="loopback:blk")
    return VolatileStore(size, path, np.random.default_rng(seed))


def _blk(params: Params, depth: int) -> Model:
    read_only = params.switch("ro", False)
    store = _store(params, params.text("file"), read_only)
    options: dict[str, Any] = {
        "read_only": read_only,
        "num_queues": params.number("num_queues", 1),
        "serial": params.text("serial", "guestpv").encode(),
        "block_size": params.number("block_size", SECTOR),
        "seg_max": params.number("seg_max", 0),
        "size_max": params.number("size_max", 0),
        "depth": depth,
    }
    try:
        zone = params.number("zoned", 0)
        if not zone:
            return Blk(store, **options)
        granularity = params.number("granularity", options["block_size"])
        append = params.number("max_append", zone)
        for name, value in (("zoned", zone), ("granularity", granularity), ("max_append", append)):
            if value < 0 or value % SECTOR or (not value and name != "max_append"):
                raise UsageError(f"{name}={value} is no multiple of {SECTOR} bytes", where="loopback:blk")
        return ZonedBlk(
            store,
            zone_sectors=zone // SECTOR,
            conventional=params.number("conventional", 0),
            max_open=params.number("max_open", 0),
            max_active=params.number("max_active", 0),
            max_append=append // SECTOR,
            granularity=granularity,
            aware=params.switch("aware", False),
            read_only_zones=params.number("read_only_zones", 0),
            offline_zones=params.number("offline_zones", 0),
            **options,
        )
    except BaseException:
        store.close()
        raise


def _balloon(params: Params, depth: int) -> Model:
    model = Balloon(depth)
    model.config["num_pages"] = params.number("target", 0)
    return model


def _console(params: Params, depth: int) -> Model:
    model = Console(params.number("cols", 80), params.number("rows", 25), depth)
    if params.switch("echo", True):
        model.peer = model.type
    return model


MODELS: dict[str, Callable[[Params, int], Model]] = {
    "rng": _rng,
    "net": _net,
    "blk": _blk,
    "balloon": _balloon,
    "console": _console,
}


def make_model(body: str, params: dict[str, str]) -> Model:
    """A device model alone, for other transports; ``params`` are those of the type, and ``queue_size``.

    Raises:
        UsageError: device type or parameter unknown, or a value makes no sense.
    """
    if body not in MODELS:
        raise UsageError(f"no device type is called {body!r}", hint="there are " + " ".join(MODELS))
    left = Params(params, body)
    model = MODELS[body](left, left.number("queue_size", DEFAULT_QUEUE_SIZE))
    left.done(f"see the description of open_function in {__name__}")
    return model


def open_function(body: str, params: dict[str, str]) -> SoftwareFunction:
    """A software function for ``loopback:BODY?key=value&...``.

    Args:
        body: device type: ``rng``, ``net``, ``blk``, ``balloon``, ``console``.
        params: for every type:

            - ``packed``, ``indirect_desc``, ``event_idx``, ``in_order``, ``order_platform``,
              ``notification_data``, ``notif_config_data``, ``ring_reset``: ``on`` or ``off``, whether the
              device offers the feature. By default indirect_desc, event_idx, order_platform and
              ring_reset are on.
            - ``offer``: ``+name,-name`` or bit numbers, any further feature to offer or not.
            - ``queue_size``: largest queue size (256).
            - ``msix``: size of the MSI-X table, ``off`` for INTx only.
            - ``multiplier``: notify_off_multiplier (4); 0 puts all doorbells at one address.
            - ``threaded``: ``on`` gives the device a thread of its own.
            - ``segment``: bytes after which DMA memory continues elsewhere on the bus (0: never).
            - ``flr``: ``off`` leaves out the function level reset.
            - ``translated``: ``on`` puts an IOMMU between the device and memory: bus addresses are not
              guest-physical ones then, and ACCESS_PLATFORM is required (``off`` for ``balloon`` only).

            ``rng``: ``seed``, ``most`` (bytes a buffer gets at most).

            ``net``: ``mac``, ``mtu`` (0: not offered), ``pairs``, ``offloads`` (``on``), ``backlog``,
            ``peer``: ``echo`` sends everything back, ``sink`` swallows it, ``wire:NAME`` connects the two
            functions of this process that name the same wire.

            ``blk``: ``file`` (else memory), ``size`` (64M), ``ro``, ``num_queues``, ``serial``,
            ``block_size``, ``seg_max``, ``size_max``; ``cache``: ``volatile`` keeps what was not flushed in
            memory, so that the end of the process loses it, in whole or, at random after ``seed``, in part;
            ``zoned``: bytes of a zone makes it host-managed, all zones empty at first, with
            ``conventional`` (number of zones at the start), ``max_open``, ``max_active``, ``max_append``
            (bytes), ``granularity`` (bytes), ``aware`` (``on`` makes it host-aware), ``read_only_zones``
            and ``offline_zones`` (numbers of zones at the end).

            ``balloon``: ``target`` in 4096-byte pages.

            ``console``: ``cols``, ``rows``, ``echo`` (``on``: what is sent comes back).

    Raises:
        UsageError: device type or parameter unknown, or a value makes no sense.
    """
    where = f"loopback:{body}"
    if body not in MODELS:
        raise UsageError(
            f"no device type is called {body!r}", where=where, hint="there are " + " ".join(MODELS)
        )
    left = Params(params, where)
    depth = left.number("queue_size", DEFAULT_QUEUE_SIZE)
    if not 1 <= depth <= 32768:
        raise UsageError(f"queue_size={depth} is not between 1 and 32768", where=where)
    msix = left.text("msix", "auto")
    model = MODELS[body](left, depth)
    options: dict[str, Any] = {
        "threaded": left.switch("threaded", False),
        "flr": left.switch("flr", True),
        # A balloon's requests name guest-physical pages; without translation a bus address is one.
        "translated": left.switch("translated", body != "balloon"),
    }
    segment, multiplier = left.number("segment", 0), left.number("multiplier", 4)
    masks = {bit: left.text(name) for name, bit in SWITCHES.items()}
    offer = left.text("offer")
    left.done(f"see the description of open_function in {__name__}")
    vectors = {"auto": None, "off": 0}.get(msix, -1)
    if vectors == -1:
        vectors = Params({"msix": msix}, where).number("msix", 0)
    function = SoftwareFunction(
        model, name=where, vectors=vectors, segment=segment, multiplier=multiplier, **options
    )
    offered = function.device.offered
    for bit, value in masks.items():
        if value not in ("", "on", "off"):
            raise UsageError(f"{ft.feature_name(None, bit).lower()} is on or off, not {value!r}", where=where)
        if value:
            offered = offered | 1 << bit if value == "on" else offered & ~(1 << bit)
    function.device.offered = _masked(offered, offer, model.device_type, where)
    return function


def _masked(offered: int, text: str, device_type: int, where: str) -> int:
    for word in filter(None, text.split(",")):
        try:
            bit = ft.feature_bit(device_type, word.lstrip("+-"))
        except KeyError:
            raise UsageError(f"no feature is called {word!r}", where=where) from None
        offered = offered & ~(1 << bit) if word.startswith("-") else offered | 1 << bit
    return offered
