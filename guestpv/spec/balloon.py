"""Traditional memory balloon device (5.5): configuration, queue numbers, statistics."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np

from .layout import Field, Layout

F_MUST_TELL_HOST: Final = 0
F_STATS_VQ: Final = 1
F_DEFLATE_ON_OOM: Final = 2
F_FREE_PAGE_HINT: Final = 3
F_PAGE_POISON: Final = 4
F_PAGE_REPORTING: Final = 5

INFLATEQ, DEFLATEQ, STATSQ, FREE_PAGE_VQ, REPORTING_VQ = range(5)

QUEUE_NAMES: Final = ("inflateq", "deflateq", "statsq", "free_page_vq", "reporting_vq")
OPTIONAL_QUEUES: Final = {
    STATSQ: F_STATS_VQ,
    FREE_PAGE_VQ: F_FREE_PAGE_HINT,
    REPORTING_VQ: F_PAGE_REPORTING,
}
"""Queue number of the standard -> feature that makes the queue exist (5.5.2)."""

PAGE_SHIFT: Final = 12
"""A page frame number counts 4096-byte units whatever the guest's page size (5.5.6)."""
PAGE_BYTES: Final = 1 << PAGE_SHIFT
PAGE_NUMBER: Final = np.dtype("<u4")
"""One entry of an inflate or deflate request."""

CMD_ID_STOP: Final = 0
CMD_ID_DONE: Final = 1
CMD_ID_FIRST: Final = 2
"""Reserved values of ``free_page_hint_cmd_id``, and the first that starts a round of hints (5.5.6.5)."""


class Stat(IntEnum):
    """Tags of the statistics (5.5.6.4); bytes or counts since boot."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJFLT = 2
    MINFLT = 3
    MEMFREE = 4
    MEMTOT = 5
    AVAIL = 6
    CACHES = 7
    HTLB_PGALLOC = 8
    HTLB_PGFAIL = 9


STAT: Final = np.dtype([("tag", "<u2"), ("val", "<u8")])
"""``virtio_balloon_stat``: 10 bytes, packed. (5.5.6.3.1 also asks for "a multiple of 6 bytes": a slip.)"""

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
