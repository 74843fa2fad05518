"""Addresses: given or leased, kept, fallen back for, and taken away again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import stat
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from guestpv.errors import AccessDenied, GuestpvError, TimeLimit, UsageError
from guestpv.services import dhcp
from guestpv.services.addressing import DHCP_TIME_LIMIT, Addressing, KernelLink, static
from guestpv.services.dhcp import LibraryClient, Settings, Udhcpc, settings_of, with_prefix
from guestpv.services.resolver import Resolver

LEASE = Settings("10.0.2.15/24", gateway="10.0.2.2", dns=("10.0.2.3",), server="10.0.2.2", lease_seconds=60)


class FakeLink:
    def __init__(self) -> None:
        self.name = "pv0"
        self.carrier = True
        self.log: list[str] = []
        self.refuses = False

    def has_carrier(self) -> bool:
        return self.carrier

    def configure(self, settings: Settings) -> None:
        if self.refuses:
            raise GuestpvError("the kernel does not take it")
        self.log.append(f"+{settings.address}")

    def deconfigure(self, settings: Settings) -> None:
        self.log.append(f"-{settings.address}")


class FakeClient:
    def __init__(self, news: list[list[Settings | None] | GuestpvError], name: str = "fake") -> None:
        self.name = name
        self.news = news
        self.closed = 0

    def poll(self) -> list[Settings | None]:
        item = self.news.pop(0) if self.news else []
        if isinstance(item, GuestpvError):
            raise item
        return item

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    return path


@pytest.fixture
def resolver(tmp_path: Path, conf: Path) -> Resolver:
    (tmp_path / "net" / "pv0").mkdir(parents=True)
    return Resolver("pv0", resolv_conf=conf, resolved=tmp_path / "none", links=tmp_path / "net")


def leased(
    link: FakeLink, resolver: Resolver, *clients: FakeClient, clock: Callable[[], float] = lambda: 0.0
) -> Addressing:
    return Addressing(link, None, resolver, clients=tuple((lambda _, c=c: c) for c in clients), clock=clock)


def test_a_given_address(link: FakeLink, resolver: Resolver, conf: Path) -> None:
    addressing = Addressing(link, static("192.0.2.5/24", "192.0.2.1", ("192.0.2.53",)), resolver)
    assert addressing.ready
    assert addressing.poll() == []
    assert link.log == ["+192.0.2.5/24"]
    assert "nameserver 192.0.2.53" in conf.read_text()
    addressing.close()
    addressing.close()
    assert link.log == ["+192.0.2.5/24", "-192.0.2.5/24"]
    assert conf.read_text() == "nameserver 192.0.2.1\n"


@pytest.mark.parametrize(
    ("address", "gateway", "dns"),
    [
        ("192.0.2.5", None, ()),
        ("192.0.2.256/24", None, ()),
        ("192.0.2.5/24", "no", ()),
        ("192.0.2.5/24", None, ("x",)),
    ],
)
def test_what_is_no_address(address: str, gateway: str | None, dns: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        static(address, gateway, dns)
    assert "--address" in caught.value.hint


def test_a_lease_is_awaited_kept_renewed_and_released(link: FakeLink, resolver: Resolver, conf: Path) -> None:
    client = FakeClient([[], [LEASE], [LEASE], []])
    addressing = leased(link, resolver, client)
    assert not addressing.ready
    assert addressing.poll() == []
    assert addressing.poll() == ["address 10.0.2.15/24"]
    assert addressing.ready
    assert addressing.settings == LEASE
    assert addressing.poll() == ["lease of 10.0.2.15/24 renewed"]
    assert "-10.0.2.15/24" not in link.log
    addressing.close()
    assert client.closed == 1
    assert link.log[-1] == "-10.0.2.15/24"
    assert "10.0.2.3" not in conf.read_text()


def test_another_address_replaces_the_old_one(link: FakeLink, resolver: Resolver) -> None:
    addressing = leased(link, resolver, FakeClient([[LEASE], [Settings("10.0.2.16/24", server="x")]]))
    addressing.poll()
    assert addressing.poll() == ["address 10.0.2.16/24"]
    assert link.log == ["+10.0.2.15/24", "-10.0.2.15/24", "+10.0.2.16/24"]


def test_a_lost_lease(link: FakeLink, resolver: Resolver, conf: Path) -> None:
    now = [0.0]
    addressing = leased(link, resolver, FakeClient([[None], [LEASE], [None]]), clock=lambda: now[0])
    assert addressing.poll() == []
    addressing.poll()
    now[0] = 1e6
    assert addressing.poll() == ["lease of 10.0.2.15/24 lost, asking for a new one"]
    assert not addressing.ready
    assert link.log == ["+10.0.2.15/24", "-10.0.2.15/24"]
    assert conf.read_text() == "nameserver 192.0.2.1\n"
    now[0] = 2e6
    assert addressing.poll() == []


@pytest.mark.parametrize(("carrier", "says"), [(True, "within 30 s$"), (False, "the link has no carrier")])
def test_nobody_answers(link: FakeLink, resolver: Resolver, carrier: bool, says: str) -> None:
    now = [0.0]
    link.carrier = carrier
    addressing = leased(link, resolver, FakeClient([]), clock=lambda: now[0])
    now[0] = DHCP_TIME_LIMIT
    assert addressing.poll() == []
    now[0] = DHCP_TIME_LIMIT + 1
    with pytest.raises(TimeLimit, match="no DHCP server answered") as caught:
        addressing.poll()
    assert "--address CIDR" in caught.value.hint
    assert re.search(says, caught.value.message)


def test_the_next_client_is_tried(link: FakeLink, resolver: Resolver) -> None:
    first = FakeClient([GuestpvError("it broke")])
    second = FakeClient([[LEASE], GuestpvError("it broke, too")], "udhcpc")
    addressing = leased(link, resolver, first, second)
    assert addressing.poll() == ["it broke", "trying udhcpc instead"]
    assert first.closed == 1
    assert addressing.poll() == ["address 10.0.2.15/24"]
    with pytest.raises(GuestpvError, match="it broke, too"):
        addressing.poll()
    addressing.close()
    assert link.log == ["+10.0.2.15/24", "-10.0.2.15/24"]


def test_a_link_that_refuses(link: FakeLink, resolver: Resolver) -> None:
    link.refuses = True
    with pytest.raises(GuestpvError, match="does not take it"):
        leased(link, resolver, FakeClient([[LEASE]])).poll()


def test_name_servers_that_cannot_be_set_are_no_reason_to_stop(link: FakeLink, tmp_path: Path) -> None:
    resolver = Resolver("pv0", resolv_conf=tmp_path / "no" / "resolv.conf", resolved=tmp_path / "none")
    addressing = leased(link, resolver, FakeClient([[LEASE]]))
    events = addressing.poll()
    assert events[0] == "address 10.0.2.15/24"
    assert "name servers 10.0.2.3 not set" in events[1]
    assert addressing.ready


# The kernel's links.


class FakeNetlink:
    """pyroute2's IPRoute on a machine whose only link is pv0."""

    calls: list[tuple[Any, ...]]
    error: int | None

    def __enter__(self) -> FakeNetlink:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def link_lookup(self, ifname: str) -> list[int]:
        return [7] if ifname == "pv0" else []

    def get_links(self, index: int) -> list[Any]:
        return [SimpleNamespace(get_attr=lambda name: 1500)]

    def call(self, kind: str, command: str, **values: Any) -> None:
        if self.error is not None:
            raise NetlinkError(self.error, "refused")
        self.calls.append((kind, command, values))

    def addr(self, command: str, **values: Any) -> None:
        self.call("addr", command, **values)

    def link(self, command: str, **values: Any) -> None:
        self.call("link", command, **values)

    def route(self, command: str, **values: Any) -> None:
        self.call("route", command, **values)


@pytest.fixture
def netlink(monkeypatch: pytest.MonkeyPatch) -> type[FakeNetlink]:
    fresh = type("Netlink", (FakeNetlink,), {"calls": [], "error": None})
    monkeypatch.setattr("pyroute2.IPRoute", fresh)
    return fresh


ADDRESS = {"index": 7, "address": "10.0.2.15", "prefixlen": 24}
ROUTE = {"dst": "default", "gateway": "10.0.2.2", "oif": 7, "priority": 1024}


def test_a_link_is_configured_and_deconfigured(netlink: type[FakeNetlink]) -> None:
    settings = Settings("10.0.2.15/24", gateway="10.0.2.2", mtu=1400)
    KernelLink("pv0").configure(settings)
    KernelLink("pv0").deconfigure(settings)
    assert netlink.calls == [
        ("addr", "replace", ADDRESS),
        ("link", "set", {"index": 7, "mtu": 1400}),
        ("route", "replace", ROUTE),
        ("addr", "del", ADDRESS),
    ]


@pytest.mark.parametrize("mtu", [None, 1500, 9000, 500])
def test_no_other_mtu_is_taken(netlink: type[FakeNetlink], mtu: int | None) -> None:
    KernelLink("pv0").configure(Settings("10.0.2.15/24", mtu=mtu))
    assert netlink.calls == [("addr", "replace", ADDRESS)]


def test_a_gateway_outside_the_network_is_on_the_link(netlink: type[FakeNetlink]) -> None:
    KernelLink("pv0").configure(Settings("10.0.2.15/24", gateway="10.9.9.9"))
    assert netlink.calls[-1] == ("route", "replace", ROUTE | {"gateway": "10.9.9.9", "flags": ["onlink"]})


def test_a_kernel_that_refuses_is_quoted(netlink: type[FakeNetlink]) -> None:
    netlink.error = errno.EINVAL
    with pytest.raises(
        GuestpvError, match=r"does not take 10\.0\.2\.15/24 with gateway 10\.0\.2\.2: .*refused"
    ):
        KernelLink("pv0").configure(Settings("10.0.2.15/24", gateway="10.0.2.2"))
    with pytest.raises(NetlinkError):
        KernelLink("pv0").deconfigure(LEASE)
    netlink.error = errno.EADDRNOTAVAIL
    KernelLink("pv0").deconfigure(LEASE)


def test_a_link_that_is_gone(netlink: type[FakeNetlink]) -> None:
    with pytest.raises(GuestpvError, match="no such link any more"):
        KernelLink("pv9").configure(LEASE)
    KernelLink("pv9").deconfigure(LEASE)
    assert netlink.calls == []
    assert not KernelLink("pv9").has_carrier()


# What a server sends.


def test_every_option_but_the_lease_time_may_be_missing() -> None:
    settings = settings_of({"yiaddr": "10.0.2.15", "options": {"lease_time": -1}})
    assert (settings.address, settings.gateway, settings.dns) == ("10.0.2.15/8", None, ())
    assert (settings.lease_seconds, settings.server) == (None, "unknown")
    assert settings.as_dict()["by"] == "dhcp"


def test_all_that_is_understood() -> None:
    options = {
        "lease_time": 3600,
        "subnet_mask": "255.255.255.0",
        "router": ["10.0.2.2", "10.0.2.1"],
        "name_server": ["10.0.2.3"],
        "domain_name": "example.org",
        "interface_mtu": 1400,
        "server_id": "10.0.2.2",
    }
    settings = settings_of({"yiaddr": "10.0.2.15", "options": options})
    assert settings == Settings(
        "10.0.2.15/24", "10.0.2.2", ("10.0.2.3",), "example.org", 1400, "10.0.2.2", 3600, settings.obtained
    )


@pytest.mark.parametrize(
    ("address", "mask", "expected"),
    [
        ("10.0.2.15", "255.255.255.0", "10.0.2.15/24"),
        ("10.0.2.15", None, "10.0.2.15/8"),
        ("172.16.0.9", None, "172.16.0.9/16"),
        ("192.168.1.9", None, "192.168.1.9/24"),
        ("192.168.1.9", "28", "192.168.1.9/28"),
    ],
)
def test_prefix_lengths(address: str, mask: str | None, expected: str) -> None:
    assert with_prefix(address, mask) == expected


# The library's client.


class FakeLibrary:
    """Stands in for pyroute2's AsyncDHCPClient, which needs a link and a server."""

    script: Callable[[Any], Any]
    left: list[str]

    def __init__(self, config: Any) -> None:
        self.config = config

    async def __aenter__(self) -> FakeLibrary:
        self.task = asyncio.create_task(type(self).script(self.config))
        return self

    async def bootstrap(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        self.left.append("left")
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self.task


def library(monkeypatch: pytest.MonkeyPatch, script: Callable[[Any], Any]) -> list[str]:
    from pyroute2.dhcp import client

    left: list[str] = []
    monkeypatch.setattr(
        client,
        "AsyncDHCPClient",
        type("Fake", (FakeLibrary,), {"script": staticmethod(script), "left": left}),
    )
    return left


def poll_until(client: Any, count: int) -> list[Settings | None]:
    deadline = time.monotonic() + 60
    news: list[Settings | None] = []
    while len(news) < count:
        assert time.monotonic() < deadline
        news += client.poll()
        time.sleep(0.005)
    return news


def test_hooks_of_the_library_become_news(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyroute2.dhcp.hooks import Trigger, run_hooks

    monkeypatch.chdir(tmp_path)

    async def script(config: Any) -> None:
        ack = {"yiaddr": "10.0.2.15", "options": {"lease_time": 60, "subnet_mask": "255.255.255.0"}}
        lease = config.lease_type(ack=ack, interface="pv0", server_mac="52:55:0a:00:02:02")
        lease.dump()
        assert config.lease_type.load("pv0") is None
        assert not config.handle_signals
        for trigger in (Trigger.BOUND, Trigger.RENEWED, Trigger.EXPIRED):
            await run_hooks(config.hooks, lease, trigger, 1.0)
        await asyncio.sleep(600)

    left = library(monkeypatch, script)
    client = LibraryClient("pv0")
    bound, renewed, expired = poll_until(client, 3)
    assert bound is not None
    assert renewed is not None
    assert (bound.address, renewed.address, expired) == ("10.0.2.15/24", "10.0.2.15/24", None)
    assert client.poll() == []
    client.close()
    client.close()
    assert left == ["left"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (KeyError("message_type"), GuestpvError, "the DHCP client ended: KeyError"),
        (PermissionError(1, "Operation not permitted"), AccessDenied, "packet socket"),
        (None, GuestpvError, "lost its link"),
    ],
)
def test_a_library_that_dies_is_noticed(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, kind: type[GuestpvError], says: str
) -> None:
    async def script(config: Any) -> None:
        if error is not None:
            raise error

    library(monkeypatch, script)
    client = LibraryClient("pv0")
    with pytest.raises(kind, match=says):
        poll_until(client, 1)
    client.close()


def test_repetitions_come_soon_and_then_seldom() -> None:
    waits = dhcp.backoff()
    assert [next(waits) for _ in range(7)] == [1, 2, 4, 8, 16, 32, 32]


# udhcpc.


UDHCPC = """
    #!{python}
    import os, signal, subprocess, sys, time
    hook = sys.argv[sys.argv.index("-s") + 1]
    def event(name, **values):
        subprocess.run([hook, name], env={{**os.environ, **values}}, check=True)
    event("deconfig")
    event("bound", ip="10.0.2.15", subnet="255.255.255.0", router="10.0.2.2 10.0.2.1", dns="10.0.2.3",
          serverid="10.0.2.2", lease="60", mtu="1400")
    event("renew", ip="10.0.2.15", mask="24", lease="x")
    {end}
"""


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    program = tmp_path / "udhcpc"
    program.write_text(textwrap.dedent(UDHCPC.format(python=sys.executable, end=end)).lstrip())
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_udhcpc_reports_through_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "time.sleep(600)")
    client = Udhcpc("pv0")
    lost, bound, renewed = poll_until(client, 3)
    assert lost is None
    assert bound == Settings(
        "10.0.2.15/24", "10.0.2.2", ("10.0.2.3",), None, 1400, "10.0.2.2", 60, bound.obtained if bound else 0
    )
    assert renewed is not None
    assert (renewed.address, renewed.lease_seconds) == ("10.0.2.15/8", None)
    client.close()
    client.close()
    assert client.ended


def test_udhcpc_that_ends_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "sys.exit(3)")
    client = Udhcpc("pv0")
    with pytest.raises(GuestpvError, match="udhcpc ended with status 3"):
        poll_until(client, 4)
    client.close()


def test_udhcpc_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path,
        monkeypatch,
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); event('deconfig'); time.sleep(600)",
    )
    monkeypatch.setattr(dhcp, "STOP_TIME_LIMIT", 0.1)
    client = Udhcpc("pv0")
    poll_until(client, 4)
    client.close()
    assert client.ended


def test_without_udhcpc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestpvError, match="there is no udhcpc"):
        Udhcpc("pv0")


# Name servers.


def test_resolv_conf_keeps_what_others_write(resolver: Resolver, conf: Path) -> None:
    resolver.apply(("10.0.2.3", "10.0.2.4"), "example.org")
    assert conf.read_text() == (
        "# guestpv pv0 begin\nsearch example.org\nnameserver 10.0.2.3\nnameserver 10.0.2.4\n"
        "# guestpv pv0 end\n"
        "nameserver 192.0.2.1\n"
    )
    conf.write_text(conf.read_text() + "options edns0\n")
    resolver.apply(("10.0.2.5",), None)
    assert conf.read_text().count("# guestpv pv0 begin") == 1
    resolver.restore()
    resolver.restore()
    assert conf.read_text() == "nameserver 192.0.2.1\noptions edns0\n"


def test_what_a_killed_process_left_is_removed(resolver: Resolver, conf: Path, tmp_path: Path) -> None:
    (tmp_path / "net" / "pv2").mkdir()
    block = "# guestpv {0} begin\nnameserver 10.9.9.9\n# guestpv {0} end\n"
    conf.write_text(
        block.format("pv0") + block.format("pv1") + block.format("pv2") + "nameserver 192.0.2.1\n"
    )
    resolver.apply(("10.0.2.3",), None)
    resolver.restore()
    assert conf.read_text() == block.format("pv2") + "nameserver 192.0.2.1\n"


def test_no_name_servers_touch_nothing(resolver: Resolver, conf: Path) -> None:
    conf.unlink()
    resolver.apply((), "example.org")
    resolver.restore()
    assert not conf.exists()


def test_a_file_that_was_not_there_goes_again(resolver: Resolver, conf: Path) -> None:
    conf.unlink()
    resolver.apply(("10.0.2.3",), None)
    assert conf.exists()
    resolver.restore()
    assert not conf.exists()


def test_systemd_resolved_is_told(tmp_path: Path, conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    answer = [0]

    class FakeSystem:
        def run(self, command: list[str]) -> tuple[int, str]:
            calls.append(command)
            return answer[0], "Unknown link" if answer[0] else ""

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    (tmp_path / "net" / "pv0").mkdir(parents=True)
    resolver = Resolver(
        "pv0",
        resolv_conf=conf,
        resolved=tmp_path,
        links=tmp_path / "net",
        system=FakeSystem(),  # type: ignore[arg-type]
    )
    resolver.apply(("10.0.2.3",), "example.org")
    resolver.restore()
    assert calls == [
        ["resolvectl", "dns", "pv0", "10.0.2.3"],
        ["resolvectl", "domain", "pv0", "example.org"],
        ["resolvectl", "revert", "pv0"],
    ]
    assert conf.read_text() == "nameserver 192.0.2.1\n"
    answer[0] = 1
    with pytest.raises(GuestpvError, match=r"resolvectl dns pv0 10\.0\.2\.3: Unknown link"):
        resolver.apply(("10.0.2.3",), None)
