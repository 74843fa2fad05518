"""Bodies that drivers pass in every other world, over ``vfio:`` under the real kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestvm import Machine
from worlds import bodies

SCRIPT = """
import sys
sys.path.insert(0, "/tmp")
import bodies, guestpv
from guestpv.vfio.binding import bind
address, body = sys.argv[1:]
bind(address)
getattr(bodies, body)(bodies.Place(lambda: guestpv.open(f"vfio:{address}")))
"""


@pytest.fixture
def address(vm: Machine) -> Iterator[str]:
    """The shared machine's entropy function, back with the kernel afterwards."""
    vm.write_file("/tmp/bodies.py", Path(bodies.__file__).read_bytes())
    found = vm.address("rng0")
    yield found
    back = vm.run(["guestpv", "unbind", "--force", found])
    assert back.status == 0, back.stderr


@pytest.mark.parametrize("body", bodies.BODIES["rng"], ids=lambda body: body.__name__)
def test(vm: Machine, address: str, body: object) -> None:
    done = vm.run(["python", "-", address, getattr(body, "__name__", "")], stdin=SCRIPT.encode(), timeout=600)
    assert done.status == 0, done.stderr
