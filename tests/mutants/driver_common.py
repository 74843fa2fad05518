"""Drivers with one mistake in status, features, configuration or cleanup (2.1 to 2.6, 3, 6)."""

from __future__ import annotations

from guestpv.devices.looks import Looks
from guestpv.spec import features as ft
from guestpv.spec import net
from guestpv.spec.pci import CfgType
from guestpv.spec.status import Status

from .driver_bench import Bench, healthy, mutant

ACK, DRIVER, OK, LIVE = 1, 3, 11, 15
RESET = 1 << ft.F_RING_RESET


@healthy()
def one_buffer(b: Bench) -> None:
    b.one(b.start()[0])


@healthy("rng?translated=off")
def physical_addresses(b: Bench) -> None:
    b.one(b.start()[0])


@healthy()
def twice_with_other_features(b: Bench) -> None:
    b.start(RESET)
    b.start(1 << ft.F_EVENT_IDX)


@healthy("rng?offer=+44,+26,+3,+100,+sr_iov")
def bits_that_mean_nothing(b: Bench) -> None:
    b.one(b.start()[0])


@healthy()
def a_queue_is_reset(b: Bench) -> None:
    b.start(RESET)
    b.function.registers.queue_reset_reads = 2
    b.driver.write("queue_reset", 1)
    while b.driver.read("queue_reset"):
        pass
    b.one(b.driver.queue(0, 4))


@healthy()
def gives_up(b: Bench) -> None:
    b.device.refuse_features_ok = True
    b.driver.negotiate(b.must)
    b.driver.write("device_status", DRIVER | Status.FAILED)


@healthy()
def a_reset_with_buffers_out(b: Bench) -> None:
    b.device.hold = True
    b.one(b.start()[0])


@healthy("net?offloads=on")
def offered_without_what_it_needs(b: Bench) -> None:
    b.device.offered &= ~(1 << net.F_GUEST_CSUM)
    b.start()


@healthy("balloon?target=258")
def reads_again_after_a_change(b: Bench) -> None:
    b.start(sizes={0: 8, 1: 8})
    b.model.set_target(0x102)
    b.watch.tell("num_pages", b.driver.read_at(CfgType.DEVICE, 0, 4))
    b.watch.settle()


@healthy("blk")
def reads_until_the_generation_holds_still(b: Bench) -> None:
    b.start()
    b.function.registers.generation_bumps = 2
    for _ in range(2):
        b.driver.read_at(CfgType.DEVICE, 0, 4)
        b.driver.read_at(CfgType.DEVICE, 4, 4)


@healthy("net")
def reads_the_address_again(b: Bench) -> None:
    b.start()
    b.function.registers.generation_bumps = 2
    for _ in range(2):
        for byte in range(6):
            b.driver.read_at(CfgType.DEVICE, byte, 1)


@healthy(looks=Looks(spare=64))
def a_larger_configuration(b: Bench) -> None:
    b.watch.works = ("DRV-CONFIG-05",)
    b.start()


@healthy()
def refuses_what_it_cannot_use(b: Bench) -> None:
    b.watch.refuses = ("DRV-FEAT-13",)
    b.driver.begin()
    b.driver.write("device_status", DRIVER | Status.FAILED)


# Status and initialization


@mutant("DRV-STATUS-01", "DRV-INIT-08")
def two_steps_at_once(b: Bench) -> None:
    b.driver.begin()
    b.driver.offered()
    b.driver.write("driver_feature_select", 1)
    b.driver.write("driver_feature", b.must >> 32)
    b.driver.write("device_status", LIVE)
    b.driver.read("device_status")


@mutant("DRV-STATUS-02")
def drops_a_bit(b: Bench) -> None:
    b.driver.begin()
    b.driver.write("device_status", Status.DRIVER)


@mutant("DRV-STATUS-03")
def goes_on_after_failed(b: Bench) -> None:
    b.driver.begin()
    b.driver.write("device_status", DRIVER | Status.FAILED)
    b.driver.write("device_status", DRIVER | Status.FAILED)


@mutant("DRV-STATUS-05")
def sets_a_bit_that_no_status_has(b: Bench) -> None:
    b.driver.begin()
    b.driver.write("device_status", DRIVER | 32)


@mutant("DRV-INIT-01")
def begins_without_a_reset(b: Bench) -> None:
    b.driver.write("device_status", ACK)


@mutant("DRV-INIT-02")
def acknowledge_and_driver_at_once(b: Bench) -> None:
    b.driver.reset()
    b.driver.write("device_status", DRIVER)


@mutant("DRV-INIT-03")
def does_not_look_at_what_is_offered(b: Bench) -> None:
    b.driver.begin()
    b.driver.write("driver_feature_select", 1)
    b.driver.write("driver_feature", b.must >> 32)
    b.driver.write("device_status", OK)
    b.driver.read("device_status")


@mutant("DRV-INIT-05", spec="balloon")
def writes_configuration_too_early(b: Bench) -> None:
    b.driver.begin()
    b.driver.write_at(CfgType.DEVICE, 4, 4, 0)


@mutant("DRV-INIT-06", "DRV-INIT-08")
def never_settles_features(b: Bench) -> None:
    b.driver.begin()
    b.driver.write("device_status", DRIVER | Status.DRIVER_OK)


@mutant("DRV-INIT-07")
def writes_features_after_features_ok(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.write("driver_feature_select", 1)
    b.driver.write("driver_feature", b.must >> 32)


@mutant("DRV-INIT-08")
def does_not_read_features_ok_back(b: Bench) -> None:
    b.driver.begin()
    b.driver.offered()
    b.driver.write("driver_feature_select", 1)
    b.driver.write("driver_feature", b.must >> 32)
    b.driver.write("device_status", OK)
    b.driver.features = b.must
    b.driver.queue(0, 8)


@mutant("DRV-INIT-09")
def sets_up_a_queue_too_early(b: Bench) -> None:
    b.driver.begin()
    b.driver.write("queue_select", 0)
    b.driver.read("queue_size")
    b.driver.write("queue_size", 8)


@mutant("DRV-INIT-10")
def enables_a_queue_after_driver_ok(b: Bench) -> None:
    b.start(sizes={0: 8})
    b.device.queues[0].reset()
    b.driver.queue(0, 8)


@mutant("DRV-INIT-12")
def sets_up_queues_although_refused(b: Bench) -> None:
    b.device.refuse_features_ok = True
    b.driver.negotiate(b.must)
    b.driver.write("queue_select", 0)
    b.driver.read("queue_size")
    b.driver.write("queue_size", 8)


@mutant("DRV-INIT-13")
def kicks_before_driver_ok(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.queue(0, 8).kick()
    b.driver.driver_ok()


# Features


@mutant("DRV-FEAT-01")
def accepts_what_is_not_offered(b: Bench) -> None:
    b.driver.negotiate(b.must | 1 << ft.F_RING_PACKED)


@mutant("DRV-FEAT-02", spec="net")
def accepts_without_what_it_requires(b: Bench) -> None:
    b.driver.negotiate(b.must | 1 << net.F_CTRL_GUEST_OFFLOADS)


@mutant("DRV-FEAT-02", "DRV-FEAT-03", spec="net")
def takes_what_is_offered_unseen(b: Bench) -> None:
    b.device.offered = b.must | 1 << net.F_CTRL_GUEST_OFFLOADS
    b.driver.negotiate(b.device.offered)


def fails_when_offered(b: Bench) -> None:
    b.driver.begin()
    b.driver.offered()
    b.driver.write("device_status", DRIVER | Status.FAILED)


mutant("DRV-FEAT-04", "DRV-FEAT-14", spec="rng?offer=+26")(fails_when_offered)
mutant("DRV-FEAT-05", "DRV-FEAT-14", spec="rng?offer=+44")(fails_when_offered)
mutant("DRV-FEAT-07", "DRV-FEAT-14", spec="rng?offer=+3")(fails_when_offered)


def accepts_all(b: Bench) -> None:
    b.driver.negotiate(b.device.offered)


mutant("DRV-FEAT-08", spec="rng?offer=+26")(accepts_all)
mutant("DRV-FEAT-09", "DRV-FEAT-29", spec="rng?offer=+44")(accepts_all)
mutant("DRV-FEAT-11", spec="rng?offer=+3")(accepts_all)
mutant("DRV-FEAT-24", spec="rng?offer=+sr_iov")(accepts_all)


@mutant("DRV-FEAT-13")
def gives_up_in_silence(b: Bench) -> None:
    b.watch.refuses = ("DRV-FEAT-13",)
    b.driver.begin()


@mutant("DRV-FEAT-15")
def leaves_version_1_out(b: Bench) -> None:
    b.driver.negotiate(1 << ft.F_ACCESS_PLATFORM)


@mutant("DRV-FEAT-30", "DRV-INIT-07")
def changes_its_mind_without_a_reset(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.write("driver_feature_select", 0)
    b.driver.write("driver_feature", 1 << ft.F_EVENT_IDX)


def gives_memory_that_is_not_mapped(b: Bench) -> None:
    queue = b.start()[0]
    queue.parts = lambda readable, writable: [(0x1000, 16, True)]  # type: ignore[method-assign]
    b.one(queue)


mutant("DRV-FEAT-18")(gives_memory_that_is_not_mapped)
mutant("DRV-FEAT-19", spec="rng?translated=off")(gives_memory_that_is_not_mapped)


# Configuration


@mutant("DRV-CONFIG-01", spec="blk")
def believes_a_torn_capacity(b: Bench) -> None:
    b.start()
    b.function.registers.generation_bumps = 1
    b.driver.read_at(CfgType.DEVICE, 0, 4)
    b.function.registers.generation_bumps = 1
    b.driver.read_at(CfgType.DEVICE, 4, 4)


@mutant("DRV-CONFIG-02", spec="net")
def believes_a_torn_address(b: Bench) -> None:
    b.start()
    for byte in range(6):
        b.function.registers.generation_bumps = 1
        b.driver.read_at(CfgType.DEVICE, byte, 1)


@mutant("DRV-CONFIG-04", spec="net")
def reads_a_field_that_is_not_there(b: Bench) -> None:
    b.start()
    b.driver.read_at(CfgType.DEVICE, 10, 2)


@mutant("DRV-CONFIG-05", looks=Looks(spare=64))
def wants_the_length_that_it_knows(b: Bench) -> None:
    b.watch.works = ("DRV-CONFIG-05",)
    b.driver.reset()


@mutant("DRV-CONFIG-07", spec="balloon")
def takes_big_for_little_endian(b: Bench) -> None:
    b.start(sizes={0: 8, 1: 8})
    b.model.set_target(0x102)
    value = b.driver.read_at(CfgType.DEVICE, 0, 4)
    b.watch.tell("num_pages", int.from_bytes(value.to_bytes(4, "big"), "little"))


@mutant("DRV-CONFIG-08", spec="balloon")
def does_not_mind_changes(b: Bench) -> None:
    b.start(sizes={0: 8, 1: 8})
    b.model.set_target(5)
    b.watch.settle()


# Queue reset and cleanup


@mutant("DRV-VQRESET-01")
def takes_a_queue_reset_for_granted(b: Bench) -> None:
    b.start(RESET)
    b.driver.write("queue_reset", 1)
    b.driver.queue(0, 4)


@mutant("DRV-VQRESET-03", "DRV-FEAT-18")
def enables_a_queue_without_its_addresses(b: Bench) -> None:
    b.start(RESET)
    b.driver.write("queue_reset", 1)
    b.driver.read("queue_reset")
    b.driver.write("queue_size", 4)
    b.driver.write("queue_enable", 1)


@mutant("DRV-VQRESET-04", "DRV-PCI-61")
def resets_a_queue_without_the_feature(b: Bench) -> None:
    b.start()
    b.driver.write("queue_reset", 1)


@mutant("DRV-CLEANUP-01")
def changes_what_it_gave_away(b: Bench) -> None:
    queue = b.start()[0]
    b.device.hold = True
    b.one(queue)
    queue.rings.desc[0]["len"] = 4
    b.device.release()


@mutant("DRV-CLEANUP-02")
def takes_its_memory_back_too_early(b: Bench) -> None:
    queue = b.start()[0]
    b.device.hold = True
    region = b.function.dma.map(4096)
    queue.parts = lambda readable, writable: [(region.segments[0].address, 16, True)]  # type: ignore[method-assign]
    b.one(queue)
    b.function.dma.unmap(region)
