"""``guestpv blk up`` without a kernel that has nbd: order of doing and undoing, and waiting while mounted."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from guestpv.cli import blk_session
from guestpv.cli.blk_session import BlkSession, Wishes
from guestpv.cli.kinds import BLK
from guestpv.cli.main import main
from guestpv.errors import DeviceGone, GuestpvError, Refused, UsageError
from guestpv.services import nbd
from guestpv.services.control import ask

pytestmark = pytest.mark.usefixtures("strict")

log: list[str] = []


class FakeService:
    """What ``BlkService`` shows to a session."""

    name, path, features, index = "nbd7", "/dev/nbd7", 0, 7
    busy = 0
    events: list[list[str]] = []

    def __init__(self, transport: Any, **options: Any) -> None:
        log.append(f"service {sorted(options.items())}")
        self.disk = SimpleNamespace(
            capacity=1 << 20, block_size=512, read_only=False, volatile_cache=True, queues=[None]
        )

    def watch(self, timeout: float, wake_fd: int | None = None) -> list[str]:
        log.append("watch")
        threading.Event().wait(0.01)
        return FakeService.events.pop(0) if FakeService.events else []

    def stats(self) -> dict[str, Any]:
        names = ("reads", "writes", "flushes", "discards", "zeroes", "errors", "bytes_read", "bytes_written")
        counters = dict.fromkeys((*names, "requests", "interrupts", "wakeups", "kicks"), 3)
        return {"mode": "msix", "capacity": 1 << 20, **counters, "queues": [counters]}

    def settle(self) -> bool:
        log.append("settle")
        if FakeService.busy:
            FakeService.busy -= 1
            raise Refused("/dev/nbd7 is in use: mounted", hint="umount /dev/nbd7")
        return True

    def restart(self) -> None:
        log.append("restart")

    def close(self) -> None:
        log.append("close")


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(blk_session, "BlkService", FakeService)
    log.clear()
    FakeService.busy, FakeService.events = 0, []
    yield
    assert not list(Path(BLK.directory()).glob("*.sock"))
    assert not list(Path(BLK.directory()).glob("*.pid"))


def session(spec: str = "loopback:blk", **wishes: Any) -> tuple[BlkSession, list[str]]:
    said: list[str] = []
    return BlkSession(Wishes(spec=spec, **wishes), said.append), said


def down_at_once(status: dict[str, Any]) -> None:
    def end() -> None:
        answers.append(ask(Path(BLK.directory()) / "nbd7.sock", "down", 60))

    answers: list[dict[str, Any]] = []
    status["thread"] = threading.Thread(target=end)
    status["thread"].start()
    threads.append((status["thread"], answers))


threads: list[tuple[threading.Thread, list[dict[str, Any]]]] = []


def test_up_and_down() -> None:
    threads.clear()
    one, said = session(queues=2, poll=True, index=7)
    one.run(down_at_once, lambda status: None)
    ((thread, answers),) = threads
    thread.join(60)
    assert log[0] == "service [('index', 7), ('poll', True), ('queues', 2), ('restarts', False)]"
    assert log[-2:] == ["settle", "close"]
    assert answers == [{"name": "nbd7", "function": "loopback:blk", "driver": None}]
    assert said == ["/dev/nbd7 is up: 1048576 bytes", "going down: guestpv blk down"]


def test_a_mounted_disk_is_waited_for() -> None:
    threads.clear()
    FakeService.busy = 3
    one, said = session()
    one.run(down_at_once, lambda status: None)
    threads[0][0].join(60)
    assert log.count("settle") == 4
    assert said[1] == "/dev/nbd7 is in use: mounted; going down once it is not: umount /dev/nbd7"
    assert said[2] == "going down: guestpv blk down"


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ("release requested", "asked for the function back"),
        ("bus error", "unrecoverable bus error"),
        ("disconnected", "somebody else disconnected it"),
    ],
)
def test_an_end_that_nobody_asked_for(event: str, says: str) -> None:
    FakeService.events = [["capacity is now 5 bytes"], [event]]
    one, said = session()
    with pytest.raises(GuestpvError, match=says) as caught:
        one.run(lambda status: None, lambda status: None)
    assert isinstance(caught.value, DeviceGone) == (event != "disconnected")
    assert said[1:] == ["capacity is now 5 bytes", event]
    assert log[-1] == "close"
    assert "settle" not in log


def test_status_is_shown() -> None:
    shown: list[Any] = []

    def look(status: dict[str, Any]) -> None:
        for words in (["blk", "status"], ["blk", "status", "nbd7", "-v"], ["blk", "status", "--json"]):
            shown.append(CliRunner().invoke(main, words))
        down_at_once({})

    threads.clear()
    one, _ = session()
    one.run(look, lambda status: None)
    threads[0][0].join(60)
    assert [result.exit_code for result in shown] == [0, 0, 0]
    assert "/dev/nbd7, 1.0 MiB, blocks of 512 bytes, write-back cache" in shown[0].output
    assert "QUEUE" in shown[1].output
    assert json.loads(shown[2].stdout)["data"][0]["name"] == "nbd7"


def test_a_device_that_is_no_disk() -> None:
    one, _ = session("loopback:net")
    with pytest.raises(UsageError, match="it is a virtio net device, no block device"):
        one.run(lambda status: None, lambda status: None)
    assert log == []


def test_what_a_killed_process_left_behind_is_taken_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone: list[int] = []

    class Kernel:
        def __enter__(self) -> Kernel:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def disconnect(self, index: int) -> None:
            gone.append(index)

    dead, alive = "4194305", str(os.getpid())
    sysfs = {"nbd1": dead, "nbd2": "77", "nbd4": alive}
    read = nbd.SYSTEM.read_text
    monkeypatch.setattr(nbd, "Netlink", Kernel)
    monkeypatch.setattr(
        nbd.SYSTEM,
        "read_text",
        lambda path: sysfs[path.split("/")[3]] if path.startswith("/sys/block/nbd") else read(path),
        raising=False,
    )
    records = {"nbd1": dead, "nbd2": dead, "nbd4": alive}
    for name, pid in records.items():
        (tmp_path / f"{name}.pid").write_text(f"{pid}\n")
    (tmp_path / "nbd1.log").write_text("a log is no record")
    assert nbd.clear_stale(str(tmp_path)) == ["nbd1"]
    assert gone == [1]
    assert (tmp_path / "nbd4.pid").exists()
    assert not (tmp_path / "nbd1.pid").exists()
    # Somebody else has it by now: the record goes, the device stays.
    assert not (tmp_path / "nbd2.pid").exists()
    assert nbd.remember(str(tmp_path), 6) == str(tmp_path / "nbd6.pid")
    assert (tmp_path / "nbd6.pid").read_text().strip() == alive
