"""The driver side of a virtqueue alone: a C stub uses each buffer at once, so what is left is our own cost.

Everything is judged as a multiple of a no-op cffi call of the same run, which takes machine and moment
out of the figure.
"""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi
import numpy as np
from guestpv.core._core import lib

from guestpv.memory import DmaPool
from guestpv.spec import features as f
from guestpv.virtqueue.burst import Burst
from guestpv.virtqueue.kick import Kick
from guestpv.virtqueue.queue import Virtqueue
from ringpeer import PeerSpace

from .report import Row, median, sample

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "bench"
CDEF = """
struct device {
    uint32_t size; int32_t packed; uint8_t *desc, *driver, *device; uint16_t index, wrap; uint32_t elements;
};
void noop(void);
int32_t use_all(void *user, uint32_t value);
void use_again(struct device *d, uint32_t buffers, uint32_t rounds);
"""


def stub() -> Any:
    """The compiled stub: ``noop`` to compare with, ``use_all`` as a device."""
    builder = cffi.FFI()
    builder.cdef(CDEF)
    builder.set_source("_ring_device", (HERE / "ring_device.c").read_text(), extra_compile_args=["-O2"])
    path = builder.compile(tmpdir=str(BUILD))
    spec = importlib.util.spec_from_file_location("_ring_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class StubKick(Kick):
    """A kick that runs the stub device, in C all the way."""

    def __init__(self, module: Any) -> None:
        super().__init__(lib.GPV_KICK_CALL)
        self.module = module
        self.device = module.ffi.new("struct device *")

    def fill(self, kick: Any, index: int, ffi: Any, lib: Any) -> object:
        keep = super().fill(kick, index, ffi, lib)
        address = int(
            self.module.ffi.cast("uintptr_t", self.module.ffi.addressof(self.module.lib, "use_all"))
        )
        kick.call = ffi.cast("int32_t (*)(void *, uint32_t)", address)
        kick.user = ffi.cast("void *", int(self.module.ffi.cast("uintptr_t", self.device)))
        return keep


class Subject:
    """A queue with the stub behind it, its interrupts off as a polling driver has them."""

    def __init__(
        self, module: Any, size: int, packed: bool, burst: int, elements: int = 1, options: int = 0
    ) -> None:
        features = f.mask([f.F_VERSION_1, *([f.F_RING_PACKED] if packed else [])]) | options
        self.pool = DmaPool(PeerSpace())
        kick = StubKick(module)
        self.queue = Virtqueue(0, size, features, self.pool, kick)
        self.module, self.device = module, kick.device
        self.device.size, self.device.packed, self.device.wrap, self.device.elements = (
            size,
            packed,
            1,
            elements,
        )
        for name, area in (
            ("desc", self.queue.desc),
            ("driver", self.queue.driver),
            ("device", self.queue.device),
        ):
            setattr(self.device, name, module.ffi.cast("uint8_t *", area.ctypes.data))
        self.queue.disable_interrupts()
        self.burst = Burst(self.queue, burst, elements, elements // 2)
        buffer = self.pool.allocate(4096)
        self.burst.addresses[:] = buffer.address
        self.burst.lengths[:] = 64
        self.parts = buffer[:64], buffer[64:128]
        self.count = burst

    def turns(self, rounds: int) -> float:
        """Nanoseconds per buffer of submit, stub and reap."""
        submit, reap, count = self.burst.submit, self.burst.reap, self.count
        begin = time.perf_counter_ns()
        for _ in range(rounds):
            submit(count)
            reap()
        spent = time.perf_counter_ns() - begin
        assert self.queue.outstanding == 0
        return (spent / rounds - empty_loop(rounds)) / count

    def stub_share(self, rounds: int) -> float:
        """Nanoseconds per buffer that the stub itself takes."""
        self.queue.device["flags"] = 1
        self.burst.submit(self.count)
        begin = time.perf_counter_ns()
        self.module.lib.use_again(self.device, self.count, rounds)
        spent = time.perf_counter_ns() - begin
        self.queue.device["flags"] = 0
        assert self.burst.reap() == self.count
        return spent / rounds / self.count

    def friendly(self, rounds: int) -> float:
        """Nanoseconds of one ``add`` of a readable and a writable buffer."""
        add, queue = self.queue.add, self.queue
        readable, writable = [self.parts[0]], [self.parts[1]]
        spent = 0
        batch = range(self.queue.size // 2)
        for _ in range(rounds):
            begin = time.perf_counter_ns()
            for _ in batch:
                add(readable, writable)
            spent += time.perf_counter_ns() - begin
            queue.publish()
            queue.reap_burst()
        return spent / rounds / len(batch)


def empty_loop(rounds: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(rounds):
        pass
    return (time.perf_counter_ns() - begin) / rounds


def noop_call(module: Any, rounds: int) -> float:
    """Nanoseconds of a cffi call that does nothing, without the loop round it."""
    noop = module.lib.noop
    begin = time.perf_counter_ns()
    for _ in range(rounds):
        noop()
    return (time.perf_counter_ns() - begin) / rounds - empty_loop(rounds)


def run(quick: bool) -> tuple[dict[str, str], list[Row]]:
    """Measure; versions and rows for the report."""
    module = stub()
    repeats = 7 if quick else 41
    work: dict[str, Callable[[], float]] = {"cffi-call": lambda: noop_call(module, 20000)}
    limits: dict[str, tuple[str, float | None]] = {}
    for name, packed in (("split", False), ("packed", True)):
        one = Subject(module, 64, packed, 1)
        many = Subject(module, 256, packed, 128)
        work[f"{name}/burst of 1"] = lambda s=one: s.turns(4000)  # type: ignore[misc]
        work[f"{name}/burst of 128"] = lambda s=many: s.turns(400) - s.stub_share(400)  # type: ignore[misc]
        limits[f"{name}/burst of 1"] = ("ns_per_turn", 5)
        limits[f"{name}/burst of 128"] = ("ns_per_buffer", 0.16)
        friendly = Subject(module, 128, packed, 1, elements=2)
        work[f"{name}/add"] = lambda s=friendly: s.friendly(20)  # type: ignore[misc]
        limits[f"{name}/add"] = ("ns_per_buffer", 20)
        for size in (64, 1024, 32768):
            sized = Subject(module, size, packed, 32)
            work[f"{name}/burst of 32, {size} entries"] = lambda s=sized: s.turns(1500)  # type: ignore[misc]
            limits[f"{name}/burst of 32, {size} entries"] = ("ns_per_buffer", None)
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, action in work.items():
            samples[name].append(sample(action))
    call, dropped = median(samples["cffi-call"])
    rows = [Row("cffi-call", "ns_per_call", call, runs=repeats, discarded=dropped)]
    for name, (metric, limit) in limits.items():
        value, dropped = median(samples[name])
        rows.append(Row(name, metric, value, "cffi-call", call, value / call, repeats, dropped, limit))
    values = {row.case: row.value for row in rows}

    def compare(case: str, over: str, limit: float) -> None:
        rows.append(
            Row(
                case,
                "ns_per_buffer",
                values[case],
                over,
                values[over],
                values[case] / values[over],
                repeats,
                0,
                limit,
            )
        )

    compare("packed/burst of 128", "split/burst of 128", 1.05)  # no slower, within what repeats differ by
    for name in ("split", "packed"):
        compare(f"{name}/burst of 32, 32768 entries", f"{name}/burst of 32, 64 entries", 2.0)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "cffi": cffi.__version__}
    return versions, rows
