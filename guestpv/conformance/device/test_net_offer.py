"""What a network device offers: features with what they require, queues, its configuration (5.1.2-5.1.4)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestpv.conformance.rig import Rig
from guestpv.spec import features as ft
from guestpv.spec import net

pytestmark = [pytest.mark.device("net"), pytest.mark.formats]

CTRL = (net.F_CTRL_VQ,)
REQUIRED: dict[str, tuple[int, tuple[tuple[int, ...], ...]]] = {
    "DEV-NET-182": (7, ((1,),)),
    "DEV-NET-183": (8, ((1,),)),
    "DEV-NET-184": (10, ((1,),)),
    "DEV-NET-185": (54, ((1,),)),
    "DEV-NET-186": (55, ((1,),)),
    "DEV-NET-187": (9, ((7, 8),)),
    "DEV-NET-188": (11, ((0,),)),
    "DEV-NET-189": (12, ((0,),)),
    "DEV-NET-190": (14, ((0,),)),
    "DEV-NET-191": (56, ((0,),)),
    "DEV-NET-192": (13, ((11, 12),)),
    "DEV-NET-193": (18, (CTRL,)),
    "DEV-NET-194": (19, (CTRL,)),
    "DEV-NET-195": (21, (CTRL,)),
    "DEV-NET-196": (22, (CTRL,)),
    "DEV-NET-197": (23, (CTRL,)),
    "DEV-NET-198": (60, (CTRL,)),
    "DEV-NET-199": (61, ((7, 8, 11, 12),)),
    "DEV-NET-204": (65, ((7,), (8,), (54,), (55,))),
    "DEV-NET-205": (66, ((65,),)),
    "DEV-NET-206": (67, ((11,), (12,), (56,))),
    "DEV-NET-207": (68, ((67,),)),
}
"""Requirement -> a feature, and alternatives of which one each has to be offered with it (5.1.3.1)."""


def offer_check(requirement: str) -> Callable[[Rig], None]:
    """The check of one row of the table."""
    bit, needs = REQUIRED[requirement]
    name = ft.feature_name(ft.NET, bit)
    others = " and ".join(" or ".join(ft.feature_name(ft.NET, one) for one in some) for some in needs)

    @pytest.mark.requirement(requirement)
    def check(rig: Rig) -> None:
        offered = rig.transport.offered
        if not offered >> bit & 1:
            pytest.skip(f"{name} is not offered")
        for some in needs:
            assert any(offered >> one & 1 for one in some), f"{name} is offered without {others}"

    check.__doc__ = f"{name} is offered only together with {others}."
    return check


for _requirement, (_bit, _) in REQUIRED.items():
    globals()[f"test_offer_of_bit_{_bit}"] = offer_check(_requirement)


def config(rig: Rig, name: str, *needs: int) -> int:
    """A field of the configuration after negotiation of what makes it exist, or the case is skipped."""
    if not any(rig.transport.offered >> bit & 1 for bit in needs):
        pytest.skip(f"{' nor '.join(ft.feature_name(ft.NET, bit) for bit in needs)} is not offered")
    wanted = ft.mask(bit for bit in (*needs, net.F_CTRL_VQ) if rig.transport.offered >> bit & 1)
    rig.negotiate(rig.features_for() | wanted)
    field = net.CONFIG[name]
    return rig.transport.read_config(field.offset, field.width)


@pytest.mark.requirement("DEV-NET-02", "DEV-NET-208")
def test_number_of_pairs(rig: Rig) -> None:
    """max_virtqueue_pairs is 1 to 0x8000."""
    pairs = config(rig, "max_virtqueue_pairs", net.F_MQ, net.F_RSS)
    assert 1 <= pairs <= net.MQ_PAIRS_MAX, f"max_virtqueue_pairs is {pairs}"


@pytest.mark.requirement("DEV-NET-03")
def test_mtu_is_possible(rig: Rig) -> None:
    """mtu is 68 to 65535."""
    mtu = config(rig, "mtu", net.F_MTU)
    assert mtu >= net.MTU_MIN, f"mtu is {mtu}"


@pytest.mark.requirement("DEV-NET-05")
def test_mtu_stays(rig: Rig) -> None:
    """mtu does not change."""
    first = config(rig, "mtu", net.F_MTU)
    rig.transport.reset(rig.limit)
    rig.start()
    rig.transport.reset(rig.limit)
    again = config(rig, "mtu", net.F_MTU)
    assert again == first, f"mtu was {first} and is {again}"


@pytest.mark.requirement("DEV-NET-08")
def test_hash_keys_have_room(rig: Rig) -> None:
    """rss_max_key_size is at least 40."""
    size = config(rig, "rss_max_key_size", net.F_RSS, net.F_HASH_REPORT)
    assert size >= net.RSS_KEY_MIN, f"rss_max_key_size is {size}"


@pytest.mark.requirement("DEV-NET-09")
def test_indirection_tables_have_room(rig: Rig) -> None:
    """rss_max_indirection_table_length is at least 128."""
    length = config(rig, "rss_max_indirection_table_length", net.F_RSS)
    assert length >= net.RSS_TABLE_MIN, f"rss_max_indirection_table_length is {length}"


@pytest.mark.requirement("DEV-NET-233")
def test_hash_types_are_defined_ones(rig: Rig) -> None:
    """supported_hash_types has bits that are defined."""
    types = config(rig, "supported_hash_types", net.F_RSS, net.F_HASH_REPORT)
    assert types & ~0x1FF == 0, f"supported_hash_types is {types:#x}"


@pytest.mark.requirement("DEV-NET-11", "DEV-NET-210")
def test_speed(rig: Rig) -> None:
    """speed is a number of Mbit/s or unknown."""
    speed = config(rig, "speed", net.F_SPEED_DUPLEX)
    assert speed <= net.SPEED_MAX or speed == 0xFFFFFFFF, f"speed is {speed:#x}"


@pytest.mark.requirement("DEV-NET-12", "DEV-NET-210")
def test_duplex(rig: Rig) -> None:
    """duplex is half, full or unknown."""
    duplex = config(rig, "duplex", net.F_SPEED_DUPLEX)
    assert duplex in (0, 1, 0xFF), f"duplex is {duplex:#x}"


@pytest.mark.requirement("DEV-NET-209", "DEV-NET-208")
def test_status(rig: Rig) -> None:
    """status has no other bits than LINK_UP and ANNOUNCE."""
    status = config(rig, "status", net.F_STATUS)
    assert status & ~(net.S_LINK_UP | net.S_ANNOUNCE) == 0, f"status is {status:#x}"


@pytest.mark.requirement("DEV-NET-208")
def test_mac_is_an_address_of_its_own(rig: Rig) -> None:
    """mac at offset 0 is a unicast address."""
    first = config(rig, "mac", net.F_MAC)
    assert not first & 1, f"mac begins with {first:#04x}"
    assert any(rig.transport.read_config(at, 1) for at in range(6)), "mac is 0"


@pytest.mark.requirement("DEV-NET-180", "DEV-NET-181")
def test_numbers_of_queues(rig: Rig) -> None:
    """Queues are numbered by pairs, the control queue behind them, and only with CTRL_VQ."""
    # Without registers it is the front end that says which queues there are.
    assert rig.pci
    offered = rig.transport.offered
    sizes = rig.transport.queue_max_size
    rig.negotiate(rig.features_for())
    assert sizes(0), "receiveq1 does not exist"
    assert sizes(1), "transmitq1 does not exist"
    if offered >> net.F_CTRL_VQ & 1:
        assert not sizes(2), "queue 2 exists though neither CTRL_VQ nor MQ is negotiated"
        rig.transport.reset(rig.limit)
        rig.negotiate(rig.features_for() | 1 << net.F_CTRL_VQ)
        assert sizes(2), "with CTRL_VQ and without MQ the control queue is queue 2, which does not exist"
    if offered >> net.F_MQ & 1:
        rig.transport.reset(rig.limit)
        rig.negotiate(rig.features_for() | 1 << net.F_CTRL_VQ | 1 << net.F_MQ)
        pairs = rig.transport.read_config(net.CONFIG["max_virtqueue_pairs"].offset, 2)
        missing = [index for index in range(2 * pairs + 1) if not sizes(index)]
        assert not missing, f"with {pairs} pairs queues {missing} do not exist"
