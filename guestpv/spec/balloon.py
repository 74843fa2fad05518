"""Traditional memory balloon device (5.5): configuration and queue numbers."""

from __future__ import annotations

from typing import Final

from .layout import Field, Layout

F_MUST_TELL_HOST: Final = 0
F_STATS_VQ: Final = 1
F_DEFLATE_ON_OOM: Final = 2
F_FREE_PAGE_HINT: Final = 3
F_PAGE_POISON: Final = 4
F_PAGE_REPORTING: Final = 5

INFLATEQ, DEFLATEQ, STATSQ, FREE_PAGE_VQ, REPORTING_VQ = range(5)

PAGE_SHIFT: Final = 12
"""A page frame number counts 4096-byte units whatever the guest's page size (5.5.6)."""

CONFIG: Final = Layout(
    "virtio_balloon_config",
    "5.5.4",
    (
        Field("num_pages", 0, 4),
        Field("actual", 4, 4, writable=True),
        Field("free_page_hint_cmd_id", 8, 4, feature=F_FREE_PAGE_HINT),
        Field("poison_val", 12, 4, writable=True, feature=F_PAGE_POISON),
    ),
)
