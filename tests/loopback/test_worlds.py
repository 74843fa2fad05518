"""Every body of every driver over ``loopback:`` and over our own servers' sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.register_assert_rewrite("worlds.bodies", "worlds.schemes")

from worlds.bodies import Place  # noqa: E402
from worlds.schemes import LOOPBACK, VFIO_USER, VHOST_USER, World, case_id, cases  # noqa: E402


@pytest.mark.parametrize(("body", "world"), cases([*LOOPBACK, *VFIO_USER, *VHOST_USER]), ids=case_id)
def test(body: Callable[[Place], None], world: World, tmp_path: Path) -> None:
    with world.place(tmp_path) as place:
        body(place)
