"""Firmware's drivers before our strict devices, served by vfio-user to the newest QEMU: one boot a scenario.

``PYTHONPATH=tools python -m strictfirmware`` writes a report for each driver to docs/conformance.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guestpv.conformance.driver.listen import Lives
from guestpv.conformance.driver.run import Run
from guestpv.conformance.driver.scenarios import SCENARIOS, Scenario
from guestpv.conformance.report import now
from guestpv.devices.models.net import Net
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.spec.blk import SECTOR
from peers import tree
from strictguest import (
    GUEST_ADDRESS,
    OUR_ADDRESS,
    SLOTS,
    Neighbour,
    attachment,
    known_versions,
    newest_qemu,
    rows_of,
    write_report,
)

PATIENCE: Final = 120.0
"""Seconds that a firmware may take for one step, on a machine that is busy with others."""
LIVES: Final = 16
"""Firmware starts its driver several times in one boot; the scenario stays."""
FIRMWARE_SCENARIOS: Final = (
    *("plain", "features-1", "features-2", "features-3", "features-4"),
    *("unknown-features", "broken-offer", "slow-reset", "torn-configuration"),
)
MEMORY: Final = 256


class Console:
    """The other end of a machine's serial line."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.said = b""

    def wait(self, *texts: bytes) -> bytes:
        """Read until one of these came; what came up to its end, which is then forgotten.

        Raises:
            TimeoutError: none came, with what came instead.
        """
        deadline = time.monotonic() + PATIENCE
        while not (ends := [self.said.find(text) + len(text) for text in texts if text in self.said]):
            self._sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                more = self._sock.recv(4096)
            except TimeoutError:
                more = b""
            if not more:
                words = " or ".join(text.decode() for text in texts)
                said = re.sub(r"\x1b\[[\d;=]*[A-Za-z]|\s+", " ", self.said.decode(errors="replace"))
                raise TimeoutError(f"no {words} came on the console, which ends with: {said[-300:].strip()}")
            self.said += more
        before, self.said = self.said[: min(ends)], self.said[min(ends) :]
        return before

    def type(self, line: str) -> None:
        """A line, slowly enough for a polled UART: each echo is waited for."""
        for character in line.encode():
            self._sock.sendall(bytes([character]))
            self.wait(bytes([character]))
        self.enter()

    def enter(self) -> None:
        """The Enter key."""
        self._sock.sendall(b"\r")


@dataclass(frozen=True)
class Firmware:
    """A firmware and what is done with its driver.

    Attributes:
        kind: device type.
        device: what ``make_function`` takes.
        package: Debian package that it comes in.
        options: of QEMU; given the tree's root and a directory to write to.
        talk: on its console, until everything was tried.
    """

    kind: str
    device: str
    package: str
    options: Callable[[Path, Path], Sequence[str]]
    talk: Callable[[Console], None]


def fat(files: dict[str, bytes], sectors: int = 32768) -> bytes:
    """A FAT16 file system without partitions, that holds ``files`` of up to a cluster each (8.3 names)."""
    cluster, entries = 4, 512
    table = -(-(sectors // cluster + 2) * 2 // SECTOR)
    boot = bytearray(SECTOR)
    shape = (SECTOR, cluster, 1, 2, entries, sectors, 0xF8, table, 32, 64, 0, 0)
    struct.pack_into("<3s8sHBHBHHBHHHII", boot, 0, b"\xeb\x3c\x90", b"guestpv ", *shape)
    struct.pack_into("<BBBI11s8s", boot, 36, 0x80, 0, 0x29, 1, b"STRICT     ", b"FAT16   ")
    boot[510:] = b"\x55\xaa"
    links = bytearray(table * SECTOR)
    struct.pack_into("<HH", links, 0, 0xFFF8, 0xFFFF)
    directory, data = bytearray(entries * 32), bytearray()
    for number, (name, content) in enumerate(files.items()):
        stem, _, extension = name.upper().partition(".")
        short = f"{stem:<8}{extension:<3}".encode()
        struct.pack_into("<11sB14xHI", directory, 32 * number, short, 0x20, number + 2, len(content))
        struct.pack_into("<H", links, 2 * (number + 2), 0xFFFF)
        data += content.ljust(cluster * SECTOR, b"\0")
    image = bytes(boot) + bytes(links) * 2 + bytes(directory) + bytes(data)
    return image.ljust(sectors * SECTOR, b"\0")


def _ovmf(root: Path, home: Path) -> list[str]:
    variables = home / "vars.fd"
    shutil.copy(root / "usr/share/OVMF/OVMF_VARS_4M.fd", variables)
    code = root / "usr/share/OVMF/OVMF_CODE_4M.fd"
    return [
        *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={variables}"),
    ]


def _ovmf_blk(console: Console) -> None:
    """The shell runs what lies on the disk."""
    console.wait(b"STRICT-DONE")
    console.wait(b"FS0:")


def _ipxe(root: Path, home: Path) -> list[str]:
    steps = [
        "ifopen net0",
        f"set net0/ip {GUEST_ADDRESS}",
        "set net0/netmask 255.255.255.0",
        f"ping -c 5 {OUR_ADDRESS}",
        f"ping -c 3 -s 1400 {OUR_ADDRESS}",
        "ifclose net0",
        "ifopen net0",
        f"ping -c 3 {OUR_ADDRESS}",
        "ifclose net0",
        "echo STRICT-DONE",
        "shell",
    ]
    script = home / "script.ipxe"
    script.write_text("#!ipxe\n" + " ||\n".join(steps) + "\n")
    (kernel,) = root.glob("usr/lib/ipxe/ipxe.lkrn")
    return ["-kernel", str(kernel), "-initrd", str(script)]


def _ipxe_net(console: Console) -> None:
    console.wait(b"STRICT-DONE")
    console.wait(b"iPXE>")


def _u_boot(root: Path, home: Path) -> list[str]:
    return ["-bios", str(root / "usr/lib/u-boot/qemu-x86/u-boot.rom")]


def _at_prompt(console: Console, *commands: str) -> None:
    console.wait(b"autoboot")
    console.enter()
    for command in commands:
        console.wait(b"=> ")
        console.type(command)
    console.wait(b"=> ")


def _u_boot_blk(console: Console) -> None:
    _at_prompt(
        console,
        "virtio scan",
        "virtio info",
        "virtio read 1000000 0 800",
        "virtio write 1000000 4000 800",
        "virtio read 2000000 4000 800",
        "cmp.b 1000000 2000000 100000",
        "fatls virtio 0",
    )


def _u_boot_net(console: Console) -> None:
    _at_prompt(
        console,
        "virtio scan",
        f"setenv ipaddr {GUEST_ADDRESS}",
        "setenv netmask 255.255.255.0",
        *[f"ping {OUR_ADDRESS}"] * 5,
    )


SCRIPT: Final = b"""\
@echo -off
fs0:
cp startup.nsh again.nsh
cp startup.nsh third.nsh
comp startup.nsh again.nsh
rm third.nsh
reconnect -r
echo STRICT-DONE
"""
DISK, CARD = "blk?offer=-zoned", "net?mtu=1500"
FIRMWARE: Final = {
    # Without MSI-X the structures' BAR is the only one; OVMF does not find them behind a 64-bit BAR.
    "ovmf-blk": Firmware("blk", f"{DISK}&msix=off", "ovmf", _ovmf, _ovmf_blk),
    "ipxe-net": Firmware("net", CARD, "ipxe", _ipxe, _ipxe_net),
    "u-boot-blk": Firmware("blk", DISK, "u-boot-qemu", _u_boot, _u_boot_blk),
    "u-boot-net": Firmware("net", CARD, "u-boot-qemu", _u_boot, _u_boot_net),
}
NOTE: Final = "One boot a scenario, behind vfio-user: ring memory was sampled when the device looked at it."


def boot(name: str, scenario: Scenario, run: Run, home: Path, device: str = "") -> str:
    """Boot ``name`` once with a strict device; what stands between it and its end, or nothing.

    Args:
        home: a directory for sockets and images.
        device: another one than the firmware's usual.
    """
    firmware = FIRMWARE[name]
    spec = device or firmware.device
    if firmware.kind == "blk":
        (home / "disk.img").write_bytes(fat({"startup.nsh": SCRIPT}))
        spec += f"&file={home / 'disk.img'}"
    function = make_function(spec)
    with VfioUserServer(function, str(home / "s.sock")) as server:
        if isinstance(function.model, Net):
            Neighbour(function.model)
        lives = Lives(function.device, function, "vfio-user", [scenario] * LIVES, run, lambda text: None)
        ours, theirs = socket.socketpair()
        command = [
            str(newest_qemu(home)),
            "-accel",
            "tcg",
            "-machine",
            "q35,memory-backend=ram,graphics=off",
            "-m",
            str(MEMORY),
        ]
        command += ["-object", f"memory-backend-memfd,id=ram,size={MEMORY}M,share=on"]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-chardev", f"socket,id=serial,fd={theirs.fileno()}", "-serial", "chardev:serial"]
        command += ["-device", attachment(server.path, SLOTS[firmware.kind])]
        command += firmware.options(tree.get("qemu").root, home)
        with open(home / "qemu.log", "wb") as log:
            qemu = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        theirs.close()
        trouble = ""
        try:
            firmware.talk(Console(ours))
            # It waits for a command: what it has not done by now it does not do.
            lives.finish()
        except TimeoutError as error:
            trouble = f"{error} {(home / 'qemu.log').read_text().strip()}"
        finally:
            qemu.kill()
            qemu.wait()
            ours.close()
    if trouble:
        lives.finish()
    return trouble


def drive(name: str, scenarios: Sequence[str], device: str = "") -> Run:
    """Boot a firmware once for each scenario, with ``device`` or its usual one."""
    run = Run(rows_of(FIRMWARE[name].kind), f"python -m strictfirmware {name}")
    for label in scenarios:
        with tempfile.TemporaryDirectory(prefix="strict-") as home:
            if trouble := boot(name, SCENARIOS[label], run, Path(home), device):
                run.troubles[label] = trouble
    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="strictfirmware", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one or more of {' '.join(FIRMWARE)}; all by default"
    )
    parser.add_argument("--scenario", default=",".join(FIRMWARE_SCENARIOS))
    parser.add_argument("--device", default="", help="what is served, as in `guestpv serve vfio-user`")
    parser.add_argument("--out", type=Path, default=Path("docs/conformance"))
    options = parser.parse_args()
    if unknown := {*options.names} - {*FIRMWARE} | {*options.scenario.split(",")} - {*SCENARIOS}:
        parser.error(f"unknown: {' '.join(sorted(unknown))}")
    for name in options.names or FIRMWARE:
        begun = now()
        run = drive(name, options.scenario.split(","), options.device)
        versions = known_versions() | {
            FIRMWARE[name].package: tree.get("qemu").version(FIRMWARE[name].package)
        }
        write_report(options.out, name, run, versions, begun, f"python -m strictfirmware {name}", NOTE)


if __name__ == "__main__":
    main()
