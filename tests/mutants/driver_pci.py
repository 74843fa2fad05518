"""Drivers with one mistake in virtio over PCI (4.1)."""

from __future__ import annotations

from guestpv.devices.looks import ORDER, Looks, reserved_bar, reserved_type
from guestpv.spec import features as ft
from guestpv.spec import pci
from guestpv.spec.pci import CfgType
from guestpv.spec.status import Status

from .driver_bench import Bench, healthy, mutant

LOOKS = {
    "DRV-PCI-01": Looks(),
    "DRV-PCI-02": Looks(device=0x1005),
    "DRV-PCI-03": Looks(revision=0x77),
    "DRV-PCI-10": Looks(first=(reserved_type(),)),
    "DRV-PCI-12": Looks(longer=8),
    "DRV-PCI-13": Looks(first=(reserved_bar(),)),
    "DRV-PCI-15": Looks(spare=512),
    "DRV-PCI-41": Looks(),
    "DRV-PCI-57": Looks(order=ORDER[::-1]),
    "DRV-PCI-58": Looks(bar=2, shift=8192),
}
"""Requirement -> a function that a driver has to work with."""
STRANGERS = {"DRV-PCI-40": Looks(order=()), "DRV-PCI-54": Looks(device=0x1080)}
"""Requirement -> a function that a driver has to leave alone."""
DATA = 1 << ft.F_NOTIFICATION_DATA
PACKED = 1 << ft.F_RING_PACKED


def presented(requirement: str, looks: Looks, works: bool) -> None:
    def walk(b: Bench) -> None:
        b.watch.works, b.watch.refuses = ((requirement,), ()) if works else ((), (requirement,))
        b.driver.start(b.must, {0: 8})

    def gives_up(b: Bench) -> None:
        b.watch.works, b.watch.refuses = ((requirement,), ()) if works else ((), (requirement,))

    right, wrong = (walk, gives_up) if works else (gives_up, walk)
    right.__name__, wrong.__name__ = f"lives_with_{requirement}", f"breaks_{requirement}"
    healthy(looks=looks)(right)
    if requirement != "DRV-PCI-40":
        mutant(requirement, looks=looks)(wrong)


for name, odd in LOOKS.items():
    presented(name, odd, True)
for name, odd in STRANGERS.items():
    presented(name, odd, False)


def window(b: Bench, bar: int, offset: int, length: int, at: int = 16, width: int = 4) -> None:
    """One access through the PCI configuration access capability."""
    b.driver.read("num_queues")
    place = b.function.config.positions[CfgType.PCI_CFG]
    for field, value, size in ((4, bar, 1), (8, offset, 4), (12, length, 4)):
        b.function.config_write(place + field, size, value)
    b.function.config_read(place + at, width)


@healthy()
def through_the_window(b: Bench) -> None:
    b.start()
    window(b, 4, 0x14, 1)


@healthy("rng?notification_data=on")
def with_data(b: Bench) -> None:
    b.one(b.start(DATA)[0])


@healthy("rng?notif_config_data=on")
def with_other_notification_data(b: Bench) -> None:
    b.one(b.start(1 << ft.F_NOTIF_CONFIG_DATA)[0])


@healthy("rng?packed=on&queue_size=7")
def an_odd_size(b: Bench) -> None:
    b.one(b.start(PACKED, {0: 7})[0])


@healthy()
def with_vectors(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.write("config_msix_vector", 0)
    b.driver.read("config_msix_vector")
    b.driver.queue(0, 8, 1)
    b.driver.driver_ok()


@healthy("balloon")
def writes_a_32_bit_field(b: Bench) -> None:
    b.start(sizes={0: 8, 1: 8})
    b.driver.write_at(CfgType.DEVICE, 4, 4, 0)


@mutant("DRV-PCI-39")
def knows_where_the_structures_are(b: Bench) -> None:
    b.function.config_write(4, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    b.function.bar(4).write(20, 1, 0)
    b.function.bar(4).read(20, 1)


@mutant("DRV-PCI-39", "DRV-PCI-40", looks=Looks(order=()))
def guesses_where_the_structures_are(b: Bench) -> None:
    b.watch.refuses = ("DRV-PCI-40",)
    b.function.config_write(4, 2, pci.COMMAND_MEMORY)
    b.function.bar(4).read(20, 1)


WIDTHS = {
    "DRV-PCI-05 DRV-NET-175": (CfgType.DEVICE, 0, 2),
    "DRV-PCI-06": (CfgType.DEVICE, 6, 1),
    "DRV-PCI-07": (CfgType.COMMON, 0x00, 2),
}
ACROSS = {"DRV-PCI-59": (0x14, 4, "DRV-PCI-05"), "DRV-PCI-60": (0x1C, 4, "DRV-PCI-06")}
WRITES = {
    "DRV-PCI-18": ("device_feature", 1),
    "DRV-PCI-19": ("num_queues", 1),
    "DRV-PCI-20": ("config_generation", 1),
    "DRV-PCI-21": ("queue_notify_off", 1),
    "DRV-PCI-22": ("queue_notif_config_data", 1),
    "DRV-PCI-23 DRV-PACKED-22": ("queue_size", 0),
    "DRV-PCI-24 DRV-SPLIT-38": ("queue_size", 3),
    "DRV-PCI-27": ("queue_enable", 0),
    "DRV-PCI-44": ("queue_msix_vector", 9),
    "DRV-PCI-66": ("queue_size", 1024),
    "DRV-PCI-67": ("queue_enable", 2),
}


def writes(requirement: str, register: str, value: int) -> None:
    def walk(b: Bench) -> None:
        more = {"DRV-PCI-22": 1 << ft.F_NOTIF_CONFIG_DATA, "DRV-PCI-23": PACKED}.get(requirement[:10], 0)
        b.device.offered |= more
        b.driver.negotiate(b.must | more)
        b.driver.write("queue_select", 0)
        for name in ("queue_size", register):
            b.driver.read(name)
        for area in ("desc", "driver", "device"):
            b.driver.write(f"queue_{area}", 0)
        b.driver.write(register, value)

    walk.__name__ = f"writes_{value}_to_{register}"
    mutant(*requirement.split())(walk)


def accesses(requirements: tuple[str, ...], kind: CfgType, offset: int, width: int) -> None:
    def walk(b: Bench) -> None:
        b.driver.read_at(kind, offset, width)

    walk.__name__ = f"reads_{width}_bytes_at_{offset}_of_{kind.name.lower()}"
    mutant(*requirements, spec="net")(walk)


for name, (register, value) in WRITES.items():
    writes(name, register, value)
for name, (kind, offset, width) in WIDTHS.items():
    accesses(tuple(name.split()), kind, offset, width)
for name, (offset, width, also) in ACROSS.items():
    accesses((name, also), CfgType.COMMON, offset, width)


@mutant("DRV-PCI-17")
def writes_a_capability(b: Bench) -> None:
    b.start()
    b.function.config_write(b.function.config.positions[CfgType.COMMON] + 8, 4, 0)


@mutant("DRV-PCI-25", "DRV-FEAT-18")
def enables_a_queue_that_has_no_addresses(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.write("queue_select", 0)
    b.driver.read("queue_size")
    b.driver.write("queue_enable", 1)


@mutant("DRV-PCI-26")
def does_not_wait_for_the_reset(b: Bench) -> None:
    b.driver.write("device_status", 0)
    b.driver.write("device_status", Status.ACKNOWLEDGE)


@mutant("DRV-PCI-28", "DRV-VQRESET-01")
def enables_a_queue_that_is_being_reset(b: Bench) -> None:
    b.start(1 << ft.F_RING_RESET)
    b.function.registers.queue_reset_reads = 2
    b.driver.write("queue_reset", 1)
    b.driver.queue(0, 4)


@mutant("DRV-PCI-36")
def a_window_that_is_not_aligned(b: Bench) -> None:
    window(b, 4, 2, 4)


@mutant("DRV-PCI-37")
def looks_askew_through_the_window(b: Bench) -> None:
    window(b, 4, 0x14, 1, at=17, width=2)


@mutant("DRV-PCI-38")
def a_window_on_nothing(b: Bench) -> None:
    window(b, 4, 0x800, 4)


@mutant("DRV-PCI-75")
def a_window_of_three_bytes(b: Bench) -> None:
    window(b, 4, 0, 3)


@mutant("DRV-PCI-45")
def does_not_read_its_vector_back(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.write("config_msix_vector", 0)
    b.driver.driver_ok()


@mutant("DRV-PCI-47")
def kicks_with_32_bits(b: Bench) -> None:
    b.start()[0].kick(width=4)


@mutant("DRV-PCI-48", spec="rng?notification_data=on")
def kicks_with_16_bits(b: Bench) -> None:
    b.start(DATA)[0].kick(0, width=2)


@mutant("DRV-PCI-49", spec="rng?multiplier=0")
def kicks_a_queue_that_is_not_there(b: Bench) -> None:
    b.start()[0].kick(7)


@mutant("DRV-PCI-50", spec="rng?multiplier=0&notification_data=on")
def kicks_with_data_a_queue_that_is_not_there(b: Bench) -> None:
    b.start(DATA)[0].kick(0x0001_0001)


@mutant("DRV-PCI-55", "DRV-SPLIT-01")
def exchanges_the_halves_of_addresses(b: Bench) -> None:
    b.driver.negotiate(b.must)
    memory = b.driver.pool.allocate(4096)
    b.driver.write("queue_select", 0)
    b.driver.write("queue_size", min(8, b.driver.read("queue_size")))
    for number, area in enumerate(("desc", "driver", "device")):
        address = memory.address + 1024 * number
        b.driver.write(f"queue_{area}", address >> 32 | (address & 0xFFFFFFFF) << 32)
    b.driver.write("queue_enable", 1)


@mutant("DRV-PCI-56")
def reads_behind_a_structure(b: Bench) -> None:
    b.driver.read_at(CfgType.COMMON, 0x80, 4)


@mutant("DRV-PCI-64")
def does_not_select_a_feature_word(b: Bench) -> None:
    b.driver.begin()
    b.driver.read("device_feature")


@mutant("DRV-PCI-65")
def does_not_select_a_queue(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.read("queue_size")


@mutant("DRV-PCI-66")
def does_not_ask_for_the_size(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.write("queue_select", 0)
    b.driver.write("queue_size", 8)


@mutant("DRV-PCI-68", spec="net")
def kicks_at_another_queues_address(b: Bench) -> None:
    b.start(sizes={0: 8, 1: 8})
    b.driver.write_at(CfgType.NOTIFY, 4, 2, 0)


@mutant("DRV-PCI-50", "DRV-PCI-68", "DRV-PCI-69", spec="rng?notification_data=on")
def exchanges_the_halves_of_a_notification(b: Bench) -> None:
    queue = b.start(DATA)[0]
    b.one(queue, kick=False)
    queue.kick(1)


@mutant("DRV-PCI-44", "DRV-PCI-73")
def a_vector_that_cannot_be(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.write("config_msix_vector", 0x8000)
    b.driver.read("config_msix_vector")


@mutant("DRV-PCI-74", "DRV-SPLIT-22")
def rings_that_are_not_zeroed(b: Bench) -> None:
    b.driver.negotiate(b.must)
    memory = b.driver.pool.allocate(4096)
    memory.array[2048:] = 1
    b.driver.write("queue_select", 0)
    b.driver.write("queue_size", min(8, b.driver.read("queue_size")))
    for number, area in enumerate(("desc", "driver", "device")):
        b.driver.write(f"queue_{area}", memory.address + 1024 * number)
    b.driver.write("queue_enable", 1)
