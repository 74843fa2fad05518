"""Frames under asyncio, and scapy's packets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import ARP, Ether

from guestpv.devices.loopback import open_function
from guestpv.devices.models.net import Net as NetModel
from guestpv.drivers.net import Net
from guestpv.drivers.net_aio import AioNet
from guestpv.errors import DeviceViolation, UsageError
from guestpv.transport.pci import PciTransport

PATIENCE = 60.0


def opened(mode: str = "msix", **params: str) -> tuple[Net, NetModel]:
    function = open_function("net", {"threaded": "on", **params})
    assert isinstance(function.model, NetModel)
    transport = PciTransport(function)
    transport.mode = mode  # type: ignore[assignment]
    return Net(transport), function.model


def frames(count: int) -> list[bytes]:
    return [n.to_bytes(2, "big").rjust(14, b"\2") + bytes(46) for n in range(count)]


@pytest.mark.parametrize("mode", ["msix", "poll"])
@pytest.mark.parametrize("size", ["256", "4"])
def test_more_frames_than_the_queue_holds_go_round(mode: str, size: str) -> None:
    net, _ = opened(mode, queue_size=size)

    async def main() -> list[bytes]:
        with AioNet(net) as aio:

            async def sender() -> None:
                for frame in frames(300):
                    await aio.send(frame)

            sending = asyncio.create_task(sender())
            got = [await asyncio.wait_for(aio.receive(), PATIENCE) for _ in range(300)]
            await sending
            return got

    with net:
        assert asyncio.run(main()) == frames(300)
        # The queues are anybody's again.
        assert net.send(frames(1)) == 1
        assert net.receive_within(PATIENCE) == frames(1)


def test_iteration_ends_with_what_broke_the_queue() -> None:
    net, model = opened(peer="sink")

    async def main() -> list[bytes]:
        got: list[bytes] = []
        with AioNet(net) as aio:
            model.deliver(frames(1)[0])
            async for frame in aio:
                got.append(frame)
                net.pairs[0].rx.device["ring"][1] = (9999, 60)
                net.pairs[0].rx.device["idx"] = 2
        return got

    with net, pytest.raises(DeviceViolation, match="9999"):
        asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_a_coroutine_that_is_cancelled_loses_no_frame() -> None:
    net, model = opened(peer="sink")

    async def main() -> bytes:
        with AioNet(net) as aio:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(aio.receive(), 0.01)
            model.deliver(frames(1)[0])
            return await asyncio.wait_for(aio.receive(), PATIENCE)

    with net:
        assert asyncio.run(main()) == frames(1)[0]


def test_packets_of_scapys_go_out_and_come_in() -> None:
    net, _ = opened()
    packets: list[Any] = [
        Ether(dst="ff:ff:ff:ff:ff:ff", src="52:54:00:00:00:01") / ARP(pdst="192.0.2.1"),
        Ether(src="52:54:00:00:00:01", dst="52:54:00:00:00:02") / IP(dst="192.0.2.1") / ICMP(),
    ]
    with net:
        assert net.send(packets) == 2
        got: list[Any] = []
        while len(got) < 2:
            assert net.wait(PATIENCE)
            got += net.receive_packets()
        assert [bytes(packet) for packet in got] == [bytes(packet) for packet in packets]
        assert got[0][ARP].pdst == "192.0.2.1"


def test_without_scapy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scapy.layers.l2", None)
    net, _ = opened()
    with net, pytest.raises(UsageError) as caught:
        net.receive_packets()
    assert "guestpv[scapy]" in caught.value.hint
