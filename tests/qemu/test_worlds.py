"""Every body of every driver on QEMU's devices, and on qemu-storage-daemon and DPDK over ``vhost-user:``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.register_assert_rewrite("worlds.bodies", "worlds.schemes")

from worlds.bodies import Place  # noqa: E402
from worlds.schemes import PEERS, QTEST, World, case_id, cases  # noqa: E402

CASES = list(cases([*QTEST, *PEERS]))


@pytest.mark.parametrize(("body", "world"), CASES, ids=case_id)
def test(body: Callable[[Place], None], world: World, tmp_path: Path) -> None:
    with world.place(tmp_path) as place:
        body(place)
