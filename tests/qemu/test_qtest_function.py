"""QEMU's functions as PCI functions: configuration space, BARs, interrupts, reset; no rings yet."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import pytest

from guestpv.errors import UsageError
from guestpv.pci.capabilities import first, virtio_capabilities
from guestpv.pci.qtest import QtestFunction
from guestpv.pci.qtest_machine import QtestMachine
from guestpv.spec import pci as spec
from guestpv.spec.features import F_VERSION_1
from guestpv.spec.status import Status
from guestpv.wire import qtest as wire

Launch = Callable[..., QtestMachine]
Open = Callable[..., QtestFunction]

NET = "virtio-net-pci,id=net,disable-legacy=on"
NET_STATUS = 1 << 16
EXTENDED_AER, EXTENDED_ATS = 0x0001, 0x000F
MACHINES = ["q35", "pc"]


def rings(fd: int, seconds: float = 60.0) -> bool:
    """Whether the eventfd is signalled in time; takes the signal."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(seconds * 1000):
        return False
    os.eventfd_read(fd)
    return True


class Registers:
    """The common configuration structure, by hand."""

    def __init__(self, function: QtestFunction) -> None:
        self.function = function
        capabilities = virtio_capabilities(function.config_read)
        common, isr = first(capabilities, spec.CfgType.COMMON), first(capabilities, spec.CfgType.ISR)
        assert common is not None
        assert isr is not None
        self.bar, self.offset = function.bar(common.bar), common.offset
        self.isr_bar, self.isr_offset = function.bar(isr.bar), isr.offset
        command = spec.COMMAND_MEMORY | spec.COMMAND_BUS_MASTER
        function.config_write(spec.PCI_CONFIG_COMMAND, 2, function.config_read(4, 2) | command)

    def read(self, name: str) -> int:
        field = spec.COMMON_CFG[name]
        return self.bar.read(self.offset + field.offset, field.width)

    def write(self, name: str, value: int) -> None:
        field = spec.COMMON_CFG[name]
        self.bar.write(self.offset + field.offset, field.width, value)

    def isr(self) -> int:
        return self.isr_bar.read(self.isr_offset, 1)

    def go_live(self, vector: int | None = None) -> None:
        """Negotiate VERSION_1 and the net device's STATUS, set DRIVER_OK."""
        self.write("device_status", 0)
        assert self.read("device_status") == 0
        self.write("device_status", Status.ACKNOWLEDGE | Status.DRIVER)
        for word, bits in enumerate((NET_STATUS, 1 << F_VERSION_1 - 32)):
            self.write("driver_feature_select", word)
            self.write("driver_feature", bits)
        live = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        self.write("device_status", live)
        assert self.read("device_status") == live
        if vector is not None:
            self.write("config_msix_vector", vector)
            assert self.read("config_msix_vector") == vector
        self.write("device_status", live | Status.DRIVER_OK)
        assert self.read("device_status") == live | Status.DRIVER_OK


def set_link(machine: QtestMachine, up: bool) -> None:
    machine.qemu.qmp.execute("set_link", {"name": "net", "up": up})


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("device", "pci_id", "bars"),
    [
        ("virtio-rng-pci,disable-legacy=on", 0x1044, {1, 4}),
        ("virtio-rng-pci", 0x1005, {0, 1, 4}),
        ("virtio-rng-pci,vectors=0,disable-legacy=on", 0x1044, {4}),
    ],
)
def test_bars_are_sized_and_placed(
    opened: Open, machine: str, device: str, pci_id: int, bars: set[int]
) -> None:
    function = opened(device, machine=machine)
    assert function.config_read(0, 4) == pci_id << 16 | spec.VENDOR_ID
    assert function.config_read(2, 2) == pci_id
    assert function.config_read(1, 1) == spec.VENDOR_ID >> 8
    modern = function.bar(4)
    assert (modern.size, modern.pointer, modern.port) == (0x4000, 0, False)
    assert function.config_read(spec.PCI_CONFIG_BAR0 + 16, 4) & ~0xF == modern.address
    for index in range(6):
        if index in bars:
            assert function.bar(index).address % function.bar(index).size == 0
        else:
            with pytest.raises(UsageError, match=rf"not {index}"):
                function.bar(index)


def test_a_transitional_device_answers_through_its_ports(opened: Open) -> None:
    function = opened("virtio-rng-pci")
    ports = function.bar(0)
    assert ports.port
    legacy_status = 18
    ports.write(legacy_status, 1, Status.ACKNOWLEDGE)
    assert ports.read(legacy_status, 1) == Status.ACKNOWLEDGE
    assert Registers(function).read("device_status") == Status.ACKNOWLEDGE


def test_a_function_starts_without_bus_master_and_interrupts(opened: Open) -> None:
    command = opened("virtio-rng-pci").config_read(spec.PCI_CONFIG_COMMAND, 2)
    assert command & spec.COMMAND_MEMORY
    assert not command & spec.COMMAND_BUS_MASTER
    assert command & spec.COMMAND_INTX_DISABLE


@pytest.mark.parametrize(
    ("offset", "width"), [(0x3FFF, 2), (0x4000, 1), (-1, 1), (0, 3), (0, 8)], ids=lambda value: f"{value:#x}"
)
def test_accesses_outside_a_bar_are_refused(opened: Open, offset: int, width: int) -> None:
    bar = opened("virtio-balloon-pci").bar(4)
    with pytest.raises(UsageError, match="of a BAR of 0x4000 bytes"):
        bar.read(offset, width)
    with pytest.raises(UsageError, match="of a BAR of 0x4000 bytes"):
        bar.write(offset, width, 0)


@pytest.mark.parametrize(
    ("machine", "offset", "width"),
    [("pc", 256, 4), ("q35", 4096, 4), ("q35", 1, 2), ("pc", 2, 4), ("q35", -4, 4), ("q35", 0, 8)],
)
def test_bad_configuration_accesses_are_refused(opened: Open, machine: str, offset: int, width: int) -> None:
    with pytest.raises(UsageError, match="naturally aligned"):
        opened("virtio-balloon-pci", machine=machine).config_read(offset, width)


def test_configuration_space_of_express_has_4096_bytes(launch: Launch) -> None:
    """Through memory (ECAM); its first 256 bytes are those that the ports give."""
    machine = launch(f"{NET},ats=on,aer=on", root_ports=True)
    bus, slot, _ = machine.locate(0)
    extended = set()
    at = 256
    while at:
        head = machine.config_read(bus, slot, at, 4)
        extended.add(head & 0xFFFF)
        at = head >> 20
    assert {EXTENDED_AER, EXTENDED_ATS} <= extended
    for width in (1, 2, 4):
        seen = [machine.config_read(bus, slot, offset, width) for offset in range(0, 256, width)]
        through_ports = []
        for offset in range(0, 256, width):
            lines = wire.write_port(0xCF8, 4, 1 << 31 | bus << 16 | slot << 11 | offset & 0xFC)
            lines += wire.read_port(0xCFC + offset % 4, width)
            through_ports.append(machine.session.ask(lines, 2).number)
        assert seen == through_ports
    assert machine.config_read(bus, slot + 1, 0, 4) == 0xFFFF_FFFF


def test_posted_writes_are_carried_out_in_order(opened: Open) -> None:
    registers = Registers(opened(NET))
    for count in range(1000):
        registers.write("queue_select", count)
    assert registers.read("queue_select") == 999


def test_threads_share_a_function(opened: Open) -> None:
    function = opened(NET)
    wrong: list[int] = []

    def hammer(offset: int, expected: int) -> None:
        wrong.extend(
            value for value in (function.config_read(offset, 2) for _ in range(200)) if value != expected
        )

    threads = [
        threading.Thread(target=hammer, args=(offset, function.config_read(offset, 2)))
        for offset in (0, 2, spec.PCI_CONFIG_SUBSYSTEM)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("root_port", ["0", "1"])
@pytest.mark.parametrize("machine", MACHINES)
def test_msix_is_an_eventfd(opened: Open, machine: str, root_port: str) -> None:
    function = opened(NET, machine=machine, root_port=root_port)
    assert function.msix_vectors == 4
    other, config = function.enable_msix(2)
    registers = Registers(function)
    registers.go_live(vector=1)
    for up in (False, True):
        set_link(function.machine, up)
        assert rings(config)
    assert not rings(other, 0)
    function.disable_interrupts()
    set_link(function.machine, False)
    function.config_read(0, 4)
    assert not rings(config, 0)


def test_masked_msix_waits_in_the_pending_bits(opened: Open) -> None:
    function = opened(NET)
    (config,) = function.enable_msix(1)
    registers = Registers(function)
    registers.go_live(vector=0)
    table = function.bar(1)
    vector_control = 12
    table.write(vector_control, 4, 1)
    set_link(function.machine, False)
    assert not rings(config, 0.05)
    table.write(vector_control, 4, 0)
    assert rings(config)


@pytest.mark.parametrize("root_port", ["0", "1"])
@pytest.mark.parametrize("machine", MACHINES)
def test_intx_is_an_eventfd(opened: Open, machine: str, root_port: str) -> None:
    function = opened(NET, machine=machine, root_port=root_port)
    line = function.enable_intx()
    registers = Registers(function)
    registers.go_live()
    for up in (False, True):
        set_link(function.machine, up)
        assert rings(line)
        # QEMU sets the queue bit too.
        assert registers.isr() & spec.ISR_CONFIG
        assert registers.isr() == 0
        function.unmask_intx()
        assert not rings(line, 0)
    function.disable_interrupts()
    set_link(function.machine, False)
    assert registers.isr() & spec.ISR_CONFIG
    line = function.enable_intx()
    assert not rings(line, 0.02)


def test_intx_is_masked_until_the_owner_unmasks(opened: Open) -> None:
    function = opened(NET)
    line = function.enable_intx()
    registers = Registers(function)
    registers.go_live()
    set_link(function.machine, False)
    assert rings(line)
    function.unmask_intx()
    assert rings(line), "the line is still raised, for the ISR was not read"
    registers.isr()
    set_link(function.machine, True)
    registers.read("device_status")
    assert not rings(line, 0), "masked since the last event"
    function.unmask_intx()
    assert rings(line)


def test_two_functions_have_interrupts_of_their_own(launch: Launch) -> None:
    machine = launch(NET, NET.replace("id=net", "id=other"), root_ports=True)
    functions = [QtestFunction(machine, number) for number in range(2)]
    fds = [function.enable_msix(1)[0] for function in functions]
    for function in functions:
        Registers(function).go_live(vector=0)
    set_link(machine, False)
    assert rings(fds[0])
    assert not rings(fds[1], 0)
    machine.qemu.qmp.execute("set_link", {"name": "other", "up": False})
    assert rings(fds[1])
    assert not rings(fds[0], 0)


def test_vectors_run_out_with_a_message(opened: Open) -> None:
    function = opened(NET, vectors="2")
    assert len(function.enable_msix(2)) == 2
    with pytest.raises(UsageError, match=r"3 MSI-X vectors asked for, 2 of 2 are left(\n.*)*vectors=N"):
        function.enable_msix(3)
    with pytest.raises(UsageError, match="5 MSI-X vectors of 4"):
        function.enable_msix(5)
    assert len(function.enable_msix(2)) == 2


def test_a_device_without_msix_says_so(opened: Open) -> None:
    function = opened("virtio-rng-pci,vectors=0")
    assert function.msix_vectors == 0
    with pytest.raises(UsageError, match="1 MSI-X vectors of 0"):
        function.enable_msix(1)


def test_function_level_reset_behind_a_root_port(opened: Open) -> None:
    function = opened(NET, root_port="1")
    registers = Registers(function)
    registers.go_live()
    bar, command = function.config_read(0x20, 4), function.config_read(spec.PCI_CONFIG_COMMAND, 2)
    assert function.reset() is True
    assert registers.read("device_status") == 0
    assert function.config_read(0x20, 4) == bar
    assert function.config_read(spec.PCI_CONFIG_COMMAND, 2) == command
    registers.go_live()


def test_no_function_level_reset_on_the_root_bus(opened: Open) -> None:
    function = opened(NET)
    registers = Registers(function)
    registers.go_live()
    assert function.reset() is False
    assert registers.read("device_status") & Status.DRIVER_OK


def test_parameters_attach_what_they_make(opened: Open) -> None:
    function = opened("virtio-blk-pci,id=b", blockdev="driver=null-co,size=1048576", object="iothread")
    qmp = function.machine.qemu.qmp
    (block,) = qmp.execute("query-block")
    assert block["inserted"]["node-name"] == "blockdev0"
    assert qmp.execute("qom-get", {"path": "/machine/peripheral/b", "property": "iothread"}) == (
        "/objects/object0"
    )
    named = opened(
        "virtio-blk-pci,id=b,drive=mine", blockdev="driver=null-co,node-name=mine,size=1048576", memory="64"
    )
    (block,) = named.machine.qemu.qmp.execute("query-block")
    assert block["inserted"]["node-name"] == "mine"
    assert named.machine.qemu.ram.size == 64 << 20
