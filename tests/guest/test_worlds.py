"""Bodies that drivers pass in every other world, over ``vfio:`` under the real kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guestvm import Machine
from worlds import bodies
from worlds.schemes import DISK, QUEUES, Returner

from .conftest import MODERN

SCRIPT = """
import sys
sys.path.insert(0, "/tmp")
import bodies, guestpv
from guestpv.vfio.binding import bind
address, body, queues = sys.argv[1:]
bind(address)
getattr(bodies, body)(bodies.Place(lambda: guestpv.open(f"vfio:{address}"), queues=int(queues)))
"""
CASES = [(kind, body.__name__) for kind in ("rng", "net", "blk") for body in bodies.BODIES[kind]]


@pytest.fixture
def address(vm: Machine, kind: str, tmp_path: Path) -> Iterator[str]:
    """A function of the shared machine; the machine is as it was afterwards."""
    vm.write_file("/tmp/bodies.py", Path(bodies.__file__).read_bytes())
    if kind == "rng":
        found = vm.address("rng0")
        yield found
        back = vm.run(["guestpv", "unbind", "--force", found])
        assert back.status == 0, back.stderr
        return
    with ExitStack() as undo:
        device = f"virtio-{kind}-pci,id=world0,{MODERN}"
        if kind == "net":
            cable = Returner(tmp_path)
            undo.callback(cable.close)
            local, remote = ({"type": "unix", "path": path} for path in (cable.device, cable.wire))
            vm.qmp("netdev_add", type="dgram", id="world", local=local, remote=remote)
            undo.callback(vm.qmp, "netdev_del", id="world")
            device += ",netdev=world"
        else:
            disk = tmp_path / "disk"
            disk.write_bytes(bytes(DISK))
            vm.qmp("blockdev-add", driver="file", filename=str(disk), node_name="world")
            undo.callback(vm.qmp, "blockdev-del", node_name="world")
            device += f",drive=world,num-queues={QUEUES}"
        where = vm.plug(device)
        undo.callback(vm.unplug, "world0")
        yield where


@pytest.mark.parametrize(("kind", "body"), CASES)
def test(vm: Machine, address: str, kind: str, body: str) -> None:
    done = vm.run(["python", "-", address, body, str(QUEUES)], stdin=SCRIPT.encode(), timeout=600)
    assert done.status == 0, done.stderr
