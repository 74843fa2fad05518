"""QEMU's entropy device when it holds back, is reset under the driver's feet, or dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceGone, TimeLimit
from guestpv.pci.qtest import QtestFunction
from guestpv.spec.status import Status
from guestpv.transport.pci import PciTransport

Device = Callable[..., PciTransport]


def test_what_the_rate_limit_holds_back_is_drained_after_reset(device: Device) -> None:
    transport = device("virtio-rng-pci,max-bytes=1,period=3600000")
    transport.negotiate(supported=0)
    queue = transport.make_queue(0)
    transport.driver_ok()
    memory = transport.pool.allocate(4096)
    tokens = [queue.add(writable=[memory[64 * n : 64 * n + 64]]) for n in range(4)]
    queue.publish()
    assert queue.wait(60)
    ((first, length),) = queue.completions()
    assert (first, length) == (tokens[0], 1)
    assert not queue.wait(0.05)
    transport.write_status(0)
    assert transport.read_status() == 0
    assert queue.drain() == tokens[1:]


def test_a_device_behind_a_root_port_survives_a_function_level_reset(device: Device) -> None:
    transport = device("virtio-rng-pci", root_port="1")
    assert len(Rng(transport).read(100)) == 100
    assert transport.function.reset()
    assert transport.status == Status(0)
    assert len(Rng(transport).read(100)) == 100


def test_a_dead_qemu_ends_waiting_and_closing(device: Device) -> None:
    transport = device("virtio-rng-pci")
    rng = Rng(transport)
    assert isinstance(transport.function, QtestFunction)
    os.kill(transport.function.machine.qemu.pid, signal.SIGKILL)
    with pytest.raises((DeviceGone, TimeLimit)):
        rng.read(16, timeout=0.5)
    rng.close()
