"""What our own network driver does in front of the strict device (5.1)."""

from __future__ import annotations

from typing import Final

import numpy as np

from ...devices.models.net import Net as NetModel
from ...drivers.net import Net
from ...drivers.net_config import LinkState
from ...drivers.net_port import Frames
from ...spec import net as spec
from ...spec.features import mask
from ...transport.base import FeatureFilter, Transport
from .outcome import Broken
from .rules import Watch

FRAMES: Final = 40
HEADER: Final = 14
UNKNOWN: Final = 0xFFFFFFFF
LINKS: Final = (
    ({"status": 0xFFF1}, LinkState(up=True), "DRV-NET-176"),
    ({"status": 0xFFF0}, LinkState(up=False), "DRV-NET-176"),
    ({"status": 3}, LinkState(announce=True), "DRV-NET-176"),
    ({"speed": 40_000, "duplex": 1}, LinkState(speed=40_000, duplex="full"), "DRV-NET-177"),
    ({"speed": 10, "duplex": 0}, LinkState(speed=10, duplex="half"), "DRV-NET-177"),
    ({"speed": UNKNOWN, "duplex": 0xFF}, LinkState(), "DRV-NET-177"),
    ({"speed": 0x80000001, "duplex": 1}, LinkState(duplex="full"), "DRV-NET-11"),
    ({"speed": 10, "duplex": 7}, LinkState(speed=10), "DRV-NET-12"),
)
"""Configuration, what the driver's user has to get, and the requirement that says so."""
NO_LINK: Final = {"status": spec.S_LINK_UP, "speed": UNKNOWN, "duplex": 0xFF}


def net(transport: Transport, watch: Watch, patience: float) -> None:
    """Send frames of many lengths to a peer that sends them back."""
    with Net(transport) as driver:
        lengths = [min(37 * n, driver.mtu) for n in range(1, FRAMES)]
        if transport.has(spec.F_MTU):
            lengths.append(driver.mtu)
        frames = [frame_from(driver.mac, number, length) for number, length in enumerate(lengths)]
        came: list[bytes] = []
        for frame in frames:
            driver.send([frame])
            back = driver.receive_within(patience)
            if not back:
                raise Broken(f"a frame of {len(frame)} bytes did not come back")
            came += back
        _ = driver.state
        watch.settle()
        if came != frames:
            raise Broken(f"{len(frames)} frames were sent, {len(came)} came back, or others")


def frame_from(mac: bytes, number: int, length: int) -> bytes:
    """A broadcast of the experimental EtherType whose ``length`` bytes of content count from ``number``."""
    return b"\xff" * 6 + mac + b"\x88\xb5" + bytes((number + at) & 0xFF for at in range(length))


def net_links(transport: Transport, watch: Watch, patience: float) -> None:
    """Change the link's state from outside, and look at what the driver's user gets of it."""
    model = watch.device.model
    assert isinstance(model, NetModel)
    with Net(transport) as driver:
        for fields, wanted, requirement in LINKS:
            model.change_config(**(NO_LINK | fields))
            if driver.state == wanted:
                watch.keep(requirement)
            else:
                watch.break_rule(requirement, f"{fields} is {driver.state} to the user, not {wanted}")
        model.change_config(**NO_LINK)


def net_steered(transport: Transport, watch: Watch, patience: float) -> None:
    """Two pairs of queues with RSS and reported hashes; frames by both of them."""
    transport.feature_filter = FeatureFilter(mask((spec.F_RSS, spec.F_HASH_REPORT)), 0)
    with Net(transport, queue_pairs=2) as driver:
        for pair in range(2):
            frame = frame_from(driver.mac, pair, 100)
            if driver.send_burst(Frames.of([frame]), pair=pair) != 1:
                raise Broken(f"the device does not take a frame on pair {pair + 1}")
            # What has no addresses to take a hash over comes to the first queue.
            if not driver.wait(patience):
                raise Broken(f"the frame sent on pair {pair + 1} did not come back")
            got = driver.receive_burst(headers=True)
            assert got.headers is not None
            if [got[row] for row in range(len(got))] != [frame] or np.any(got.headers["hash_report"]):
                raise Broken(f"the frame sent on pair {pair + 1} came back otherwise")
        watch.settle()
