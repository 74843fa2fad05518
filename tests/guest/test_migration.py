"""Live migration under load: the rings, the mappings and the interrupts go on on the other side.

Functions that a driver holds through VFIO move with the guest; neither the driver nor the programs that use
it notice more than a pause. GUESTPV_MIGRATIONS is how many migrations a guest goes through.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guestvm import Machine, Process
from guestvm.migration import migrate

MODERN = "disable-legacy=on,iommu_platform=on,ats=on"
MIGRATIONS = int(os.environ.get("GUESTPV_MIGRATIONS", "5"))
RINGS = {"6.1": "split", "6.12": "packed"}
MEMORY = 1024
BALLOONED = 768 << 20
HOST, GUEST, PORT = "10.77.0.1", "10.77.0.2", 7000

ECHO = f"""
import socket, threading
def serve(conn):
    with conn:
        while data := conn.recv(65536):
            conn.sendall(data)
with socket.create_server(("{HOST}", {PORT})) as server:
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""

CLIENT = f"""
import os, socket, sys
conn = socket.create_connection(("{HOST}", {PORT}), timeout=120)
rounds = 0
while not os.path.exists("/tmp/enough"):
    block = rounds.to_bytes(8, "little") * 1024
    conn.sendall(block)
    back = b""
    while len(back) < len(block):
        piece = conn.recv(65536)
        assert piece, "the connection was closed"
        back += piece
    assert back == block, f"round {{rounds}} came back changed"
    rounds += 1
    if rounds % 50 == 1:
        print("rounds", rounds, flush=True)
print("all", rounds, "rounds came back", flush=True)
"""

DISK = """
while [ ! -e /tmp/enough ]; do
    fio --name=load --filename=/dev/nbd0 --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=16 \
        --size=4M --verify=crc32c --verify_fatal=1 --randrepeat=0 --output=/tmp/fio.txt || exit 1
    echo verified
done
"""


@pytest.fixture
def network() -> Iterator[str]:
    """A namespace with two TAP links on a bridge, one for each side of a migration, and an echo server."""
    name = f"gpv{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=120, capture_output=True)

    with ExitStack() as undo:
        ip("netns", "add", name)
        undo.callback(ip, "netns", "delete", name)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "add", "br0", "type", "bridge")
        for tap in ("tap0", "tap1"):
            ip("-n", name, "tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr")
            ip("-n", name, "link", "set", tap, "master", "br0", "up")
        ip("-n", name, "address", "add", f"{HOST}/24", "dev", "br0")
        ip("-n", name, "link", "set", "br0", "up")
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True
        )
        undo.callback(server.wait, 10)
        undo.callback(server.kill)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield name


def netdev(tap: str) -> str:
    return f"tap,id=n0,ifname={tap},script=no,downscript=no"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it never came true: {what}"
        time.sleep(0.1)


def wait_for_more(program: Process, word: str) -> None:
    before = program.stdout.count(word)
    wait_until(lambda: program.stdout.count(word) > before, f"{program.name} goes on")


def status(vm: Machine, words: str) -> Any:
    answer = json.loads(vm.run(f"guestpv {words} status --json", timeout=300).check().stdout)
    assert answer["ok"], answer
    return answer["data"]


def test_drivers_and_their_users_move_with_the_guest(
    boot: Callable[..., Machine], kernel: str, network: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    rings = RINGS.get(kernel, "split")
    options = f"{MODERN},packed={'on' if rings == 'packed' else 'off'}"
    vm = boot(
        devices=[
            f"virtio-net-pci,id=net0,netdev=n0,{options}",
            f"virtio-blk-pci,id=blk0,drive=d0,{options}",
            f"virtio-balloon-pci,id=balloon0,{options}",
        ],
        netdevs=[netdev("tap0")],
        blockdevs=[f"driver=raw,node-name=d0,file.driver=file,file.filename={disk}"],
        memory=MEMORY,
        prefix=["ip", "netns", "exec", network],
        limit=900,
        warm=True,
    )
    vm.run(f"guestpv net up {vm.address('net0')} --address {GUEST}/24 --detach", timeout=300).check()
    vm.run(f"guestpv blk up {vm.address('blk0')} --detach", timeout=300).check()
    vm.run(f"guestpv balloon up {vm.address('balloon0')} --detach", timeout=300).check()
    vm.qmp("balloon", value=BALLOONED)
    wait_until(lambda: vm.qmp("query-balloon")["actual"] == BALLOONED, "the balloon reached its target")
    talk, load = vm.spawn(["python", "-c", CLIENT]), vm.spawn(DISK)
    talk.wait_for("rounds 1", 60)
    load.wait_for("verified", 120)

    taps = ["tap0", "tap1"]
    for number in range(MIGRATIONS):
        report = migrate(vm, through_file=number % 4 == 3, replace={netdev(taps[0]): netdev(taps[1])})
        taps.reverse()
        print(f"{rings}, migration {number + 1}: {report.get('downtime')} of {report['total-time']} ms down")
        assert talk.status is None, talk.stdout + talk.stderr
        assert load.status is None, load.stdout + load.stderr
        wait_for_more(talk, "rounds")
        wait_for_more(load, "verified")
        assert vm.qmp("query-balloon")["actual"] == BALLOONED

    vm.run("touch /tmp/enough").check()
    ended = talk.wait(600)
    assert ended.status == 0, ended.stderr
    assert load.wait(600).status == 0, load.stdout + load.stderr
    vm.qmp("balloon", value=MEMORY << 20)
    wait_until(lambda: vm.qmp("query-balloon")["actual"] == MEMORY << 20, "the balloon gave everything back")
    for service in ("net", "blk", "balloon"):
        assert status(vm, service)
        vm.run(f"guestpv {service} down", timeout=300).check()
