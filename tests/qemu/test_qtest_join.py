"""Joining a QEMU that somebody else started: its devices driven, itself left alive."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from click.testing import CliRunner

import guestpv
from guestpv.cli.main import main
from guestpv.drivers.blk import Blk
from guestpv.drivers.rng import Rng
from guestpv.errors import DeviceGone, GuestpvError, Refused, TimeLimit, UsageError
from guestpv.pci import qtest_joined
from guestpv.pci.qtest import QtestFunction, open_function
from guestpv.transport.pci import PciTransport
from peers.backend import Backend, qemu_to_join

from .conftest import EXECUTABLE

MEMFD = "memory-backend-memfd,share=on"
TO_THE_BEGINNING = b"\xe9\xfd\x00"
NO_OPERATION = b"\x90"
ENABLE_PAGING = bytes.fromhex(
    "66c706fc1f8300c0ff"  # a page of 4 MiB for the code: the last entry of a directory at 0x1000
    "66b810000000 0f22e0"  # CR4.PSE
    "66b800100000 0f22d8"  # CR3
    "0f20c0 660d01000080 0f22c0"  # CR0.PG and PE
    "f4 ebfd"
)
"""What an operating system does first, and a halt."""
RNG = ("-device", "virtio-rng-pci,id=r0,disable-legacy=on")


class Foreign:
    """A QEMU that knows nothing of us, and how to join it."""

    def __init__(self, directory: Path, *options: str, machine: str = "q35", memory: str = MEMFD) -> None:
        self.socket, self.monitor = directory / "qtest.sock", directory / "qmp.sock"
        self.backend: Backend = qemu_to_join(
            self.socket, self.monitor, options, machine=machine, memory=memory, executable=EXECUTABLE
        )
        self.backend.start(60)

    @property
    def lives(self) -> bool:
        return Path(f"/proc/{self.backend.pid}/stat").read_text().split(") ")[1][0] != "Z"

    def params(self, **more: str) -> dict[str, str]:
        return {"join": str(self.socket), "qmp": str(self.monitor), "answer_limit": "60"} | more

    def spec(self, device: str, **more: str) -> str:
        return f"qtest:{device}?{urlencode(self.params(**more))}"


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Callable[..., Foreign]]:
    """Start foreign QEMUs with the arguments of ``Foreign``; they end with the case."""
    made: list[Foreign] = []

    def start(*options: str, **how: str) -> Foreign:
        made.append(Foreign(tmp_path, *options, **how))
        return made[-1]

    yield start
    for one in made:
        one.backend.close()


def wait_for(said: Path, words: str) -> None:
    """Until a file has these words."""
    deadline = time.monotonic() + 90
    while not (said.exists() and words in said.read_text(errors="replace")):
        assert time.monotonic() < deadline, "the firmware did not end"
        time.sleep(0.05)


def firmware_that_gives_up(said: Path) -> list[str]:
    """Options for SeaBIOS, which finds nothing to boot and says so in a file."""
    options = ["-bios", "bios-256k.bin", "-chardev", f"file,id=said,path={said}"]
    return [*options, "-device", "isa-debugcon,iobase=0x402,chardev=said"]


@pytest.mark.parametrize("mode", ["intx", "poll"])
@pytest.mark.parametrize("machine", ["q35", "pc"])
@pytest.mark.parametrize("firmware", ["gave up", "none"])
def test_a_disk_is_driven_and_left(
    foreign: Callable[..., Foreign], tmp_path: Path, machine: str, mode: str, firmware: str
) -> None:
    """Firmware has placed the BARs and driven the disk before us, or nobody has."""
    disk, said = tmp_path / "disk", tmp_path / "said"
    disk.write_bytes(bytes(1 << 20))
    options = ["-blockdev", f"driver=file,filename={disk},node-name=d0"]
    options += ["-device", "virtio-blk-pci,id=b0,drive=d0"]
    if firmware == "gave up":
        options += firmware_that_gives_up(said)
    other = foreign(*options, machine=machine)
    if firmware == "gave up":
        wait_for(said, "No bootable device")
    data = np.random.default_rng(5).integers(0, 256, 1 << 20, np.uint8)
    device = "b0"
    for life in range(2):
        with guestpv.open(other.spec(device, mode=mode)) as transport, Blk(transport) as blk:
            if life == 0:
                blk.write(0, data, fua=True)
            assert np.array_equal(blk.read(0, 1 << 20), data)
            assert isinstance(transport, PciTransport)
            assert isinstance(transport.function, QtestFunction)
            device = f"00:{transport.function.slot:02x}.0"
        assert other.lives
    assert disk.read_bytes() == data.tobytes()


def bios(directory: Path, code: bytes, before: bytes = b"\0") -> list[str]:
    """The option for a BIOS that is ``code``, with the same byte everywhere before it."""
    path = directory / "bios.bin"
    jump = b"\xe9\x0d\xff"
    path.write_bytes(0xFF00 * before + code.ljust(0xF0, b"\0") + jump.ljust(16, b"\0"))
    return ["-bios", str(path)]


def test_an_operating_system_is_left_alone(foreign: Callable[..., Foreign], tmp_path: Path) -> None:
    other = foreign(*RNG, *bios(tmp_path, ENABLE_PAGING))
    with pytest.raises(Refused, match="an operating system, or UEFI, runs") as caught:
        guestpv.open(other.spec("r0"))
    assert "vfio:" in caught.value.hint


def test_a_running_program_is_left_alone(
    foreign: Callable[..., Foreign], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qtest_joined, "IDLE_LIMIT", 1.0)
    other = foreign(*RNG, *bios(tmp_path, TO_THE_BEGINNING, NO_OPERATION))
    with pytest.raises(Refused, match="a program runs in this QEMU"):
        guestpv.open(other.spec("r0"))


@pytest.mark.parametrize("kind", ["file", "unlinked", "decoys", "named"])
def test_its_ram_is_found(foreign: Callable[..., Foreign], tmp_path: Path, kind: str) -> None:
    """A file that QEMU names, one without a name any more, one of several alike, one that we name."""
    memory, more = f"memory-backend-file,share=on,mem-path={tmp_path / 'ram'}", {}
    options = list(RNG)
    if kind == "unlinked":
        memory = f"memory-backend-file,share=on,mem-path={tmp_path}"
    elif kind == "decoys":
        memory = MEMFD
        for number in range(2):
            options += ["-object", f"{MEMFD},id=decoy{number},size=128M"]
    elif kind == "named":
        more["memory_path"] = str(tmp_path / "ram")
    other = foreign(*options, memory=memory)
    with guestpv.open(other.spec("r0", **more)) as transport, Rng(transport) as rng:
        assert len(set(rng.read(4096))) == 256
    assert other.lives


def test_reused_ram_is_zero(foreign: Callable[..., Foreign]) -> None:
    """What a program before us, or the firmware, left in the RAM is not handed out."""
    other = foreign(*RNG)
    for _ in range(2):
        function = open_function("r0", other.params())
        region = function.dma.map(1 << 20)
        assert not region.array.any()
        region.array[:] = 0xEE
        del region
        function.close()


@pytest.mark.parametrize(
    ("memory", "words"),
    [("memory-backend-ram", "its own"), ("memory-backend-memfd,share=off", "its own")],
    ids=["ram", "private"],
)
def test_ram_that_nobody_can_share_is_refused(
    foreign: Callable[..., Foreign], memory: str, words: str
) -> None:
    other = foreign(*RNG, memory=memory)
    with pytest.raises(Refused, match=words) as caught:
        guestpv.open(other.spec("r0"))
    assert "memory-backend-memfd" in caught.value.hint
    assert other.lives


def test_what_cannot_be_joined_is_said(foreign: Callable[..., Foreign], tmp_path: Path) -> None:
    other = foreign(*RNG)
    wrong = tmp_path / "wrong"
    wrong.write_bytes(bytes(128 << 20))
    swapped = {"join": str(other.monitor), "qmp": str(other.socket), "answer_limit": "1"}
    cases: list[tuple[str, dict[str, str], type[GuestpvError], str]] = [
        ("r9", other.params(), UsageError, r"no PCI function 'r9'; of virtio it has r0 \(00:01.0\)"),
        ("r0", other.params(memory_path=str(tmp_path / "none")), UsageError, "No such file"),
        ("r0", other.params(memory_path=str(wrong)), Refused, "were not found"),
        ("r0", other.params(memory="64"), UsageError, "memory has no sense with join"),
        ("", other.params(), UsageError, "needs the device's id"),
        ("r0", {"join": str(other.socket)}, UsageError, "needs the device's id and the monitor's"),
        ("r0", other.params(join=str(tmp_path / "none")), GuestpvError, "there is no such socket"),
        ("r0", other.params(qmp=str(tmp_path / "none")), GuestpvError, "there is no such socket"),
        ("r0", swapped, GuestpvError, "QMP connect"),
    ]
    for device, params, error, words in cases:
        with pytest.raises(error, match=words):
            open_function(device, params)
    assert other.lives
    with guestpv.open(other.spec("r0")) as transport, Rng(transport) as rng:
        assert rng.read(16)


def test_a_device_behind_a_bridge_is_refused(foreign: Callable[..., Foreign], tmp_path: Path) -> None:
    said = tmp_path / "said"
    port = ("-device", "pcie-root-port,id=p0", "-device", "virtio-rng-pci,id=deep,bus=p0")
    other = foreign(*port, *firmware_that_gives_up(said))
    wait_for(said, "No bootable device")
    with pytest.raises(UsageError, match=r"deep is at 01:00\.0; .* on the root bus") as caught:
        open_function("deep", other.params())
    assert "bus=pcie.0" in caught.value.hint


def test_somebody_else_is_connected(foreign: Callable[..., Foreign]) -> None:
    other = foreign(*RNG)
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(str(other.socket))
        with pytest.raises(TimeLimit, match="gave no answer") as caught:
            open_function("r0", other.params(answer_limit="1"))
        assert "somebody else" in caught.value.hint
    assert other.lives


def test_it_dies_or_stops_in_use(foreign: Callable[..., Foreign]) -> None:
    """It is not ours: one that stopped is reported and not killed."""
    other = foreign(*RNG)
    function = open_function("r0", other.params(answer_limit="1"))
    os.kill(other.backend.pid, signal.SIGSTOP)
    with pytest.raises(TimeLimit, match=rf"pid {other.backend.pid}\) gave no answer"):
        function.config_read(0, 4)
    function.close()
    os.kill(other.backend.pid, signal.SIGCONT)
    assert other.lives
    function = open_function("r0", other.params())
    other.backend.kill()
    with pytest.raises(DeviceGone, match="closed the connection"):
        function.config_read(0, 4)
    function.close()


def test_the_command_line_joins_and_explains(foreign: Callable[..., Foreign], tmp_path: Path) -> None:
    other = foreign(*RNG)
    shown = CliRunner().invoke(main, ["info", other.spec("r0")])
    assert shown.exit_code == 0, shown.output
    assert "rng" in shown.output
    missing = CliRunner().invoke(main, ["info", other.spec("r0", join=str(tmp_path / "none"))])
    assert missing.exit_code == 1
    assert "there is no such socket" in missing.output
    assert "-qtest unix:" in missing.output
