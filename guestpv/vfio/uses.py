"""What the machine uses a function for: everything that would break if the kernel's driver let go of it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ..spec.features import CONSOLE, P9
from ..system import SYSTEM, System
from .lock import holders

FS = 26


@dataclass(frozen=True, slots=True)
class Use:
    """One way in which the machine depends on a function.

    Attributes:
        kind: ``root``, ``mount``, ``swap``, ``claimed``, ``route`` or ``console``.
        detail: the same in words.
    """

    kind: str
    detail: str


def find_uses(address: str, device_type: int, system: System = SYSTEM) -> list[Use]:
    """Everything that would break if the kernel's driver let go of the function."""
    uses = _disk_uses(address, system) + _route_uses(address, system)
    if device_type in (P9, FS):
        uses += _share_uses(address, device_type, system)
    if device_type == CONSOLE:
        uses += _console_uses(address, system)
    return uses


def _names(kind: str, address: str, system: System) -> list[str]:
    """Names in ``/sys/class/<kind>`` that belong to the function."""
    root = f"/sys/class/{kind}"
    names = []
    with suppress(OSError):
        for name in system.listdir(root):
            with suppress(OSError):
                if f"/{address}/" in system.readlink(f"{root}/{name}"):
                    names.append(name)
    return names


def _closure(names: list[str], above: Callable[[str], list[str]]) -> list[str]:
    """The names and everything stacked on top of them, each once."""
    found = list(names)
    for name in found:
        found += [upper for upper in above(name) if upper not in found]
    return found


def _disk_uses(address: str, system: System) -> list[Use]:
    def above(name: str) -> list[str]:
        with suppress(OSError):
            return system.listdir(f"/sys/class/block/{name}/holders")
        return []

    disks = _names("block", address, system)
    numbers: dict[str, str] = {}
    for name in _closure(disks, above):
        with suppress(OSError):
            numbers[system.read_text(f"/sys/class/block/{name}/dev")] = name
    uses = []
    for mount in _mounts(system):
        name = numbers.get(mount.number) or (
            mount.source[5:]
            if mount.source[5:] in numbers.values() and mount.source.startswith("/dev/")
            else ""
        )
        if name:
            kind = "root" if mount.point == "/" else "mount"
            what = "the root filesystem" if kind == "root" else f"the filesystem at {mount.point}"
            uses.append(Use(kind, f"{name} carries {what}"))
    for path in _lines("/proc/swaps", system)[1:]:
        with suppress(OSError, IndexError):
            node = path.split()[0]
            device = system.stat(node).st_rdev
            name = numbers.get(f"{os.major(device)}:{os.minor(device)}", "")
            if name:
                uses.append(Use("swap", f"{name} is swap space ({node})"))
    return uses or [use for disk in disks for use in _claims(disk, system)]


def _claims(disk: str, system: System) -> list[Use]:
    """Ask the kernel: an exclusive open fails while a mount out of sight, RAID or LVM holds the disk."""
    try:
        system.close(system.open(f"/dev/{disk}", os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return [Use("claimed", f"the kernel holds {disk} (a mount out of sight, RAID or LVM)")]
    return []


def _route_uses(address: str, system: System) -> list[Use]:
    def above(name: str) -> list[str]:
        with suppress(OSError):
            return [e[6:] for e in system.listdir(f"/sys/class/net/{name}") if e.startswith("upper_")]
        return []

    links = _closure(_names("net", address, system), above)
    routes = set()
    for line in _lines("/proc/net/route", system)[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000":
            routes.add(fields[0])
    for line in _lines("/proc/net/ipv6_route", system):
        fields = line.split()
        if len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00":
            routes.add(fields[9])
    return [Use("route", f"{link} carries the default route") for link in links if link in routes]


def _console_uses(address: str, system: System) -> list[Use]:
    """A console of the kernel's, and ports that a process has open (a guest agent's, say)."""
    uses = []
    with suppress(OSError):
        active = system.read_text("/sys/class/tty/console/active").split()
        uses += [Use("console", f"{tty} is the console") for tty in active if tty.startswith("hvc")]
    for port in _names("virtio-ports", address, system):
        owners = holders(f"/dev/{port}", system)
        if owners:
            uses.append(Use("console", f"{port} is open in {', '.join(owners)}"))
    return uses


def _share_uses(address: str, device_type: int, system: System) -> list[Use]:
    """Mounts of a 9p or virtiofs share; what is not told apart by its tag counts as ours."""
    kind = "9p" if device_type == P9 else "virtiofs"
    tag = ""
    with suppress(OSError):
        for entry in system.listdir(f"/sys/bus/pci/devices/{address}"):
            if entry.startswith("virtio"):
                tag = system.read_text(f"/sys/bus/pci/devices/{address}/{entry}/mount_tag")
    mounts = _mounts(system)
    uses = [
        Use(
            "root" if mount.point == "/" else "mount",
            f"the {kind} share {mount.source} is mounted at {mount.point}",
        )
        for mount in mounts
        if mount.type == kind and (not tag or mount.source in (tag, "/dev/root"))
    ]
    if not uses and any(mount.point == "/" and mount.type == "overlay" for mount in mounts):
        uses = [
            Use("root", f"the {kind} share may be a layer of the overlay root, whose mount is out of sight")
        ]
    return uses


@dataclass(frozen=True, slots=True)
class _Mount:
    number: str
    point: str
    type: str
    source: str


def _mounts(system: System) -> list[_Mount]:
    """The mounts of this process (proc(5), mountinfo)."""
    mounts = []
    for line in _lines("/proc/self/mountinfo", system):
        left, _, right = line.partition(" - ")
        place, what = left.split(), right.split()
        if len(place) > 4 and len(what) > 1:
            mounts.append(_Mount(place[2], _plain(place[4]), what[0], _plain(what[1])))
    return mounts


def _plain(text: str) -> str:
    """Undo the kernel's octal escapes for white space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _lines(path: str, system: System) -> list[str]:
    try:
        return system.read_text(path).splitlines()
    except OSError:
        return []
