"""``--vfio-backend``: which way into VFIO a function is driven through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..opener import Spec

NOIOMMU: Final = "noiommu"
CHOICES: Final = ("auto", "type1", "iommufd", NOIOMMU)

VFIO_BACKEND: Final[Callable[[Any], Any]] = click.option(
    "--vfio-backend",
    type=click.Choice(CHOICES),
    default="auto",
    show_default=True,
    help="The way into VFIO; auto takes type1, else iommufd. noiommu drives a function without an IOMMU, "
    "and with it the device can overwrite any memory of this machine.",
)


def with_backend(spec: str, backend: str) -> str:
    """A specification with the back-end that the option named.

    Raises:
        UsageError: it is not one of VFIO's, or names another one itself.
    """
    from ..errors import UsageError
    from ..opener import Spec

    parsed = Spec.parse(spec)
    own = parsed.params.get("backend", "")
    if backend == "auto" or (own == backend and parsed.scheme == "vfio"):
        return spec
    if parsed.scheme != "vfio" or own:
        what = f"it says backend={own}" if own else f"it is a device of {parsed.scheme}:, not of VFIO"
        raise UsageError(f"--vfio-backend {backend} does not go with this device: {what}", where=spec)
    return f"{spec}{'&' if '?' in spec else '?'}backend={backend}"


def is_noiommu(spec: Spec) -> bool:
    """Whether a specification asks for VFIO's no-IOMMU mode."""
    return spec.scheme == "vfio" and spec.params.get("backend") == NOIOMMU
