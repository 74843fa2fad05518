"""The ways into VFIO by name, and which of them are open for a function. Imports nothing that takes long."""

from __future__ import annotations

from typing import Final

from ..errors import UsageError
from ..system import SYSTEM, System
from .survey import Function, cdev_of, noiommu_group_of

TYPE1: Final = "type1"
IOMMUFD: Final = "iommufd"
NOIOMMU: Final = "noiommu"
AUTO: Final = "auto"
NAMES: Final = (TYPE1, IOMMUFD, NOIOMMU)

CONTAINER_NODE: Final = "/dev/vfio/vfio"
IOMMUFD_NODE: Final = "/dev/iommu"
PARAMETER: Final = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
ENABLE: Final = f"echo 1 > {PARAMETER}"
HUGE_PAGES_HINT: Final = "as root: sysctl vm.nr_hugepages=32 (of 2 MiB each, while memory is in one piece)"
RISK: Final = (
    "no-IOMMU mode: nothing stands between the device and memory. It reads and writes physical memory "
    "wherever a ring tells it to: one wrong address, by a bug or on purpose, overwrites the kernel or any "
    "process of this machine. The kernel marks itself tainted. Use it only in a guest that you can lose"
)
"""What everybody is told who uses no-IOMMU mode."""


def check_name(name: str, where: str = "") -> str:
    """A back-end's name, ``auto`` where it is empty.

    Raises:
        UsageError: there is no such back-end.
    """
    if name not in ("", AUTO, *NAMES):
        raise UsageError(f"there is no VFIO back-end {name}", where=where, hint=" ".join((AUTO, *NAMES)))
    return name or AUTO


def is_noiommu_enabled(system: System = SYSTEM) -> bool | None:
    """Whether VFIO makes groups for functions without an IOMMU; None where it cannot, or is not loaded."""
    try:
        return system.read_text(PARAMETER) == "Y"
    except OSError:
        return None


def usable(function: Function, system: System = SYSTEM) -> list[str]:
    """Back-ends whose nodes are there for a function, the one that is taken by itself first.

    No-IOMMU is named where VFIO made a group for it; it is never taken by itself.
    """
    if function.group is None:
        return [NOIOMMU] if noiommu_group_of(function.address, system) is not None else []
    ways = []
    if system.exists(CONTAINER_NODE) and system.exists(f"/dev/vfio/{function.group}"):
        ways.append(TYPE1)
    if system.exists(IOMMUFD_NODE) and cdev_of(function.address, system) is not None:
        ways.append(IOMMUFD)
    return ways
