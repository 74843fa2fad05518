"""What a device type has to say for itself; everything else is the same for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..spec.layout import Field, Layout

if TYPE_CHECKING:
    from .device import Device
    from .queue import DeviceQueue
    from .ring import Chain

DEFAULT_QUEUE_SIZE = 256


class Model:
    """One device type.

    A subclass sets ``device_type``, ``pci_class`` and ``layout``, fills ``offered`` and ``config``, and
    overrides ``handle``, or ``serve`` where a kick does not mean "a request is there".

    Attributes:
        written_early: configuration fields that may be written before FEATURES_OK.
        offered: feature bits of the device type's own that it offers.
        config: values of the configuration fields by name; bytes for fields of several elements.
        depth: queue size offered for every queue.
        device: the device it stands behind, once attached.
    """

    device_type: ClassVar[int]
    pci_class: ClassVar[int] = 0x00FF00
    layout: ClassVar[Layout | None] = None
    written_early: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, depth: int = DEFAULT_QUEUE_SIZE) -> None:
        self.offered = 0
        self.config: dict[str, int | bytes] = {}
        self.depth = depth
        self.device: Device

    @property
    def num_queues(self) -> int:
        """Most queues the device can have."""
        return 1

    def queue_size(self, index: int, features: int) -> int:
        """Largest size of a queue; 0 where it does not exist with these features."""
        return self.depth if index < self.num_queues else 0

    def objection(self, features: int) -> str:
        """Why the device cannot work with this feature set, or an empty string."""
        return ""

    def reset(self) -> None:
        """Forget everything the driver did."""

    def queue_reset(self, queue: DeviceQueue) -> None:
        """The driver reset one queue; its chains are not ours any more."""

    def negotiated(self) -> None:
        """FEATURES_OK was set and kept."""

    def start(self) -> None:
        """The driver set DRIVER_OK."""

    def close(self) -> None:
        """The function is closed: give back what the model holds."""

    def serve(self, queue: DeviceQueue) -> None:
        """A queue was kicked."""
        for chain in queue.chains():
            self.handle(queue, chain)

    def handle(self, queue: DeviceQueue, chain: Chain) -> None:
        """One request; ``queue.complete`` it now or later."""
        queue.complete(chain)

    def config_read(self, field: Field) -> None:
        """The driver is about to read a field."""

    def config_written(self, field: Field, value: int) -> None:
        """The driver wrote a writable field."""
        self.config[field.name] = value

    def change_config(self, **values: int | bytes) -> None:
        """Change fields from outside: the driver gets a new generation and a notification (3.2.1)."""
        with self.device.executor:
            self.config.update(values)
            self.device.config_changed()
