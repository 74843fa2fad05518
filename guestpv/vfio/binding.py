"""Taking a function away from the kernel's driver, and giving it back."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from ..errors import AccessDenied, GuestpvError, Refused, TimeLimit, UsageError
from ..system import SYSTEM, System
from .lock import FunctionLock, holders, runtime_directory
from .survey import (
    DEVICES,
    VFIO_DRIVER,
    Function,
    Member,
    cdev_of,
    driver_of,
    look_up,
    nodes_of,
    noiommu_group_of,
)
from .ways import CONTAINER_NODE, ENABLE, is_noiommu_enabled

LOG: Final = logging.getLogger(__name__)
DRIVERS: Final = "/sys/bus/pci/drivers"
PROBE: Final = "/sys/bus/pci/drivers_probe"
TIME_LIMIT: Final = 30.0
"""Seconds for a driver to be bound, or for a node to appear."""
REFUSALS: Final = ("Operation not permitted", "Key was rejected")
REFUSED_HINT: Final = (
    "the kernel takes no such module: under Secure Boot or lockdown it has to be of the kernel's own package "
    "(dmesg | grep -i -e lockdown -e module); in a container load it on the host"
)
MISSING_HINT: Final = (
    "boot a kernel that has it (Debian: apt install linux-image-amd64), or build it with CONFIG_VFIO_PCI=m "
    "and CONFIG_VFIO_IOMMU_TYPE1=m"
)


@dataclass(frozen=True, slots=True)
class Bound:
    """What ``bind`` did.

    Attributes:
        driver: the kernel driver that ``unbind`` will give the function back to, or None.
        node: the group's node in ``/dev/vfio``.
        changed: False where it was bound to vfio-pci already.
        blockers: members of the group that have to be bound too before it can be opened.
    """

    address: str
    driver: str | None
    node: str
    changed: bool
    blockers: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Unbound:
    """What ``unbind`` did.

    Attributes:
        driver: the kernel driver that has the function now; None where it had none before ``bind`` either.
        changed: False where it was not bound to vfio-pci.
    """

    address: str
    driver: str | None
    changed: bool


def bind(
    address: str,
    *,
    force: bool = False,
    user: str | None = None,
    noiommu: bool = False,
    system: System = SYSTEM,
) -> Bound:
    """Bind a virtio function to vfio-pci, remembering its kernel driver; half-done steps are undone.

    Args:
        force: take it even if the machine uses it.
        user: who gets the function's nodes, to drive it without being root.
        noiommu: for VFIO's no-IOMMU mode, which has to be enabled.

    Raises:
        UsageError: no such function or user, or not a virtio function.
        Refused: the function is in use, or cannot be driven at all; no-IOMMU mode is not enabled.
        AccessDenied: not root.
        GuestpvError: vfio-pci is missing or did not take the function.
    """
    function = look_up(address, system)
    owner = None if user is None else _user_id(user, system)
    problem, hint = function.obstacle(noiommu)
    hopeless = function.kind == "legacy" or (function.group is None and not noiommu)
    if hopeless or (function.uses and not force):
        raise Refused(problem, where=function.address, hint=hint)
    changed = function.driver != VFIO_DRIVER
    noiommu = noiommu and function.group is None
    with ExitStack() as undo:
        if changed:
            _load_vfio(function.address, noiommu, system)
            if noiommu and not is_noiommu_enabled(system):
                raise _not_enabled(function.address, system)
            _take(function, undo, system)
        if noiommu:
            node = f"/dev/vfio/noiommu-{noiommu_group_of(function.address, system)}"
        else:
            node = f"/dev/vfio/{function.group}"
        _wait_for_node(node, function.address, system)
        if owner is not None:
            for path in filter(None, (node, cdev_of(function.address, system))):
                with _explained(path, f"giving it to {user}", f"bind --user {user} {function.address}"):
                    if system.exists(path):
                        system.chown(path, owner)
        undo.pop_all()
    LOG.info("%s: bound to %s, before: %s", function.address, VFIO_DRIVER, function.driver)
    previous = function.driver if changed else (_recall(function.address, system) or {}).get("driver")
    return Bound(function.address, previous, node, changed, function.blockers)


def _not_enabled(address: str, system: System) -> Refused:
    if is_noiommu_enabled(system) is None:
        return Refused(
            "this kernel's VFIO has no no-IOMMU mode",
            where=address,
            hint="it takes a kernel built with CONFIG_VFIO_NOIOMMU, which Debian's are not; or give the "
            "guest an IOMMU: docs/vfio-in-a-guest.md",
        )
    return Refused("VFIO's no-IOMMU mode is not enabled", where=address, hint=f"as root: {ENABLE}")


def unbind(address: str, *, force: bool = False, system: System = SYSTEM) -> Unbound:
    """Give a function back to the kernel driver it had before ``bind``, or to the one that matches it.

    Args:
        force: also while a process drives it; VFIO then asks that process to let go, and this call waits.

    Raises:
        UsageError: no such function, or not a virtio function.
        Refused: a process drives it.
        AccessDenied: not root.
        TimeLimit: no driver took it in time.
    """
    try:
        function = look_up(address, system)
    except UsageError as error:
        # Unplugged while it was bound: the next function at this place shall not inherit its record.
        if error.where and not system.exists(f"{DEVICES}/{error.where}"):
            forget(error.where, system)
        raise
    address = function.address
    bound = function.driver == VFIO_DRIVER
    if bound and not force:
        _refuse_if_driven(function, system)
    record = _recall(address, system)
    with _explained(address, "giving it back", f"unbind {address}"):
        _release(address, system)
        if bound or function.driver is None:
            _give_back(address, record, system)
    with suppress(FileNotFoundError):
        system.unlink(_record_path(address, system))
    driver = driver_of(address, system)
    LOG.info("%s: given back to %s", address, driver)
    return Unbound(address, driver, bound)


def _take(function: Function, undo: ExitStack, system: System) -> None:
    """Move the function from its driver to vfio-pci; ``undo`` gets the way back, before each step."""
    address = function.address
    record = {"address": address, "driver": function.driver}
    undo.callback(forget, address, system)
    _remember(record, system)
    with _explained(address, "binding it to vfio-pci", f"bind {address}"):
        undo.callback(_restore, address, record, system)
        system.write_text(f"{DEVICES}/{address}/driver_override", VFIO_DRIVER)
        if function.driver is not None:
            system.write_text(f"{DEVICES}/{address}/driver/unbind", address)
        system.write_text(PROBE, address)
    if driver_of(address, system) != VFIO_DRIVER:
        raise GuestpvError(
            "vfio-pci did not take the function", where=address, hint="`dmesg | tail` says why"
        )


def _restore(address: str, record: dict[str, str | None], system: System) -> None:
    if system.read_text(f"{DEVICES}/{address}/driver_override") == VFIO_DRIVER:
        _release(address, system)
    if driver_of(address, system) is None:
        _give_back(address, record, system)


def _release(address: str, system: System) -> None:
    """Clear the override, without which no other driver would ever match, and take vfio-pci away."""
    system.write_text(f"{DEVICES}/{address}/driver_override", "\n")
    if driver_of(address, system) == VFIO_DRIVER:
        system.write_text(f"{DRIVERS}/{VFIO_DRIVER}/unbind", address)


def _give_back(address: str, record: dict[str, str | None] | None, system: System) -> None:
    """Have a driver bound: the recorded one, or without a record the one that matches."""
    wanted = record["driver"] if record else None
    if wanted and not system.exists(f"{DRIVERS}/{wanted}"):
        with suppress(OSError):
            system.run(["modprobe", wanted])
    system.write_text(PROBE, address)
    if record and wanted is None:
        return
    deadline = system.monotonic() + TIME_LIMIT
    while driver_of(address, system) is None:
        if system.monotonic() >= deadline:
            raise TimeLimit(
                f"no kernel driver took the function back in {TIME_LIMIT:.0f} s",
                where=address,
                hint=f"modprobe {wanted or 'virtio_pci'} && echo {address} > {PROBE}",
            )
        system.sleep(0.01)


def _refuse_if_driven(function: Function, system: System) -> None:
    """An owner would hang the kernel's unbind; one of another function would lose its group's viability."""
    FunctionLock(function.address, system=system).close()
    group = function.group if function.group is not None else noiommu_group_of(function.address, system)
    if group is None:
        return
    owners = dict.fromkeys(owner for node in nodes_of(group, system) for owner in holders(node, system))
    if owners:
        raise Refused(
            f"IOMMU group {group} is in use by {', '.join(owners)}",
            where=function.address,
            hint=f"end that process first, or `guestpv unbind --force {function.address}` asks it to let go",
        )


def _load_vfio(address: str, noiommu: bool, system: System) -> None:
    _load(address, VFIO_DRIVER, f"{DRIVERS}/{VFIO_DRIVER}", system)
    try:
        _load(address, "vfio_iommu_type1", "/sys/module/vfio_iommu_type1", system)
    except GuestpvError:
        # No-IOMMU mode does without, and so does a kernel with iommufd, which came with vfio-pci.
        if not noiommu and not system.exists("/sys/module/iommufd"):
            raise


def _load(address: str, module: str, sign: str, system: System) -> None:
    if system.exists(sign):
        return
    if system.geteuid() != 0:
        raise AccessDenied(
            f"kernel module {module} is not loaded, and only root may load it",
            where=address,
            hint=f"sudo modprobe {module}",
        )
    try:
        status, output = system.run(["modprobe", module])
    except OSError as error:
        status, output = 1, str(error)
    if status or not system.exists(sign):
        refused = any(words in output for words in REFUSALS)
        raise GuestpvError(
            f"kernel module {module} cannot be loaded: {output or 'modprobe was silent'}",
            where=address,
            hint=REFUSED_HINT if refused else MISSING_HINT,
        )


def _wait_for_node(node: str, address: str, system: System) -> None:
    """Wait for the group's node, or the function's own where VFIO makes none for groups."""
    deadline = system.monotonic() + TIME_LIMIT
    while not system.exists(node):
        cdev = cdev_of(address, system)
        if cdev is not None and system.exists(cdev) and not system.exists(CONTAINER_NODE):
            return
        if system.monotonic() >= deadline:
            raise TimeLimit(
                "the group's node did not appear", where=node, hint="mount -t devtmpfs devtmpfs /dev"
            )
        system.sleep(0.01)


def _user_id(user: str, system: System) -> int:
    try:
        return system.user_id(user)
    except KeyError as error:
        raise UsageError(f"no such user: {user}", hint="getent passwd") from error


# The record of the driver a function had. It may be lost or stale: then the matching driver gets it back.


def _record_path(address: str, system: System) -> str:
    return f"{runtime_directory(system)}/{address}.json"


def _remember(record: dict[str, str | None], system: System) -> None:
    path = _record_path(str(record["address"]), system)
    with _explained(path, "recording the function's driver", f"bind {record['address']}"):
        fd = system.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            system.write(fd, (json.dumps(record) + "\n").encode())
        finally:
            system.close(fd)
        system.rename(path + ".new", path)


def _recall(address: str, system: System) -> dict[str, str | None] | None:
    try:
        record = json.loads(system.read_text(_record_path(address, system)))
        driver = record["driver"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if driver is None or (isinstance(driver, str) and re.fullmatch(r"[\w-]+", driver)):
        return {"address": address, "driver": driver}
    return None


def forget(address: str, system: System = SYSTEM) -> None:
    """Drop the record of the driver that a function had, if there is one."""
    path = _record_path(address, system)
    for name in (path, path + ".new"):
        with suppress(FileNotFoundError):
            system.unlink(name)


@contextmanager
def _explained(where: str, doing: str, command: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AccessDenied(
            f"no permission for {doing}", where=where, hint=f"sudo guestpv {command}"
        ) from error
    except OSError as error:
        raise GuestpvError(
            f"{doing} failed: {error}", where=where, hint="`dmesg | tail` may say more"
        ) from error
