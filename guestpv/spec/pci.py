"""Virtio over the PCI bus (4.1): identification, capabilities, register blocks."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from .features import F_ADMIN_VQ, F_NOTIF_CONFIG_DATA, F_RING_RESET
from .layout import Field, Layout

VENDOR_ID: Final = 0x1AF4
MODERN_DEVICE_BASE: Final = 0x1040
"""PCI device id of a modern function: this plus the virtio device id (4.1.2)."""
TRANSITIONAL_DEVICES: Final = {
    0x1000: 1,
    0x1001: 2,
    0x1002: 5,
    0x1003: 3,
    0x1004: 8,
    0x1005: 4,
    0x1009: 9,
}
"""Transitional PCI device id -> virtio device id (4.1.2.1)."""

NO_VECTOR: Final = 0xFFFF
"""VIRTIO_MSI_NO_VECTOR: written to unmap, read back when the device refused a vector (4.1.5.1.2)."""

PCI_CAP_VENDOR: Final = 0x09
PCI_CAP_MSIX: Final = 0x11
PCI_CAP_EXPRESS: Final = 0x10
PCI_CAP_ADVANCED_FEATURES: Final = 0x13

COMMAND_MEMORY: Final = 1 << 1
COMMAND_BUS_MASTER: Final = 1 << 2
COMMAND_INTX_DISABLE: Final = 1 << 10

PCI_CONFIG_VENDOR: Final = 0x00
PCI_CONFIG_DEVICE: Final = 0x02
PCI_CONFIG_COMMAND: Final = 0x04
PCI_CONFIG_STATUS: Final = 0x06
PCI_CONFIG_REVISION: Final = 0x08
PCI_CONFIG_BAR0: Final = 0x10
PCI_CONFIG_SUBSYSTEM: Final = 0x2E
PCI_CONFIG_CAPABILITIES: Final = 0x34
PCI_CONFIG_INTERRUPT_PIN: Final = 0x3D
PCI_STATUS_CAPABILITIES: Final = 1 << 4


class CfgType(IntEnum):
    """``cfg_type`` of a virtio structure capability (4.1.4)."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI_CFG = 5
    SHARED_MEMORY = 8
    VENDOR = 9


CAPABILITY: Final = Layout(
    "virtio_pci_cap",
    "4.1.4",
    (
        Field("cap_vndr", 0, 1),
        Field("cap_next", 1, 1),
        Field("cap_len", 2, 1),
        Field("cfg_type", 3, 1),
        Field("bar", 4, 1),
        Field("id", 5, 1),
        Field("padding", 6, 1, 2),
        Field("offset", 8, 4),
        Field("length", 12, 4),
    ),
)
CAPABILITY_NOTIFY_MULTIPLIER: Final = 16
"""Offset of ``notify_off_multiplier`` in the notification capability (4.1.4.4)."""
CAPABILITY_PCI_CFG_DATA: Final = 16
"""Offset of ``pci_cfg_data`` in the PCI configuration access capability (4.1.4.9)."""

COMMON_CFG: Final = Layout(
    "virtio_pci_common_cfg",
    "4.1.4.3",
    (
        Field("device_feature_select", 0, 4, writable=True),
        Field("device_feature", 4, 4),
        Field("driver_feature_select", 8, 4, writable=True),
        Field("driver_feature", 12, 4, writable=True),
        Field("config_msix_vector", 16, 2, writable=True),
        Field("num_queues", 18, 2),
        Field("device_status", 20, 1, writable=True),
        Field("config_generation", 21, 1),
        Field("queue_select", 22, 2, writable=True),
        Field("queue_size", 24, 2, writable=True),
        Field("queue_msix_vector", 26, 2, writable=True),
        Field("queue_enable", 28, 2, writable=True),
        Field("queue_notify_off", 30, 2),
        Field("queue_desc", 32, 8, writable=True),
        Field("queue_driver", 40, 8, writable=True),
        Field("queue_device", 48, 8, writable=True),
        Field("queue_notif_config_data", 56, 2, feature=F_NOTIF_CONFIG_DATA),
        Field("queue_reset", 58, 2, writable=True, feature=F_RING_RESET),
        Field("admin_queue_index", 60, 2, feature=F_ADMIN_VQ),
        Field("admin_queue_num", 62, 2, feature=F_ADMIN_VQ),
    ),
)
COMMON_CFG_MIN_LENGTH: Final = 56
"""Length of the common configuration structure without any feature-dependent register."""

ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2
"""Bits of the ISR status byte; reading it clears it and lowers INTx (4.1.4.5)."""
