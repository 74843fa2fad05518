"""What an access to a register means in the life of a device: its step, and the section of that."""

from __future__ import annotations

from typing import Final

from .status import Status

STATUS_STEPS: Final = {
    Status.RESET: ("reset", "3.1.1 step 1, 2.4"),
    Status.ACKNOWLEDGE: ("acknowledge", "3.1.1 step 2"),
    Status.DRIVER: ("driver", "3.1.1 step 3"),
    Status.FEATURES_OK: ("features-ok", "3.1.1 steps 5 and 6"),
    Status.FAILED: ("failed", "2.1.1, 3.1.1"),
    Status.DRIVER_OK: ("driver-ok", "3.1.1 step 8"),
}
"""The bit of ``device_status`` that a write adds -> what it is called, and its section."""

REGISTER_STEPS: Final = {
    "device_feature": ("read-features", "3.1.1 step 4, 4.1.4.3"),
    "driver_feature": ("write-features", "3.1.1 step 4, 4.1.4.3"),
    "config_msix_vector": ("configuration-vector", "4.1.5.1.2"),
    "queue_reset": ("queue-reset", "2.6.1, 4.1.4.3"),
    "queue_": ("queue-setup", "3.1.1 step 7, 4.1.5.1.3"),
    "num_queues": ("count-queues", "4.1.4.3"),
    "config_generation": ("configuration", "2.5.1, 4.1.4.3.2"),
}
"""Register, or how its name begins -> the same. Anything else is device configuration."""


def register_step(register: str) -> tuple[str, str]:
    """Step and section of a register of the common configuration, or of device configuration."""
    for start, meaning in REGISTER_STEPS.items():
        if register.startswith(start):
            return meaning
    return REGISTER_STEPS["config_generation"]
