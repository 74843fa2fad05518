"""What ``guestpv compare`` can compare: links and disks of this machine, each with the driver that has it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ..errors import GuestpvError, UsageError
from ..spec.pci import VENDOR_ID
from ..system import SYSTEM, System
from ..vfio.survey import DEVICES, driver_of, look_up
from ..vfio.uses import find_uses

PACKET, BLOCK = "packet", "block"
PCI_ADDRESS: Final = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A link or a disk in the hands of the kernel.

    Attributes:
        kind: ``packet`` or ``block``.
        address: PCI function.
        name: of the link or disk in the kernel.
        device: what is compared: ``virtio``, or the kernel's driver, with ``PIO`` where a disk has no DMA.
        needles: words that mark its interrupts in ``/proc/interrupts``.
        ours: why we cannot drive it, None where we can.
    """

    kind: str
    address: str
    name: str
    device: str
    needles: tuple[str, ...]
    ours: str | None


def candidates(
    wanted: Sequence[str], system: System = SYSTEM
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Links and disks, and the functions that were left out with the reason.

    Args:
        wanted: PCI addresses; all functions that are not in use where there is none.

    Raises:
        UsageError: a function was named that has neither link nor disk.
    """
    found: list[Candidate] = []
    left_out: list[tuple[str, str]] = []
    addresses = _known(wanted, system) if wanted else _addresses(system)
    for address in addresses:
        names = [(kind, name) for kind in (PACKET, BLOCK) for name in _names(kind, address, system)]
        if not names and wanted:
            raise UsageError(
                "no link or disk of the kernel's",
                where=address,
                hint=f"is it bound? guestpv unbind {address}",
            )
        uses = "; ".join(use.detail for use in find_uses(address, 0, system)) if names else ""
        if uses and not wanted:
            left_out.append((address, f"in use: {uses}"))
            continue
        found += [_candidate(kind, name, address, uses, system) for kind, name in names]
    return found, left_out


def _known(wanted: Sequence[str], system: System) -> Iterator[str]:
    for text in wanted:
        full = text if text.count(":") > 1 else f"0000:{text}"
        if not PCI_ADDRESS.fullmatch(full):
            raise UsageError(
                f"{text!r} is not a PCI address such as 0000:00:03.0", hint="guestpv compare --help"
            )
        if not system.exists(f"{DEVICES}/{full}"):
            raise UsageError("no such PCI function", where=full, hint="ls /sys/bus/pci/devices")
        yield full


def _addresses(system: System) -> list[str]:
    try:
        return system.pci_addresses()
    except ImportError as error:
        raise GuestpvError(f"udev cannot be asked: {error}", hint="apt install libudev1") from error


def _names(kind: str, address: str, system: System) -> list[str]:
    """Names of the function's links, or of its whole disks."""
    root = "/sys/class/net" if kind == PACKET else "/sys/block"
    names = []
    for name in system.listdir(root):
        with suppress(OSError):
            # Bridges on the way have links and disks in their directories, too.
            if PCI_ADDRESS.findall(system.readlink(f"{root}/{name}"))[-1:] == [address]:
                names.append(name)
    return names


def _candidate(kind: str, name: str, address: str, uses: str, system: System) -> Candidate:
    driver = driver_of(address, system) or "?"
    virtio = int(system.read_text(f"{DEVICES}/{address}/vendor"), 0) == VENDOR_ID
    if not virtio:
        device = f"{driver} PIO" if kind == BLOCK and _is_pio(name, system) else driver
        needle = name if kind == PACKET else driver
        return Candidate(kind, address, name, device, (needle,), "not a virtio device")
    needles = tuple(
        f"{entry}-" for entry in system.listdir(f"{DEVICES}/{address}") if entry.startswith("virtio")
    )
    function = look_up(address, system)
    why = function.problem or (f"in use: {uses}" if uses else None)
    return Candidate(kind, address, name, "virtio", needles, why)


def _is_pio(disk: str, system: System) -> bool:
    """Whether the kernel moves an ATA disk's data through registers."""
    path = os.path.realpath(f"/sys/block/{disk}")
    match = re.search(r"^(.*/ata(\d+))/host\d+/target\d+:\d+:\d+/\d+:\d+:(\d+):\d+/", path)
    if match is None:
        return False
    port, number, unit = match.groups()
    link = f"{port}/link{number}"
    with suppress(OSError):
        for name in system.listdir(link):
            if re.fullmatch(rf"dev{number}\.{unit}", name):
                return "PIO" in system.read_text(f"{link}/{name}/ata_device/{name}/xfer_mode")
    return False


def interrupts(needles: Sequence[str], system: System = SYSTEM) -> int:
    """How many interrupts with one of these words in their names this machine has counted."""
    total = 0
    head, *lines = system.read_text("/proc/interrupts").splitlines()
    cpus = len(head.split())
    for line in lines:
        words = line.split()
        rest = " ".join(words[cpus + 1 :])
        if words[0].rstrip(":").isdigit() and any(needle in rest for needle in needles):
            total += sum(map(int, words[1 : cpus + 1]))
    return total
