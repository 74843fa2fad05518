"""What can be up: which devices, where they are found, and how they end.

For verbs that only look, or say goodbye: nothing here loads a driver.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import click

from ..errors import GuestpvError, Refused, TimeLimit, UsageError
from ..pci.capabilities import type_name
from ..services.control import DOWN_TIME_LIMIT, Endpoint, ask
from ..services.control import find as find_endpoints
from ..spec import features as feat
from ..vfio.lock import runtime_directory
from ..vfio.survey import Function, survey
from .report import Report


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of device that can be up.

    Attributes:
        device_type: virtio device id.
        verb: ``net`` of ``guestpv net up``.
        noun: what a device of another type is none of.
        one: what there is none of, or none that can be driven.
        qemu: options that give a machine one.
        beside: whether its control sockets have a directory of their own.
    """

    device_type: int
    verb: str
    noun: str
    one: str
    qemu: str
    beside: bool = True

    def directory(self) -> str:
        """Where its control sockets are."""
        if not self.beside:
            return runtime_directory()
        path = os.path.join(runtime_directory(), self.verb)
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        return path

    def find(self, wanted: str | None) -> list[Endpoint]:
        """Those that are up, or the one with this name, PCI address or SPEC.

        Raises:
            UsageError: one was named that is not up.
        """
        return find_endpoints(self.directory(), wanted, self.verb)

    def require(self, device_type: int, name: str) -> None:
        """Raise UsageError unless it is such a device."""
        if device_type != self.device_type:
            raise UsageError(
                f"it is a virtio {type_name(device_type)} device, no {self.noun}",
                where=name,
                hint="guestpv list",
            )

    def choose(self, force: bool, noiommu: bool = False) -> Function:
        """The only one that can be driven.

        Args:
            force: one that is in use counts, too.
            noiommu: and one without an IOMMU.

        Raises:
            Refused: there is none.
            UsageError: there are several.
        """
        known = [function for function in survey() if function.type == self.device_type]
        if not known:
            raise Refused(f"this machine has no virtio {self.one}", hint=f"QEMU: {self.qemu}")
        found = [one for one in known if not one.obstacle(noiommu)[0] or (force and one.uses)]
        if not found:
            reasons = "; ".join(f"{one.address}: {one.obstacle(noiommu)[0]}" for one in known)
            raise Refused(f"no {self.one} can be driven: {reasons}", hint=known[0].obstacle(noiommu)[1])
        if len(found) > 1:
            names = ", ".join(f"{one.address} (driver {one.driver or 'none'})" for one in found)
            raise UsageError(f"which one? {names}", hint=f"guestpv {self.verb} up {found[0].address}")
        return found[0]


NET: Final = Kind(
    feat.NET,
    "net",
    "network device",
    "network function",
    "-device virtio-net-pci,netdev=...,disable-legacy=on,iommu_platform=on",
    beside=False,
)
BLK: Final = Kind(
    feat.BLK,
    "blk",
    "block device",
    "disk",
    "-device virtio-blk-pci,drive=...,disable-legacy=on,iommu_platform=on",
)
BALLOON: Final = Kind(
    feat.BALLOON,
    "balloon",
    "memory balloon",
    "balloon",
    "-device virtio-balloon-pci,disable-legacy=on,iommu_platform=on,deflate-on-oom=on",
)


def end(
    report: Report,
    kind: Kind,
    found: list[Endpoint],
    everything: bool,
    called: Callable[[dict[str, Any]], str] = lambda farewell: str(farewell["name"]),
) -> None:
    """End what was found, wait for it, and say who has the function now.

    Args:
        report: where to say it.
        kind: of all of them.
        found: what is up and was named.
        everything: whether none, or several, are well.
        called: what to call it, from its farewell.

    Raises:
        UsageError: not exactly one, and not ``everything``.
        TimeLimit: one does not end.
        GuestpvError: one ended with an error.
    """
    if not found and not everything:
        raise UsageError("nothing is up", hint=f"guestpv {kind.verb} status")
    if len(found) > 1 and not everything:
        names = " ".join(endpoint.name for endpoint in found)
        down = f"guestpv {kind.verb} down"
        raise UsageError(f"which one? up are: {names}", hint=f"{down} NAME, or {down} --all")
    ended = []
    for endpoint in found:
        try:
            farewell = ask(endpoint.path, "down", DOWN_TIME_LIMIT)
        except TimeLimit as error:
            raise TimeLimit(
                error.message, where=endpoint.name, hint=f"kill {endpoint.status.get('pid', 'PID')}"
            ) from error
        if "error" in farewell:
            raise GuestpvError(f"it ended with an error: {farewell['error']}", where=endpoint.name)
        ended.append(farewell)

    def show() -> None:
        for one in ended:
            click.echo(f"{called(one)} is down{where_it_is(one)}")

    report.done(ended, show)


def where_it_is(farewell: dict[str, str | None]) -> str:
    """Who has the function now, where it is one of the kernel's."""
    function, driver = farewell["function"], farewell["driver"]
    if driver is None:
        return "."
    if driver == "vfio-pci":
        return f"; {function} stays bound to vfio-pci (guestpv unbind {function})."
    return f"; {driver} has {function} again."
