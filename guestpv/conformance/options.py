"""What pytest learns from an installed guestpv: the options of the conformance suite, and nothing else.

The suite itself is loaded only where ``--device`` is given.
"""

from __future__ import annotations

import importlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device`` and what goes with it."""
    group = parser.getgroup("guestpv", "conformance of virtio devices")
    group.addoption("--device", metavar="SPEC", help="the device to check: scheme:body?key=value")
    group.addoption(
        "--hostile",
        action="store_true",
        help="also malformed rings and requests: they can take a hypervisor down",
    )
    group.addoption(
        "--wire", default="", metavar="INTERFACE", help="what is at the other end of a network device's cable"
    )
    group.addoption("--select", default="", metavar="IDS", help="requirements: DEV-SPLIT,DEV-BLK-0*")
    group.addoption("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the checks")


def pytest_configure(config: pytest.Config) -> None:
    """Load the suite."""
    if config.getoption("--device") and not config.pluginmanager.has_plugin("guestpv_conformance_suite"):
        plugin = importlib.import_module("guestpv.conformance.plugin")
        config.pluginmanager.register(plugin, "guestpv_conformance_suite")
