"""`net top`: rates between two samples, and what a person sees of them."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner

from guestpv.cli import net_top


def status(name: str, **queue: int) -> dict[str, Any]:
    counts = dict.fromkeys((f"{way}_{key}" for way in ("rx", "tx") for key in net_top.RATES), 0)
    rings = {"rx_size": 256, "tx_size": 256, "rx_outstanding": 128, "tx_outstanding": 0}
    return {
        "name": name,
        "function": "0000:01:00.0",
        "mode": "msix",
        "link": "up",
        "queues": [counts | rings | queue],
    }


def test_rates_are_differences_over_time() -> None:
    before = status("pv0", rx_packets=100, rx_bytes=1000, tx_kicks=7)
    after = status("pv0", rx_packets=300, rx_bytes=9000, tx_kicks=8, rx_dropped=1)
    ((link),) = net_top.rates((10.0, [before]), (12.0, [after]))
    rx, tx = link["queues"][0]["rx"], link["queues"][0]["tx"]
    assert (rx["packets_per_second"], rx["bytes_per_second"], rx["dropped_per_second"]) == (
        100.0,
        4000.0,
        0.5,
    )
    assert (tx["kicks_per_second"], tx["kicks"]) == (0.5, 8)
    assert (rx["outstanding"], rx["size"]) == (128, 256)


def test_a_link_that_came_up_in_between_has_no_rates_yet() -> None:
    (link,) = net_top.rates((0.0, []), (1.0, [status("pv1", rx_packets=5000)]))
    assert link["queues"][0]["rx"]["packets_per_second"] == 0
    assert link["queues"][0]["rx"]["packets"] == 5000


def shown(links: list[dict[str, Any]]) -> str:
    import click

    return CliRunner().invoke(click.command()(lambda: net_top.show(links)), []).output


def test_a_person_sees_a_line_for_each_queue() -> None:
    before, after = status("pv0"), status("pv0", rx_packets=2_000_000, rx_bytes=10**9)
    lines = shown(net_top.rates((0.0, [before]), (1.0, [after]))).splitlines()
    assert lines[1].split() == ["pv0", "rx0", "2.0", "M", "8.0", "G", "0", "0", "0", "#####.....", "128/256"]
    assert lines[2].split()[-2:] == ["..........", "0/256"]


def test_one_that_does_not_answer_is_a_line_of_its_own() -> None:
    assert "no answer to status" in shown(
        net_top.rates((0.0, []), (1.0, [{"name": "pv3", "error": "no answer to status within 15 s"}]))
    )
    assert "Nothing is up" in shown([])
