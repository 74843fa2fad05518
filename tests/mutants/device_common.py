"""Broken devices: status, features, configuration and reset."""

from __future__ import annotations

from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.spec import features as ft
from guestpv.spec import net
from guestpv.spec.status import Status

from .device import mutant, replace


def messages(function: SoftwareFunction) -> None:
    """The message of every vector."""
    for vector in range(function.interrupts.vectors):
        function.interrupts.message(vector)


def on_kick(function: SoftwareFunction, action: Any) -> None:
    """Call ``action(index)`` at each notification, before the device does anything."""

    def make(inner: Any) -> Any:
        def kick(index: int, data: int | None = None) -> None:
            action(index)
            inner(index, data)

        return kick

    replace(function.device, "kick", make)


@mutant("DEV-STATUS-02")
def interrupts_before_driver_ok(function: SoftwareFunction) -> None:
    """A notification is answered by an interrupt, also before DRIVER_OK."""
    on_kick(function, lambda index: messages(function))


@mutant("DEV-STATUS-04")
def needs_reset_in_silence(function: SoftwareFunction) -> None:
    """DEVICE_NEEDS_RESET is set without a configuration change notification."""
    device = function.device

    def need_reset() -> None:
        device.status |= Status.NEEDS_RESET

    device.need_reset = need_reset  # type: ignore[method-assign]


@mutant("DEV-STATUS-05")
def status_with_an_undefined_bit(function: SoftwareFunction) -> None:
    """Bit 5 of device_status is set once the driver has written something."""
    replace(function.registers, "_read_status", lambda inner: lambda: inner() and inner() | 0x20)


@mutant("DEV-STATUS-06")
def status_is_not_0_at_power_on(function: SoftwareFunction) -> None:
    """The device comes up acknowledged."""
    function.device.status = Status.ACKNOWLEDGE


@mutant("DEV-RESET-02")
def interrupts_after_reset(function: SoftwareFunction) -> None:
    """A notification after a reset is answered by an interrupt."""
    on_kick(function, lambda index: function.device.status == Status.RESET and messages(function))


@mutant("DEV-RESET-03")
def uses_old_rings_after_reset(function: SoftwareFunction) -> None:
    """A notification after a reset makes the device write to the used ring that it knew before."""
    device = function.device
    old: dict[int, Any] = {}

    def reset(inner: Any) -> Any:
        def keep() -> None:
            old.update({queue.index: queue.ring for queue in device.queues if queue.ring})
            inner()

        return keep

    def write(index: int) -> None:
        ring = old.get(index)
        if device.status == Status.RESET and ring is not None and hasattr(ring, "_used"):
            ring._used[1] += 1

    replace(device, "reset", reset)
    on_kick(function, write)


# Features.


@mutant("DEV-FEAT-01", spec="loopback:net")
def offers_without_prerequisite(function: SoftwareFunction) -> None:
    """GUEST_TSO4 without GUEST_CSUM."""
    device = function.device
    device.offered = device.offered & ~(1 << net.F_GUEST_CSUM) | 1 << net.F_GUEST_TSO4


@mutant("DEV-FEAT-03")
def keeps_features_ok_whatever_comes(function: SoftwareFunction) -> None:
    """FEATURES_OK stays for any mask."""
    device = function.device

    def negotiate() -> None:
        device.features = device.accepted
        device.status |= Status.FEATURES_OK

    device._negotiate = negotiate  # type: ignore[method-assign]


@mutant("DEV-FEAT-04")
def offers_an_undefined_bit(function: SoftwareFunction) -> None:
    """Bit 20 means nothing for a disk."""
    function.device.offered |= 1 << 20


@mutant("DEV-FEAT-17")
def offers_an_unassigned_bit(function: SoftwareFunction) -> None:
    """Bit 45 is nobody's."""
    function.device.offered |= 1 << 45


@mutant("DEV-FEAT-06")
def does_not_offer_version_1(function: SoftwareFunction) -> None:
    """A device of before 1.0."""
    function.device.offered &= ~(1 << ft.F_VERSION_1)


@mutant("DEV-FEAT-10", spec="loopback:blk?packed=on&in_order=on")
def uses_in_reverse_order(function: SoftwareFunction) -> None:
    """With IN_ORDER the buffers of one notification are used last first."""
    device = function.device

    def serve(queue: Any) -> None:
        if queue.ring is None:
            return
        queue.ring.in_order = False
        chains = list(queue.chains())
        for chain in reversed(chains):
            device.model.handle(queue, chain)

    device.model.serve = serve  # type: ignore[method-assign]


@mutant("DEV-FEAT-16")
def does_not_know_indirect_tables(function: SoftwareFunction) -> None:
    """INDIRECT_DESC is negotiated and not understood."""
    for queue in function.device.queues:

        def make(inner: Any, queue: Any = queue) -> Any:
            def enable() -> None:
                inner()
                queue.ring.indirect = False

            return enable

        replace(queue, "enable", make)


# Configuration.


@mutant("DEV-CONFIG-01")
def configuration_is_empty_before_features_ok(function: SoftwareFunction) -> None:
    """Fields read 0 until features are negotiated."""
    registers = function.registers

    def make(inner: Any) -> Any:
        def config_bytes() -> bytes:
            block: bytes = inner()
            return block if function.device.status & Status.FEATURES_OK else bytes(len(block))

        return config_bytes

    replace(registers, "config_bytes", make)


def swapped(inner: Any) -> Any:
    """A read of the configuration with its bytes the other way round."""

    def config_read(offset: int, width: int) -> int:
        value: int = inner(offset, width)
        return int.from_bytes(value.to_bytes(width, "little"), "big")

    return config_read


@mutant("DEV-CONFIG-02", spec="loopback:balloon")
def configuration_is_big_endian(function: SoftwareFunction) -> None:
    """Fields have their highest byte first."""
    replace(function.registers, "config_read", swapped)


@mutant("DEV-PCI-77")
def halves_are_swapped(function: SoftwareFunction) -> None:
    """The upper half of a 64-bit field lies at the lower address."""
    replace(
        function.registers,
        "config_read",
        lambda inner: lambda offset, width: inner(offset ^ 4 if offset < 8 else offset, width),
    )


@mutant("DEV-CONFIG-03", spec="loopback:net")
def changes_in_silence(function: SoftwareFunction) -> None:
    """A change of the configuration is not notified."""
    function.device.config_changed = function.device.bump_generation  # type: ignore[method-assign]


@mutant("DEV-CONFIG-04", "DEV-PCI-21", spec="loopback:balloon")
def generation_stands_still(function: SoftwareFunction) -> None:
    """config_generation never changes."""
    function.device.config_seen = lambda: None  # type: ignore[method-assign]


# Reset of the registers, and of one queue.


def keep_over_reset(function: SoftwareFunction, name: str) -> None:
    """Every queue keeps an attribute over a reset."""
    for queue in function.device.queues:

        def make(inner: Any, queue: Any = queue) -> Any:
            def reset() -> None:
                kept = getattr(queue, name)
                inner()
                setattr(queue, name, kept)

            return reset

        replace(queue, "reset", make)


@mutant("DEV-PCI-70")
def vectors_survive_a_reset(function: SoftwareFunction) -> None:
    """Queues stay mapped to their vectors."""
    keep_over_reset(function, "vector")


@mutant("DEV-PCI-88")
def sizes_survive_a_reset(function: SoftwareFunction) -> None:
    """queue_size keeps what the driver wrote."""
    keep_over_reset(function, "size")


def register(function: SoftwareFunction, name: str, value: Any) -> None:
    """A queue register reads as ``value(what it is)``."""
    replace(
        function.registers,
        "_read_queue",
        lambda inner: lambda asked: value(inner(asked)) if asked == name else inner(asked),
    )


@mutant("DEV-PCI-23")
def queues_are_enabled_after_a_reset(function: SoftwareFunction) -> None:
    """queue_enable reads 1 while the device is reset."""
    device = function.device
    register(function, "queue_enable", lambda value: value or int(device.status == Status.RESET))


@mutant("DEV-PCI-24")
def queue_reset_reads_1_at_first(function: SoftwareFunction) -> None:
    """queue_reset reads 1 until the queue is enabled."""

    def make(inner: Any) -> Any:
        def read(name: str) -> int:
            value: int = inner(name)
            return value if name != "queue_reset" or inner("queue_enable") else 1

        return read

    replace(function.registers, "_read_queue", make)


@mutant("DEV-PCI-25")
def queue_reset_reads_1_when_enabled(function: SoftwareFunction) -> None:
    """queue_reset reads 1 while the queue is enabled."""

    def make(inner: Any) -> Any:
        def read(name: str) -> int:
            value: int = inner(name)
            return 1 if name == "queue_reset" and inner("queue_enable") else value

        return read

    replace(function.registers, "_read_queue", make)


@mutant("DEV-PCI-26")
def queue_reset_does_nothing(function: SoftwareFunction) -> None:
    """A write to queue_reset is ignored."""
    function.registers._write_queue_reset = lambda queue, value: None  # type: ignore[method-assign]


@mutant("DEV-PCI-27")
def queue_reset_reads_0_too_early(function: SoftwareFunction) -> None:
    """queue_reset reads 0 while the queue is reset, some accesses later."""
    registers = function.registers
    waiting: list[tuple[Any, Any]] = []

    def write(inner: Any) -> Any:
        return lambda queue, value: waiting.append((inner, (queue, value)))

    def read(inner: Any) -> Any:
        def read_queue(name: str) -> int:
            value: int = inner(name)
            if name != "queue_reset" and waiting:
                done, arguments = waiting.pop()
                done(*arguments)
            return value

        return read_queue

    replace(registers, "_write_queue_reset", write)
    replace(registers, "_read_queue", read)


@mutant("DEV-PCI-28")
def queue_stays_enabled_after_its_reset(function: SoftwareFunction) -> None:
    """queue_enable reads 1 once a queue was enabled, also after its reset."""
    register(function, "queue_enable", lambda value: int(bool(value or function.device.running)))


def late_queue_reset(function: SoftwareFunction, after: Any) -> None:
    """A queue reset that shows in the registers; ``after(queue)`` runs at notifications that follow."""
    gone: dict[int, Any] = {}

    def write(inner: Any) -> Any:
        def reset(queue: Any, value: int) -> None:
            gone[queue.index] = queue.ring, queue.vector
            inner(queue, value)

        return reset

    def kicked(index: int) -> None:
        queue = function.device.queues[index]
        if index in gone and not queue.enabled:
            after(queue, *gone[index])

    replace(function.registers, "_write_queue_reset", write)
    on_kick(function, kicked)


@mutant("DEV-VQRESET-01", "DEV-PCI-26")
def runs_queues_after_their_reset(function: SoftwareFunction) -> None:
    """A queue that was reset is served at a notification."""

    def serve(queue: Any, ring: Any, vector: int) -> None:
        queue.ring = ring
        function.device.model.serve(queue)

    late_queue_reset(function, serve)


@mutant("DEV-VQRESET-02")
def interrupts_for_queues_after_their_reset(function: SoftwareFunction) -> None:
    """A notification of a queue that was reset is answered by its interrupt."""
    late_queue_reset(function, lambda queue, ring, vector: function.interrupts.message(vector))


@mutant("DEV-VQRESET-03")
def queue_reset_keeps_the_position(function: SoftwareFunction) -> None:
    """A queue that is enabled again goes on where it was."""
    popped: dict[int, int] = {}

    def write(inner: Any) -> Any:
        def reset(queue: Any, value: int) -> None:
            popped[queue.index] = queue.ring.popped
            inner(queue, value)

        return reset

    replace(function.registers, "_write_queue_reset", write)
    for queue in function.device.queues:

        def make(inner: Any, queue: Any = queue) -> Any:
            def enable() -> None:
                inner()
                if queue.index in popped:
                    queue.ring.popped = popped[queue.index]

            return enable

        replace(queue, "enable", make)


@mutant("DEV-VQRESET-04")
def queue_reset_keeps_the_size(function: SoftwareFunction) -> None:
    """A queue that is enabled again has the size it had at first."""
    sizes: dict[int, int] = {}
    for queue in function.device.queues:

        def make(inner: Any, queue: Any = queue) -> Any:
            def enable() -> None:
                queue.size = sizes.setdefault(queue.index, queue.size)
                inner()

            return enable

        replace(queue, "enable", make)


@mutant("DEV-VQRESET-05")
def queue_reset_resets_the_device(function: SoftwareFunction) -> None:
    """The reset of one queue takes the device's status with it."""
    device = function.device

    def make(inner: Any) -> Any:
        def reset(queue: Any, value: int) -> None:
            inner(queue, value)
            device.status = Status.RESET

        return reset

    replace(function.registers, "_write_queue_reset", make)


@mutant("DEV-FEAT-15")
def offers_sr_iov_without_having_it(function: SoftwareFunction) -> None:
    """SR_IOV without the capability."""
    function.device.offered |= 1 << ft.F_SR_IOV
