"""Real QEMU devices without a guest: a fresh QEMU per case, ended by its pid whatever happens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guestpv.pci.qtest import QtestFunction, open_function
from guestpv.pci.qtest_machine import QtestMachine

CASE_LIMIT = 30
"""Seconds a case may take; most take a tenth of one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = shutil.which("qemu-system-x86_64") is None
    for item in items:
        if "/tests/qemu/" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.timeout(CASE_LIMIT))
        if missing:
            item.add_marker(
                pytest.mark.skip(reason="qemu-system-x86_64 is missing: apt install qemu-system-x86")
            )


@pytest.fixture
def launch() -> Iterator[Callable[..., QtestMachine]]:
    """Start machines with the arguments of ``QtestMachine``; they end with the case."""
    machines: list[QtestMachine] = []

    def start(*devices: str, **options: Any) -> QtestMachine:
        machines.append(QtestMachine(devices, **options))
        return machines[-1]

    yield start
    for machine in machines:
        machine.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., QtestFunction]]:
    """``open_function`` with parameters as keywords; what it opens ends with the case."""
    functions: list[QtestFunction] = []

    def start(body: str, **params: str) -> QtestFunction:
        functions.append(open_function(body, params))
        return functions[-1]

    yield start
    for function in functions:
        function.close()
