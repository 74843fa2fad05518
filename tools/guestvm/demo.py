"""The demonstration: one guest, one virtio-net function, from the kernel's driver to ours and back."""

import argparse
import re
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from guestvm.errors import LabError
from guestvm.hostfiles import GUEST_URL, HostFiles
from guestvm.link import Result
from guestvm.machine import Machine
from guestvm.progress import Progress

MEBIBYTES = 64
GATEWAY = "10.0.2.2"
ADDRESS = "10.0.2.15/24"
DEVICE = "virtio-net-pci,id=net0,netdev=n0,disable-legacy=on,iommu_platform=on,ats=on"
UPLOAD = """
import http.client, os, sys
connection = http.client.HTTPConnection(sys.argv[1])
with open(sys.argv[2], "rb") as file:
    connection.request("PUT", "/upload", file, {"Content-Length": str(os.path.getsize(sys.argv[2]))})
print(connection.getresponse().read().decode().strip())
"""


class Broken(Exception):
    """A step did not do what it says."""


class Show:
    """Prints each command and its output, and stops at the first step that does not hold."""

    def __init__(self, machine: Machine, console: Console) -> None:
        self._machine = machine
        self._console = console

    def title(self, text: str) -> None:
        """Announce the next step."""
        self._console.print(Rule(Text(text, style="bold"), align="left"))

    def run(
        self,
        command: str,
        *,
        timeout: float = 60,
        shown: str = "",
        expect: Callable[[str], bool] | None = None,
    ) -> str:
        """Run a command in the guest; its exit status and `expect` of its output decide."""
        self._console.print(Text(f"guest# {shown or command}", style="bold cyan"))
        started = time.monotonic()
        result: Result = self._machine.run(command, timeout=timeout)
        output = (result.stdout + result.stderr).rstrip()
        if output:
            self._console.print(Text("\n".join(line.rstrip() for line in output.splitlines())))
        self._console.print(Text(f"({time.monotonic() - started:.1f} s)", style="dim"))
        if result.status != 0:
            raise Broken(f"`{shown or command}` ended with status {result.status}")
        if expect is not None and not expect(output):
            raise Broken(f"`{shown or command}` did not print what it should")
        return output

    def same(self, what: str, here: str, there: str) -> None:
        """Compare two digests and say so."""
        if here != there:
            raise Broken(f"{what}: SHA-256 differs: guest {here}, host {there}")
        self._console.print(Text(f"{what}: SHA-256 equal on both sides ({here[:16]}...)", style="green"))


def kernel_function(show: Show) -> str:
    """The PCI address of the network function."""
    listing = show.run("guestpv list", expect=lambda text: "net" in text)
    rows = [line for line in listing.splitlines() if re.search(r"\bnet\b", line)]
    found = re.search(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", rows[0]) if rows else None
    if found is None:
        raise Broken("`guestpv list` shows no network function")
    return found.group()


def demonstrate(machine: Machine, files: HostFiles, console: Console) -> None:
    """Every step in order; raises Broken at the first that does not hold."""
    show = Show(machine, console)
    show.title("What virtio functions does this guest have?")
    address = kernel_function(show)

    show.title("Take the network function away from the kernel and drive it")
    show.run(
        f"guestpv net up {address} --detach",
        timeout=60,
        expect=lambda text: "VERSION_1" in text.upper() and "10.0.2." in text,
    )

    show.title("Is the guest on the network?")
    show.run(f"ping -c 3 {GATEWAY}", expect=lambda text: " 0% packet loss" in text)

    show.title(f"Download {MEBIBYTES} MiB over HTTP from the host")
    show.run(f"wget -q -O /tmp/data {GUEST_URL}/data", timeout=120)
    digest = show.run("sha256sum /tmp/data").split()[0]
    show.same("download", digest, files.sha256)

    show.title(f"Upload {MEBIBYTES} MiB")
    host = GUEST_URL.removeprefix("http://")
    answer = show.run(
        f"python3 -c '{UPLOAD}' {host} /tmp/data",
        timeout=120,
        shown=f"python3 (http.client) PUT /tmp/data -> {GUEST_URL}/upload",
    )
    received, there = files.uploads.get("/upload", (0, ""))
    if received != files.size or answer.split()[-1] != there:
        raise Broken(f"the host received {received} of {files.size} bytes")
    show.same("upload", digest, there)

    show.title("What did the driver count?")
    show.run("guestpv net status")

    show.title("Give the function back to the kernel")
    show.run("guestpv net down")
    show.run(
        f"readlink -f /sys/bus/pci/devices/{address}/driver", expect=lambda text: text.endswith("/virtio-pci")
    )
    show.run(
        f"name=$(ls /sys/bus/pci/devices/{address}/virtio*/net) && ip link set $name up && "
        f"ip address add {ADDRESS} dev $name && ping -I $name -c 2 -W 3 {GATEWAY}",
        expect=lambda text: " 0% packet loss" in text,
    )


def main() -> int:
    """Run the demonstration; 0 only if every step held."""
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--kernel", default="6.1", help="kernel series of the guest: 6.1 or 6.12")
    parser.add_argument("--record", metavar="FILE", help="also save what it prints as an SVG picture")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True, record=bool(options.record))
    started = time.monotonic()
    try:
        with (
            HostFiles(size=MEBIBYTES << 20) as files,
            Machine(
                options.kernel, devices=[DEVICE], netdevs=[files.netdev("n0")], progress=Progress()
            ) as machine,
        ):
            demonstrate(machine, files, console)
    except (Broken, LabError) as error:
        console.print(Text(f"The demonstration failed: {error}", style="bold red"))
        return 1
    console.print(Rule(Text("Done", style="bold"), align="left"))
    console.print(
        Text(
            f"Every step did what it says: {time.monotonic() - started:.0f} s, kernel {options.kernel}, "
            f"accelerator {machine.accel}.",
            style="green",
        )
    )
    if options.record:
        console.save_svg(options.record, title="./tools/demo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
