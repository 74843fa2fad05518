"""What shipping devices do beside the standard, and what the queue makes of it."""

from __future__ import annotations

import pytest

from guestpv.errors import DeviceViolation
from ringpeer import AVAIL, USED, WRITE, Bench, bench, mask

ROOM = 40


def used_without_write(length: int, extra_flags: int = 0) -> Bench:
    """A packed queue whose one buffer came back with ``length`` and only the flags given."""
    b = bench(mask("RING_PACKED"), 8)
    b.queue.add([b.pool.allocate(4)], [b.pool.allocate(ROOM)])
    b.queue.publish()
    b.queue.desc[0]["id"], b.queue.desc[0]["len"] = 0, length
    b.queue.desc[0]["flags"] = AVAIL | USED | extra_flags
    return b


@pytest.mark.requirement("DEV-PACKED-21")
@pytest.mark.parametrize(("length", "taken"), [(0, 0), (ROOM, ROOM), (ROOM + 1, 0), (0xFFFFFFFF, 0)])
def test_a_packed_length_without_write_counts_where_it_can_be_meant(length: int, taken: int) -> None:
    """QEMU to 10.0 never sets WRITE in a used descriptor and means its len all the same."""
    _, lengths = used_without_write(length).queue.reap_burst()
    assert lengths.tolist() == [taken]


@pytest.mark.requirement("DEV-PACKED-21")
def test_a_packed_length_with_write_must_fit() -> None:
    with pytest.raises(DeviceViolation, match=str(ROOM + 1)):
        used_without_write(ROOM + 1, WRITE).queue.reap_burst()
