"""Fixtures of the loopback tier."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

CLONE_NEWNET = 0x40000000


@pytest.fixture
def own_network() -> Iterator[None]:
    """A network namespace of the test's own, for the thread that runs it and those it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET):
            pytest.fail(f"a network namespace cannot be made: {os.strerror(ctypes.get_errno())}; run as root")
        yield
        assert libc.setns(home, CLONE_NEWNET) == 0
    finally:
        os.close(home)
