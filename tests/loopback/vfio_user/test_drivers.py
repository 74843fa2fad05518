"""Our drivers and our models at the two ends of a socket."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from guestpv.devices.models.net import Net as NetModel
from guestpv.drivers.blk import Blk
from guestpv.drivers.net import Net
from guestpv.drivers.rng import Rng
from guestpv.spec import balloon
from guestpv.spec import features as feat
from guestpv.system import SYSTEM

from .kit import Serve, opened

WAYS = [
    "",
    "packed=on",
    "packed=on&in_order=on&notification_data=on",
    "event_idx=off&indirect_desc=off",
    "msix=off",
    "msix=1",
    "threaded=on",
    "multiplier=0",
    "offer=-access_platform",
    "flr=off",
    "queue_size=8",
]


@pytest.mark.parametrize("way", WAYS)
def test_rng(serve: Serve, way: str) -> None:
    server = serve(f"rng?most=100&{way}")
    for _ in range(2):
        with opened(server) as transport, Rng(transport) as rng:
            assert len(set(rng.read(5000))) > 200


@pytest.mark.parametrize("way", WAYS)
def test_net(serve: Serve, way: str) -> None:
    server = serve(f"net?{way}")
    with opened(server) as transport, Net(transport) as net:
        frames = [bytes([number]) * (60 + 40 * number) for number in range(30)]
        got: list[bytes] = []
        for start in range(0, 30, 3):
            assert net.send(frames[start : start + 3]) == 3
            while len(got) < start + 3:
                assert net.wait(60)
                got += net.receive()
        assert got == frames


@pytest.mark.parametrize("way", WAYS)
def test_blk(serve: Serve, way: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    server = serve(f"blk?file={disk}&size=8M&{way}")
    data = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)
    with opened(server) as transport, Blk(transport) as blk:
        blk.write(4096, data)
        blk.flush()
        assert np.array_equal(blk.read(4096, data.nbytes), data)
    assert disk.read_bytes()[4096 : 4096 + data.nbytes] == data.tobytes()
    with opened(server) as transport, Blk(transport) as blk:
        assert np.array_equal(blk.read(4096, data.nbytes), data)


def test_a_balloon_does_not_translate(serve: Serve) -> None:
    with opened(serve("balloon?target=100")) as transport:
        assert not transport.offered >> feat.F_ACCESS_PLATFORM & 1
        assert transport.config(balloon.CONFIG)["num_pages"] == 100


def test_frames_come_while_the_driver_sleeps(serve: Serve) -> None:
    server = serve("net?peer=sink")
    model = server.function.model
    assert isinstance(model, NetModel)
    with opened(server) as transport, Net(transport) as net:
        threading.Timer(0.1, model.deliver, [b"\xff" * 60]).start()
        assert net.wait(60)
        assert net.receive() == [b"\xff" * 60]


def test_a_changed_configuration_interrupts(serve: Serve) -> None:
    server = serve("net")
    model = server.function.model
    assert isinstance(model, NetModel)
    with opened(server) as transport, Net(transport) as net:
        assert net.link_up
        model.set_link(False)
        assert transport.config_fd is not None
        assert SYSTEM.poll([transport.config_fd], 60)
        assert not net.link_up
