"""Which way into VFIO a function is driven through."""

from __future__ import annotations

from typing import Final

from ..errors import Refused
from ..system import SYSTEM, System
from .container import Type1Container
from .context import Context
from .iommufd import Iommufd
from .noiommu import NoIommu
from .survey import IOMMU_HINT, NO_IOMMU_GROUP_PROBLEM, Function, noiommu_group_of
from .ways import AUTO, ENABLE, NOIOMMU, TYPE1, check_name, usable

WAYS: Final[dict[str, type[Context]]] = {way.backend: way for way in (Type1Container, Iommufd, NoIommu)}


def choose(function: Function, wanted: str = AUTO, system: System = SYSTEM) -> tuple[type[Context], int]:
    """The kind of context for a function that is bound to vfio-pci, and the number of its group.

    Args:
        wanted: ``auto``: type1 where its nodes are there, else iommufd; never ``noiommu``.

    Raises:
        UsageError: there is no such back-end.
        Refused: this one cannot be had for the function.
    """
    check_name(wanted, function.address)
    if wanted == NOIOMMU:
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
        wanted = (usable(function, system) or [TYPE1])[0]
    return WAYS[wanted], function.group
