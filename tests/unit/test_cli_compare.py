"""``guestpv compare``: what it reads of the kernel, its table and its refusals."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from ipaddress import IPv4Address
from typing import Any

import pytest
from click.testing import CliRunner

from guestpv.cli import compare, compare_find, compare_view, compare_ways
from guestpv.cli.main import main
from guestpv.system import System

ENDS = compare_ways.Ends(IPv4Address("10.0.2.15"), IPv4Address("10.0.2.2"))
TABLE = """\
            CPU0       CPU1
  9:          0          0   IO-APIC   9-fasteoi   acpi
 14:          7          2   IO-APIC  14-edge      ata_piix
 30:        100         11  IR-PCI-MSI-0000:01:00.0    0-edge      vfio-msix[1](0000:01:00.0)
 31:          5          0  IR-PCI-MSI-0000:02:00.0    1-edge      virtio3-input.0
NMI:          1          1   Non-maskable interrupts of ata_piix
"""


class Interrupts(System):
    def read_text(self, path: str) -> str:
        assert path == "/proc/interrupts"
        return TABLE


def row(**changed: Any) -> dict[str, Any]:
    plain = {
        "kind": "packet",
        "function": "0000:01:00.0",
        "name": "eth0",
        "device": "virtio",
        "ring": "",
        "driver": "kernel",
        "mode": "",
        "microseconds": 12.5,
        "interrupts": 2,
        "accesses": None,
        "iommu_accesses": None,
    }
    return plain | changed


@pytest.mark.parametrize(
    ("needle", "count"), [("ata_piix", 9), ("(0000:01:00.0)", 111), ("virtio3-", 5), ("virtio4-", 0)]
)
def test_interrupts_are_counted_by_name_on_all_processors(needle: str, count: int) -> None:
    assert compare_find.interrupts((needle,), Interrupts()) == count


def test_only_the_peers_reply_is_an_answer() -> None:
    request = compare_ways.arp_request(bytes(6), ENDS)
    assert len(request) == 60
    assert not compare_ways.is_answer(request, ENDS)
    reply = request[:20] + b"\0\2" + request[22:28] + ENDS.peer.packed + request[32:]
    assert compare_ways.is_answer(reply, ENDS)
    other = compare_ways.Ends(ENDS.own, IPv4Address("10.0.2.3"))
    assert not compare_ways.is_answer(reply, other)
    assert not compare_ways.is_answer(reply[:30], ENDS)


def test_the_table_says_what_a_guest_cannot_see(capsys: pytest.CaptureFixture[str]) -> None:
    ours = row(driver="guestpv", mode="poll", ring="packed", accesses=1, interrupts=0)
    compare_view.show([row(), ours], [("0000:00:02.0", "in use: vda carries the root filesystem")])
    said = capsys.readouterr().out
    assert "virtio, guestpv, packed, polling" in said
    assert "?: a guest cannot see" in said
    assert "Left out: 0000:00:02.0: in use: vda carries the root filesystem" in said
    compare_view.show([ours], [])
    assert "?: a guest cannot see" not in capsys.readouterr().out


def test_the_picture_has_a_line_for_each_driver() -> None:
    rows = [
        row(device="e1000", accesses=7),
        row(),
        row(kind="block", device="<ide>", accesses=1043),
    ]
    drawn = ElementTree.fromstring(compare_view.picture(rows))
    texts = ["".join(element.itertext()) for element in drawn.iter() if element.tag.endswith("text")]
    for text in ("e1000, kernel's driver", "virtio, kernel's driver", "<ide>, kernel's driver", "1043", "?"):
        assert text in texts


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nonsense"], "'nonsense' is not a PCI address such as 0000:00:03.0"),
        (["ffff:ff:1f.7"], "ffff:ff:1f.7: no such PCI function"),
        (["--peer", "here"], "'here' is not an IPv4 address"),
        (["--mark-port", "x"], "'x' is not a number such as 0xe9"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    words: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    done = CliRunner().invoke(main, ["compare", *words])
    assert (done.exit_code, text in done.output) == (2, True), done.output


def test_it_is_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    done = CliRunner().invoke(main, ["compare"])
    assert done.exit_code == 4
    assert "sudo guestpv compare" in done.output


def test_every_driver_has_a_letter_of_its_own() -> None:
    with compare.Marks(None) as marks:
        assert not marks.used
        letters = [marks.next_letter() for _ in range(25)]
        assert letters == [chr(ord("a") + number) for number in range(25)]
        with pytest.raises(compare.UsageError, match="too many functions"):
            marks.next_letter()
