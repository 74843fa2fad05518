"""A PCI function through VFIO: registers, interrupts, reset, and the order of the end."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest

from guestpv.errors import DeviceGone, GuestpvError, Refused, UsageError
from guestpv.memory import DmaPool
from guestpv.pci.function import PciFunction
from guestpv.vfio import abi
from guestpv.vfio.context import Attachment
from guestpv.vfio.function import VfioFunction, open_function

from .fake_kernel import REGION_SHIFT, FakeKernel, Faulty, os_error

NET = "0000:00:03.0"
NOTHING = {"descriptors": [], "mappings": [], "dma": {}}


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    kernel.add(NET, driver="vfio-pci")
    return kernel


def memory_of(kernel: FakeKernel, index: int, offset: int, size: int) -> bytes:
    return os.pread(kernel.functions[NET].memory, size, (index << REGION_SHIFT) + offset)


def test_open_enables_memory_and_bus_master_and_close_takes_bus_master_away(kernel: FakeKernel) -> None:
    function: PciFunction = VfioFunction("00:03.0", system=kernel)
    assert (function.name, function.translated) == (NET, True)
    assert kernel.command(NET) & 6 == 6
    function.close()
    function.close()
    assert kernel.command(NET) & 4 == 0
    assert kernel.leaks() == NOTHING


def test_configuration_space(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, system=kernel)
    assert function.config_read(0, 4) == 0x10411AF4
    assert function.config_read(2, 2) == 0x1041
    assert function.config_read(0x34, 1) == 0x40
    function.config_write(0x40, 4, 0x12345678)
    assert memory_of(kernel, 7, 0x40, 4) == b"\x78\x56\x34\x12"
    for offset, width in ((0, 8), (-1, 1), (4095, 2), (4096, 1)):
        with pytest.raises(UsageError, match="of configuration space"):
            function.config_read(offset, width)
    function.close()


@pytest.mark.parametrize("mapped", [True, False])
def test_bars_are_mapped_or_read_call_by_call(kernel: FakeKernel, mapped: bool) -> None:
    if not mapped:
        kernel.functions[NET].unmappable.add(4)
    function = VfioFunction(NET, system=kernel)
    bar = function.bar(4)
    assert function.bar(4) is bar
    assert (bar.size, bool(bar.pointer)) == (16384, mapped)
    for offset, width, value in ((0, 1, 0xA5), (2, 2, 0xBEEF), (16380, 4, 0xDEADBEEF)):
        bar.write(offset, width, value)
        assert bar.read(offset, width) == value
        assert memory_of(kernel, 4, offset, width) == value.to_bytes(width, "little")
    for offset, width in ((0, 8), (1, 2), (2, 4), (16384, 1), (-4, 4)):
        with pytest.raises(UsageError, match=r"no .-byte register"):
            bar.read(offset, width)
        with pytest.raises(UsageError, match=r"no .-byte register"):
            bar.write(offset, width, 0)
    function.close()
    assert bar.pointer == 0
    with pytest.raises(UsageError, match="closed"):
        bar.read(0, 4)
    assert kernel.leaks() == NOTHING


@pytest.mark.parametrize(
    ("areas", "mapped"),
    [
        ([(0, 16384)], True),
        ([(8192, 8192), (0, 8192)], True),
        ([(0, 4096), (8192, 8192)], False),
        ([(0, 8192)], False),
        ([], False),
    ],
)
def test_a_bar_with_holes_is_not_mapped(
    kernel: FakeKernel, areas: list[tuple[int, int]], mapped: bool
) -> None:
    kernel.functions[NET].sparse[4] = areas
    function = VfioFunction(NET, system=kernel)
    assert bool(function.bar(4).pointer) is mapped
    function.close()


def test_bars_that_are_not_there(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, system=kernel)
    with pytest.raises(UsageError, match="no BAR 0"):
        function.bar(0)
    for index in (-1, 6):
        with pytest.raises(UsageError, match="BARs 0 to 5"):
            function.bar(index)
    function.close()


def test_a_view_shows_registers_and_survives_the_function(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, system=kernel)
    bar = function.bar(4)
    bar.write(0, 4, 0x01020304)
    view = bar.view()
    part = bar.view()[:2]
    assert list(view[:4]) == [4, 3, 2, 1]
    function.close()
    assert list(view[:4]) == [0, 0, 0, 0]
    assert all(owner is None for _, owner in kernel.mappings.values()), "the group is free"
    VfioFunction(NET, system=kernel).close()
    del view, part
    gc.collect()
    assert kernel.leaks() == NOTHING


def test_a_view_that_went_first_leaves_nothing(kernel: FakeKernel) -> None:
    kernel.functions[NET].unmappable.add(1)
    function = VfioFunction(NET, system=kernel)
    assert function.bar(4).view().shape == (16384,)
    with pytest.raises(UsageError, match="not mapped"):
        function.bar(1).view()
    function.close()
    assert kernel.leaks() == NOTHING


def test_msix(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, system=kernel)
    assert function.msix_vectors == 4
    for count in (0, 5):
        with pytest.raises(UsageError, match="4 are there"):
            function.enable_msix(count)
    fds = function.enable_msix(3)
    kernel.fire(NET, abi.PCI_MSIX_IRQ_INDEX, 2)
    assert kernel.poll(fds, 0) == [fds[2]]
    assert os.eventfd_read(fds[2]) == 1
    with pytest.raises(UsageError, match="enabled already"):
        function.enable_intx()
    function.disable_interrupts()
    function.disable_interrupts()
    assert kernel.functions[NET].triggers == {}
    assert len(function.enable_msix(4)) == 4
    function.close()
    assert kernel.leaks() == NOTHING


def test_no_msix(kernel: FakeKernel) -> None:
    kernel.functions[NET].irqs[abi.PCI_MSIX_IRQ_INDEX] = (0, 0)
    function = VfioFunction(NET, system=kernel)
    assert function.msix_vectors == 0
    function.close()


def test_intx(kernel: FakeKernel) -> None:
    kernel._set_command(kernel.functions[NET], 0x400)
    function = VfioFunction(NET, system=kernel)
    fd = function.enable_intx()
    assert not kernel.command(NET) & 0x400, "the command register lets INTx through"
    kernel.fire(NET, abi.PCI_INTX_IRQ_INDEX)
    assert os.eventfd_read(fd) == 1
    function.unmask_intx()
    assert "unmask 0" in kernel.log
    function.close()
    kernel.functions[NET].irqs[abi.PCI_INTX_IRQ_INDEX] = (0, 0)
    function = VfioFunction(NET, system=kernel)
    with pytest.raises(UsageError, match="no legacy interrupt"):
        function.enable_intx()
    function.close()


def test_request_and_error_events_beside_msix(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, system=kernel)
    request, error = function.request_fd(), function.error_fd()
    assert request is not None
    assert error is not None
    assert function.request_fd() == request
    function.enable_msix(1)
    function.disable_interrupts()
    kernel.fire(NET, abi.PCI_REQ_IRQ_INDEX)
    kernel.fire(NET, abi.PCI_ERR_IRQ_INDEX)
    assert set(kernel.poll([request, error], 0)) == {request, error}
    function.close()
    assert kernel.leaks() == NOTHING


def test_a_function_without_them_has_none(kernel: FakeKernel) -> None:
    del kernel.functions[NET].irqs[abi.PCI_ERR_IRQ_INDEX]
    kernel.functions[NET].irqs[abi.PCI_REQ_IRQ_INDEX] = (0, 0)
    function = VfioFunction(NET, system=kernel)
    assert function.error_fd() is None
    assert function.request_fd() is None
    function.close()


def test_reset_where_there_is_one(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, system=kernel)
    assert function.reset() is True
    assert kernel.functions[NET].resets == 1
    assert kernel.command(NET) & 6 == 6
    function.close()
    kernel.functions[NET].flags &= ~abi.DEVICE_FLAGS_RESET
    function = VfioFunction(NET, system=kernel)
    assert function.reset() is False
    function.close()


def test_the_order_of_the_end(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, system=kernel)
    pool = DmaPool(function.dma)
    pool.allocate(64)
    function.enable_msix(2)
    function.bar(4)
    kernel.log.clear()
    function.close()
    gc.collect()
    assert kernel.log == ["unmap", f"released {NET}"], "quiet, then unmapped, then closed"
    assert kernel.leaks()["dma"] == {}


def test_a_second_open_is_refused(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, system=kernel)
    with pytest.raises(Refused, match="process 4321 drives this function already"):
        VfioFunction(NET, system=kernel)
    function.close()
    VfioFunction(NET, system=kernel).close()


def test_what_is_not_bound_says_whose_it_is(kernel: FakeKernel) -> None:
    kernel.add("0000:00:05.0", group=9)
    kernel.add("0000:00:06.0", group=9, driver=None)
    with pytest.raises(Refused, match="not bound to vfio-pci: it belongs to virtio-pci") as caught:
        VfioFunction("00:05.0", system=kernel)
    assert caught.value.hint == "guestpv bind 0000:00:05.0"
    with pytest.raises(Refused, match="it has no driver"):
        VfioFunction("00:06.0", system=kernel)


def test_bound_but_without_iommu(kernel: FakeKernel) -> None:
    kernel.files["/sys/kernel/iommu_groups/7/name"] = "vfio-noiommu"
    with pytest.raises(Refused, match="no IOMMU group"):
        VfioFunction(NET, system=kernel)


def test_a_device_file_that_is_no_pci(kernel: FakeKernel) -> None:
    kernel.functions[NET].flags = 0
    with pytest.raises(GuestpvError, match="does not call it a PCI function"):
        VfioFunction(NET, system=kernel)
    assert kernel.leaks() == NOTHING


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EIO])
def test_an_unplugged_function_says_so_and_closes_quietly(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    kernel.functions[NET].unmappable.add(4)
    function = VfioFunction(NET, system=kernel)
    bar = function.bar(4)
    function.enable_msix(1)
    function.dma.map(4096)

    def gone(*arguments: Any) -> Any:
        raise os_error(number)

    for name in ("pread", "pwrite", "_device_10", "_device_11"):
        monkeypatch.setattr(kernel, name, gone)
    for attempt in (
        lambda: function.config_read(0, 4),
        lambda: bar.read(0, 4),
        lambda: bar.write(0, 4, 0),
        function.reset,
        function.unmask_intx,
    ):
        with pytest.raises(DeviceGone, match="the function is gone"):
            attempt()
    function.close()
    gc.collect()
    assert kernel.leaks() == NOTHING


def test_a_short_read_is_an_unplugged_function(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    function = VfioFunction(NET, system=kernel)
    monkeypatch.setattr(kernel, "pread", lambda *_: b"")
    with pytest.raises(DeviceGone, match="read 0 of 4 bytes"):
        function.config_read(0, 4)
    function.close()


def test_other_errors_keep_their_errno_text(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    function = VfioFunction(NET, system=kernel)
    monkeypatch.setattr(kernel, "_device_10", lambda *_: (_ for _ in ()).throw(os_error(errno.ENOSPC)))
    with pytest.raises(GuestpvError, match=r"setting interrupts .* failed: .*No space left"):
        function.enable_msix(1)
    function.close()
    assert kernel.leaks() == NOTHING


def test_the_scheme_has_no_parameters() -> None:
    with pytest.raises(UsageError, match="knows no parameter speed"):
        open_function("0000:00:03.0", {"speed": "1"})
    with pytest.raises(UsageError, match="no such PCI function"):
        open_function("ffff:ff:1f.7", {})


# Every call of the operating system fails in turn


def life(system: Any) -> None:
    """Everything a driver does with a function."""
    function = VfioFunction(NET, system=system)
    try:
        pool = DmaPool(function.dma)
        pool.allocate(64)
        function.bar(4).write(0, 4, 1)
        function.bar(4).view()
        function.request_fd()
        function.enable_msix(2)
        function.disable_interrupts()
        function.enable_intx()
        function.reset()
        pool.close()
        function.dma.map(4096)
    finally:
        function.close()


def calls_of_a_life() -> int:
    kernel = FakeKernel()
    kernel.add(NET, driver="vfio-pci")
    system = Faulty(kernel, -1, OSError)
    life(system)
    return len(system.calls)


@pytest.mark.parametrize(
    "error",
    [lambda: os_error(errno.EIO), lambda: os_error(errno.ENOMEM), KeyboardInterrupt],
    ids=["EIO", "ENOMEM", "Ctrl-C"],
)
@pytest.mark.parametrize("number", range(calls_of_a_life()))
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # munmap in a finalizer
def test_whatever_fails_nothing_is_left(
    kernel: FakeKernel, number: int, error: Callable[[], BaseException]
) -> None:
    system = Faulty(kernel, number, error)
    with contextlib.suppress(GuestpvError, OSError, KeyboardInterrupt):
        life(system)
    gc.collect()
    assert kernel.leaks() == NOTHING, f"{system.failed} failed"
    assert not kernel.command(NET) & 4
    assert "unmap under live interrupts" not in kernel.log
    assert all(key[0] is not system for key in Attachment._open)
    VfioFunction(NET, system=kernel).close()
