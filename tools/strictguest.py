"""Linux's drivers in a guest before our strict devices, served by vfio-user to the newest QEMU.

``PYTHONPATH=tools python -m strictguest --kernel 6.1`` writes a report for each driver to docs/conformance.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rich.console import Console

from guestpv.conformance import catalogue
from guestpv.conformance.driver.listen import Lives
from guestpv.conformance.driver.run import Run
from guestpv.conformance.driver.scenarios import SCENARIOS, Scenario, choose
from guestpv.conformance.net_ports import tcp
from guestpv.conformance.report import Report, now, versions
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.balloon import Balloon
from guestpv.devices.models.net import Net
from guestpv.devices.models.wire import tap
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.spec import net
from guestvm import Machine
from peers import tree

MEMORY: Final = 1024
BACKEND: Final = f"memory-backend-memfd,id=ram,size={MEMORY}M,share=on"
OUR_ADDRESS, GUEST_ADDRESS = "192.0.2.1", "192.0.2.2"
OUR_MAC: Final = bytes.fromhex("525400000099")
OWN_MAC: Final = bytes.fromhex("525400000001")
"""The address of the model."""
ARP, IPV4, ICMP = 0x0806, 0x0800, 1
SLOTS: Final = {"blk": 0x1A, "net": 0x1B, "balloon": 0x1D}
DEVICES: Final = {
    "blk": "blk?size=16M&offer=-zoned",
    "net": "net?mtu=1500&pairs=2&offer=+rss,+hash_report",
    # Linux numbers the balloon's queues densely and so looks for this feature's at a wrong place.
    "balloon": "balloon?offer=-page_reporting",
}
HANGS: Final = {"needs-reset"}
"""Scenarios after which Linux's drivers wait for ever for what was on its way."""
PATIENCE: Final = 60.0
NOTE: Final = "Behind vfio-user: ring memory was sampled when the device looked at it."


def newest_qemu(home: Path) -> Path:
    """A program in ``home`` that runs the newest QEMU of Debian's backports."""
    return tree.get("qemu").qemu(home)


def rows_of(kind: str) -> list[str]:
    """The requirements that drivers of a device type are judged by."""
    areas = ("common", "pci", "split", "packed", kind)
    return [row.id for row in catalogue.observable("driver").values() if row.area in areas]


def known_versions() -> dict[str, str]:
    """What a published report names of this side."""
    return {name: version for name, version in versions().items() if name != "system"}


def write_report(
    out: Path, name: str, run: Run, known: dict[str, str], begun: str, command: str, note: str
) -> None:
    """Write a run to ``out``/``name``.txt, and print what it found."""
    report = Report("driver", name, run.outcomes(), known, begun, command, note)
    with (out / f"{name}.txt").open("w", encoding="utf-8") as file:
        paper = Console(file=file, width=160, emoji=False)
        for part in report.text(verbose=1):
            paper.print(part)
    print(name, report.counts)
    for outcome in report.outcomes:
        if outcome.bad:
            print(
                f"  {outcome.requirements} {outcome.sent}: {outcome.seen}",
                *outcome.evidence[-8:],
                sep="\n    ",
            )


def attachment(path: str, slot: int, **properties: object) -> str:
    """QEMU's ``-device`` for a server's socket; its place is fixed, as functions on the root bus need one."""
    device = {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": path},
        "bus": "pcie.0",
        "addr": f"{slot:#x}",
        "x-no-posted-writes": True,
        "x-msg-timeout": 300000,
    }
    return json.dumps(device | properties)


class Neighbour:
    """Answers ARP and ping for ``OUR_ADDRESS`` at the far end of a network device's wire."""

    def __init__(self, model: Net) -> None:
        self._model = model
        self._address = bytes(map(int, OUR_ADDRESS.split(".")))
        self.answered = 0
        tap(model, self._receive)

    def _receive(self, frame: bytes) -> None:
        frame = bytes(frame)
        kind = struct.unpack_from(">H", frame, 12)[0]
        if kind == ARP and frame[20:22] == b"\0\1" and frame[38:42] == self._address:
            body = frame[14:20] + b"\0\2" + OUR_MAC + self._address + frame[22:32]
        elif kind == IPV4 and frame[23] == ICMP and frame[30:34] == self._address and frame[34] == 8:
            # Type 8 becomes 0, so the checksum, a ones' complement sum, grows by 0x0800.
            checksum = struct.unpack_from(">H", frame, 36)[0] + 0x0800
            checksum = (checksum & 0xFFFF) + (checksum >> 16)
            echo = struct.pack(">HH", 0, checksum) + frame[38:]
            body = frame[14:26] + self._address + frame[26:30] + echo
            self.answered += 1
        else:
            return
        self._model.deliver(frame[6:12] + OUR_MAC + frame[12:14] + body)


class StrictGuest:
    """A guest with a strict disk, network card and balloon.

    Args:
        kernel: series of the guest's kernel.
        home: a directory for sockets.

    Attributes:
        vm: the guest.
        firmware: what the firmware did with the disk, before the kernel came.
        release: the guest kernel's version.
    """

    def __init__(self, kernel: str, home: Path) -> None:
        self._kernel = kernel
        self._home = home
        self._stack = ExitStack()
        self.functions: dict[str, SoftwareFunction] = {}
        self.firmware = Run(rows_of("blk"))

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            devices = []
            for kind, spec in DEVICES.items():
                function = self.functions[kind] = make_function(spec)
                server = stack.enter_context(VfioUserServer(function, str(self._home / f"{kind}.sock")))
                devices.append(attachment(server.path, SLOTS[kind]))
            model = self.functions["net"].model
            assert isinstance(model, Net)
            self.neighbour = Neighbour(model)
            boot = self._lives("blk", [SCENARIOS["plain"]], self.firmware)
            self.vm = stack.enter_context(
                Machine(
                    self._kernel,
                    devices=devices,
                    objects=[BACKEND],
                    machine="q35,kernel-irqchip=split,memory-backend=ram",
                    memory=MEMORY,
                    iommu="none",
                    qemu=str(newest_qemu(self._home)),
                    limit=1500,
                    boot_limit=300,
                )
            )
            for kind in DEVICES:
                self.bind(kind, False)
            boot.finish()
            self.release = self.sh("uname -r").strip()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _lives(self, kind: str, scenarios: Sequence[Scenario], run: Run) -> Lives:
        function = self.functions[kind]
        return Lives(function.device, function, "vfio-user", scenarios, run, lambda text: None)

    def sh(self, script: str, timeout: float = 120) -> str:
        """Run a shell script in the guest; what it printed, whatever became of it."""
        return str(self.vm.run(script, timeout).stdout)

    def bind(self, kind: str, to: bool) -> None:
        """Give a function to Linux's driver, or take it away."""
        verb, address = ("bind" if to else "unbind"), f"0000:00:{SLOTS[kind]:02x}.0"
        self.sh(f"echo {address} > /sys/bus/pci/drivers/virtio-pci/{verb}")

    def drive(self, kind: str, names: str = "all") -> Run:
        """Let Linux's driver live once for each scenario.

        Returns:
            What the scenarios said. Scenarios of ``HANGS`` are left out.
        """
        run = Run(rows_of(kind))
        chosen = [entry for entry in choose(names, kind) if entry.served and entry.name not in HANGS]
        lives = self._lives(kind, chosen, run)
        for _ in chosen:
            self.bind(kind, True)
            getattr(self, f"_{kind}")()
            self.bind(kind, False)
        lives.finish()
        return run

    def _device(self, kind: str, what: str) -> str:
        return self.sh(f"ls /sys/bus/pci/devices/0000:00:{SLOTS[kind]:02x}.0/virtio*/{what}").strip()

    def _blk(self) -> None:
        if disk := self._device("blk", "block"):
            self.sh(
                f"""
                cat /sys/block/{disk}/serial
                dd if=/dev/urandom of=/dev/{disk} bs=64k count=16 oflag=direct
                dd if=/dev/{disk} of=/dev/null bs=4k count=64 iflag=direct
                dd if=/dev/zero of=/dev/{disk} bs=4k count=64 seek=64 conv=fsync
                blkdiscard -o 65536 -l 65536 /dev/{disk}
                blkdiscard -z -o 65536 -l 65536 /dev/{disk}
                """
            )

    def _net(self) -> None:
        model = self.functions["net"].model
        assert isinstance(model, Net)
        if link := self._device("net", "net"):
            frames = " ".join(frame.hex() for frame in segmented(OWN_MAC))
            self.sh(
                f"""
                ip link set {link} up; ip address add {GUEST_ADDRESS}/24 dev {link}
                ping -c 10 -i 0.05 -s 1472 -w 30 {OUR_ADDRESS}; ping -c 3 -i 0.05 -s 9 -w 30 {OUR_ADDRESS}
                python3 -c '{SEND}' {link} {frames}
                for mode in promisc allmulticast; do
                    ip link set {link} $mode on; ip link set {link} $mode off
                done
                """
            )
            if model.device.running and model.has(net.F_GUEST_ANNOUNCE):
                model.announce()
                wait_for(lambda: not model.device.running or not model.announcing)
            self.sh(
                f"""
                ip address flush dev {link}; ip link set {link} down
                ip link set {link} address 52:54:00:00:00:77; ip link set {link} address {OWN_MAC.hex(":")}
                """
            )

    def _balloon(self) -> None:
        model = self.functions["balloon"].model
        assert isinstance(model, Balloon)
        if not model.device.running:
            return
        for target in (0x402, 0):
            model.set_target(target)
            wait_for(lambda: model.config["actual"] == target or not model.device.running)  # noqa: B023
        for _ in range(2):
            model.ask_statistics()


SEND: Final = (
    "import socket, sys; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.setsockopt(263, 15, 1); "
    "s.bind((sys.argv[1], 0)); [s.send(bytes.fromhex(f)) for f in sys.argv[2:]]"
)
"""Sends frames behind the header of packet sockets (PACKET_VNET_HDR)."""


def segmented(source: bytes) -> Iterator[bytes]:
    """TCP packets that are too long for the link, behind the header that leaves their cutting to the card."""
    for v6, kind in ((False, net.GSO_TCPV4), (True, net.GSO_TCPV6)):
        data, start = tcp(bytes(3000), v6=v6, target=OUR_MAC)
        frame = bytearray(data)
        frame[6:12] = source
        for ecn in (0, net.GSO_ECN):
            # CWR is what the ECN bit tells of.
            frame[start + 13] |= ecn
            head = (net.HDR_F_NEEDS_CSUM, kind | ecn, start + 20, 1000, start, 16)
            yield struct.pack("<BBHHHH", *head) + frame


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something holds, or a minute has passed."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(prog="strictguest", description=__doc__)
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--device", choices=list(DEVICES), action="append", help="only these drivers")
    parser.add_argument("--scenario", default="all")
    parser.add_argument("--out", type=Path, default=Path("docs/conformance"))
    options = parser.parse_args()
    begun = now()
    with (
        tempfile.TemporaryDirectory(prefix="strict-") as home,
        StrictGuest(options.kernel, Path(home)) as guest,
    ):
        qemu = guest.vm.qmp("query-version")["qemu"]
        known = known_versions() | {
            "qemu": ".".join(str(qemu[part]) for part in ("major", "minor", "micro")),
            "linux": guest.release,
        }
        runs = {} if options.device else {"seabios-blk": guest.firmware}
        for kind in options.device or DEVICES:
            runs[f"linux-{options.kernel}-{kind}"] = guest.drive(kind, options.scenario)
    command = f"python -m strictguest --kernel {options.kernel}"
    for name, run in runs.items():
        write_report(options.out, name, run, known, begun, command, NOTE)


if __name__ == "__main__":
    main()
