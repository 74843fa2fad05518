"""Starting, watching and ending a QEMU without a guest, and what it says when that fails."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from guestpv.errors import DeviceGone, GuestpvError, Refused, TimeLimit, UsageError
from guestpv.pci import qemu
from guestpv.pci.qemu import Qemu, qemu_version
from guestpv.pci.qemu_ram import GuestRam
from guestpv.pci.qtest import QtestFunction, open_function
from guestpv.pci.qtest_machine import QtestMachine

Launch = Callable[..., QtestMachine]
Open = Callable[..., QtestFunction]


def ends(pid: int, seconds: float) -> bool:
    """Whether a process that is not our child ends in time."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(watched)


def shorten(machine: QtestMachine, seconds: float) -> None:
    """From now on: while it starts, it may take its time."""
    machine.qemu.answer_limit = seconds
    machine.qemu._limit_answers(seconds)


def impostor(directory: Path, version: str, otherwise: str) -> str:
    """An executable that claims to be some QEMU and then does what the shell command says."""
    script = directory / f"qemu-{version}"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit\n{otherwise}\n')
    script.chmod(0o755)
    return str(script)


def test_version_is_known() -> None:
    assert qemu_version() >= (7, 2, 0)


@pytest.mark.parametrize(
    ("body", "params", "error", "words"),
    [
        ("virtio-rng-pci,speed=9", {}, UsageError, "Property 'virtio-rng-pci.speed' not found"),
        ("virtio-warp-pci", {}, UsageError, "'virtio-warp-pci' is not a valid device model name"),
        ("virtio-blk-pci", {}, UsageError, "drive property not set"),
        ("virtio-blk-pci", {"blockdev": "driver=file,filename=/nonexistent"}, UsageError, "No such file"),
        ("virtio-rng-pci", {"machine": "abacus"}, UsageError, "unsupported machine type"),
        ("virtio-rng-pci", {"colour": "blue"}, UsageError, "no parameter colour"),
        ("virtio-rng-pci", {"memory": "much"}, UsageError, "memory=much is not a number"),
        ("virtio-rng-pci", {"memory": "4096"}, UsageError, "whole MiB from 2 to 2048"),
        ("virtio-rng-pci,addr=5", {}, UsageError, "places the device itself"),
        ("virtio-rng-pci", {"accel": "kvm"}, Refused, "with KVM"),
        ("virtio-rng-pci", {"qemu": "/nonexistent/qemu"}, UsageError, "there is no /nonexistent/qemu"),
        ("virtio-rng-pci", {"qemu": "/bin/echo"}, UsageError, "is not QEMU"),
        ("virtio-rng-pci", {"qemu": "/etc/passwd"}, UsageError, "does not run: Permission denied"),
        ("", {}, UsageError, "needs a device"),
    ],
)
def test_refusals_are_clear(body: str, params: dict[str, str], error: type[GuestpvError], words: str) -> None:
    with pytest.raises(error) as caught:
        open_function(body, params)
    assert words in str(caught.value)


def test_old_qemu_is_refused(tmp_path: Path) -> None:
    old = impostor(tmp_path, "QEMU emulator version 5.2.0", "exit 1")
    with pytest.raises(Refused, match=r"QEMU 5\.2\.0 is too old; 7\.2 is the oldest"):
        open_function("virtio-rng-pci", {"qemu": old})


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [("while :; do :; done", "spins"), ("exec sleep 600", "hangs")],
    ids=["spinning", "sleeping"],
)
def test_a_qemu_that_never_answers_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, words: str
) -> None:
    monkeypatch.setattr(qemu, "START_LIMIT", 3.0)
    executable = impostor(
        tmp_path, "QEMU emulator version 99.0.0", f'echo $$ > "{tmp_path}/pid"; {behaviour}'
    )
    start = time.monotonic()
    with pytest.raises(TimeLimit, match=words):
        open_function("virtio-rng-pci", {"qemu": executable})
    assert time.monotonic() - start < 60
    assert ends(int((tmp_path / "pid").read_text()), 0)


def test_a_stopped_qemu_is_killed_and_reported(opened: Open) -> None:
    function = opened("virtio-rng-pci")
    shorten(function.machine, 1.0)
    pid = function.machine.qemu.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(TimeLimit, match=rf"\(pid {pid}\) hangs: no answer to `readl 0xb0020000.*killed"):
        function.config_read(0, 4)
    with pytest.raises(DeviceGone, match="hangs"):
        function.bar(4).read(0, 4)
    assert ends(pid, 60)


def test_a_qemu_stopped_behind_the_monitor_is_killed(launch: Launch) -> None:
    machine = launch("virtio-rng-pci")
    assert machine.qemu.qmp.execute("query-status")["running"]
    shorten(machine, 1.0)
    os.kill(machine.qemu.pid, signal.SIGSTOP)
    with pytest.raises(TimeLimit, match="no answer to `QMP query-status`"):
        machine.qemu.qmp.execute("query-status")
    with pytest.raises(DeviceGone):
        machine.config_read(0, 0, 0, 4)


def test_a_qemu_that_does_not_end_is_killed_and_reported() -> None:
    machine = QtestMachine(["virtio-rng-pci"])
    shorten(machine, 0.5)
    os.kill(machine.qemu.pid, signal.SIGSTOP)
    with pytest.raises(TimeLimit, match="no answer to `SIGTERM`"):
        machine.close()
    assert ends(machine.qemu.pid, 0)
    machine.close()


def test_a_qemu_that_dies_is_reported_with_its_status(opened: Open) -> None:
    function = opened("virtio-rng-pci")
    os.kill(function.machine.qemu.pid, signal.SIGABRT)
    with pytest.raises(DeviceGone, match="died of SIGABRT at"):
        function.config_read(0, 4)
    with pytest.raises(DeviceGone, match="died of SIGABRT at"):
        _ = function.machine.qemu.qmp


def test_a_failed_posted_write_is_reported_by_the_next_access(launch: Launch) -> None:
    machine = launch("virtio-rng-pci")
    machine.session.post(b"irq_intercept_in nobody\n")
    with pytest.raises(GuestpvError, match=r"`.*` was refused: "):
        machine.config_read(0, 0, 0, 4)
    assert machine.config_read(0, 0, 0, 2) == 0x8086


def test_a_closed_function_says_so(opened: Open) -> None:
    function = opened("virtio-rng-pci")
    pid = function.machine.qemu.pid
    function.close()
    function.close()
    assert ends(pid, 0)
    with pytest.raises(DeviceGone, match="was closed"):
        function.config_read(0, 4)


def test_qemu_does_not_outlive_a_killed_owner() -> None:
    program = (
        "import sys, time; from guestpv.pci.qtest import open_function\n"
        "f = open_function('virtio-rng-pci', {})\n"
        "print(f.machine.qemu.pid, flush=True); time.sleep(600)"
    )
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert not ends(pid, 0)
        owner.kill()
        owner.wait()
    assert ends(pid, 60)


def test_nothing_is_left_open() -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    open_function("virtio-rng-pci", {}).close()
    before = descriptors()
    for _ in range(3):
        function = open_function("virtio-rng-pci", {})
        function.enable_msix(2)
        function.enable_intx()
        function.machine.qemu.qmp.execute("query-version")
        function.close()
        with pytest.raises(UsageError, match="refused its options"):
            open_function("virtio-rng-pci,speed=9", {})
        del function
    assert descriptors() == before


def test_monitor_commands_errors_and_events(launch: Launch) -> None:
    monitored = launch("virtio-rng-pci,id=r0").qemu
    version = monitored.qmp.execute("query-version")["qemu"]
    assert (version["major"], version["minor"], version["micro"]) == monitored.version
    with pytest.raises(GuestpvError, match="QMP device_del: Device 'nobody' not found"):
        monitored.qmp.execute("device_del", {"id": "nobody"})
    monitored.qmp.execute("stop")
    assert monitored.qmp.wait_event("STOP")["event"] == "STOP"
    with pytest.raises(TimeLimit, match="RESUME did not come"):
        monitored.qmp.wait_event("RESUME", timeout=0.05)


def test_a_qemu_ends_with_its_context() -> None:
    with Qemu(["-device", "virtio-rng-pci"]) as running:
        pid = running.pid
        assert not ends(pid, 0)
    assert ends(pid, 0)


def test_guest_ram_is_reused_only_when_no_view_is_left() -> None:
    ram = GuestRam(2 << 20)
    first = ram.map(5000)
    assert first.array.nbytes == 8192
    assert first.segments[0].address == 1 << 20
    first.array[:] = 7
    view = first.array[100:200].view(np.uint32)
    ram.unmap(first)
    del first
    second = ram.map(4096)
    assert second.segments[0].address == (1 << 20) + 8192
    assert set(view) == {0x07070707}
    del view
    third = ram.map(8192)
    assert third.segments[0].address == 1 << 20
    assert not third.array.any()
    with pytest.raises(GuestpvError, match=r"RAM of 2 MiB has no 1048576 bytes.*(\n.*)*memory=MIB"):
        ram.map(1 << 20)
    ram.close()


def test_dma_memory_is_the_guests_ram(launch: Launch) -> None:
    machine = launch("virtio-rng-pci")
    function = QtestFunction(machine)
    region = function.dma.map(4096)
    region.array[:4] = np.frombuffer(b"\x78\x56\x34\x12", np.uint8)
    text = machine.qemu.qmp.execute(
        "human-monitor-command", {"command-line": f"xp /1xw {region.segments[0].address:#x}"}
    )
    assert "0x12345678" in text
