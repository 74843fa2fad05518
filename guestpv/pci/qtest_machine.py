"""A QEMU without a guest, started here: its devices, its bridges, its interrupts as eventfds.

MSI-X arrives as real eventfds: messages are aimed at the doorbell of an ivshmem device, which has no
other purpose here. INTx is seen by intercepting the inputs of the I/O APIC.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
from collections.abc import Sequence

from ..errors import GuestpvError, UsageError
from ..spec import pci as spec
from .qemu import DEFAULT_EXECUTABLE, Qemu
from .qtest_host import QtestBar, QtestHost, Window

BRIDGE_WINDOW = 2 << 20

CONFIG_PRIMARY_BUS = 0x18
CONFIG_MEMORY_BASE = 0x20
CONFIG_PREFETCH_BASE = 0x24
PREFETCH_CLOSED = 0x0000_FFF0

IVSHMEM_DOORBELL = 12
IVSHMEM_US = 1
"""Our peer number at the doorbell; QEMU itself is 0."""

DEVICE_SLOT = 4
PORT_SLOT = 12
DOORBELL_SLOT = 20


class _Doorbell:
    """The ivshmem device that turns messages of other devices into eventfds of ours.

    What its server would say is written into the socket before QEMU starts.
    """

    def __init__(self, vectors: int) -> None:
        self.eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(vectors)]
        self.free = list(range(vectors))
        self.address = 0
        shared = os.memfd_create("guestpv-ivshmem", os.MFD_CLOEXEC)
        os.ftruncate(shared, 4096)
        self._server, self._client = socket.socketpair()
        self.fd = self._client.fileno()
        version, own_id = 0, 0
        for number, fd in ((version, None), (own_id, None), (-1, shared)):
            self._say(number, fd)
        for fd in self.eventfds:
            self._say(IVSHMEM_US, fd)
        os.close(shared)

    def _say(self, number: int, fd: int | None) -> None:
        data = number.to_bytes(8, "little", signed=True)
        socket.send_fds(self._server, [data], [] if fd is None else [fd])

    @property
    def options(self) -> list[str]:
        """What QEMU's command line needs; ``fd`` has to be inherited."""
        device = f"ivshmem-doorbell,chardev=doorbell-socket,vectors={len(self.eventfds)}"
        return [
            *("-chardev", f"socket,id=doorbell-socket,fd={self.fd}"),
            *("-device", f"{device},addr={DOORBELL_SLOT:#x}"),
        ]

    def place(self, bar: QtestBar) -> None:
        """Note the address of the doorbell and wait until QEMU has all eventfds."""
        self.address = bar.address + IVSHMEM_DOORBELL
        last = len(self.eventfds) - 1
        # QEMU makes an eventfd blocking when it comes and non-blocking again when it connects it, so poll.
        poll = select.poll()
        poll.register(self.eventfds[last], select.POLLIN)
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            bar.write(IVSHMEM_DOORBELL, 4, self.message(last))
            bar.read(0, 4)
            if poll.poll(1):
                os.eventfd_read(self.eventfds[last])
                return
        raise GuestpvError("the ivshmem doorbell does not ring its eventfds", where="qtest")

    def message(self, vector: int) -> int:
        """Value to write to the doorbell for one of our vectors."""
        return IVSHMEM_US << 16 | vector

    def close(self) -> None:
        for fd in self.eventfds:
            os.close(fd)
        self.eventfds.clear()
        self._server.close()
        self._client.close()


class QtestMachine(QtestHost):
    """A QEMU without a guest and the PCI functions in it.

    Args:
        devices: QEMU's ``-device`` strings, without ``addr`` and ``bus``.
        options: further command line arguments (``-blockdev``, ``-netdev``, ``-object``, ...).
        root_ports: put each device behind a PCI Express root port of its own, which gives it function
            level reset; q35 only.
        attached: ``-device`` strings of what hangs on a bus that one of the devices brings.
        vectors: MSI-X vectors that all functions together can have.
        machine, accel, executable, memory, pass_fds, answer_limit: as for ``Qemu``.

    Attributes:
        qemu: the process, with ``ram``, ``qmp``, ``pid``, ``version``.

    Raises:
        UsageError: QEMU refused an option; the message has its own words.
    """

    rings_doorbells = True

    def __init__(
        self,
        devices: Sequence[str],
        options: Sequence[str] = (),
        *,
        root_ports: bool = False,
        attached: Sequence[str] = (),
        vectors: int = 32,
        machine: str = "q35",
        accel: str = "tcg",
        executable: str = DEFAULT_EXECUTABLE,
        memory: int = 256 << 20,
        pass_fds: Sequence[int] = (),
        answer_limit: float = 20.0,
    ) -> None:
        self.root_ports = root_ports
        arguments = list(options)
        for number, device in enumerate(devices):
            if re.search(r",(addr|bus)=", device):
                raise UsageError("qtest: places the device itself; leave addr= and bus= out", where=device)
            place = f"addr={DEVICE_SLOT + number:#x}"
            if root_ports:
                arguments += [
                    "-device",
                    f"pcie-root-port,id=port{number},chassis={number + 1},addr={PORT_SLOT + number:#x}",
                ]
                place = f"bus=port{number},addr=0"
            arguments += ["-device", f"{device},{place}"]
        for device in attached:
            arguments += ["-device", device]
        self._doorbell = _Doorbell(vectors)
        try:
            qemu = Qemu(
                arguments + self._doorbell.options,
                machine=machine,
                accel=accel,
                executable=executable,
                memory=memory,
                pass_fds=[*pass_fds, self._doorbell.fd],
                answer_limit=answer_limit,
            )
        except BaseException:
            self._doorbell.close()
            raise
        super().__init__(qemu, devices, express=not re.match(r"pc(,|$)|pc-i440fx", machine))
        try:
            self.open_ecam()
            self._doorbell.place(self.place_bars(0, DOORBELL_SLOT)[0])
        except BaseException:
            self.close()
            raise

    def _root_slot(self, bus: int, slot: int) -> int:
        return PORT_SLOT + bus - 1 if bus else slot

    def locate(self, number: int) -> tuple[int, int, Window | None]:
        """Bus and slot of the ``number``-th device, and the window of the bridge before it.

        A root port is programmed first, so that the device answers.
        """
        if not self.root_ports:
            return 0, DEVICE_SLOT + number, None
        bridge, bus = PORT_SLOT + number, 1 + number
        base = self._memory.take(BRIDGE_WINDOW)
        limit = base + BRIDGE_WINDOW - 1
        self.config_write(0, bridge, CONFIG_PRIMARY_BUS, 4, bus << 16 | bus << 8)
        self.config_write(0, bridge, CONFIG_MEMORY_BASE, 4, limit & 0xFFF0_0000 | base >> 16)
        self.config_write(0, bridge, CONFIG_PREFETCH_BASE, 4, PREFETCH_CLOSED)
        command = spec.COMMAND_MEMORY | spec.COMMAND_BUS_MASTER
        self.config_write(0, bridge, spec.PCI_CONFIG_COMMAND, 2, command)
        return bus, 0, Window("memory", base, limit + 1)

    def take_vectors(self, count: int) -> list[int]:
        """Reserve doorbell vectors; their numbers.

        Raises:
            UsageError: there are not so many left.
        """
        free = self._doorbell.free
        if count > len(free):
            raise UsageError(
                f"{count} MSI-X vectors asked for, {len(free)} of {len(self._doorbell.eventfds)} are left",
                where="qtest",
                hint="ask for more when opening: ?vectors=N",
            )
        taken, free[:count] = free[:count], []
        for vector in taken:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._doorbell.eventfds[vector])
        return taken

    def give_vectors(self, vectors: Sequence[int]) -> None:
        """Return doorbell vectors."""
        self._doorbell.free = sorted({*self._doorbell.free, *vectors})

    def message(self, vector: int) -> tuple[int, int, int]:
        """Address, data and eventfd of a doorbell vector."""
        return self._doorbell.address, self._doorbell.message(vector), self._doorbell.eventfds[vector]

    def close(self) -> None:
        """End QEMU. Idempotent."""
        try:
            super().close()
        finally:
            self._doorbell.close()
