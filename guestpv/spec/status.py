"""The device status field (2.1)."""

from enum import IntFlag


class Status(IntFlag):
    """Bits of ``device_status``. Writing 0 resets the device."""

    RESET = 0
    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    NEEDS_RESET = 64
    FAILED = 128
