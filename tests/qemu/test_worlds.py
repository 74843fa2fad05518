"""Every body of every driver on QEMU's devices, and on qemu-storage-daemon and DPDK over ``vhost-user:``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

pytest.register_assert_rewrite("worlds.bodies", "worlds.schemes")

from worlds.bodies import Place  # noqa: E402
from worlds.schemes import PEERS, QTEST, World, case_id, cases  # noqa: E402

CASES = list(cases([*QTEST, *PEERS]))


@pytest.fixture(scope="module")
def place_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[World], Place]]:
    """One place for all bodies of a world: others' back ends take seconds to start, and wait for the next."""
    with ExitStack() as stack:
        here: dict[World, Place] = {}

        def place_of(world: World) -> Place:
            if world not in here:
                here.clear()
                stack.close()
                here[world] = stack.enter_context(world.place(tmp_path_factory.mktemp("world")))
            return here[world]

        yield place_of


@pytest.mark.parametrize(("body", "world"), CASES, ids=case_id)
def test(body: Callable[[Place], None], world: World, place_of: Callable[[World], Place]) -> None:
    body(place_of(world))
