"""guestpv: the guest half of virtio in user space.

>>> import guestpv
>>> with guestpv.open("vfio:0000:01:00.0") as transport:      # doctest: +SKIP
...     print(transport.device_type, hex(transport.offered))
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

__all__ = ["__version__", "open", "open_driver"]
__version__ = "0.1.0"

# A library says nothing unless whoever uses it asks for it: logging.getLogger("guestpv").
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from .opener import open, open_driver


def __getattr__(name: str) -> Any:
    # Resolved late: `guestpv --help` needs neither numpy nor the C core.
    if name in ("open", "open_driver"):
        from . import opener

        return getattr(opener, name)
    raise AttributeError(f"module 'guestpv' has no attribute {name!r}")
