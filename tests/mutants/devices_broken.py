"""A pytest plugin that runs the device suite on every broken device instead of a sound one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from guestpv.conformance.plugin import PEERS

from .device import MUTANTS

for path in sorted(Path(__file__).parent.glob("device_*.py")):
    # Importing one registers its devices.
    import_module(f"{__package__}.{path.stem}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Each check is run on the devices that break one of its requirements."""
    config.stash[PEERS] = MUTANTS
