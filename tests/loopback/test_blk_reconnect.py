"""The block driver when its back end dies under load and comes back: nothing is lost or silently doubled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import guestpv
from guestpv.drivers.blk import Blk
from guestpv.drivers.blk_queue import Request
from guestpv.errors import DeviceGone
from guestpv.serve.vhost_user import PROTOCOL_FEATURES
from guestpv.spec import blk as spec
from guestpv.spec import features as feat
from guestpv.spec.features import mask
from guestpv.wire.vhost_user import ProtocolFeature as PF
from peers.mortal import immortal, mortal_disk

BLOCK = 4096
WRITES = 60
DEATHS = {"pop": 37, "push": 20, "publish": 6}
"""At which event of its kind the back end dies: a request taken, one answered, answers made visible."""


@pytest.mark.parametrize(
    ("packed", "tracked", "kind"),
    [*[(False, True, kind) for kind in DEATHS], (False, False, "push"), (True, False, "push")],
)
def test_each_request_ends_once(tmp_path: Path, packed: bool, tracked: bool, kind: str) -> None:
    image, log, sock = tmp_path / "disk", tmp_path / "log", tmp_path / "sock"
    image.write_bytes(bytes(1 << 20))
    protocol = PROTOCOL_FEATURES & ~(0 if tracked else mask((PF.INFLIGHT_SHMFD,)))
    offer = mask((feat.F_RING_PACKED,)) if packed else 0
    back_end = mortal_disk(
        sock, image, log, kind=kind, count=DEATHS[kind], offer=offer, protocol_features=protocol
    )
    with (
        back_end,
        guestpv.open(f"vhost-user:blk:{sock}") as transport,
        Blk(transport, timeout=60.0) as disk,
    ):
        requests, memory = disk.queues[0], disk.allocate(WRITES * BLOCK)
        memory.array[:] = np.random.default_rng(5).integers(0, 256, memory.nbytes, np.uint8)
        ended: list[int] = []
        sent: list[Request] = []
        for place in range(0, WRITES * BLOCK, BLOCK):
            (request,) = disk.submit(spec.T_OUT, place, [memory[place : place + BLOCK]])
            request.on_end = lambda one: ended.append(one.sector * spec.SECTOR // BLOCK)
            sent.append(request)
        requests.publish()
        with pytest.raises(DeviceGone):
            requests.wait(sent, 60)
        requests.reap()
        before, executed = list(ended), log.read_text().split()
        assert len(before) < WRITES
        back_end.kill()
        immortal(back_end)
        back_end.start()
        again = disk.reconnect()
        # A back end that kept a record goes on by itself; any other is told, and so is the caller.
        assert {request.sector for request in again} == (
            set() if tracked else {request.sector for request in sent if request.outcome is None}
        )
        requests.wait(sent, 60)
        for request in sent:
            request.check()
        assert sorted(ended) == list(range(WRITES))
        after = log.read_text().split()[len(executed) :]
        assert not set(map(str, before)) & set(after), "a request that had ended was carried out again"
        assert set(executed) | set(after) == set(map(str, range(WRITES)))
        disk.flush()
        assert image.read_bytes()[: memory.nbytes] == memory.array.tobytes()
