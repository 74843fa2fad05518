"""The console's model: what comes in, what goes out, and what it holds against a driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestpv.devices.loopback import open_function
from guestpv.devices.models.console import Console
from guestpv.devices.scripted import ScriptedDriver
from guestpv.spec import console as spec
from guestpv.spec.features import F_ACCESS_PLATFORM, F_VERSION_1, mask
from guestpv.spec.pci import CfgType

FEATURES = mask((F_VERSION_1, F_ACCESS_PLATFORM, spec.F_SIZE, spec.F_EMERG_WRITE))


class World:
    """A model and a driver by hand."""

    def __init__(self, **params: str) -> None:
        self.function = open_function("console", params)
        assert isinstance(self.function.model, Console)
        self.model = self.function.model
        self.driver = ScriptedDriver(self.function)

    def start(self) -> None:
        queues = {spec.RECEIVEQ: 4, spec.TRANSMITQ: 4}
        self.receiveq, self.transmitq = self.driver.start(FEATURES, dict(queues))


@pytest.fixture
def world() -> Iterator[World]:
    world = World(echo="off", cols="132")
    yield world
    world.function.close()


def test_what_is_typed_waits_for_buffers_and_is_cut_to_them(world: World) -> None:
    world.start()
    world.model.type(b"abcde")
    buffers = [world.receiveq.buffer(3) for _ in range(2)]
    for buffer in buffers:
        world.receiveq.add(writable=[buffer])
    world.receiveq.kick()
    assert [length for _, length in world.receiveq.used()] == [3, 2]
    assert [buffer.array.tobytes() for buffer in buffers] == [b"abc", b"de\0"]


def test_what_is_sent_is_kept_and_the_buffer_comes_back_empty(world: World) -> None:
    world.start()
    world.transmitq.add([world.transmitq.buffer(2, b"hi")])
    world.transmitq.kick()
    assert world.model.written == b"hi"
    assert [length for _, length in world.transmitq.used()] == [0]
    assert world.function.findings == []


def test_emergency_write_works_on_an_unconfigured_device(world: World) -> None:
    world.driver.write_at(CfgType.DEVICE, spec.CONFIG["emerg_wr"].offset, 4, 0x1234_5600 | ord("!"))
    assert world.model.written == b"!"
    assert world.function.findings == []


def test_buffers_in_the_wrong_queue_are_told(world: World) -> None:
    world.start()
    world.transmitq.add(writable=[world.transmitq.buffer(4)])
    world.transmitq.kick()
    world.receiveq.add([world.receiveq.buffer(4)])
    world.receiveq.kick()
    world.model.type(b"x")
    assert ["5.3.6.1" in finding.message for finding in world.function.findings] == [True, True]


def test_a_new_size_is_in_the_configuration_under_a_new_generation(world: World) -> None:
    world.start()
    before = world.driver.read("config_generation")
    assert world.driver.read_at(CfgType.DEVICE, spec.CONFIG["cols"].offset, 2) == 132
    world.model.resize(100, 40)
    assert world.driver.read_at(CfgType.DEVICE, spec.CONFIG["rows"].offset, 2) == 40
    assert world.driver.read("config_generation") != before
