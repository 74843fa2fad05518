"""Broken devices: identity, capabilities, registers, notifications and interrupts on PCI."""

from __future__ import annotations

from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.spec import pci
from guestpv.spec.pci import CfgType

from .device import mutant, replace
from .device_common import register

VENDOR_DATA = 9


def capability(function: SoftwareFunction, kind: CfgType, offset: int, value: int, width: int = 4) -> None:
    """Overwrite a field of a capability."""
    at = function.config.positions[kind] + offset
    function.config.data[at : at + width] = value.to_bytes(width, "little")


@mutant("DEV-PCI-03")
def foreign_vendor(function: SoftwareFunction) -> None:
    """Another vendor id."""
    function.config.put(pci.PCI_CONFIG_VENDOR, 2, 0x1AF5)


@mutant("DEV-PCI-04", "DEV-PCI-76", "DEV-CONF-07")
def unlisted_device_id(function: SoftwareFunction) -> None:
    """A device id that is neither a modern nor a transitional one."""
    function.config.put(pci.PCI_CONFIG_DEVICE, 2, 0x1010)


@mutant("DEV-PCI-01")
def endless_capability_list(function: SoftwareFunction) -> None:
    """The last capability leads back to the first."""
    data = function.config.data
    at = data[pci.PCI_CONFIG_CAPABILITIES]
    while data[at + 1]:
        at = data[at + 1]
    data[at + 1] = data[pci.PCI_CONFIG_CAPABILITIES]


@mutant("DEV-PCI-13", "DEV-PCI-91")
def notify_capability_without_multiplier(function: SoftwareFunction) -> None:
    """cap_len leaves out the multiplier."""
    capability(function, CfgType.NOTIFY, 2, 16, 1)


@mutant("DEV-PCI-78")
def overlapping_capabilities(function: SoftwareFunction) -> None:
    """A capability that claims its neighbour's bytes."""
    capability(function, CfgType.COMMON, 2, 0x40, 1)


@mutant("DEV-PCI-79")
def reserved_structure(function: SoftwareFunction) -> None:
    """A capability of a type that is not in use."""
    capability(function, CfgType.PCI_CFG, 3, 7, 1)


@mutant("DEV-PCI-17")
def no_common_structure(function: SoftwareFunction) -> None:
    """The common configuration cannot be found."""
    capability(function, CfgType.COMMON, 3, VENDOR_DATA, 1)


@mutant("DEV-PCI-33")
def no_notify_structure(function: SoftwareFunction) -> None:
    """The notification structure cannot be found."""
    capability(function, CfgType.NOTIFY, 3, VENDOR_DATA, 1)


@mutant("DEV-PCI-44")
def no_isr_structure(function: SoftwareFunction) -> None:
    """The ISR cannot be found."""
    capability(function, CfgType.ISR, 3, VENDOR_DATA, 1)


@mutant("DEV-PCI-49")
def no_device_structure(function: SoftwareFunction) -> None:
    """The device configuration cannot be found."""
    capability(function, CfgType.DEVICE, 3, VENDOR_DATA, 1)


@mutant("DEV-PCI-59")
def no_window(function: SoftwareFunction) -> None:
    """The PCI configuration access capability cannot be found."""
    capability(function, CfgType.PCI_CFG, 3, VENDOR_DATA, 1)


@mutant("DEV-PCI-16")
def common_structure_at_an_odd_place(function: SoftwareFunction) -> None:
    """The common configuration is not aligned."""
    capability(function, CfgType.COMMON, 8, 2)


@mutant("DEV-PCI-50")
def device_structure_at_an_odd_place(function: SoftwareFunction) -> None:
    """The device configuration is not aligned."""
    capability(function, CfgType.DEVICE, 8, 0x2002)


@mutant("DEV-PCI-80")
def structure_beyond_its_bar(function: SoftwareFunction) -> None:
    """The device configuration reaches out of its BAR."""
    capability(function, CfgType.DEVICE, 12, 1 << 20)


@mutant("DEV-PCI-82")
def common_structure_too_short(function: SoftwareFunction) -> None:
    """The common configuration has no room for queue_device."""
    capability(function, CfgType.COMMON, 12, 0x30)


@mutant("DEV-PCI-83")
def common_structure_without_queue_reset(function: SoftwareFunction) -> None:
    """RING_RESET is offered, queue_reset is not there."""
    capability(function, CfgType.COMMON, 12, 0x38)


DATA = "loopback:net?notification_data=on"


@mutant("DEV-PCI-34")
def notifications_at_an_odd_place(function: SoftwareFunction) -> None:
    """The notification structure is not aligned to 2 bytes."""
    capability(function, CfgType.NOTIFY, 8, 0x3001)


@mutant("DEV-PCI-40", spec=DATA)
def long_notifications_at_an_odd_place(function: SoftwareFunction) -> None:
    """The notification structure is not aligned to 4 bytes."""
    capability(function, CfgType.NOTIFY, 8, 0x3002)


@mutant("DEV-PCI-35")
def multiplier_of_6(function: SoftwareFunction) -> None:
    """The multiplier is no power of two."""
    capability(function, CfgType.NOTIFY, 16, 6)


@mutant("DEV-PCI-39", spec=DATA)
def multiplier_of_2_with_data(function: SoftwareFunction) -> None:
    """The multiplier is too small for 32-bit notifications."""
    capability(function, CfgType.NOTIFY, 16, 2)


@mutant("DEV-PCI-36")
def no_room_for_a_notification(function: SoftwareFunction) -> None:
    """The notification structure has one byte."""
    capability(function, CfgType.NOTIFY, 12, 1)


@mutant("DEV-PCI-41", spec=DATA)
def no_room_for_a_long_notification(function: SoftwareFunction) -> None:
    """The notification structure has two bytes."""
    capability(function, CfgType.NOTIFY, 12, 2)


@mutant("DEV-PCI-37", "DEV-PCI-38", spec="loopback:net")
def no_room_for_the_last_queue(function: SoftwareFunction) -> None:
    """The notification structure ends before the last queue's address."""
    capability(function, CfgType.NOTIFY, 12, 8)


@mutant("DEV-PCI-42", "DEV-PCI-43", spec=DATA)
def no_room_for_the_last_queue_with_data(function: SoftwareFunction) -> None:
    """The notification structure ends in the middle of the last queue's address."""
    capability(function, CfgType.NOTIFY, 12, 10)


@mutant("DEV-PCI-98")
def window_that_stays_where_it_is(function: SoftwareFunction) -> None:
    """bar, offset and length of the window take nothing."""
    at = function.config.positions[CfgType.PCI_CFG]
    function.config.mask[at + 4 : at + 16] = bytes(12)


def no_window_for(function: SoftwareFunction, writes: bool) -> None:
    """The window does one direction only."""

    def make(inner: Any) -> Any:
        def window(write: bytes | None) -> None:
            if (write is not None) != writes:
                inner(write)

        return window

    replace(function, "_window", make)


@mutant("DEV-PCI-60")
def window_that_does_not_write(function: SoftwareFunction) -> None:
    """A write to pci_cfg_data goes nowhere."""
    no_window_for(function, True)


@mutant("DEV-PCI-61")
def window_that_does_not_read(function: SoftwareFunction) -> None:
    """A read of pci_cfg_data gives what was there before."""
    no_window_for(function, False)


# Registers.


def read_register(function: SoftwareFunction, name: str, value: Any) -> None:
    """A register of the whole device reads as ``value(what it is)``."""
    replace(
        function.registers,
        "_read_register",
        lambda inner: lambda asked: value(inner(asked)) if asked == name else inner(asked),
    )


@mutant("DEV-PCI-18")
def feature_words_repeat(function: SoftwareFunction) -> None:
    """device_feature_select counts modulo 4."""
    registers = function.registers
    read_register(
        function,
        "device_feature",
        lambda value: function.device.offered >> 32 * (registers.device_feature_select % 4) & 0xFFFFFFFF,
    )


@mutant("DEV-PCI-19")
def driver_feature_reads_0(function: SoftwareFunction) -> None:
    """What the driver accepted cannot be read back."""
    read_register(function, "driver_feature", lambda value: 0)


@mutant("DEV-PCI-86", "DEV-PCI-81")
def one_select_for_both(function: SoftwareFunction) -> None:
    """The two feature selects are one register."""
    registers = function.registers

    def make(inner: Any) -> Any:
        def write(name: str, value: int) -> None:
            inner(name, value)
            if name.endswith("feature_select"):
                registers.device_feature_select = registers.driver_feature_select = value

        return write

    replace(registers, "_write_device", make)


@mutant("DEV-PCI-09")
def halves_are_not_independent(function: SoftwareFunction) -> None:
    """Writing the lower half of an address clears the upper one."""

    def make(inner: Any) -> Any:
        def write(field: Any, byte: int, value: int) -> None:
            if field.width == 8 and not byte:
                inner(field, 4, 0)
            inner(field, byte, value)

        return write

    replace(function.registers, "_write_queue", make)


@mutant("DEV-PCI-87", spec="loopback:net")
def queues_share_their_addresses(function: SoftwareFunction) -> None:
    """queue_desc shows the address of the last queue that it was written for."""
    seen = [0]

    def make(inner: Any) -> Any:
        def write(field: Any, byte: int, value: int) -> None:
            inner(field, byte, value)
            if field.name == "queue_desc" and not byte:
                seen[0] = value

        return write

    replace(function.registers, "_write_queue", make)
    register(function, "queue_desc", lambda value: seen[0])


@mutant("DEV-PCI-29")
def queues_without_end(function: SoftwareFunction) -> None:
    """Queues that are not there have a size."""
    register(function, "queue_size", lambda value: value or 16)


@mutant("DEV-PCI-89", spec="loopback:net")
def miscounted_queues(function: SoftwareFunction) -> None:
    """num_queues counts fewer queues than there are."""
    read_register(function, "num_queues", lambda value: value - 2)


@mutant("DEV-PCI-30")
def split_queue_of_100(function: SoftwareFunction) -> None:
    """A size that is no power of two, also for the split format."""
    function.model.depth = 100


@mutant("DEV-PCI-90")
def writable_generation(function: SoftwareFunction) -> None:
    """config_generation takes what the driver writes."""
    field = pci.COMMON_CFG["config_generation"]

    def make(inner: Any) -> Any:
        def write(offset: int, width: int, value: int) -> None:
            if offset == field.offset:
                function.device.generation = value
            inner(offset, width, value)

        return write

    replace(function.registers, "common_write", make)


# Notifications.


def notified(function: SoftwareFunction, change: Any) -> None:
    """``change(offset, width, value)`` says what the device takes a notification for."""
    replace(
        function.registers,
        "notify",
        lambda inner: lambda offset, width, value: inner(*change(offset, width, value)),
    )


@mutant("DEV-PCI-91", spec="loopback:net")
def notifications_at_one_address_only(function: SoftwareFunction) -> None:
    """Every queue is notified at its own address, but the device listens at the first one's only."""

    def make(inner: Any) -> Any:
        def notify(offset: int, width: int, value: int) -> None:
            if offset == 0:
                inner(offset, width, value)

        return notify

    replace(function.registers, "notify", make)


@mutant("DEV-PCI-92", spec="loopback:net?notification_data=on&packed=on&multiplier=0")
def notification_data_the_wrong_way_round(function: SoftwareFunction) -> None:
    """The queue is looked for in the upper half of the notification."""
    notified(function, lambda offset, width, value: (offset, width, value >> 16 | (value & 0xFFFF) << 16))


@mutant("DEV-PCI-93", spec="loopback:net?multiplier=0")
def queues_at_one_address_are_one(function: SoftwareFunction) -> None:
    """The value of a notification is not looked at."""
    notified(function, lambda offset, width, value: (offset, width, value & ~0xFFFF))


# Interrupts.


def isr_never_has(function: SoftwareFunction, missing: int) -> None:
    """An ISR bit is never set."""
    replace(function.registers, "raise_isr", lambda inner: lambda bit: inner(bit) if bit != missing else None)


@mutant("DEV-PCI-45")
def isr_without_changes(function: SoftwareFunction) -> None:
    """The ISR does not tell configuration changes."""
    isr_never_has(function, pci.ISR_CONFIG)


@mutant("DEV-PCI-46")
def isr_without_queues(function: SoftwareFunction) -> None:
    """The ISR does not tell used buffers."""
    isr_never_has(function, pci.ISR_QUEUE)


@mutant("DEV-PCI-94")
def isr_with_an_undefined_bit(function: SoftwareFunction) -> None:
    """Bit 2 of the ISR is set with every other."""
    replace(function.registers, "raise_isr", lambda inner: lambda bit: inner(bit | 4))


@mutant("DEV-PCI-48")
def isr_that_stays(function: SoftwareFunction) -> None:
    """Reading the ISR leaves it as it is."""
    registers = function.registers
    registers.read_isr = lambda offset, width: registers.isr  # type: ignore[method-assign]


@mutant("DEV-PCI-47")
def interrupt_status_stays_0(function: SoftwareFunction) -> None:
    """The PCI status register knows nothing of the ISR."""
    function._show_line = lambda: None  # type: ignore[method-assign]


@mutant("DEV-PCI-65", "DEV-PCI-67", "DEV-PCI-95")
def fewer_vectors_than_told(function: SoftwareFunction) -> None:
    """The table has more entries than the device can use."""
    function.registers.vectors_granted = 1


@mutant("DEV-PCI-68")
def vectors_for_good(function: SoftwareFunction) -> None:
    """An event that is mapped cannot be unmapped."""

    def make(inner: Any) -> Any:
        return lambda vector, where: inner(0 if vector == pci.NO_VECTOR else vector, where)

    replace(function.registers, "_grant", make)


@mutant("DEV-PCI-69")
def vectors_read_as_0(function: SoftwareFunction) -> None:
    """queue_msix_vector reads 0 whatever is mapped."""
    register(function, "queue_msix_vector", lambda value: 0)


@mutant("DEV-PCI-72")
def vectors_beyond_the_table(function: SoftwareFunction) -> None:
    """A vector that does not exist reads back as mapped."""
    function.registers._grant = lambda vector, where: vector  # type: ignore[method-assign]


def interrupt(function: SoftwareFunction, vector_of: Any) -> None:
    """``vector_of(queue or None, vector)`` is the vector that is sent."""

    def send(queue: Any) -> None:
        vector = function.registers.config_msix_vector if queue is None else queue.vector
        function.registers.raise_isr(pci.ISR_CONFIG if queue is None else pci.ISR_QUEUE)
        chosen = vector_of(queue, vector)
        if chosen != pci.NO_VECTOR:
            function.interrupts.message(chosen)

    function.device._interrupt = send


@mutant("DEV-PCI-73")
def interrupts_of_unmapped_queues(function: SoftwareFunction) -> None:
    """A queue without a vector uses vector 0."""
    interrupt(function, lambda queue, vector: 0 if queue and vector == pci.NO_VECTOR else vector)


@mutant("DEV-PCI-75")
def interrupts_of_unmapped_changes(function: SoftwareFunction) -> None:
    """Configuration changes without a vector use vector 0."""
    interrupt(function, lambda queue, vector: 0 if queue is None and vector == pci.NO_VECTOR else vector)


@mutant("DEV-PCI-96")
def queue_interrupts_on_another_vector(function: SoftwareFunction) -> None:
    """Queues send the vector beside theirs."""
    interrupt(function, lambda queue, vector: vector ^ 1 if queue and vector < 2 else vector)


@mutant("DEV-PCI-97")
def change_interrupts_on_another_vector(function: SoftwareFunction) -> None:
    """Configuration changes send the vector beside theirs."""
    interrupt(function, lambda queue, vector: vector ^ 1 if queue is None and vector < 2 else vector)
