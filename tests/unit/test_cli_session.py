"""A session: every step is undone, whatever step fails and whenever a signal comes."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guestpv.cli import driven, kinds
from guestpv.cli import session as module
from guestpv.cli.kinds import NET as KIND
from guestpv.cli.session import Session, Wishes
from guestpv.cli.signals import Stop, Stopped
from guestpv.errors import DeviceGone, DeviceViolation, GuestpvError, Refused, TimeLimit, UsageError
from guestpv.services.control import ask, endpoints
from guestpv.services.dhcp import Settings
from guestpv.spec import features as feat
from guestpv.vfio.binding import bind as real_bind
from guestpv.vfio.binding import unbind as real_unbind
from guestpv.vfio.lock import runtime_directory
from guestpv.vfio.survey import look_up as real_look_up
from guestpv.vfio.survey import survey as real_survey
from guestpv.vfio.ways import RISK

from .fake_kernel import FakeKernel

pytestmark = pytest.mark.usefixtures("strict")

NET = "0000:00:03.0"
RNG = "0000:00:04.0"
UNDONE = ["address gone", "service closed", "transport closed", f"virtio-pci takes {NET}"]


class World:
    """The kernel, a device and a DHCP server that a session meets; ``log`` has what was undone."""

    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.kernel.add(NET)
        self.kernel.add(RNG, 0x1044, group=8)
        self.log: list[str] = []
        self.failures: dict[str, BaseException] = {}
        self.signals: dict[str, int] = {}
        self.events: list[list[str]] = []
        self.device_type = feat.NET
        self.lease: Settings | None = Settings("10.0.2.15/24", server="10.0.2.2")
        self.links_up = True

    def step(self, name: str) -> None:
        """A place where a test lets something go wrong."""
        if name in self.signals:
            signal.raise_signal(self.signals.pop(name))
        if name in self.failures:
            raise self.failures[name]

    # What stands in for the modules below.

    def bind(self, address: str, *, force: bool = False, noiommu: bool = False) -> Any:
        bound = real_bind(address, force=force, noiommu=noiommu, system=self.kernel)
        self.step("bind")
        return bound

    def unbind(self, address: str) -> Any:
        done = real_unbind(address, system=self.kernel)
        self.log.append(f"virtio-pci takes {address}")
        return done

    def open(self, spec: str) -> Any:
        self.step("open")

        def close() -> None:
            if "transport closed" not in self.log:
                self.log.append("transport closed")

        return SimpleNamespace(
            name=spec.removeprefix("vfio:").partition("?")[0],
            device_type=self.device_type,
            close=close,
            feature_filter=None,
        )


class FakeService:
    world: World

    def __init__(self, transport: Any, *, ifname: str | None, poll: bool, queue_pairs: int, rss: Any) -> None:
        self.world.step("service")
        self.transport, self.ifname = transport, ifname or "pv0"
        self.mac, self.mtu, self.features = "52:54:00:12:34:56", 1500, 1 << 32 | 1 << 33
        self.link_up = self.world.links_up
        self.closed = False

    def watch(self, timeout: float, wake_fd: int) -> list[str]:
        self.world.step("watch")
        if self.world.events:
            return self.world.events.pop(0)
        select.select([wake_fd], [], [], min(timeout, 0.05))
        return []

    def stats(self) -> dict[str, Any]:
        assert not self.closed
        ways = {way: {"packets": 1, "bytes": 60} for way in ("rx", "tx")}
        return {"mode": "msix", "link": "up" if self.link_up else "down", **ways, "queues": []}

    def close(self) -> None:
        self.stats = dict  # type: ignore[method-assign,assignment]
        self.world.log.append("service closed")
        self.transport.close()
        self.world.step("close")


class FakeAddressing:
    world: World

    def __init__(self, link: Any, settings: Settings | None, resolver: Any) -> None:
        self.settings = settings
        self.world.step("addressing")

    @property
    def ready(self) -> bool:
        return self.settings is not None

    def poll(self) -> list[str]:
        self.world.step("lease")
        if self.settings is None and self.world.lease is not None:
            self.settings = self.world.lease
            return [f"address {self.settings.address}"]
        return []

    def close(self) -> None:
        self.world.log.append("address gone")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World()
    FakeService.world = FakeAddressing.world = world
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(driven, "bind", world.bind)
    monkeypatch.setattr(driven, "unbind", world.unbind)
    monkeypatch.setattr(driven, "open_transport", world.open)
    monkeypatch.setattr(driven, "look_up", lambda address: real_look_up(address, world.kernel))
    monkeypatch.setattr(kinds, "survey", lambda: real_survey(world.kernel))
    monkeypatch.setattr(module, "NetService", FakeService)
    monkeypatch.setattr(module, "Addressing", FakeAddressing)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield world
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert world.kernel.functions[NET].driver == "virtio-pci"
    assert world.kernel.functions[NET].override == ""
    assert not list(tmp_path.glob("*.sock"))


def end_it() -> None:
    signal.raise_signal(signal.SIGTERM)


def run(
    wishes: Wishes | None = None, when_up: Callable[[], None] = end_it
) -> tuple[list[str], list[dict[str, Any]]]:
    told: list[str] = []
    ready: list[dict[str, Any]] = []

    def up(status: dict[str, Any]) -> None:
        ready.append(status)
        when_up()

    try:
        Session(wishes or Wishes(), told.append).run(up, lambda status: None)
    except GuestpvError as error:
        error.told = told  # type: ignore[attr-defined]
        raise
    return told, ready


def test_up_and_down_again(world: World) -> None:
    told, (status,) = run()
    assert told == [
        f"{NET} taken from virtio-pci",
        "pv0 is up: MAC 52:54:00:12:34:56, MTU 1500",
        "asking for an address (DHCP)",
        "address 10.0.2.15/24",
        "going down: SIGTERM",
        f"{NET} given back to virtio-pci",
    ]
    assert world.log == UNDONE
    assert status["name"] == "pv0"
    assert status["function"] == NET
    assert status["spec"] == f"vfio:{NET}"
    assert status["pid"] == os.getpid()
    assert status["driver_before"] == "virtio-pci"
    assert status["stays_bound"] is False
    assert status["features"] == ["VERSION_1", "ACCESS_PLATFORM"]
    assert status["address"]["address"] == "10.0.2.15/24"
    assert status["rx"]["packets"] == 1


REACHED = [
    ("open", UNDONE[3:]),
    ("service", UNDONE[2:]),
    ("addressing", UNDONE[1:]),
    ("watch", UNDONE),
    ("lease", UNDONE),
]


@pytest.mark.parametrize(("step", "undone"), REACHED)
@pytest.mark.parametrize(
    "failure",
    [DeviceViolation("it lied"), KeyError("a defect"), KeyboardInterrupt()],
    ids=["error", "defect", "interrupt"],
)
def test_whatever_fails_everything_is_undone(
    world: World, step: str, undone: list[str], failure: BaseException
) -> None:
    world.failures[step] = failure
    with pytest.raises(type(failure)):
        run()
    assert world.log == undone


def test_a_function_that_vfio_does_not_take(world: World) -> None:
    world.kernel.vfio_takes = False
    with pytest.raises(GuestpvError, match="vfio-pci did not take the function"):
        run()
    assert world.log == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("step", "undone"),
    [
        ("bind", UNDONE[3:]),
        ("open", UNDONE[2:]),
        ("service", UNDONE[1:]),
        ("addressing", UNDONE),
        ("watch", UNDONE),
        ("lease", UNDONE),
    ],
)
def test_a_signal_at_any_step(world: World, step: str, undone: list[str], number: signal.Signals) -> None:
    world.signals[step] = number
    with pytest.raises(Stopped, match=f"stopped by {number.name} before it was up"):
        run()
    assert world.log == undone


def test_a_signal_while_undoing_changes_nothing(world: World) -> None:
    world.signals["close"] = signal.SIGINT
    told, _ = run()
    assert world.log == UNDONE
    assert told[-1] == f"{NET} given back to virtio-pci"


def test_a_failing_undo_does_not_stop_the_others(world: World) -> None:
    world.failures["close"] = TimeLimit("device_status still reads 0xf")
    with pytest.raises(TimeLimit):
        run()
    assert world.log == UNDONE


@pytest.mark.parametrize("event", ["release requested", "bus error"])
def test_a_function_that_is_wanted_back(world: World, event: str) -> None:
    world.events = [[], [event]]
    with pytest.raises(DeviceGone) as caught:
        run(when_up=lambda: None)
    assert caught.value.where == NET
    assert caught.value.told[-2] == event  # type: ignore[attr-defined]
    assert world.log == UNDONE


def failing_unbind(world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, there: bool) -> None:
    def fail(address: str) -> None:
        real_unbind(address, system=world.kernel)
        raise error

    monkeypatch.setattr(driven, "unbind", fail)
    monkeypatch.setattr(driven, "UNPLUG_TIME_LIMIT", 0.1)
    monkeypatch.setattr(driven, "SYSTEM", SimpleNamespace(exists=lambda path: there))


@pytest.mark.parametrize(
    "error",
    [UsageError("no such PCI function"), OSError(19, "No such device"), GuestpvError("failed: ENODEV")],
)
def test_an_unplugged_function_cannot_be_given_back(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing_unbind(world, monkeypatch, error, there=False)
    told, _ = run()
    assert told[-1] == f"{NET} is unplugged: there is nothing to give back"


def test_a_function_that_is_there_and_cannot_be_given_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_unbind(world, monkeypatch, TimeLimit("no kernel driver took the function back"), there=True)
    with pytest.raises(TimeLimit, match="no kernel driver took the function back"):
        run()


def test_link_events_are_told_and_kept(world: World) -> None:
    world.links_up = False
    world.events = [["link up"], ["link down"]]
    told, (status,) = run()
    assert [event["event"] for event in status["events"]] == told[: len(status["events"])]
    assert told[2:5] == ["link down", "asking for an address (DHCP)", "link up"]


def test_what_was_bound_before_stays_bound(world: World) -> None:
    real_bind(NET, system=world.kernel)
    told, (status,) = run()
    assert status["stays_bound"] is True
    assert world.kernel.functions[NET].driver == "vfio-pci"
    assert world.log == UNDONE[:3]
    assert not [event for event in told if "given back" in event]
    real_unbind(NET, system=world.kernel)


def test_no_address(world: World) -> None:
    _, (status,) = run(Wishes(addressed=False))
    assert status["address"] is None
    assert world.log == UNDONE[1:]


def test_another_scheme_binds_nothing(world: World) -> None:
    told, (status,) = run(Wishes(spec="loopback:net", addressed=False, ifname="lan0"))
    assert world.kernel.log == [f"virtio-pci takes {NET}", f"virtio-pci takes {RNG}"]
    assert (status["name"], status["function"], status["driver_before"]) == ("lan0", "loopback:net", None)
    assert told[-1] == "going down: SIGTERM"


@pytest.mark.parametrize("wishes", [Wishes(spec=RNG), Wishes(spec=f"vfio:{RNG}")])
def test_another_device_type_is_left_alone(world: World, wishes: Wishes) -> None:
    with pytest.raises(UsageError, match="it is a virtio rng device"):
        run(wishes)
    assert world.log == []
    assert world.kernel.functions[RNG].driver == "virtio-pci"


def test_a_feature_that_does_not_exist_binds_nothing(world: World) -> None:
    with pytest.raises(UsageError, match="no feature is called 'bogus'"):
        run(Wishes(features="+bogus"))
    assert world.log == []


def test_status_and_down_over_the_socket(world: World) -> None:
    answers: list[dict[str, Any]] = []

    def client() -> None:
        (endpoint,) = endpoints(runtime_directory())
        answers.append(endpoint.status)
        answers.append(ask(endpoint.path, "down", 60))

    thread = threading.Thread(target=client)
    told, _ = run(when_up=thread.start)
    thread.join(60)
    assert answers[0]["function"] == NET
    assert answers[1] == {"name": "pv0", "function": NET, "driver": "virtio-pci"}
    assert told[-2] == "going down: guestpv net down"
    assert world.log == UNDONE


def test_down_while_an_address_is_awaited(world: World) -> None:
    world.lease = None
    answers: list[BaseException | dict[str, Any]] = []

    def client() -> None:
        while not endpoints(runtime_directory()):
            time.sleep(0.01)
        answers.append(ask(endpoints(runtime_directory())[0].path, "down", 60))

    thread = threading.Thread(target=client)
    thread.start()
    with pytest.raises(GuestpvError, match="ended by guestpv net down before it was up"):
        run()
    thread.join(60)
    assert "before it was up" in answers[0]["error"]  # type: ignore[index]
    assert world.log == UNDONE


# Choosing.


def test_the_only_one_is_chosen(world: World) -> None:
    assert KIND.choose(force=False).address == NET


def test_several_are_named(world: World) -> None:
    world.kernel.add("0000:00:05.0", group=9)
    with pytest.raises(UsageError, match=f"which one.*{NET}.*0000:00:05.0") as caught:
        KIND.choose(force=False)
    assert NET in caught.value.hint


def test_none_says_why(world: World) -> None:
    world.kernel.links["/sys/class/net/eth0"] = f"../../devices/pci0000:00/{NET}/virtio0/net/eth0"
    route = "eth0 00000000 0202000A 0003 0 0 0 00000000 0 0 0"
    world.kernel.files["/proc/net/route"] = f"Iface Destination\n{route}"
    with pytest.raises(Refused, match="eth0 carries the default route") as caught:
        KIND.choose(force=False)
    assert "--force" in caught.value.hint
    assert KIND.choose(force=True).address == NET
    world.kernel.files["/proc/net/route"] = "x"


def test_one_without_an_iommu_is_chosen_only_when_asked_for(world: World) -> None:
    world.kernel.remove(NET)
    world.kernel.add(NET, group=None)
    with pytest.raises(Refused, match="no IOMMU group"):
        KIND.choose(force=False)
    assert KIND.choose(force=False, noiommu=True).address == NET
    world.kernel.remove(NET)
    world.kernel.add(NET, 0x1000, group=None, legacy=True)
    with pytest.raises(Refused, match=f"{NET}: a legacy-only function") as caught:
        KIND.choose(force=False, noiommu=True)
    assert "disable-modern=off" in caught.value.hint


def test_the_risk_of_no_iommu_mode_is_told_by_the_library_alone(world: World) -> None:
    world.kernel.remove(NET)
    world.kernel.add_noiommu()
    world.kernel.add(NET, group=None)
    told, (status,) = run(Wishes(vfio_backend="noiommu"))
    assert status["spec"] == f"vfio:{NET}?backend=noiommu"
    assert not [event for event in told if RISK in event]


def test_there_is_no_network_function(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "survey", list)
    with pytest.raises(Refused, match="no virtio network function") as caught:
        KIND.choose(force=False)
    assert "-device virtio-net-pci" in caught.value.hint


# Signals.


def test_a_nohup_stays_a_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.wanted
            stop.check()
            signal.raise_signal(signal.SIGTERM)
            assert (stop.wanted, stop.reason) == (True, "SIGTERM")
    finally:
        signal.signal(signal.SIGHUP, before)
