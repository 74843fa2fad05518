"""Broken devices: what a network device offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guestpv.conformance.device.test_net_offer import REQUIRED
from guestpv.devices.function import SoftwareFunction
from guestpv.spec import features as ft

from .device import mutant, replace

NET = "loopback:net"
MANY = "loopback:net?pairs=2&mtu=1400&offer=%2Brss,%2Bhash_report"


def lonely(bit: int, needs: tuple[tuple[int, ...], ...]) -> Callable[[SoftwareFunction], None]:
    def offer(function: SoftwareFunction) -> None:
        """The feature is offered without what it requires."""
        function.device.offered |= 1 << bit
        function.device.offered &= ~ft.mask(needs[0])

    offer.__name__ = f"offers_bit_{bit}_alone"
    return offer


for _requirement, (_bit, _needs) in REQUIRED.items():
    mutant(_requirement, spec=NET)(lonely(_bit, _needs))


def wrong(requirement: str, name: str, value: int, *also: str) -> None:
    def configure(function: SoftwareFunction) -> None:
        """The field of the configuration has a value that it cannot have."""
        model: Any = function.model
        model.config[name] = value

    configure.__name__ = f"{name}_is_{value}"
    mutant(requirement, *also, spec=MANY)(configure)


wrong("DEV-NET-02", "max_virtqueue_pairs", 0)
wrong("DEV-NET-03", "mtu", 67)
wrong("DEV-NET-08", "rss_max_key_size", 39)
wrong("DEV-NET-09", "rss_max_indirection_table_length", 64)
wrong("DEV-NET-233", "supported_hash_types", 0x1000)
wrong("DEV-NET-11", "speed", 0x8000_0000, "DEV-NET-210")
wrong("DEV-NET-12", "duplex", 2, "DEV-NET-210")
wrong("DEV-NET-209", "status", 5, "DEV-NET-208")


@mutant("DEV-NET-05", spec=MANY)
def mtu_shrinks(function: SoftwareFunction) -> None:
    """Each reset takes ten bytes from the mtu."""
    model: Any = function.model

    def make(inner: Any) -> Any:
        def reset() -> None:
            inner()
            model.config["mtu"] -= 10

        return reset

    replace(model, "reset", make)


@mutant("DEV-NET-180", "DEV-NET-181", spec=MANY)
def control_queue_is_always_last(function: SoftwareFunction) -> None:
    """The control queue is behind all pairs, negotiated or not, and there without CTRL_VQ."""
    model: Any = function.model
    model.queue_size = lambda index, features: model.depth if index in (0, 1, 2, 4) else 0
