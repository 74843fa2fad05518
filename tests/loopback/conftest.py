"""Every device of the loopback tier is a strict one."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def always_strict(strict: None) -> None:
    """See ``strict``."""
