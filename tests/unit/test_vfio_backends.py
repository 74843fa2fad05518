"""Ways into VFIO beside type1: iommufd with the functions' own nodes, and no-IOMMU mode with its guardian."""

from __future__ import annotations

import contextlib
import errno
import gc
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from guestpv.cli.vfio_option import CHOICES, is_noiommu, with_backend
from guestpv.errors import AccessDenied, GuestpvError, Refused, UsageError
from guestpv.memory import DmaPool
from guestpv.opener import Spec
from guestpv.vfio import guardian
from guestpv.vfio.binding import bind, unbind
from guestpv.vfio.context import Attachment
from guestpv.vfio.function import VfioFunction, open_function
from guestpv.vfio.noiommu import NoIommu
from guestpv.vfio.survey import look_up
from guestpv.vfio.ways import AUTO, NAMES, PARAMETER, RISK, usable

from .fake_kernel import FakeKernel, Faulty, os_error

NET = "0000:00:03.0"
RNG = "0000:00:03.1"
NOTHING = {"descriptors": [], "mappings": [], "dma": {}}
HUGE = 2 << 20


@pytest.fixture
def kernel() -> FakeKernel:
    """A function behind an IOMMU, in a kernel with iommufd."""
    kernel = FakeKernel()
    kernel.add(NET, driver="vfio-pci")
    kernel.add_iommufd()
    return kernel


@pytest.fixture
def bare() -> Iterator[FakeKernel]:
    """A function without an IOMMU, in a kernel whose no-IOMMU mode is enabled."""
    kernel = FakeKernel()
    kernel.add_noiommu()
    kernel.add(NET, group=None)
    kernel.huge_pages = 8
    yield kernel
    for thread in kernel.guardians:
        thread.join(60)
        assert not thread.is_alive(), "a guardian stays for ever"


# Choosing.


def test_type1_is_taken_where_its_nodes_are_and_iommufd_otherwise(kernel: FakeKernel) -> None:
    function = look_up(NET, kernel)
    assert usable(function, kernel) == ["type1", "iommufd"]
    opened = VfioFunction(NET, system=kernel)
    assert (opened.backend, opened.translated) == ("type1", True)
    opened.close()
    del kernel.nodes["/dev/vfio/7"]
    assert usable(function, kernel) == ["iommufd"]
    opened = VfioFunction(NET, system=kernel)
    assert (opened.backend, opened.translated) == ("iommufd", True)
    opened.close()
    assert kernel.leaks() == NOTHING


def test_no_iommu_is_never_taken_by_itself(bare: FakeKernel) -> None:
    with pytest.raises(Refused, match="no IOMMU group"):
        bind(NET, system=bare)
    bind(NET, noiommu=True, system=bare)
    assert usable(look_up(NET, bare), bare) == ["noiommu"]
    for backend in ("auto", "type1", "iommufd"):
        with pytest.raises(Refused, match="no IOMMU group"):
            VfioFunction(NET, backend=backend, system=bare)


def test_what_the_scheme_takes() -> None:
    with pytest.raises(UsageError, match="no VFIO back-end vhost"):
        open_function(NET, {"backend": "vhost"})
    with pytest.raises(UsageError, match="knows no parameter color"):
        open_function(NET, {"backend": "type1", "color": "red"})


def test_the_option_becomes_a_parameter_of_the_specification() -> None:
    assert (AUTO, *NAMES) == CHOICES
    assert with_backend(NET, "auto") == NET
    assert with_backend(NET, "iommufd") == f"{NET}?backend=iommufd"
    assert with_backend(f"vfio:{NET}?mode=poll", "noiommu") == f"vfio:{NET}?mode=poll&backend=noiommu"
    assert with_backend(f"{NET}?backend=type1", "type1") == f"{NET}?backend=type1"
    for spec in (f"{NET}?backend=type1", "loopback:net"):
        with pytest.raises(UsageError, match="--vfio-backend iommufd does not go with this device"):
            with_backend(spec, "iommufd")
    assert is_noiommu(Spec.parse(f"{NET}?backend=noiommu"))
    assert not is_noiommu(Spec.parse("loopback:net?backend=noiommu"))


# iommufd.


def test_iommufd_maps_in_the_allowed_ranges(kernel: FakeKernel) -> None:
    function = VfioFunction(NET, backend="iommufd", system=kernel)
    region = function.dma.map(100)
    (segment,) = region.segments
    assert kernel.dma_maps() == {segment.address: (region.pointer, 4096)}
    assert any(low <= segment.address <= high - 4095 for low, high in kernel.ranges)
    function.dma.unmap(region)
    assert kernel.dma_maps() == {}
    pool = DmaPool(function.dma)
    assert len(pool.allocate(3 << 20).segments) == 1
    function.close()
    assert kernel.log[-2:] == ["unmap", f"released {NET}"], "no bus master while memory goes"
    del region, pool
    gc.collect()
    assert kernel.leaks() == NOTHING


def test_functions_of_a_group_share_the_address_space(kernel: FakeKernel) -> None:
    kernel.add(RNG, 0x1044, driver="vfio-pci")
    first = VfioFunction(NET, backend="iommufd", system=kernel)
    second = VfioFunction(RNG, backend="iommufd", system=kernel)
    assert len(kernel.iommufds()) == 1
    first.dma.map(4096)
    kept = second.dma.map(4096)
    first.close()
    assert list(kernel.dma_maps()) == [kept.segments[0].address]
    second.close()


def test_who_has_the_group_is_named(kernel: FakeKernel) -> None:
    kernel.open("/dev/vfio/7")
    kernel.links["/proc/77/fd/3"] = "/dev/vfio/7"
    kernel.files["/proc/77/comm"] = "qemu"
    with pytest.raises(Refused, match=r"IOMMU group 7 is in use by 77 \(qemu\)"):
        VfioFunction(NET, backend="iommufd", system=kernel)


def test_what_is_missing_is_said(kernel: FakeKernel) -> None:
    kernel.user = 1000
    with pytest.raises(AccessDenied, match="/dev/iommu") as refusal:
        VfioFunction(NET, backend="iommufd", system=kernel)
    assert "chmod 666 /dev/iommu" in refusal.value.hint
    kernel.nodes["/dev/iommu"] = 1000
    with pytest.raises(AccessDenied, match="/dev/vfio/devices/vfio24: no permission"):
        VfioFunction(NET, backend="iommufd", system=kernel)
    kernel.user = 0
    bind(NET, user="alice", system=kernel)
    assert kernel.nodes["/dev/vfio/7"] == kernel.nodes["/dev/vfio/devices/vfio24"] == 1000
    kernel.user = 1000
    VfioFunction(NET, backend="iommufd", system=kernel).close()
    del kernel.nodes["/dev/iommu"]
    with pytest.raises(GuestpvError, match="the kernel has no iommufd"):
        VfioFunction(NET, backend="iommufd", system=kernel)


def test_a_kernel_without_nodes_for_functions(kernel: FakeKernel) -> None:
    del kernel.files[f"/sys/bus/pci/devices/{NET}/vfio-dev/vfio24/dev"]
    with pytest.raises(GuestpvError, match="VFIO has no character device for it"):
        VfioFunction(NET, backend="iommufd", system=kernel)


def test_interrupts_and_other_members(kernel: FakeKernel) -> None:
    kernel.interrupt_remapping = False
    with pytest.raises(Refused, match="does not remap interrupts") as refusal:
        VfioFunction(NET, backend="iommufd", system=kernel)
    assert "modprobe iommufd allow_unsafe_interrupts=1" in refusal.value.hint
    kernel.interrupt_remapping = True
    kernel.add(RNG, 0x1044)
    with pytest.raises(Refused, match=f"not viable: the kernel still drives {RNG}"):
        VfioFunction(NET, backend="iommufd", system=kernel)


# No-IOMMU.


def test_it_has_to_be_enabled(bare: FakeKernel) -> None:
    bare.files[PARAMETER] = "N"
    with pytest.raises(Refused, match="mode is not enabled") as refusal:
        bind(NET, noiommu=True, system=bare)
    assert f"echo 1 > {PARAMETER}" in refusal.value.hint
    del bare.files[PARAMETER]
    with pytest.raises(Refused, match="this kernel's VFIO has no no-IOMMU mode"):
        bind(NET, noiommu=True, system=bare)
    assert look_up(NET, bare).driver == "virtio-pci", "nothing was taken"


def test_it_is_not_for_functions_behind_an_iommu(kernel: FakeKernel) -> None:
    with pytest.raises(Refused, match="behind an IOMMU"):
        VfioFunction(NET, backend="noiommu", system=kernel)
    assert bind(NET, noiommu=True, system=kernel).node == "/dev/vfio/7"


def test_addresses_are_physical_and_the_pages_huge(
    bare: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    assert bind(NET, noiommu=True, system=bare).node == "/dev/vfio/noiommu-124"
    function = VfioFunction(NET, backend="noiommu", system=bare)
    assert caplog.messages == [f"/dev/vfio/noiommu-124: {RISK}"]
    assert not function.translated
    region = function.dma.map(3 << 20)
    assert region.array.nbytes == 2 * HUGE, "whole huge pages"
    frames = bare.page_frames(region.pointer, 1024)
    assert [segment.address >> 12 for segment in region.segments] == [int(frames[0]), int(frames[512])]
    assert [segment.length for segment in region.segments] == [HUGE, HUGE]
    region.array[:] = 7
    assert np.all(region.array == 7)
    function.close()
    assert unbind(NET, system=bare).driver == "virtio-pci"
    del region
    gc.collect()
    assert bare.leaks() == NOTHING


def test_the_guardian_keeps_memory_until_the_device_is_stopped(bare: FakeKernel) -> None:
    bind(NET, noiommu=True, system=bare)
    function = VfioFunction(NET, backend="noiommu", system=bare)
    region = function.dma.map(4096)
    function.dma.unmap(function.dma.map(4096))
    (thread,) = bare.guardians
    # What a kill does first: the descriptors go one by one, the device's last.
    ((context, _),) = (found for key, found in Attachment._open.items() if key[0] is bare)
    assert isinstance(context, NoIommu)
    context._guardian.close()
    thread.join(0.05)
    assert thread.is_alive(), "the device can still write"
    assert bare.command(NET) & 4
    bare._set_command(bare.functions[NET], 2)
    thread.join(60)
    assert not thread.is_alive()
    with pytest.raises(GuestpvError, match="the process that guards the device's memory has died"):
        function.dma.map(4096)
    with pytest.raises(GuestpvError, match="has died"):
        function.dma.unmap(region)
    with contextlib.suppress(GuestpvError):
        function.close()
    assert not bare.command(NET) & 4


def test_no_huge_pages_no_frames_no_rights(bare: FakeKernel) -> None:
    bind(NET, noiommu=True, system=bare)
    function = VfioFunction(NET, backend="noiommu", system=bare)
    bare.huge_pages = 0
    with pytest.raises(Refused, match="no 2 MiB of reserved huge pages") as refusal:
        function.dma.map(4096)
    assert "vm.nr_hugepages" in refusal.value.hint
    bare.huge_pages = 8
    bare.frames_shown = False
    with pytest.raises(Refused, match="does not tell this process which physical pages"):
        function.dma.map(4096)
    function.close()
    bare.raw_io = False
    with pytest.raises(AccessDenied, match="CAP_SYS_RAWIO"):
        VfioFunction(NET, backend="noiommu", system=bare)
    gc.collect()
    assert bare.leaks() == NOTHING


def test_a_guardian_that_does_not_start(bare: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    bind(NET, noiommu=True, system=bare)
    monkeypatch.setattr(
        bare, "start_daemon", lambda *_: (_ for _ in ()).throw(os_error(errno.ECHILD, "python"))
    )
    with pytest.raises(GuestpvError, match="the process that keeps the device's memory did not start"):
        VfioFunction(NET, backend="noiommu", system=bare)
    assert bare.leaks() == NOTHING


def test_the_guardian_goes_at_once_where_nothing_was_kept() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=guardian.serve, args=(theirs, lambda: False))
    thread.start()
    ours.close()
    thread.join(60)
    assert not thread.is_alive()


def test_what_the_guardian_calls_quiet() -> None:
    assert guardian.is_quiet("ffff:ff:1f.7"), "what is not there reaches no memory"


# Whatever fails.


def life(system: object, backend: str) -> None:
    function = VfioFunction(NET, backend=backend, system=system)  # type: ignore[arg-type]
    try:
        pool = DmaPool(function.dma)
        pool.allocate(4096)
        function.bar(4)
        function.enable_msix(2)
        function.disable_interrupts()
        pool.close()
        function.dma.map(4096)
    finally:
        function.close()


def machine(backend: str) -> FakeKernel:
    kernel = FakeKernel()
    kernel.huge_pages = 8
    if backend == "noiommu":
        kernel.add_noiommu()
    else:
        kernel.add_iommufd()
    kernel.add(NET, driver="vfio-pci", group=None if backend == "noiommu" else 7)
    return kernel


def calls_of_a_life(backend: str) -> int:
    system = Faulty(machine(backend), -1, OSError)
    life(system, backend)
    return len(system.calls)


@pytest.mark.parametrize("error", [lambda: os_error(errno.EIO), KeyboardInterrupt], ids=["EIO", "Ctrl-C"])
@pytest.mark.parametrize(
    ("backend", "number"),
    [(way, number) for way in ("iommufd", "noiommu") for number in range(calls_of_a_life(way))],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # munmap in a finalizer
def test_whatever_fails_nothing_is_left(
    backend: str, number: int, error: Callable[[], BaseException]
) -> None:
    kernel = machine(backend)
    system = Faulty(kernel, number, error)
    with contextlib.suppress(GuestpvError, OSError, KeyboardInterrupt):
        life(system, backend)
    gc.collect()
    assert kernel.leaks() == NOTHING, f"{system.failed} failed"
    assert not kernel.command(NET) & 4
    assert all(key[0] is not system for key in Attachment._open)
    VfioFunction(NET, backend=backend, system=kernel).close()
    for thread in kernel.guardians:
        thread.join(60)
        assert not thread.is_alive()
