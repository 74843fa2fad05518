"""The register blocks of a virtio PCI function: common, ISR, notification, device configuration (4.1.4)."""

from __future__ import annotations

from collections.abc import Callable

from ..spec import features as ft
from ..spec import pci
from ..spec.layout import Field
from ..spec.status import Status
from .device import Device
from .evidence import Event
from .queue import DeviceQueue

NAME_RULES = {
    "device_feature": "DRV-PCI-18",
    "num_queues": "DRV-PCI-19",
    "config_generation": "DRV-PCI-20",
    "queue_notify_off": "DRV-PCI-21",
    "queue_notif_config_data": "DRV-PCI-22",
}
WIDTH_RULES = {1: "DRV-PCI-05", 2: "DRV-PCI-06", 4: "DRV-PCI-07", 8: "DRV-PCI-07"}


class VirtioRegisters:
    """What the driver sees of a device through its BARs.

    Args:
        device: the device behind.
        vectors: size of the MSI-X table.
        multiplier: notify_off_multiplier.

    Attributes:
        isr: the ISR status bits.
        isr_changed: called after any change of the ISR, to move the INTx line.
        vectors_granted: vectors from here on are refused with NO_VECTOR; any number may be set.
        reset_reads: for so many reads after a reset, device_status still shows what it was.
        queue_reset_reads: for so many reads after a queue reset, queue_reset still shows 1.
        generation_bumps: for so many reads of device configuration, config_generation changes.
    """

    def __init__(
        self, device: Device, vectors: int, multiplier: int, isr_changed: Callable[[], None]
    ) -> None:
        self.device = device
        self.vectors = vectors
        self.multiplier = multiplier
        self.isr = 0
        self.isr_changed = isr_changed
        self.vectors_granted = vectors
        self.reset_reads = 0
        self.queue_reset_reads = 0
        self.generation_bumps = 0
        self.fields = {field.offset: field for field in pci.COMMON_CFG}
        self.notify_data = {self._notify_data(i): i for i in range(len(device.queues))}
        self._plain_reset()

    def _plain_reset(self) -> None:
        self.isr = 0
        self.device_feature_select = self.driver_feature_select = 0
        self.queue_select = 0
        self.config_msix_vector = pci.NO_VECTOR
        self._config_vector_verified = True
        self._unverified: set[int] = set()
        self._resetting: dict[int, int] = {}
        self._old_status = self._lingering = 0
        self._reset_seen = True

    def power_on(self) -> None:
        """Everything as after power-on: what a function level reset does."""
        self.device.reset()
        self._plain_reset()
        self.isr_changed()

    def raise_isr(self, bit: int) -> None:
        """Set an ISR bit."""
        self.isr |= bit
        self.isr_changed()

    @staticmethod
    def _notify_data(index: int) -> int:
        """queue_notif_config_data of a queue: on purpose not its index, and unique in 16 bits."""
        return (3 * index + 0x55) & 0xFFFF

    # Common configuration (4.1.4.3)

    def common_read(self, offset: int, width: int) -> int:
        """One access to the common configuration structure."""
        field = self._common_field(offset, width, "read")
        if field is None:
            return 0
        value = self._read_register(field.name)
        value = value >> 8 * (offset - field.offset) & (1 << 8 * width) - 1
        self.device.journal.record(Event("read", field.name, offset, width, value, self._queue_of(field)))
        return value

    def common_write(self, offset: int, width: int, value: int) -> None:
        """One access to the common configuration structure; what the driver must not write is not written."""
        field = self._common_field(offset, width, "write")
        if field is None:
            return
        self.device.journal.record(Event("write", field.name, offset, width, value, self._queue_of(field)))
        if field.name in NAME_RULES or not field.writable:
            self.device.find(NAME_RULES.get(field.name, ""), "read-only register written", field.name)
        elif field.name.startswith("queue_") and field.name != "queue_select":
            self._write_queue(field, offset - field.offset, value)
        else:
            self._write_device(field.name, value)

    def _queue_of(self, field: Field) -> int:
        return self.queue_select if field.name.startswith("queue_") else -1

    def _common_field(self, offset: int, width: int, verb: str) -> Field | None:
        """The register an access means, or None with a finding when it means none."""
        field = self.fields.get(offset) or pci.COMMON_CFG.at(offset)
        where = f"common configuration +{offset:#x}/{width}"
        if field is None:
            self.device.find("DRV-PCI-56", f"{verb} of no register", where)
            return None
        part = min(field.width, 4)
        if width != part or (offset - field.offset) % part:
            self.device.find(
                WIDTH_RULES[field.width], f"{verb} of {field.name} ({8 * field.width} bits)", where
            )
            if offset + width > field.end:
                rule = "DRV-PCI-60" if field.offset >= pci.COMMON_CFG["queue_select"].offset else "DRV-PCI-59"
                self.device.find(rule, f"{verb} across the end of {field.name}", where)
            return None
        if not field.exists(self.device.visible_features):
            rule = "DRV-PCI-61" if field.name == "queue_reset" else ""
            self.device.find(rule, f"{verb} of {field.name}, whose feature is not negotiated", where)
            if rule and verb == "write":
                self.device.find("DRV-VQRESET-04", "queue reset without RING_RESET", where)
            return None
        return field

    @property
    def _queue(self) -> DeviceQueue | None:
        queues = self.device.queues
        return queues[self.queue_select] if self.queue_select < len(queues) else None

    def _read_register(self, name: str) -> int:
        device = self.device
        match name:
            case "device_feature_select" | "driver_feature_select" | "queue_select":
                return int(getattr(self, name))
            case "device_feature":
                return device.offered >> 32 * self.device_feature_select & 0xFFFFFFFF
            case "driver_feature":
                return device.accepted >> 32 * self.driver_feature_select & 0xFFFFFFFF
            case "config_msix_vector":
                self._config_vector_verified = True
                return self.config_msix_vector
            case "num_queues":
                return len(device.queues)
            case "device_status":
                return self._read_status()
            case "config_generation":
                return device.generation
        return self._read_queue(name)

    def _read_queue(self, name: str) -> int:
        queue = self._queue
        if queue is None:
            return pci.NO_VECTOR if name == "queue_msix_vector" else 0
        match name:
            case "queue_size":
                return queue.size
            case "queue_msix_vector":
                self._unverified.discard(queue.index)
                return queue.vector
            case "queue_enable":
                return int(queue.enabled)
            case "queue_notify_off":
                return queue.index
            case "queue_desc" | "queue_driver" | "queue_device":
                return int(getattr(queue, name.removeprefix("queue_")))
            case "queue_notif_config_data":
                return self._notify_data(queue.index)
            case "queue_reset":
                left = self._resetting.get(queue.index, 0)
                self._resetting[queue.index] = max(left - 1, 0)
                return int(left > 0)
        return 0

    def _read_status(self) -> int:
        if self._lingering:
            self._lingering -= 1
            return self._old_status
        if self.device.status == Status.RESET:
            self._reset_seen = True
        return int(self.device.status)

    def _write_device(self, name: str, value: int) -> None:
        device = self.device
        match name:
            case "device_feature_select" | "driver_feature_select" | "queue_select":
                setattr(self, name, value)
            case "driver_feature":
                device.accept(self.driver_feature_select, value)
            case "config_msix_vector":
                self.config_msix_vector = self._grant(value, name)
                self._config_vector_verified = value == pci.NO_VECTOR
            case "device_status":
                self._write_status(value)

    def _write_status(self, value: int) -> None:
        device = self.device
        if value == 0:
            before = int(device.status or Status.ACKNOWLEDGE)
            device.write_status(0)
            self._plain_reset()
            self._old_status = before
            self._lingering = self.reset_reads
            self._reset_seen = False
            self.isr_changed()
            return
        if not self._reset_seen:
            device.find(
                "DRV-PCI-26", f"{value:#x} written before the reset was seen to be complete", "device_status"
            )
            self._reset_seen = True
        if value & ~device.status & Status.DRIVER_OK and not self._config_vector_verified:
            device.find("DRV-PCI-45", "config_msix_vector was not read back", "config_msix_vector")
        device.write_status(value)

    def _grant(self, vector: int, where: str) -> int:
        """The vector a register shows after ``vector`` was written to it."""
        if vector == pci.NO_VECTOR:
            return vector
        if vector >= self.vectors:
            self.device.find("DRV-PCI-44", f"vector {vector} of a table of {self.vectors}", where)
            return pci.NO_VECTOR
        return vector if vector < self.vectors_granted else pci.NO_VECTOR

    def _write_queue(self, field: Field, byte: int, value: int) -> None:
        device, queue = self.device, self._queue
        name = field.name
        if queue is None or not queue.max_size:
            device.find("DRV-PCI-66", f"{name} of queue {self.queue_select}, which does not exist", name)
            return
        if queue.enabled and name not in ("queue_reset", "queue_enable"):
            device.find("DRV-PCI-25", f"{name} written while the queue is enabled", queue.where)
            if name != "queue_msix_vector":
                return
            # A driver that maps vectors late works with every device in use: refused, it would not start, and
            # nothing more could be seen of it.
        match name:
            case "queue_size":
                self._write_size(queue, value)
            case "queue_msix_vector":
                queue.vector = self._grant(value, queue.where)
                if value != pci.NO_VECTOR:
                    self._unverified.add(queue.index)
            case "queue_enable":
                self._write_enable(queue, value)
            case "queue_reset":
                self._write_queue_reset(queue, value)
            case _:
                part = name.removeprefix("queue_")
                kept = getattr(queue, part) & 0xFFFFFFFF << (32 - 8 * byte)
                setattr(queue, part, kept | value << 8 * byte)

    def _write_size(self, queue: DeviceQueue, value: int) -> None:
        packed = self.device.features >> ft.F_RING_PACKED & 1
        if value > queue.max_size:
            rule, reason = "DRV-PCI-66", f"is above the maximum {queue.max_size}"
        elif packed and value == 0:
            rule, reason = "DRV-PCI-23", "with RING_PACKED"
        elif not packed and (value == 0 or value & (value - 1)):
            rule, reason = "DRV-PCI-24", "is no power of 2"
        else:
            queue.size = value
            return
        self.device.find(rule, f"queue_size {value} {reason}", queue.where)

    def _write_enable(self, queue: DeviceQueue, value: int) -> None:
        if value == 0:
            self.device.find("DRV-PCI-27", "0 written to queue_enable", queue.where)
        elif value != 1:
            self.device.find("DRV-PCI-67", f"{value:#x} written to queue_enable", queue.where)
        elif queue.enabled:
            self.device.find("DRV-PCI-25", "queue enabled twice", queue.where)
        else:
            if queue.index in self._unverified:
                self.device.find("DRV-PCI-45", "queue_msix_vector was not read back", queue.where)
            if self._resetting.pop(queue.index, 0):
                self.device.find("DRV-PCI-28", "queue enabled while its reset was not complete", queue.where)
            self.device.enable_queue(queue)

    def _write_queue_reset(self, queue: DeviceQueue, value: int) -> None:
        if value != 1:
            self.device.find("", f"{value:#x} written to queue_reset", queue.where)
            return
        self.device.journal.record(Event("reset", "queue_reset", queue=queue.index))
        queue.reset()
        self.device.model.queue_reset(queue)
        self._unverified.discard(queue.index)
        self._resetting[queue.index] = self.queue_reset_reads

    # ISR (4.1.4.5)

    def read_isr(self, offset: int, width: int) -> int:
        """The ISR byte, which reading clears."""
        if offset or width != 1:
            self.device.find("DRV-PCI-05", "the ISR is one byte", f"ISR +{offset:#x}/{width}")
            if offset:
                return 0
        value, self.isr = self.isr, 0
        self.device.journal.record(Event("read", "isr", 0, width, value))
        self.isr_changed()
        return value

    # Notification (4.1.4.4, 4.1.5.2)

    def notify(self, offset: int, width: int, value: int) -> None:
        """A write to the notification structure."""
        features = self.device.features
        with_data = bool(features >> ft.F_NOTIFICATION_DATA & 1)
        where = f"queue_notify +{offset:#x}/{width}"
        self.device.journal.record(Event("write", "queue_notify", offset, width, value))
        if width != (4 if with_data else 2):
            self.device.find("DRV-PCI-48" if with_data else "DRV-PCI-47", "wrong width", where)
            with_data = False
        token = value & 0xFFFF
        index = token
        if features >> ft.F_NOTIF_CONFIG_DATA & 1:
            if token not in self.notify_data:
                rule = "DRV-PCI-52" if with_data else "DRV-PCI-51"
                self.device.find(rule, f"{token:#x} is no queue_notif_config_data", where)
                return
            index = self.notify_data[token]
        if self.multiplier and offset != index * self.multiplier:
            self.device.find("DRV-PCI-68", f"notification of queue {index} at another one's address", where)
        self.device.kick(index, value >> 16 if with_data else None)

    # Device configuration (4.1.4.6)

    def config_bytes(self) -> bytes:
        """The device configuration structure as it is now."""
        model = self.device.model
        layout = model.layout
        if layout is None:
            return b""
        block = bytearray(layout.size)
        for field in layout:
            if not field.exists(self.device.offered):
                continue
            value = model.config.get(field.name, 0)
            size = field.end - field.offset
            data = value if isinstance(value, bytes) else value.to_bytes(size, "little")
            block[field.offset : field.end] = data.ljust(size, b"\0")[:size]
        return bytes(block)

    def config_read(self, offset: int, width: int) -> int:
        """A read of device configuration (2.5)."""
        field = self._config_field(offset, width, "read")
        if field is not None:
            self.device.model.config_read(field)
        if self.generation_bumps:
            self.generation_bumps -= 1
            self.device.bump_generation()
        self.device.config_seen()
        value = int.from_bytes(self.config_bytes()[offset : offset + width], "little")
        name = field.name if field else "device configuration"
        self.device.journal.record(Event("read", name, offset, width, value))
        return value

    def config_write(self, offset: int, width: int, value: int) -> None:
        """A write of device configuration."""
        device = self.device
        field = self._config_field(offset, width, "write")
        name = field.name if field else "device configuration"
        device.journal.record(Event("write", name, offset, width, value))
        early = field is not None and field.name in device.model.written_early
        if not device.status & Status.FEATURES_OK and not early:
            device.find("DRV-INIT-05", "written before FEATURES_OK", name)
        elif field is None or not field.writable:
            rule = {ft.NET: "DRV-NET-01", ft.BALLOON: "DRV-BALLOON-46"}.get(device.model.device_type, "")
            device.find(rule, "read-only field of the device configuration written", name)
        elif field.width == width and offset == field.offset:
            device.model.config_written(field, value)

    def _config_field(self, offset: int, width: int, verb: str) -> Field | None:
        layout = self.device.model.layout
        field = layout.at(offset) if layout else None
        where = f"device configuration +{offset:#x}/{width}"
        if field is None:
            self.device.find("", f"{verb} of no field", where)
            return None
        part = min(field.width, 4)
        if width != part or (offset - field.offset) % part:
            self.device.find(
                WIDTH_RULES[field.width], f"{verb} of {field.name} ({8 * field.width} bits)", where
            )
        if not field.exists(self.device.offered):
            self.device.find("DRV-CONFIG-04", f"{verb} of {field.name}, whose feature is not offered", where)
        return field
