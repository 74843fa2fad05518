"""Real QEMU devices without a guest, reached through QEMU's qtest socket (scheme ``qtest:``)."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping

from ..errors import DeviceGone, UsageError
from ..memory import DmaSpace
from ..spec import pci as spec
from .capabilities import walk
from .qemu import DEFAULT_EXECUTABLE, Qemu
from .qtest_host import QtestBar, QtestHost
from .qtest_joined import JoinedMachine, JoinedQemu
from .qtest_machine import QtestMachine

EXPRESS_DEVICE_CAPABILITIES = 4
EXPRESS_DEVICE_CONTROL = 8
EXPRESS_FLR_CAPABLE = 1 << 28
EXPRESS_FLR_START = 1 << 15
EXPRESS_FLR_SECONDS = 0.1
MSIX_CONTROL = 2
MSIX_TABLE = 4
MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
MSIX_ENTRY = 16


class QtestFunction:
    """The function of a machine's ``number``-th device; see ``PciFunction``.

    As the kernel does for VFIO, it decodes memory and ports but has neither bus mastering nor INTx
    enabled until its owner says so.
    """

    translated = False

    def __init__(self, machine: QtestHost, number: int = 0, *, owns_machine: bool = False) -> None:
        self.machine = machine
        self.name = "qtest:" + machine.devices[number].split(",")[0]
        self.dma: DmaSpace = machine.qemu.ram
        self._owns_machine = owns_machine
        self.bus, self.slot, window = machine.locate(number)
        self._bars = machine.place_bars(self.bus, self.slot, window)
        self._msix = next((at for at, kind in walk(self.config_read) if kind == spec.PCI_CAP_MSIX), 0)
        self._vectors: list[int] = []
        self._intx_fd = -1
        self._intx_raised = False
        self._intx_masked = True
        self._intx_intercepted = False

    def config_read(self, offset: int, width: int) -> int:
        """Read 1, 2 or 4 bytes of PCI configuration space."""
        return self.machine.config_read(self.bus, self.slot, offset, width)

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of PCI configuration space."""
        self.machine.config_write(self.bus, self.slot, offset, width, value)

    def bar(self, index: int) -> QtestBar:
        """The window of BAR ``index``.

        Raises:
            UsageError: the function has no such BAR.
        """
        if index not in self._bars:
            raise UsageError(f"the function has BARs {sorted(self._bars)}, not {index}", where=self.name)
        return self._bars[index]

    @property
    def msix_vectors(self) -> int:
        """Size of the MSI-X table, 0 without MSI-X or where its messages would not arrive."""
        if not self.machine.rings_doorbells:
            return 0
        return (self.config_read(self._msix + MSIX_CONTROL, 2) & 0x7FF) + 1 if self._msix else 0

    def enable_msix(self, count: int) -> list[int]:
        """Enable ``count`` vectors; returns one eventfd each, which belong to the machine.

        Raises:
            UsageError: the function has fewer, or the machine has fewer left.
        """
        self.disable_interrupts()
        if not 0 < count <= self.msix_vectors:
            raise UsageError(f"{count} MSI-X vectors of {self.msix_vectors}", where=self.name)
        control = self.config_read(self._msix + MSIX_CONTROL, 2)
        where = self.config_read(self._msix + MSIX_TABLE, 4)
        table, start = self.bar(where & 7), where & ~7
        self._vectors = self.machine.take_vectors(count)
        self.config_write(self._msix + MSIX_CONTROL, 2, control | MSIX_ENABLE | MSIX_FUNCTION_MASK)
        eventfds = []
        for entry, vector in enumerate(self._vectors):
            address, data, eventfd = self.machine.message(vector)
            words = (address & 0xFFFF_FFFF, address >> 32, data, 0)
            for number, word in enumerate(words):
                table.write(start + entry * MSIX_ENTRY + 4 * number, 4, word)
            eventfds.append(eventfd)
        self.config_write(self._msix + MSIX_CONTROL, 2, control & ~MSIX_FUNCTION_MASK | MSIX_ENABLE)
        return eventfds

    def enable_intx(self) -> int:
        """Enable the legacy interrupt; returns its eventfd. It is masked at each event.

        Raises:
            UsageError: the function has no interrupt pin.
        """
        self.disable_interrupts()
        pin = self.config_read(spec.PCI_CONFIG_INTERRUPT_PIN, 1)
        if not pin:
            raise UsageError("the function has no interrupt pin", where=self.name)
        if not self._intx_intercepted:
            self.machine.intercept(self.bus, self.slot, pin - 1, self._line_changed)
            self._intx_intercepted = True
        self._intx_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._command(clear=spec.COMMAND_INTX_DISABLE)
        self.unmask_intx()
        return self._intx_fd

    def _line_changed(self, raised: bool) -> None:
        """Take a change of the function's interrupt line; called by whichever thread saw it."""
        self._intx_raised = raised
        if raised and not self._intx_masked:
            self._intx_masked = True
            os.eventfd_write(self._intx_fd, 1)

    def unmask_intx(self) -> None:
        """Let the next legacy interrupt through, after the ISR was read; a line still raised is one."""
        with self.machine.session.lock:
            self._intx_masked = False
            self._line_changed(self._intx_raised)

    def disable_interrupts(self) -> None:
        """Take the eventfds away from the function; one that is gone has lost them already."""
        with contextlib.suppress(DeviceGone):
            if self._vectors:
                control = self.config_read(self._msix + MSIX_CONTROL, 2)
                self.config_write(self._msix + MSIX_CONTROL, 2, control & ~MSIX_ENABLE)
            if self._intx_fd >= 0:
                self._command(set=spec.COMMAND_INTX_DISABLE)
        self.machine.give_vectors(self._vectors)
        self._vectors = []
        self._close_intx()

    def _close_intx(self) -> None:
        with self.machine.session.lock:
            self._intx_masked = True
            if self._intx_fd >= 0:
                os.close(self._intx_fd)
                self._intx_fd = -1

    def _command(self, *, set: int = 0, clear: int = 0) -> None:
        command = self.config_read(spec.PCI_CONFIG_COMMAND, 2)
        self.config_write(spec.PCI_CONFIG_COMMAND, 2, command & ~clear | set)

    def reset(self) -> bool:
        """Function level reset; BARs and command register are put back as they were.

        Returns False where the function has none: QEMU's have one behind a root port only.
        """
        express = next((at for at, kind in walk(self.config_read) if kind == spec.PCI_CAP_EXPRESS), 0)
        if not express:
            return False
        if not self.config_read(express + EXPRESS_DEVICE_CAPABILITIES, 4) & EXPRESS_FLR_CAPABLE:
            return False
        self.disable_interrupts()
        command = self.config_read(spec.PCI_CONFIG_COMMAND, 2)
        control = self.config_read(express + EXPRESS_DEVICE_CONTROL, 2)
        self.config_write(express + EXPRESS_DEVICE_CONTROL, 2, control | EXPRESS_FLR_START)
        time.sleep(EXPRESS_FLR_SECONDS)
        for index, bar in self._bars.items():
            self.config_write(spec.PCI_CONFIG_BAR0 + 4 * index, 4, bar.address)
        self.config_write(spec.PCI_CONFIG_COMMAND, 2, command)
        return True

    def request_fd(self) -> None:
        """None: nobody else wants the function."""

    def error_fd(self) -> int | None:
        """Eventfd that tells that QEMU has ended; None for one that was joined. It reports no PCI errors."""
        qemu = self.machine.qemu
        return qemu.death_fd() if isinstance(qemu, Qemu) else None

    def close(self) -> None:
        """End the machine if it was started for this function alone. Idempotent.

        Raises:
            TimeLimit: QEMU did not end by itself and was killed.
        """
        if not self._owns_machine:
            self.disable_interrupts()
            return
        try:
            self.machine.close()
        finally:
            self._close_intx()


PARAMETERS = (
    "blockdev, netdev, object, chardev, attach, machine, accel, qemu, memory, vectors, root_port, "
    "answer_limit; "
    "and to join a QEMU that runs: join, qmp, memory_path, answer_limit"
)


def open_function(body: str, params: Mapping[str, str]) -> QtestFunction:
    """Start a QEMU for one device: ``qtest:virtio-blk-pci,packed=on?blockdev=driver=null-co,size=1048576``.

    Or join one that runs: ``qtest:b0?join=/run/qtest.sock&qmp=/run/qmp.sock`` for its device of id ``b0``.

    Args:
        body: QEMU's ``-device`` string, without ``addr`` and ``bus``: ``virtio-net-pci,packed=on``. On the
            root bus a virtio device is transitional unless it says ``disable-legacy=on``. When joining:
            the device's ``id``, or its PCI address on the root bus, ``00:04.0``.
        params:
            ``blockdev``, ``netdev``, ``object``, ``chardev``: QEMU's option of that name. Without
            ``node-name`` or ``id`` it gets one, and the device is attached to it by its property
            ``drive``, ``netdev``, ``iothread`` (an ``object=iothread``), ``rng`` (an ``object=rng-...``) or
            ``chardev``, unless the body has that property.
            ``attach``: a further ``-device``, on the bus that the device brings; a ``chardev`` is its then:
            ``qtest:virtio-serial-pci?attach=virtconsole&chardev=null``.
            ``machine``: ``q35`` (default) or ``pc`` or a versioned one. ``accel``: ``tcg`` (default).
            ``qemu``: path of qemu-system-x86_64. ``memory``: MiB of guest RAM (256).
            ``vectors``: MSI-X vectors that can be enabled (32). ``root_port=1``: behind a PCI Express root
            port, which gives it function level reset. ``answer_limit``: seconds until a QEMU that does not
            answer is killed (20).

            ``join``: qtest socket of a running QEMU (``-qtest unix:PATH,server=on,wait=off``), ``qmp``: its
            monitor's (``-qmp unix:PATH,server=on,wait=off``). It is never ended. Its RAM has to be shared
            (``-object memory-backend-memfd,id=ram,size=1G,share=on -machine q35,memory-backend=ram``), is
            found by asking QEMU, or named by ``memory_path``, and is used from 1 MiB on, so nothing that
            matters may run in it. Interrupts are INTx or polled, as MSI-X has nobody to arrive at.

    Raises:
        UsageError: a parameter does not exist or has no sense, QEMU is missing, or it refused an option
            (its own words are in the message).
        Refused: QEMU is older than 7.2, or ``accel=kvm``; the RAM of a joined one is not shared.
        GuestpvError, TimeLimit: a socket to join is missing, or belongs to something else.
    """
    if "join" in params:
        return _join(body, dict(params))
    left = dict(params)
    device = body
    options: list[str] = []
    attached = left.pop("attach", "")
    for option, naming, prop in (
        ("blockdev", "node-name", "drive"),
        ("netdev", "id", "netdev"),
        ("object", "id", ""),
        ("chardev", "id", "chardev"),
    ):
        text = left.pop(option, None)
        if text is None:
            continue
        if option == "object":
            prop = "iothread" if text.startswith("iothread") else "rng" if text.startswith("rng-") else ""
        named = re.search(rf",{naming}=([^,]+)", f",{text}")
        name = named[1] if named else f"{option}0"
        options += [f"-{option}", text if named else f"{text},{naming}={name}"]
        if option == "chardev" and attached:
            attached += f",{prop}={name}"
        elif prop and f",{prop}=" not in device:
            device += f",{prop}={name}"
    machine, accel = left.pop("machine", "q35"), left.pop("accel", "tcg")
    executable = left.pop("qemu", DEFAULT_EXECUTABLE)
    memory, vectors = _number(left, "memory", 256), _number(left, "vectors", 32)
    root_port, answer_limit = _number(left, "root_port", 0), _number(left, "answer_limit", 20)
    if left:
        raise UsageError(f"qtest: has no parameter {sorted(left)[0]}", hint=f"it has {PARAMETERS}")
    if not device.split(",")[0]:
        raise UsageError("qtest: needs a device, such as qtest:virtio-rng-pci")
    opened = QtestMachine(
        [device],
        options,
        root_ports=bool(root_port),
        attached=[attached] if attached else [],
        vectors=vectors,
        machine=machine,
        accel=accel,
        executable=executable,
        memory=memory << 20,
        answer_limit=answer_limit,
    )
    try:
        return QtestFunction(opened, owns_machine=True)
    except BaseException:
        opened.close()
        raise


def _join(device: str, params: dict[str, str]) -> QtestFunction:
    path, monitor = params.pop("join"), params.pop("qmp", "")
    memory_path, answer_limit = params.pop("memory_path", ""), _number(params, "answer_limit", 20)
    if params:
        raise UsageError(
            f"qtest: {sorted(params)[0]} has no sense with join", hint="known: qmp, memory_path, answer_limit"
        )
    if not monitor or not device:
        raise UsageError(
            "qtest: joining needs the device's id and the monitor's socket",
            hint="such as qtest:b0?join=/run/qtest.sock&qmp=/run/qmp.sock",
        )
    qemu = JoinedQemu(path, monitor, memory_path=memory_path, answer_limit=answer_limit)
    try:
        return QtestFunction(JoinedMachine(qemu, device), owns_machine=True)
    except BaseException:
        qemu.close()
        raise


def _number(params: dict[str, str], name: str, default: int) -> int:
    text = params.pop(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"qtest: {name}={text} is not a number")
    return int(text)
