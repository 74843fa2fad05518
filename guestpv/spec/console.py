"""Console device (5.3): configuration and queue numbers. Without MULTIPORT there is one port."""

from __future__ import annotations

from typing import Final

from .layout import Field, Layout

F_SIZE: Final = 0
F_MULTIPORT: Final = 1
F_EMERG_WRITE: Final = 2

RECEIVEQ, TRANSMITQ = 0, 1

CONFIG: Final = Layout(
    "virtio_console_config",
    "5.3.4",
    (
        Field("cols", 0, 2, feature=F_SIZE),
        Field("rows", 2, 2, feature=F_SIZE),
        Field("max_nr_ports", 4, 4, feature=F_MULTIPORT),
        Field("emerg_wr", 8, 4, writable=True, feature=F_EMERG_WRITE),
    ),
)
