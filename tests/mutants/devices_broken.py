"""A pytest plugin that runs the device suite on every broken device instead of a sound one."""

from __future__ import annotations

import pytest

from guestpv.conformance.plugin import PEERS

from .device import MUTANTS


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Each check is run on the devices that break one of its requirements."""
    config.stash[PEERS] = MUTANTS
