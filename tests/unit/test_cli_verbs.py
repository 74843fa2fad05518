"""What each verb prints, for people and for programs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from guestpv.cli import kinds
from guestpv.cli.counters import amount, line
from guestpv.cli.main import main
from guestpv.errors import GuestpvError, TimeLimit
from guestpv.services import control
from guestpv.services.control import Endpoint
from guestpv.vfio import binding, noiommu, survey
from guestpv.vfio.ways import RISK

from .fake_kernel import FakeKernel

pytestmark = pytest.mark.usefixtures("strict")

NET = "0000:00:03.0"
BLK = "0000:00:04.0"


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def data(*words: str) -> Any:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["ok"], answer["error"]) == (True, None)
    return answer["data"]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel()
    kernel.add(NET)
    for module, name in ((survey, "survey"), (survey, "look_up"), (binding, "bind"), (binding, "unbind")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: real(*a, **k, system=kernel))
    return kernel


# list


def test_list(kernel: FakeKernel) -> None:
    kernel.add(BLK, 0x1042, group=None)
    lines = run("list").output.splitlines()
    assert [cell.split() for cell in lines[:3]] == [
        ["ADDRESS", "TYPE", "MODE", "DRIVER", "GROUP", "DRIVABLE"],
        [NET, "net", "modern", "virtio-pci", "7", "yes"],
        [BLK, "blk", "modern", "virtio-pci", "-", "no"],
    ]
    assert f"{BLK}:" in lines
    assert any("no IOMMU group" in text for text in lines)
    assert any(text.startswith("  -> give the guest an IOMMU") for text in lines)
    assert "\x1b" not in run("list").output
    net, blk = data("list")
    assert (net["drivable"], net["group"], net["members"]) == (True, 7, [])
    assert (blk["drivable"], blk["group"]) == (False, None)
    assert blk["problem"]
    assert blk["hint"]


def test_list_names_the_members_of_a_shared_group(kernel: FakeKernel) -> None:
    kernel.add(BLK, 0x1042, group=7)
    output = run("list").output
    assert f"IOMMU group 7: {NET} (virtio-net, virtio-pci), {BLK} (virtio-blk, virtio-pci)" in output
    assert data("list")[0]["members"][0]["address"] == BLK


def test_list_without_any(kernel: FakeKernel) -> None:
    kernel.functions.clear()
    kernel.files = {path: text for path, text in kernel.files.items() if NET not in path}
    output = run("list").output
    assert "no virtio PCI function" in output
    assert "-device virtio-net-pci" in output
    assert data("list") == []


def test_list_shows_uses_when_asked(kernel: FakeKernel) -> None:
    kernel.links["/sys/class/net/eth0"] = f"../../devices/pci0000:00/{NET}/virtio0/net/eth0"
    kernel.files["/proc/net/route"] = "Iface\neth0 00000000 0202000A 0003 0 0 0 00000000 0 0 0"
    assert f"{NET} is used: eth0 carries the default route" in run("list", "-v").output
    assert data("list")[0]["uses"] == [{"kind": "route", "detail": "eth0 carries the default route"}]


# bind, unbind


def test_bind_and_unbind(kernel: FakeKernel) -> None:
    assert run("bind", NET).output == f"{NET} is bound to vfio-pci (before: virtio-pci).\n"
    again = data("bind", NET)
    assert (again["changed"], again["driver"]) == (False, "virtio-pci")
    assert "was bound to vfio-pci already" in run("bind", f"vfio:{NET}").output
    assert run("unbind", NET).output == f"{NET} has the driver virtio-pci again.\n"
    assert "nothing had to be done" in run("unbind", NET).output
    assert data("unbind", NET) == {"address": NET, "driver": "virtio-pci", "changed": False}


def test_bind_for_a_user_in_a_shared_group(kernel: FakeKernel) -> None:
    kernel.add(BLK, 0x1042, group=7)
    output = run("bind", NET, "--user", "alice").output
    assert "/dev/vfio/7 belongs to alice now." in output
    assert f"Its group also holds {BLK} (virtio-blk): guestpv bind {BLK}" in output
    assert kernel.nodes["/dev/vfio/7"] == kernel.users["alice"]


# info


class FakeTransport:
    """Only what ``info`` asks for."""

    name, device_type, offered, num_queues, config_length = NET, 1, 1 << 5 | 1 << 16 | 1 << 32, 2, 64

    def queue_max_size(self, index: int) -> int:
        return 256 >> index

    def config(self, layout: Any) -> dict[str, int | bytes]:
        return {"mac": bytes.fromhex("525400123456"), "status": 3, "speed": 0xFFFFFFFF, "duplex": 1}


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> FakeTransport:
    transport = FakeTransport()

    @contextmanager
    def fake(spec: str) -> Iterator[FakeTransport]:
        yield transport

    monkeypatch.setattr("guestpv.opener.open", fake)
    return transport


def test_info_of_an_opened_device(transport: FakeTransport) -> None:
    output = run("info", "loopback:net").output
    assert "MAC STATUS VERSION_1" in output
    assert "2; largest sizes 0: 256, 1: 128" in output
    assert "52:54:00:12:34:56" in output
    assert "0x3 (link up, announce)" in output
    assert "unknown" in output
    shown = data("info", "loopback:net")
    assert shown["features"] == ["MAC", "STATUS", "VERSION_1"]
    assert shown["queues"][1] == {"index": 1, "max_size": 128}
    assert shown["config"]["mac"] == "52:54:00:12:34:56"


@pytest.mark.parametrize(
    ("device_type", "config", "says"),
    [
        (2, {"capacity": 2 << 20}, "2097152 sectors (1.00 GiB)"),
        (1, {"speed": 1000, "duplex": 0}, "1000 Mbit/s"),
        (1, {"supported_hash_types": 0x3F}, "0x3f"),
        (5, {"num_pages": 7}, "num_pages  7"),
        (4, {}, "virtio rng (type 4)"),
    ],
)
def test_info_decodes_configuration(
    transport: FakeTransport, device_type: int, config: dict[str, int], says: str
) -> None:
    transport.device_type = device_type
    transport.config = lambda layout: config  # type: ignore[method-assign,assignment,return-value]
    assert says in run("info", "loopback:x").output


@pytest.mark.parametrize(
    ("offered", "sizes", "numbering", "numbers", "quirk"),
    [
        (0b000010, [8, 8, 8], "standard", {"inflateq": 0, "deflateq": 1, "statsq": 2}, None),
        (0b100000, [8, 8, 0, 0, 8], "standard", {"inflateq": 0, "deflateq": 1, "reporting_vq": 4}, None),
        (
            0b101000,
            [8, 8, 8, 8],
            "dense",
            {"inflateq": 0, "deflateq": 1, "free_page_vq": 2, "reporting_vq": 3},
            "queues numbered without gaps",
        ),
        (
            0b100010,
            [8, 8, 8],
            None,
            {},
            "has no inflateq at 0, deflateq at 1, statsq at 2",
        ),
    ],
)
def test_info_of_a_balloon_finds_its_queues(
    transport: FakeTransport,
    offered: int,
    sizes: list[int],
    numbering: str | None,
    numbers: dict[str, int],
    quirk: str | None,
) -> None:
    transport.device_type, transport.offered, transport.num_queues = 5, offered, len(sizes)
    transport.queue_max_size = lambda index: (sizes + [0] * 8)[index]  # type: ignore[method-assign]
    shown = data("info", "loopback:x")["balloon_queues"]
    assert (shown["numbering"], shown["numbers"]) == (numbering, numbers)
    assert (quirk is None) == (shown["quirk"] is None)
    output = " ".join(run("info", "loopback:x").output.split())
    assert ", ".join(f"{name} {number}" for name, number in numbers.items()) in output
    if quirk is not None:
        assert quirk in shown["quirk"]
        assert quirk in output


def test_info_of_what_the_kernel_drives(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    look_up, features = survey.look_up, [1 << 5 | 1 << 33, None]
    function = look_up(NET)
    (tmp_path / NET).mkdir()
    (tmp_path / NET / "config").write_bytes(kernel.blobs[f"/sys/bus/pci/devices/{NET}/config"])
    monkeypatch.setattr(survey, "look_up", lambda address: function)
    monkeypatch.setattr(survey, "DEVICES", str(tmp_path))
    monkeypatch.setattr("guestpv.cli.checks.sysfs_features", lambda address: features[0])
    shown = data("info", NET)
    assert shown["features"] == ["MAC", "ACCESS_PLATFORM"]
    assert (shown["source"], shown["driver"], shown["queues"]) == ("kernel", "virtio-pci", None)
    assert [cap["structure"] for cap in shown["capabilities"]] == ["COMMON", "NOTIFY", "ISR", "DEVICE"]
    assert f"guestpv bind {NET}" in run("info", NET).output
    features[0] = None
    assert "shown once it is bound" in run("info", NET).output


# net status, net down


def status(**changes: Any) -> dict[str, Any]:
    way = {"packets": 1200, "bytes": 3 << 20, "dropped": 1, "kicks": 5, "interrupts": 7}
    queue = {f"{name}_{key}": value for name in ("rx", "tx") for key, value in way.items()}
    return {
        "name": "pv0",
        "function": NET,
        "spec": f"vfio:{NET}",
        "pid": 4711,
        "started": time.time() - 61,
        "mac": "52:54:00:12:34:56",
        "mtu": 1500,
        "mode": "msix",
        "link": "up",
        "stays_bound": False,
        "features": ["MAC", "VERSION_1"],
        "address": {
            "address": "10.0.2.15/24",
            "gateway": "10.0.2.2",
            "dns": ["10.0.2.3"],
            "server": "10.0.2.2",
            "lease_seconds": 86400,
            "by": "dhcp",
        },
        "rx": way,
        "tx": way,
        "queues": [queue],
        "events": [{"time": time.time(), "event": "link up"}],
    } | changes


def up(monkeypatch: pytest.MonkeyPatch, *found: dict[str, Any]) -> None:
    there = [Endpoint(Path(f"/run/guestpv/{one.get('name', 'x')}.sock"), one) for one in found]
    monkeypatch.setattr(control, "endpoints", lambda directory: there)


def test_status(monkeypatch: pytest.MonkeyPatch) -> None:
    up(monkeypatch, status())
    output = run("net", "status").output
    for text in (
        "pv0, MAC 52:54:00:12:34:56, MTU 1500, carrier up",
        "MAC VERSION_1",
        "10.0.2.15/24 by DHCP from 10.0.2.2, for 86400 s",
        "4711, for 1 min 1 s",
        "gateway   10.0.2.2",
        "DNS       10.0.2.3",
    ):
        assert text in output
    rows = [text.split() for text in output.splitlines()]
    assert ["PACKETS", "BYTES", "DROPPED", "KICKS", "INTERRUPTS"] in rows
    assert ["rx", "1200", "3.0", "MiB", "1", "5", "7"] in rows
    assert "events" not in output
    detailed = run("net", "status", NET, "-v").output
    assert "pair 0 tx" in detailed
    assert "link up" in detailed


def test_status_of_several_and_of_one_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = status()["address"] | {"lease_seconds": None, "gateway": None, "dns": []}
    up(
        monkeypatch,
        status(address=None, stays_bound=True),
        status(name="pv1", address=forever),
        {"error": "no answer to status within 5 s"},
    )
    output = run("net", "status").output
    assert "address   none" in output
    assert f"stays so (guestpv unbind {NET})" in output
    assert "for ever" in output
    assert "error: no answer to status within 5 s" in output
    assert len(data("net", "status")) == 3


def test_nothing_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    up(monkeypatch)
    assert "Nothing is up." in run("net", "status").output
    assert data("net", "status") == []
    assert run("net", "status", "pv0").exit_code == 2
    assert run("net", "down").exit_code == 2
    assert run("net", "down", "--all").exit_code == 0


@pytest.mark.parametrize(
    ("function", "driver", "says"),
    [
        (NET, "virtio-pci", f"pv0 is down; virtio-pci has {NET} again."),
        (NET, "vfio-pci", f"pv0 is down; {NET} stays bound to vfio-pci (guestpv unbind {NET})."),
        ("loopback:net", None, "pv0 is down."),
    ],
)
def test_down(monkeypatch: pytest.MonkeyPatch, function: str, driver: str | None, says: str) -> None:
    farewell = {"name": "pv0", "function": function, "driver": driver}
    up(monkeypatch, status())
    monkeypatch.setattr(kinds, "ask", lambda path, command, limit: farewell)
    assert run("net", "down").output == f"{says}\n"
    assert data("net", "down", "pv0") == [farewell]


def test_down_of_several_needs_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(path: Path, command: str, limit: float) -> dict[str, Any]:
        asked.append(path.stem)
        return {"name": path.stem, "function": NET, "driver": "virtio-pci"}

    up(monkeypatch, status(), status(name="pv1", function="f1"))
    monkeypatch.setattr(kinds, "ask", ask)
    refused = run("net", "down")
    assert refused.exit_code == 2
    assert "pv0 pv1" in refused.stderr
    assert run("net", "down", "pv1").exit_code == 0
    assert asked == ["pv1"]
    assert run("net", "down", "--all").exit_code == 0
    assert asked == ["pv1", "pv0", "pv1"]


def test_down_that_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    up(monkeypatch, status())
    monkeypatch.setattr(kinds, "ask", lambda *_: {"error": "the device hangs"})
    failed = run("net", "down")
    assert (failed.exit_code, "the device hangs" in failed.stderr) == (1, True)

    def late(*_: object) -> None:
        raise TimeLimit("no answer")

    monkeypatch.setattr(kinds, "ask", late)
    failed = run("net", "down")
    assert (failed.exit_code, "kill 4711" in failed.stderr) == (6, True)


# net up


@pytest.mark.parametrize(
    "words",
    [["--address", "192.0.2.1/24", "--no-address"], ["--gateway", "192.0.2.1"], ["--dns", "192.0.2.1"]],
)
def test_options_that_do_not_go_together(words: list[str]) -> None:
    done = run("net", "up", *words)
    assert done.exit_code == 2
    assert "--address" in done.stderr


class FakeSession:
    """A session that comes up, has an event and ends."""

    wishes: Any
    failure: GuestpvError | None = None

    def __init__(self, wishes: Any, tell: Any) -> None:
        type(self).wishes = wishes
        self.tell = tell

    def run(self, ready: Any, refresh: Any) -> None:
        self.tell("pv0 is up")
        ready(status())
        refresh(status())
        self.tell("link down")
        if self.failure:
            raise self.failure


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    fresh = type("Session", (FakeSession,), {})
    monkeypatch.setattr("guestpv.cli.session.Session", fresh)
    return fresh


def test_up_in_the_foreground(session: type[FakeSession]) -> None:
    done = run("net", "up", NET, "--features", "-mq", "--name", "lan0", "--poll", "--queues", "2", "--force")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0] == "pv0 is up"
    assert lines[-2:] == ["Up. Ctrl-C gives the function back.", "link down"]
    wishes = session.wishes
    assert (wishes.spec, wishes.features, wishes.ifname) == (NET, "-mq", "lan0")
    assert (wishes.poll, wishes.queue_pairs, wishes.force) == (True, 2, True)
    assert (wishes.settings, wishes.addressed) == (None, True)


def test_up_for_a_program(session: type[FakeSession]) -> None:
    session.failure = GuestpvError("it went away")
    done = run("net", "up", "--no-address", "--json")
    assert done.exit_code == 1
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert [text["schema"] for text in lines] == [
        *("guestpv.event/1", "guestpv.net-up/1", "guestpv.event/1", "guestpv.net-up/1")
    ]
    assert lines[1]["data"]["name"] == "pv0"
    assert lines[2]["data"] == {"event": "link down"}
    assert lines[3]["error"]["message"] == "it went away"
    assert session.wishes.addressed is False


def test_up_in_the_background(
    session: type[FakeSession], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    done = run("net", "up", "--detach", "--address", "192.0.2.5/24")
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == "Up in the background, process 4711."
    log = tmp_path / "run" / "pv0.log"
    deadline = time.monotonic() + 60
    while "link down" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert log.stat().st_mode & 0o777 == 0o600
    assert [entry[20:] for entry in log.read_text().splitlines()] == ["pv0 is up", "up", "link down"]
    assert "warning" not in done.stderr


@pytest.mark.parametrize("words", [["--vfio-backend", "noiommu"], [f"vfio:{NET}?backend=noiommu"]])
def test_what_no_iommu_mode_risks_is_said_where_somebody_looks(
    session: type[FakeSession], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    done = run("net", "up", "--detach", "--json", *words)
    assert done.exit_code == 0
    assert done.stderr == f"warning: {RISK}\n"
    assert json.loads(done.stdout)["data"]["name"] == "pv0"
    assert (tmp_path / "run" / "pv0.log").read_text().count(f"WARNING: {RISK}\n") == 1


@pytest.mark.parametrize("words", [[], ["-v"], ["-vv"], ["--json"]])
def test_what_the_library_warns_of_is_told_once_in_the_foreground(
    session: type[FakeSession], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    plain = session.run

    def risky(self: FakeSession, ready: Any, refresh: Any) -> None:
        noiommu.LOG.warning("%s: %s", "/dev/vfio/noiommu-0", RISK)
        plain(self, ready, refresh)

    monkeypatch.setattr(session, "run", risky)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    told = f"warning: /dev/vfio/noiommu-0: {RISK}\n"
    for _ in range(2):
        done = run("net", "up", NET, *words)
        assert done.exit_code == 0
        assert done.stderr == ("" if words == ["-vv"] else told)


# Counters.


@pytest.mark.parametrize(
    ("value", "unit", "step", "text"),
    [
        (0, "B", 1024, "0 B"),
        (1023, "B", 1024, "1023 B"),
        (1536, "B", 1024, "1.5 KiB"),
        (5e9, "bit/s", 1000, "5.0 Gbit/s"),
        (1e30, "bit/s", 1000, "1000000000000000000.0 Tbit/s"),
    ],
)
def test_amounts(value: float, unit: str, step: int, text: str) -> None:
    assert amount(value, unit, step) == text


def test_the_live_line_fits_a_terminal() -> None:
    before, after = status(), status()
    after["rx"] = after["rx"] | {"bytes": before["rx"]["bytes"] + 125_000_000, "dropped": 0}
    text = line(before, after, 1.0)
    assert text == "pv0 up  rx 1200 pkt 1.0 Gbit/s  tx 1200 pkt 0 bit/s drop 1"
    assert len(text) < 80
