"""The ways into VFIO by name, and which of them a function is driven through."""

from __future__ import annotations

from typing import Final

from ..errors import Refused, UsageError
from ..system import SYSTEM, System
from .container import CONTAINER_NODE, Type1Container
from .context import Context
from .iommufd import NODE as IOMMUFD_NODE
from .iommufd import Iommufd
from .noiommu import ENABLE, NoIommu
from .survey import IOMMU_HINT, NO_IOMMU_GROUP_PROBLEM, Function, cdev_of, noiommu_group_of

WAYS: Final[dict[str, type[Context]]] = {way.backend: way for way in (Type1Container, Iommufd, NoIommu)}
NAMES: Final = tuple(WAYS)
AUTO: Final = "auto"


def check_name(name: str, where: str = "") -> str:
    """A back-end's name, ``auto`` where it is empty.

    Raises:
        UsageError: there is no such back-end.
    """
    if name not in ("", AUTO, *NAMES):
        raise UsageError(f"there is no VFIO back-end {name}", where=where, hint=" ".join((AUTO, *NAMES)))
    return name or AUTO


def usable(function: Function, system: System = SYSTEM) -> list[str]:
    """Back-ends whose nodes are there for a function, the one that is taken by itself first.

    No-IOMMU is named where VFIO made a group for it; it is never taken by itself.
    """
    if function.group is None:
        return [NoIommu.backend] if noiommu_group_of(function.address, system) is not None else []
    ways = []
    if system.exists(CONTAINER_NODE) and system.exists(f"/dev/vfio/{function.group}"):
        ways.append(Type1Container.backend)
    if system.exists(IOMMUFD_NODE) and cdev_of(function.address, system) is not None:
        ways.append(Iommufd.backend)
    return ways


def choose(function: Function, wanted: str = AUTO, system: System = SYSTEM) -> tuple[type[Context], int]:
    """The kind of context for a function that is bound to vfio-pci, and the number of its group.

    Args:
        wanted: ``auto``: type1 where its nodes are there, else iommufd; never ``noiommu``.

    Raises:
        UsageError: there is no such back-end.
        Refused: this one cannot be had for the function.
    """
    check_name(wanted, function.address)
    if wanted == NoIommu.backend:
        if function.group is not None:
            raise Refused(
                "the function is behind an IOMMU, so VFIO has no no-IOMMU mode for it",
                where=function.address,
                hint="leave --vfio-backend out",
            )
        number = noiommu_group_of(function.address, system)
        if number is None:
            raise Refused(
                "VFIO has no no-IOMMU group for the function",
                where=function.address,
                hint=f"{ENABLE}; guestpv bind --vfio-backend noiommu {function.address}",
            )
        return NoIommu, number
    if function.group is None:
        raise Refused(NO_IOMMU_GROUP_PROBLEM, where=function.address, hint=IOMMU_HINT)
    if wanted == AUTO:
        # What is not there is explained best by type1, which every kernel has.
        wanted = (usable(function, system) or [Type1Container.backend])[0]
    return WAYS[wanted], function.group
