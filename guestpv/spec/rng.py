"""Entropy device (5.4): one queue of device-writable buffers, no configuration, no features of its own."""

from typing import Final

REQUESTQ: Final = 0
