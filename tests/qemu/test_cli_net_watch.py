"""``net top``, ``net capture`` and ``net up`` of several, on QEMU devices in a network of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import rdpcap

GPV = f"{sys.executable} -m guestpv"
UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]


def spec(subnet: int, more: str = "") -> str:
    return f"'qtest:virtio-net-pci,disable-legacy=on{more}?netdev=user,restrict=on,net=10.0.{subnet}.0/24'"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    yield path
    if list(path.glob("*.sock")):
        # A script that failed half-way leaves nothing running.
        isolated(path, f"{GPV} net down --all")


def isolated(runtime: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a network of its own."""
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [*UNSHARE, "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=runtime.parent,
        env=os.environ | {"RUNTIME_DIRECTORY": str(runtime), "PYTHONPATH": str(root)},
    )


def reports(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_watching_and_capturing(runtime: Path) -> None:
    talk = "echo hello > /dev/udp/10.0.7.2/9; sleep 0.05"
    done = isolated(
        runtime,
        f"{GPV} net up {spec(7)} --detach --json && "
        f"{GPV} net capture -w out.pcapng --count 12 --seconds 200 --json & p=$!;"
        f"while kill -0 $p; do {talk}; done 2>&-; wait $p || exit 9;"
        f"while :; do {talk}; done & q=$!; {GPV} net top --interval 1 --json; {GPV} net top pv0; kill $q;"
        f"{GPV} net down --json",
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    up, captured, top, _down = (json.loads(line)["data"] for line in lines)
    assert (captured["name"], captured["frames"], captured["lost"]) == ("pv0", 12, 0)
    packets = rdpcap(str(runtime.parent / "out.pcapng"))
    assert len(packets) == 12
    assert any(bytes(packet).endswith(b"hello\n") for packet in packets)
    assert all(b"queue pair 0" in (packet.comment or b"") for packet in packets)
    (link,) = top
    ((queue,),) = [link["queues"]]
    assert (link["name"], link["function"]) == ("pv0", up["function"])
    assert queue["tx"]["packets_per_second"] > 0
    assert queue["rx"]["size"] == 256
    assert 0 < queue["rx"]["outstanding"] <= 256
    (shown,) = [line.split() for line in done.stdout.splitlines() if " tx0 " in line]
    assert shown[0] == "pv0"
    assert shown[-1].endswith("/256")


def test_what_cannot_be_captured(runtime: Path) -> None:
    done = isolated(runtime, f"{GPV} net capture -w x.pcapng; echo $?; {GPV} net top | cat")
    assert "nothing is up" in done.stderr
    assert done.stdout.splitlines() == ["2", "Nothing is up. (guestpv net up)"]
    assert not (runtime.parent / "x.pcapng").exists()


def test_several_at_once(runtime: Path) -> None:
    """In the foreground, until SIGINT; then all are given back."""
    done = isolated(
        runtime,
        f"{GPV} net up {spec(7)} {spec(8, ',packed=on')} --name lan%d --json > out & p=$!;"
        f"for i in $(seq 1200); do [ -s out ] && break; sleep 0.1; done; cat out;"
        f"{GPV} net status --json; kill -INT $p; wait $p; echo $?; ip -j link; ls run",
    )
    up, status, code, links, *left = done.stdout.splitlines()
    data = json.loads(up)["data"]
    assert [one["address"]["address"] for one in data] == ["10.0.7.15/24", "10.0.8.15/24"], done.stderr
    assert [one["name"] for one in json.loads(status)["data"]] == ["lan0", "lan1"]
    assert code == "0"
    assert [link["ifname"] for link in json.loads(links)] == ["lo"]
    assert left == ["lan0.log", "lan1.log"]


def test_of_several_all_come_up_or_none(runtime: Path) -> None:
    bad = "'qtest:virtio-rng-pci,disable-legacy=on'"
    done = isolated(runtime, f"{GPV} net up {spec(7)} {bad} --detach --json; echo $?; ip -j link; ls run")
    error, code, links, *left = done.stdout.splitlines()
    assert "virtio rng device, no network device" in json.loads(error)["error"]["message"]
    assert code == "2"
    assert [link["ifname"] for link in json.loads(links)] == ["lo"]
    assert left == ["pv0.log"]


def test_options_that_do_not_go_together(runtime: Path) -> None:
    both = f"{spec(7)} {spec(8)}"
    for words, says in [
        (f"{both} --address 192.0.2.1/24", "several functions cannot have the same --address"),
        (f"{both} --name lan", "several functions cannot have the same --name"),
        ("--rss-table 0,1", "--rss-table goes with --rss-key"),
        ("--rss-key xyz", "non-hexadecimal"),
        (f"--rss-key {'00' * 40} --rss-table 0,x", "invalid literal"),
        (f"{spec(7)} --no-address --rss-key {'00' * 40}", "does not offer RSS"),
    ]:
        done = isolated(runtime, f"{GPV} net up {words}")
        assert says in done.stderr, done.stderr
        assert done.returncode in (2, 3)


def test_a_link_steered_by_rss(runtime: Path) -> None:
    """Of two queues the table names the second alone: whatever has a hash comes there."""
    mac = "52:54:00:aa:bb:01"
    tap = "tap,ifname=tap0,script=no,downscript=no,vhost=off,queues=2"
    device = f"'qtest:virtio-net-pci,disable-legacy=on,mq=on,rss=on,vectors=6,mac={mac}?netdev={tap}'"
    enough = 'exit(json.load(open("s"))["data"][0]["queues"][1]["rx_packets"] < 50)'
    done = isolated(
        runtime,
        "ip tuntap add dev tap0 mode tap multi_queue vnet_hdr; ip link set tap0 up;"
        f"{GPV} net up {device} --queues 2 --rss-key {'6d5a56da' * 10} --rss-table 1 --no-address --detach"
        " --json && ip address add 192.0.2.2/24 dev tap0 && "
        f"ip neighbour add 192.0.2.1 lladdr {mac} dev tap0;"
        "for i in $(seq 100); do for j in $(seq 50); do echo $j > /dev/udp/192.0.2.1/9; done;"
        f" {GPV} net status --json > s; python3 -c 'import json; {enough}' && break; done; cat s;"
        f"{GPV} net down --json",
    )
    assert done.returncode == 0, done.stderr
    up, status, _ = reports(done)
    assert "RSS" in up["data"]["features"]
    first, second = status["data"][0]["queues"]  # type: ignore[index]
    assert second["rx_packets"] >= 50
    # Without a hash come only the kernel's own multicasts, which are few.
    assert first["rx_packets"] < second["rx_packets"] / 2


def test_ipv6_addresses_come_by_themselves(runtime: Path) -> None:
    """QEMU's router advertises a prefix; multicast comes through, so that the kernel hears it."""
    network = "user,restrict=on,ipv6-net=fd07::/64,ipv6-host=fd07::2"
    device = f"'qtest:virtio-net-pci,disable-legacy=on,mac=52:54:00:aa:bb:01?netdev={network}'"
    done = isolated(
        runtime,
        f"{GPV} net up {device} --no-address --detach --json;"
        "for i in $(seq 600); do ip -j -6 address show dev pv0 scope global > a;"
        " grep -q fd07:: a && ! grep -q tentative a && break; sleep 0.1; done; cat a;"
        f"ip -j -6 route show default; {GPV} net down --json",
    )
    assert done.returncode == 0, done.stderr
    _, (link, *_), (route, *_), _ = reports(done)  # type: ignore[misc]
    (address,) = [known for known in link["addr_info"] if known]
    assert (address["local"], address["prefixlen"]) == ("fd07::5054:ff:feaa:bb01", 64)
    assert route["dev"] == "pv0"
