"""The drivers of this package on the device half, in one process, over ``loopback:``."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

import guestpv
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.loopback import open_function
from guestpv.drivers.net import Net
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceViolation, FeaturesRefused, TimeLimit, UsageError
from guestpv.transport.base import Transport
from guestpv.transport.pci import PciTransport


def device_of(transport: Transport) -> SoftwareFunction:
    assert isinstance(transport, PciTransport)
    function = transport.function
    assert isinstance(function, SoftwareFunction)
    return function


@pytest.fixture
def clean() -> Iterator[list[SoftwareFunction]]:
    """Functions whose driver must not have broken a rule by the end of the test."""
    functions: list[SoftwareFunction] = []
    yield functions
    for function in functions:
        assert [str(finding) for finding in function.findings] == []


def test_net_two_ends_of_a_wire(clean: list[SoftwareFunction]) -> None:
    spec = "loopback:net?peer=wire:test&mac=52:54:00:00:00:0"
    with guestpv.open(spec + "1") as one, guestpv.open(spec + "2") as other, Net(one) as a, Net(other) as b:
        clean += [device_of(one), device_of(other)]
        a.send([b"from a".ljust(60)])
        b.send([b"from b".ljust(60)])
        assert a.receive() == [b"from b".ljust(60)]
        assert b.receive() == [b"from a".ljust(60)]


def test_a_wire_end_that_closes_leaves_its_name() -> None:
    open_function("net", {"peer": "wire:gone"}).close()
    one = open_function("net", {"peer": "wire:gone"})
    other = open_function("net", {"peer": "wire:gone"})
    assert one.model.peer == other.model.deliver
    one.close()
    other.close()


@pytest.mark.parametrize("params", ["packed=off", "packed=on", "event_idx=off", "packed=on&event_idx=off"])
def test_no_notification_is_lost_between_two_threads(params: str, clean: list[SoftwareFunction]) -> None:
    with guestpv.open(f"loopback:rng?threaded=on&{params}") as transport, Rng(transport) as rng:
        clean.append(device_of(transport))
        for _ in range(500):
            assert len(rng.read(8, timeout=60)) == 8


@pytest.mark.requirement("DRV-INIT-08", "DRV-INIT-11", "DRV-INIT-13")
def test_refused_features_fail_the_driver() -> None:
    with guestpv.open("loopback:rng") as transport:
        device_of(transport).device.refuse_features_ok = True
        with pytest.raises(FeaturesRefused):
            Rng(transport)


@pytest.mark.requirement("DRV-RESET-01", "DRV-PCI-26")
def test_slow_reset_is_waited_for(clean: list[SoftwareFunction]) -> None:
    with guestpv.open("loopback:rng") as transport:
        clean.append(device_of(transport))
        device_of(transport).registers.reset_reads = 5
        with Rng(transport) as rng:
            assert len(rng.read(10)) == 10


def test_reset_that_never_ends_has_a_limit() -> None:
    transport = guestpv.open("loopback:rng")
    function = device_of(transport)
    function.registers.reset_reads = 1 << 30
    with pytest.raises(TimeLimit):
        transport.reset(timeout=0.05)
    function.registers.reset_reads = 0
    function.registers.power_on()
    transport.close()


@pytest.mark.requirement("DRV-FEAT-05", "DRV-FEAT-07", "DRV-FEAT-14", "DRV-FEAT-29")
def test_unknown_features_are_left_alone(clean: list[SoftwareFunction]) -> None:
    with guestpv.open("loopback:rng?offer=44,+100,+127,+3") as transport, Rng(transport) as rng:
        clean.append(device_of(transport))
        assert device_of(transport).device.offered >> 127 & 1
        assert len(rng.read(4)) == 4


def test_refused_vectors_are_seen() -> None:
    with guestpv.open("loopback:rng") as transport:
        device_of(transport).registers.vectors_granted = 1
        with pytest.raises(guestpv.errors.GuestpvError, match="refused MSI-X vector"):
            Rng(transport)


@pytest.mark.parametrize(
    ("body", "params", "match"),
    [
        ("gpu", {}, "no device type"),
        ("rng", {"colour": "red"}, "unknown parameter colour"),
        ("rng", {"packed": "maybe"}, "packed|on or off"),
        ("rng", {"queue_size": "0"}, "queue_size"),
        ("rng", {"queue_size": "many"}, "no number"),
        ("rng", {"offer": "+warp"}, "no feature"),
        ("rng", {"segment": "100"}, "multiple of 4096"),
        ("rng", {"msix": "4096"}, "vectors"),
        ("net", {"mac": "01:00:00:00:00:00"}, "unicast"),
        ("net", {"mac": "zz"}, "MAC address"),
        ("net", {"mtu": "20"}, "mtu"),
        ("net", {"peer": "nobody"}, "peer is"),
        ("blk", {"size": "100"}, "multiple of 512"),
        ("blk", {"block_size": "100"}, "power of two"),
        ("blk", {"serial": "x" * 21}, "longer than"),
    ],
)
def test_bad_parameters(body: str, params: dict[str, str], match: str) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=match):
        open_function(body, params)
    assert len(os.listdir("/proc/self/fd")) == before


def test_sizes_and_types() -> None:
    function = open_function("blk", {"size": "3M", "num_queues": "4", "ro": "on"})
    assert function.model.config["capacity"] == 3 << 11
    assert len(function.device.queues) == 4
    function.close()
    function = open_function("balloon", {"target": "10"})
    assert function.model.config["num_pages"] == 10
    function.close()


def test_close_gives_everything_back() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for params in ("", "?msix=off", "?threaded=on"):
        with guestpv.open(f"loopback:rng{params}") as transport, Rng(transport) as rng:
            rng.read(4)
            function = device_of(transport)
        assert function.dma.windows() == ()
        function.close()
    open_function("blk", {}).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lying_used_id_is_a_violation() -> None:
    with guestpv.open("loopback:rng") as transport, Rng(transport) as rng:
        function = device_of(transport)
        function.device.hold = True
        with pytest.raises(TimeLimit):
            rng.read(4, timeout=0.01)
        ring = function.device.queues[0].ring
        assert ring is not None
        ((chain, length),) = function.device.queues[0].held[0]
        chain.id = 77
        ring.outstanding[77] = chain
        function.device.release()
        with pytest.raises(DeviceViolation):
            rng.read(4, timeout=60)
        assert length == 4
