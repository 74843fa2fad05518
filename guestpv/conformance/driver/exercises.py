"""What our own drivers do in front of the strict device, and a look at what came of it."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from queue import Empty, Queue
from typing import Any, Final

from ...devices.evidence import Event
from ...devices.models.balloon import Balloon as BalloonModel
from ...devices.models.blk import Blk as BlkModel
from ...devices.ring import Chain
from ...drivers.balloon import Balloon
from ...drivers.blk import Blk
from ...drivers.rng import Rng
from ...errors import GuestpvError, TimeLimit
from ...spec import balloon as balloon_spec
from ...spec import blk as blk_spec
from ...spec import features as ft
from ...spec import pci
from ...spec.rng import REQUESTQ
from ...system import SYSTEM
from ...transport.base import Transport
from .exercises_net import net, net_links, net_steered
from .outcome import Broken
from .rules import Watch, presented

PAGES: Final = 0x102
"""A number that reads otherwise in the wrong byte order."""
BLOCK: Final = 4096
MANY: Final = 0x10000 + 1000
LOOK_AGAIN: Final = 0.005
"""Seconds between looks for what the device shows in its own time."""

Exercise = Callable[[Transport, Watch, float], None]
"""Drives an opened device and closes its driver; the seconds are how long it waits for the device at most."""

presented("DRV-SPLIT-20", "DRV-SPLIT-51", "DRV-SPLIT-53", "DRV-SPLIT-54", needs="user")
presented("DRV-PACKED-29", "DRV-PACKED-35", "DRV-PACKED-39", "DRV-SPLIT-57", needs="user")
presented("DRV-PCI-53", "DRV-PCI-70", "DRV-PCI-71", "DRV-PCI-72", needs="user")
presented("DRV-SPLIT-19", "DRV-SPLIT-52", "DRV-PACKED-36", "DRV-PACKED-37", needs="user")
LENGTHS: Final = ("DRV-SPLIT-20", "DRV-SPLIT-51", "DRV-SPLIT-54")


def rng(transport: Transport, watch: Watch, patience: float) -> None:
    """Read random bytes, more often than the ring has entries."""
    with Rng(transport) as driver:
        for size in (1, 16, 4096, *[32] * 40):
            if len(driver.read(size, patience)) != size:
                raise Broken("the entropy driver returned too few bytes")


def blk(transport: Transport, watch: Watch, patience: float) -> None:
    """Write, read, flush, discard; look at the disk's own sectors."""
    with Blk(transport, timeout=patience) as driver:
        watch.tell("capacity", driver.capacity // blk_spec.SECTOR)
        pattern = random.Random(1)
        blocks = {place: pattern.randbytes(BLOCK) for place in range(0, 40 * BLOCK, BLOCK)}
        for place, data in blocks.items():
            driver.write(place, data)
        if transport.has(blk_spec.F_FLUSH):
            driver.flush()
        for place, data in blocks.items():
            if driver.read(place, BLOCK).tobytes() != data:
                raise Broken(f"block {place // BLOCK} reads otherwise than it was written")
        _identify(driver, watch)
        _fail_one(driver, watch)
        if transport.has(blk_spec.F_DISCARD):
            driver.discard(0, BLOCK)
        if transport.has(blk_spec.F_WRITE_ZEROES):
            driver.write_zeroes(BLOCK, BLOCK)
            if any(driver.read(BLOCK, BLOCK)):
                raise Broken("zeroes read otherwise")
        driver.changed()
        watch.settle()


def _identify(driver: Blk, watch: Watch) -> None:
    """The device's id has up to 20 characters, and no NUL behind the twentieth (5.2.6)."""
    model = watch.device.model
    assert isinstance(model, BlkModel)
    model.serial, before = b"twenty characters id", model.serial
    said = driver.get_id()
    if said.encode() == model.serial:
        watch.keep("DRV-BLK-59")
    else:
        watch.break_rule("DRV-BLK-59", f"the driver takes {model.serial!r} for {said!r}")
    model.serial = before


def _fail_one(driver: Blk, watch: Watch) -> None:
    """A status other than 0 is an error of that request, and of no other."""
    model = watch.device.model
    assert isinstance(model, BlkModel)
    for status in (blk_spec.S_IOERR, blk_spec.S_UNSUPP, 99):
        model.fail_next.append(status)
        try:
            driver.read(0, BLOCK)
        except GuestpvError:
            driver.read(0, BLOCK)
            watch.keep("DRV-BLK-52")
        else:
            watch.break_rule("DRV-BLK-52", f"a request with status {status} counts as done")


def balloon(transport: Transport, watch: Watch, patience: float) -> None:
    """Follow the target up and down, answer for statistics."""
    model = watch.device.model
    assert isinstance(model, BalloonModel)
    with Balloon(transport, answer_limit=patience) as driver:
        for target in (PAGES, PAGES // 2, 0):
            model.set_target(target)
            watch.tell("num_pages", driver.target)
            if target > driver.pages:
                driver.inflate(target - driver.pages)
            else:
                driver.deflate(driver.pages - target)
            if len(model.pages) != driver.pages:
                raise Broken(f"the driver counts {driver.pages} pages, the device {len(model.pages)}")
        if transport.has(balloon_spec.F_STATS_VQ):
            _ask(model, driver, patience)
        if transport.has(balloon_spec.F_PAGE_REPORTING):
            driver.report_free()
        watch.settle()


def _ask(model: BalloonModel, driver: Balloon, patience: float) -> None:
    """Ask for statistics twice. A device with a thread of its own takes its time."""
    seen: Queue[dict[str, int]] = Queue()
    model.statistics_seen = seen.put
    for _ in range(2):
        if not model.ask_statistics():
            raise Broken("the device has no statistics buffer")
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            driver.answer_statistics()
            with contextlib.suppress(Empty):
                seen.get(timeout=LOOK_AGAIN)
                break


def ring(transport: Transport, watch: Watch, patience: float) -> None:
    """Buffers of several elements through one queue; they come back in any order and with any length.

    It needs the entropy device, whose queue takes device-writable buffers of any shape.
    """
    given: dict[int, tuple[int, int]] = {}
    order = random.Random(2)

    def note(event: Event, chain: object) -> None:
        assert isinstance(chain, Chain)
        given[chain.elements[0].address] = (event.extra, chain.writable_bytes)

    transport.negotiate(supported=0)
    queue = transport.make_queue(REQUESTQ)
    transport.driver_ok()
    stop = watch.journal.observe(
        lambda event, subject: note(event, subject) if event.kind == "push" else None
    )
    device = watch.device
    device.hold = True
    try:
        for _ in range(6):
            mine: dict[int, Any] = {}
            while queue.free_slots and len(mine) < 12:
                parts = min(order.randint(1, 3), queue.free_slots, queue.size)
                buffers = [transport.pool.allocate(order.choice((16, 200, 0x101))) for _ in range(parts)]
                mine[queue.add(writable=buffers, cookie=buffers)] = buffers
            queue.publish()
            device.release(order=(lambda place: -place) if not watch.has(ft.F_IN_ORDER) else None)
            if not queue.wait(patience):
                raise Broken("completions did not reach the driver")
            came = dict(queue.completions())
            judge(watch, mine, came, given)
            for buffers in mine.values():
                for buffer in buffers:
                    transport.pool.free(buffer)
            given.clear()
    finally:
        device.hold = False
        stop()
        transport.close()


def judge(
    watch: Watch, mine: dict[int, Any], came: dict[int, int], given: dict[int, tuple[int, int]]
) -> None:
    """Compare what the driver was told with what the device did."""
    packed, in_order = watch.has(ft.F_RING_PACKED), watch.has(ft.F_IN_ORDER)
    if in_order:
        back: tuple[str, ...] = ("DRV-PACKED-39",) if packed else ("DRV-SPLIT-57",)
    else:
        back = ("DRV-PACKED-29", "DRV-PACKED-35") if packed else ("DRV-SPLIT-53",)
    if set(came) != set(mine):
        for requirement in back:
            text = f"{len(mine)} buffers went out, {len(set(came) & set(mine))} came back"
            watch.break_rule(requirement, text)
        return
    # With IN_ORDER the device may tell only that a batch was used.
    told = [came[token] for token in mine]
    wrote = [given[buffers[0].address][0] for buffers in mine.values()]
    if told != wrote and not in_order:
        # Each length came, to another buffer: it is the matching that is wrong.
        matching = sorted(told) == sorted(wrote)
        wrong = back if matching else () if packed else LENGTHS
        for requirement in wrong:
            watch.break_rule(requirement, f"the device wrote {wrote} bytes, the driver takes {told}")
        return
    watch.keep(*back, *(() if packed or in_order else LENGTHS))


def both_causes(transport: Transport, watch: Watch, patience: float) -> None:
    """A used buffer and a configuration change by one interrupt."""
    transport.negotiate(supported=0)
    queue = transport.make_queue(0)
    transport.driver_ok()
    header = transport.pool.allocate(16)
    header.write(blk_spec.T_GET_ID.to_bytes(16, "little"))
    device, function = watch.device, watch.function
    assert function is not None
    device.hold = True
    queue.add([header], [transport.pool.allocate(blk_spec.ID_BYTES), transport.pool.allocate(1)])
    queue.enable_interrupts()
    queue.publish()
    with device.executor:
        device.bump_generation()
        if not function.interrupts.enabled:
            function.registers.isr |= pci.ISR_CONFIG
    device.release()
    fd = transport.config_fd
    assert fd is not None
    fired = [bool(SYSTEM.poll([source], patience)) for source in (queue.fileno(), fd)]
    shared = ("DRV-PCI-72",) if function.interrupts.enabled else ("DRV-PCI-70", "DRV-PCI-71")
    if all(fired):
        watch.keep("DRV-PCI-53", *shared)
        return
    missed = "the used buffer" if not fired[0] else "the configuration change"
    for requirement in ("DRV-PCI-53", *shared):
        watch.break_rule(requirement, f"one interrupt for two causes: {missed} went unseen")


def many(transport: Transport, watch: Watch, patience: float) -> None:
    """More buffers than 16-bit indices count."""
    transport.negotiate(supported=0)
    queue = transport.make_queue(REQUESTQ)
    transport.driver_ok()
    buffer = transport.pool.allocate(16)
    left = MANY
    while left > 0:
        count = min(queue.free_slots, left)
        for _ in range(count):
            queue.add(writable=[buffer])
        queue.publish()
        came = sum(1 for _ in queue.completions())
        if came != count:
            raise Broken(f"{count} buffers were used, {came} came back, {MANY - left} before")
        left -= count


def queue_reset(transport: Transport, watch: Watch, patience: float) -> None:
    """Reset a queue with a buffer out, set it up again with another size, go on."""
    transport.negotiate(supported=0, required=0)
    queue = transport.make_queue(REQUESTQ)
    transport.driver_ok()
    buffer = transport.pool.allocate(64)
    watch.device.hold = True
    queue.add(writable=[buffer])
    queue.publish()
    if len(transport.reset_queue(REQUESTQ)) != 1:
        raise Broken("the buffer did not come back from the queue's reset")
    watch.device.hold = False
    queue = transport.make_queue(REQUESTQ, 4)
    queue.add(writable=[buffer])
    queue.publish()
    if not queue.wait(patience):
        raise Broken("the queue does not work after its reset")


def in_flight(transport: Transport, watch: Watch, patience: float) -> None:
    """End while the device has buffers, which it completes afterwards."""
    if watch.device.model.device_type == ft.BLK:
        with Blk(transport, timeout=patience) as disk:
            for place in range(0, 4 * BLOCK, BLOCK):
                disk.submit(blk_spec.T_OUT, place, [disk.allocate(BLOCK)])
    else:
        with Rng(transport) as entropy, contextlib.suppress(TimeLimit):
            entropy.read(16, 0.01)
            raise Broken("the entropy driver has bytes that the device did not give")
    if watch.device.release():
        raise Broken("the driver ended without a reset, and the device still had its buffers")


EXERCISES: Final[dict[str, Exercise]] = {
    "rng": rng,
    "net": net,
    "net links": net_links,
    "net steered": net_steered,
    "blk": blk,
    "balloon": balloon,
    "ring": ring,
    "queue reset": queue_reset,
    "both causes": both_causes,
    "many": many,
    "in flight": in_flight,
}


def drive(kind: str, transport: Transport, watch: Watch, patience: float = 30.0) -> str:
    """Run an exercise; what went wrong for the user, or an empty text."""
    try:
        EXERCISES[kind](transport, watch, patience)
    except (GuestpvError, Broken) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        transport.close()
    return ""
