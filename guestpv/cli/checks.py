"""What driving a device needs of the machine, each need as a check that tells how to mend it."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Literal

from ..errors import GuestpvError, Refused
from ..opener import DRIVERS, SCHEMES, Spec
from ..opener import open as open_transport
from ..spec import features as feat
from ..system import SYSTEM, System
from ..vfio.survey import DEVICES, VFIO_DRIVER, Function, look_up, noiommu_group_of, not_viable, survey
from ..vfio.ways import ENABLE, HUGE_PAGES_HINT, NOIOMMU, PARAMETER, RISK
from ..vfio.ways import is_noiommu_enabled as noiommu_enabled
from .checks_migration import UNSEEN, obstacles

Verdict = Literal["ok", "warn", "fail"]

OLDEST_KERNEL: Final = (5, 4)
"""VFIO tells the usable I/O addresses from here on."""
MEMLOCK_NEED: Final = 8 << 20
"""Bytes that a network device with one queue pair and all offloads pins at most."""
HUGE_PAGES_NEED: Final = 4
"""The same in huge pages."""
CAP_NET_ADMIN: Final = 12
CAP_IPC_LOCK: Final = 14

QEMU_IOMMU: Final = (
    "QEMU: -machine q35,kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on\n"
    "libvirt: <iommu model='intel'><driver intremap='on' caching_mode='on'/></iommu>, <ioapic driver='qemu'/>"
)
BOOT_IOMMU: Final = (
    "give the kernel intel_iommu=on; where GRUB boots it:\n"
    "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&intel_iommu=on /' /etc/default/grub && update-grub && reboot"
)
QEMU_PLATFORM: Final = (
    "QEMU: iommu_platform=on,disable-legacy=on at the -device virtio-...-pci\n"
    "libvirt: <driver iommu='on'/> in the device, which needs an <iommu/> in <devices>"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One need and whether it is met.

    Attributes:
        name: what was looked at.
        verdict: ``warn`` works, but not everywhere or not well.
        text: what was found.
        mend: commands or options that mend it, a line each; empty where nothing has to be done.
    """

    name: str
    verdict: Verdict
    text: str
    mend: str = ""


def examine(spec: str | None, system: System = SYSTEM) -> list[Check]:
    """All checks: of the machine, and of the device ``spec`` or of every virtio function.

    Raises:
        UsageError: ``spec`` is not well formed, or names no virtio function.
    """
    parsed = Spec.parse(spec) if spec is not None else None
    if parsed is not None and parsed.scheme != "vfio":
        return [opens(spec or "")]
    noiommu = parsed is not None and parsed.params.get("backend") == NOIOMMU
    needs = [check for check in MACHINE if not noiommu or check not in (iommu, interrupts, memlock)]
    checks = [check(system) for check in needs] + list(lockdown(system))
    if parsed is not None:
        function = look_up(parsed.body, system)
        if noiommu:
            return [*checks, *without_iommu(function, system)]
        return [*checks, *of_function(function, system)]
    known = [function for function in survey(system) if function.type in DRIVERS]
    if not known:
        return [
            *checks,
            Check("functions", "fail", "no virtio function that there is a driver for", no_function()),
        ]
    found = [list(of_function(function, system)) for function in known]
    usable = [
        function.drivable and all(check.verdict != "fail" for check in own)
        for function, own in zip(known, found, strict=True)
    ]
    if any(usable):
        # What one function lacks is no fault of the machine's as long as another one can be driven.
        found = [
            [replace(check, verdict="warn") if check.verdict == "fail" else check for check in own]
            for own in found
        ]
    else:
        checks.append(Check("functions", "fail", "none of the virtio functions can be driven", "see below"))
    return checks + [check for own in found for check in own]


def no_function() -> str:
    """How a guest gets a device."""
    names = " ".join(feat.DEVICE_NAMES[kind] for kind in DRIVERS)
    return (
        f"there are drivers for {names}\n"
        "QEMU: -device virtio-net-pci,netdev=...,disable-legacy=on,iommu_platform=on"
    )


# The machine.


def kernel(system: System) -> Check:
    """Version of the kernel."""
    release = system.read_text("/proc/sys/kernel/osrelease")
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) >= OLDEST_KERNEL:
        return Check("kernel", "ok", release)
    oldest = ".".join(map(str, OLDEST_KERNEL))
    return Check("kernel", "warn", f"{release} is older than {oldest}", "install a newer kernel")


def iommu(system: System) -> Check:
    """An IOMMU that the kernel uses."""
    units: list[str] = []
    with suppress(OSError):
        units = system.listdir("/sys/class/iommu")
    if units:
        return Check("IOMMU", "ok", " ".join(units))
    if system.exists("/sys/firmware/acpi/tables/DMAR"):
        return Check(
            "IOMMU", "fail", "the machine has one (ACPI DMAR), but the kernel does not use it", BOOT_IOMMU
        )
    with suppress(OSError):
        if "intel_iommu=on" in system.read_text("/proc/cmdline").split():
            return Check("IOMMU", "fail", "the machine has none, though intel_iommu=on is given", QEMU_IOMMU)
    return Check("IOMMU", "fail", "the machine has none", f"{QEMU_IOMMU}\n{BOOT_IOMMU}")


def modules(system: System) -> Check:
    """VFIO in the kernel."""
    wanted = ("vfio-pci", "vfio_iommu_type1")
    missing = [name for name in wanted if not system.exists(f"/sys/module/{name.replace('-', '_')}")]
    if not missing:
        return Check("VFIO modules", "ok", "loaded")
    names = " and ".join(missing)
    release = system.read_text("/proc/sys/kernel/osrelease")
    catalogue = ""
    for name in ("modules.dep", "modules.builtin"):
        with suppress(OSError):
            catalogue += system.read_text(f"/lib/modules/{release}/{name}").replace("-", "_") + "\n"
    if all(f"/{name.replace('-', '_')}.ko" in catalogue for name in missing):
        return Check("VFIO modules", "ok", f"{names} not loaded yet, guestpv bind does it")
    return Check(
        "VFIO modules",
        "fail",
        f"kernel {release} has no module {names}",
        "Debian: apt install linux-image-amd64, then reboot into it",
    )


def ways(system: System) -> Check:
    """Which ways into VFIO there are; functions behind an IOMMU need one of the first two."""
    name = "VFIO back-ends"
    if not system.exists("/sys/module/vfio"):
        return Check(name, "ok", "not known before the modules are loaded; type1 is in every kernel")
    found = ["type1"] if system.exists("/sys/module/vfio_iommu_type1") else []
    if system.exists("/dev/iommu"):
        cdevs = re.search(r"^ *\d+ vfio-dev$", _read("/proc/devices", system), re.MULTILINE)
        found.append("iommufd" if cdevs else "iommufd without nodes for functions (VFIO_DEVICE_CDEV)")
    enabled = noiommu_enabled(system)
    if enabled is not None:
        found.append(f"noiommu ({'enabled' if enabled else 'not enabled'})")
    text = ", ".join(found) or "none"
    if enabled:
        return Check(
            name,
            "warn",
            f"{text}: with no-IOMMU mode a device can overwrite any memory of this machine",
            f"as root, if nobody uses it: echo 0 > {PARAMETER}",
        )
    return Check(name, "ok" if found else "fail", text, "" if found else "modprobe vfio-pci")


def lockdown(system: System) -> Iterator[Check]:
    """The kernel's lockdown, where it is on: what loads VFIO's modules, and no more, depends on it."""
    level = re.search(r"\[(integrity|confidentiality)\]", _read("/sys/kernel/security/lockdown", system))
    if not level:
        return
    told = f"lockdown={level[1]}: VFIO, also without an IOMMU, and page numbers work as ever, but a "
    told += "module has to be signed by who built the kernel: VFIO's must be those of the kernel's package"
    unsigned = [name for name in ("vfio", "vfio-pci") if _is_unsigned(name, system)]
    if unsigned:
        yield Check(
            "kernel lockdown",
            "fail",
            f"{told}. Not signed, and not loaded yet: {' '.join(unsigned)}",
            "put the modules of the kernel's own package back, or boot without lockdown=",
        )
    else:
        yield Check("kernel lockdown", "ok", told)


def _is_unsigned(module: str, system: System) -> bool:
    """Whether a module has yet to be loaded and has no signature."""
    if system.exists(f"/sys/module/{module.replace('-', '_')}"):
        return False
    release = system.read_text("/proc/sys/kernel/osrelease")
    if f"/{module}.ko" not in _read(f"/lib/modules/{release}/modules.dep", system):
        return False
    with suppress(OSError):
        return system.run(["modinfo", "-F", "signer", module]) == (0, "")
    return False


def _read(path: str, system: System) -> str:
    try:
        return system.read_text(path)
    except OSError:
        return ""


def container(system: System) -> Check:
    """The node through which VFIO is asked for a container."""
    return _node("VFIO node", "/dev/vfio/vfio", "modprobe vfio-pci", "chmod 666 /dev/vfio/vfio", system)


def tun(system: System) -> Check:
    """TUN/TAP, and the right to make a link."""
    check = _node("TUN", "/dev/net/tun", "modprobe tun", "chmod 666 /dev/net/tun", system)
    if check.verdict == "ok" and not _capable(CAP_NET_ADMIN, system):
        return Check(
            "TUN", "warn", "this user may not make a link", "run `guestpv net up` as root, or with sudo"
        )
    return check


def _node(name: str, path: str, load: str, allow: str, system: System) -> Check:
    try:
        system.close(system.open(path, os.O_RDWR))
    except PermissionError:
        return Check(name, "fail", f"no permission for {path}", f"as root: {allow}")
    except OSError as error:
        if error.errno == errno.EBUSY:
            # A group has one owner at a time; that it has one is no fault.
            return Check(name, "ok", f"{path}, in use (guestpv net status)")
        # A static node without its module answers ENODEV; binding loads it.
        absent = error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        return Check(name, "warn" if absent else "fail", f"{path}: {error.strerror}", f"as root: {load}")
    return Check(name, "ok", path)


def interrupts(system: System) -> Check:
    """Interrupt remapping: without it a device could raise any interrupt of the machine."""
    name = "interrupt remapping"
    if system.exists("/sys/firmware/devicetree/base") or not system.exists("/sys/firmware/acpi/tables/APIC"):
        return Check(name, "ok", "a matter of the platform here")
    with suppress(OSError):
        if re.search(r"\bIR-", system.read_text("/proc/interrupts")):
            return Check(name, "ok", "on")
    for module in ("vfio_iommu_type1", "vfio"):
        with suppress(OSError):
            if system.read_text(f"/sys/module/{module}/parameters/allow_unsafe_interrupts") == "Y":
                return Check(name, "warn", "off, and VFIO is told to do without", QEMU_IOMMU)
    if re.search(r"\bvfio\w*\.allow_unsafe_interrupts=[1yY]", system.read_text("/proc/cmdline")):
        return Check(name, "warn", "off, and VFIO will be told to do without when it is loaded", QEMU_IOMMU)
    return Check(
        name,
        "fail",
        "off",
        f"{QEMU_IOMMU}\nor, in a guest you trust: modprobe vfio_iommu_type1 allow_unsafe_interrupts=1",
    )


def memlock(system: System) -> Check:
    """The limit that memory mapped for a device counts into."""
    limit, _ = system.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or _capable(CAP_IPC_LOCK, system):
        return Check("locked memory", "ok", "no limit for this user")
    text = f"limit {limit >> 10} KiB; a network device needs {MEMLOCK_NEED >> 10} KiB at most"
    if limit >= MEMLOCK_NEED:
        return Check("locked memory", "ok", text)
    return Check(
        "locked memory",
        "fail",
        text,
        "echo '* - memlock 65536' > /etc/security/limits.d/guestpv.conf, then log in again\n"
        "systemd: LimitMEMLOCK=64M",
    )


def migration(system: System) -> Check:
    """Live migration, as far as a guest can tell."""
    found = list(obstacles(system))
    if not found:
        return Check("live migration", "ok", UNSEEN)
    texts, mends = zip(*found, strict=True)
    return Check("live migration", "warn", "; ".join(texts), "\n".join(mends))


def _capable(capability: int, system: System) -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", system.read_text("/proc/self/status"), re.MULTILINE)
    return bool(match and int(match[1], 16) >> capability & 1)


MACHINE: Final[tuple[Callable[[System], Check], ...]] = (
    kernel,
    iommu,
    interrupts,
    modules,
    ways,
    container,
    memlock,
    tun,
    migration,
)


# One function.


def of_function(function: Function, system: System = SYSTEM) -> Iterator[Check]:
    """What one function needs."""
    where = f"{function.address} {function.name}"
    if function.kind == "legacy":
        yield Check(
            where, "fail", function.problem, "QEMU: disable-legacy=on,disable-modern=off at the device"
        )
        return
    held = f"driver {function.driver}" if function.driver else "no driver"
    if function.uses:
        details = "; ".join(use.detail for use in function.uses)
        yield Check(
            where,
            "warn",
            f"in use: {details}",
            f"to take it all the same: guestpv bind --force {function.address}",
        )
    else:
        yield Check(where, "ok", f"{function.kind}, {held}, not in use")
    if function.group is not None:
        if function.blockers:
            yield Check(f"{where} group", "fail", *not_viable(function.group, function.blockers))
        else:
            yield Check(f"{where} group", "ok", f"IOMMU group {function.group}, viable")
        if function.driver == VFIO_DRIVER:
            node, command = f"/dev/vfio/{function.group}", f"guestpv bind {function.address}"
            yield _node(f"{where} node", node, command, f"{command} --user NAME", system)
    yield platform(function, where, system)


def without_iommu(function: Function, system: System = SYSTEM) -> Iterator[Check]:
    """What one function needs to be driven in VFIO's no-IOMMU mode."""
    where = f"{function.address} {function.name}"
    name = f"{where} no-IOMMU mode"
    problem, hint = function.obstacle(noiommu=True)
    if function.group is not None:
        yield Check(name, "fail", "it is behind an IOMMU: there is no such mode for it", "leave backend out")
        return
    if problem:
        yield Check(where, "fail", problem, hint)
    number = noiommu_group_of(function.address, system)
    enabled = noiommu_enabled(system)
    if enabled is None:
        loaded = system.exists("/sys/module/vfio")
        text = "this kernel has none (VFIO_NOIOMMU)" if loaded else "not known before VFIO is loaded"
        yield Check(name, "fail" if loaded else "warn", text, QEMU_IOMMU if loaded else "modprobe vfio-pci")
    elif not enabled:
        yield Check(name, "fail", "not enabled", f"as root: {ENABLE}")
    elif number is None:
        yield Check(name, "warn", RISK, f"guestpv bind --vfio-backend noiommu {function.address}")
    else:
        yield _node(name, f"/dev/vfio/noiommu-{number}", "modprobe vfio-pci", "run as root", system)
        yield Check(name, "warn", RISK, f"better: {QEMU_IOMMU}")
    pages = re.search(r"^HugePages_Free: +(\d+)", _read("/proc/meminfo", system), re.MULTILINE)
    free = int(pages[1]) if pages else 0
    yield Check(
        f"{where} huge pages",
        "ok" if free >= HUGE_PAGES_NEED else "fail",
        f"{free} of 2 MiB free; a network device needs {HUGE_PAGES_NEED} at most",
        "" if free >= HUGE_PAGES_NEED else HUGE_PAGES_HINT,
    )


def platform(function: Function, where: str, system: System = SYSTEM) -> Check:
    """ACCESS_PLATFORM: without it the device would not go through the IOMMU."""
    name = f"{where} ACCESS_PLATFORM"
    if function.driver == VFIO_DRIVER:
        try:
            with open_transport(f"vfio:{function.address}") as transport:
                offered: int | None = transport.offered
        except Refused as error:
            # Somebody drives it, so it went through the same question when it was opened.
            return Check(name, "ok", f"not asked: {error.message}")
        except GuestpvError as error:
            return Check(name, "warn", f"not known: {error.message}", error.hint)
    else:
        offered = sysfs_features(function.address, system)
    if offered is None:
        return Check(name, "warn", "not known while no driver has it", f"guestpv bind {function.address}")
    if offered >> feat.F_ACCESS_PLATFORM & 1:
        return Check(name, "ok", "offered")
    return Check(
        name, "fail", "not offered: its DMA would miss the IOMMU and hit other memory", QEMU_PLATFORM
    )


def sysfs_features(address: str, system: System = SYSTEM) -> int | None:
    """Mask of the features that a function offers, as its kernel driver shows it; None without one."""
    with suppress(OSError):
        for entry in system.listdir(f"{DEVICES}/{address}"):
            if re.fullmatch(r"virtio\d+", entry):
                text = system.read_text(f"{DEVICES}/{address}/{entry}/features")
                return sum(1 << bit for bit, digit in enumerate(text) if digit == "1")
    return None


# Other schemes.


def opens(spec: str) -> Check:
    """Whether a device that is not the kernel's can be opened."""
    try:
        with open_transport(spec) as transport:
            return Check(spec, "ok", f"opens: virtio {feat.DEVICE_NAMES.get(transport.device_type, '?')}")
    except GuestpvError as error:
        return Check(spec, "fail", str(error).splitlines()[0], error.hint or "schemes: " + " ".join(SCHEMES))
