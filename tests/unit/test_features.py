"""Feature names, bits and dependencies as the standard has them."""

import pytest

from guestpv.errors import UsageError
from guestpv.spec import features as feat
from guestpv.spec import net
from guestpv.transport.base import FeatureFilter


@pytest.mark.parametrize(
    ("device", "name", "bit"),
    [
        (feat.NET, "MRG_RXBUF", 15),
        (feat.NET, "mrg_rxbuf", 15),
        (feat.NET, "VIRTIO_NET_F_MRG_RXBUF", 15),
        (feat.NET, "packed", 34),
        (feat.NET, "event_idx", 29),
        (feat.BLK, "flush", 9),
        (feat.NET, "bit 70", 70),
        (feat.NET, "62", 62),
    ],
)
def test_a_feature_is_found_by_any_usual_name(device: int, name: str, bit: int) -> None:
    assert feat.feature_bit(device, name) == bit


def test_a_feature_of_another_device_type_is_not_known() -> None:
    with pytest.raises(KeyError):
        feat.feature_bit(feat.RNG, "mrg_rxbuf")


def test_unknown_bits_have_a_name_too() -> None:
    assert feat.feature_names(feat.RNG, 1 << 32 | 1 << 45) == ["VERSION_1", "bit 45"]


@pytest.mark.requirement("DRV-FEAT-02")
def test_a_feature_without_its_prerequisite_is_dropped_with_all_that_hangs_on_it() -> None:
    tso_chain = feat.mask((net.F_GUEST_TSO4, net.F_GUEST_ECN))
    assert feat.close_dependencies(feat.NET, tso_chain) == 0
    whole = tso_chain | feat.mask((net.F_GUEST_CSUM,))
    assert feat.close_dependencies(feat.NET, whole) == whole


@pytest.mark.requirement("DRV-FEAT-02")
def test_one_of_two_alternatives_is_enough() -> None:
    either = feat.mask((net.F_GUEST_CSUM, net.F_GUEST_TSO6, net.F_GUEST_ECN))
    assert feat.close_dependencies(feat.NET, either) == either


def test_a_filter_says_what_must_and_what_must_not_be() -> None:
    chosen = FeatureFilter.parse("+mac, -event_idx,mq", feat.NET)
    assert feat.bits(chosen.required) == [net.F_MAC, net.F_MQ]
    assert feat.bits(chosen.denied) == [feat.F_EVENT_IDX]


@pytest.mark.parametrize("text", ["+nosuch", "+mac,-mac"])
def test_a_filter_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        FeatureFilter.parse(text, feat.NET)
