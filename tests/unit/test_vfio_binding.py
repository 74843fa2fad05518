"""Taking functions from the kernel's driver and giving them back."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from typing import Any

import pytest

from guestpv.errors import AccessDenied, GuestpvError, Refused, TimeLimit, UsageError
from guestpv.vfio.binding import bind, unbind
from guestpv.vfio.function import VfioFunction
from guestpv.vfio.lock import FunctionLock

from .fake_kernel import FakeKernel, Faulty, os_error

NET = "0000:00:03.0"
RECORD = f"/run/guestpv/{NET}.json"


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    kernel.add(NET)
    return kernel


def untouched(kernel: FakeKernel) -> bool:
    """Nothing of a bind is left: driver, override and record are as before."""
    function = kernel.functions[NET]
    leftovers = [path for path in kernel.files if path.startswith("/run/guestpv/") and ".json" in path]
    return (function.driver, function.override, leftovers) == ("virtio-pci", "", [])


def test_bind_takes_and_unbind_gives_back(kernel: FakeKernel) -> None:
    bound = bind("00:03.0", system=kernel)
    assert (bound.address, bound.driver, bound.node, bound.changed) == (
        NET,
        "virtio-pci",
        "/dev/vfio/7",
        True,
    )
    assert kernel.functions[NET].driver == "vfio-pci"
    assert json.loads(kernel.files[RECORD]) == {"address": NET, "driver": "virtio-pci"}
    again = bind(NET, system=kernel)
    assert (again.changed, again.driver) == (False, "virtio-pci")
    released = unbind(NET, system=kernel)
    assert (released.driver, released.changed) == ("virtio-pci", True)
    assert untouched(kernel)
    assert unbind(NET, system=kernel).changed is False
    assert kernel.log == [
        f"virtio-pci takes {NET}",
        f"virtio-pci loses {NET}",
        f"vfio-pci takes {NET}",
        f"vfio-pci loses {NET}",
        f"virtio-pci takes {NET}",
    ]


def test_a_function_without_driver_gets_none_back(kernel: FakeKernel) -> None:
    kernel._detach(kernel.functions[NET])
    kernel.functions[NET].home = None
    assert bind(NET, system=kernel).driver is None
    assert unbind(NET, system=kernel).driver is None


@pytest.mark.parametrize("record", [None, "", "{", "[1]", '{"driver": "../x"}', '{"driver": 3}', "{}"])
def test_a_lost_or_broken_record_does_not_matter(kernel: FakeKernel, record: str | None) -> None:
    bind(NET, system=kernel)
    del kernel.files[RECORD]
    if record is not None:
        kernel.files[RECORD] = record
    assert bind(NET, system=kernel).driver is None
    assert unbind(NET, system=kernel).driver == "virtio-pci"


def test_a_stale_record_does_not_matter(kernel: FakeKernel) -> None:
    bind(NET, system=kernel)
    kernel.functions[NET].override = ""
    kernel._detach(kernel.functions[NET])
    kernel._probe(kernel.functions[NET])
    assert kernel.functions[NET].driver == "virtio-pci"
    assert bind(NET, system=kernel).changed
    assert unbind(NET, system=kernel).driver == "virtio-pci"


def test_an_unplugged_function_leaves_no_record(kernel: FakeKernel) -> None:
    bind(NET, system=kernel)
    kernel.remove(NET)
    assert RECORD in kernel.files
    with pytest.raises(UsageError, match="no such PCI function"):
        unbind(NET, system=kernel)
    assert RECORD not in kernel.files


def test_unbind_waits_for_a_slow_driver(kernel: FakeKernel) -> None:
    bind(NET, system=kernel)
    kernel.slow_driver = 5
    assert unbind(NET, system=kernel).driver == "virtio-pci"
    assert kernel.slow_driver == 0


def test_unbind_has_a_time_limit_and_names_the_way_out(kernel: FakeKernel) -> None:
    bind(NET, system=kernel)
    kernel.slow_driver = 10**6
    with pytest.raises(TimeLimit, match="no kernel driver took the function back in 30 s") as caught:
        unbind(NET, system=kernel)
    assert f"echo {NET} > /sys/bus/pci/drivers_probe" in caught.value.hint
    kernel.slow_driver = 0
    assert unbind(NET, system=kernel).driver == "virtio-pci", "a second try ends the work"


def test_unbind_loads_the_recorded_driver(kernel: FakeKernel) -> None:
    bind(NET, system=kernel)
    kernel.drivers.discard("virtio-pci")
    kernel.loadable.add("virtio-pci")
    assert unbind(NET, system=kernel).driver == "virtio-pci"
    assert kernel.commands == [["modprobe", "virtio-pci"]]


def test_bind_loads_vfio(kernel: FakeKernel) -> None:
    kernel.drivers.discard("vfio-pci")
    kernel.loadable |= {"vfio-pci", "vfio_iommu_type1"}
    bind(NET, system=kernel)
    assert kernel.commands == [["modprobe", "vfio-pci"], ["modprobe", "vfio_iommu_type1"]]


@pytest.mark.parametrize("module", ["vfio-pci", "vfio_iommu_type1"])
def test_a_missing_module_is_named(kernel: FakeKernel, module: str) -> None:
    kernel.drivers.discard(module)
    kernel.absent.add(module)
    with pytest.raises(GuestpvError, match=f"kernel module {module} cannot be loaded: modprobe: FATAL"):
        bind(NET, system=kernel)
    assert untouched(kernel)


def test_a_module_that_a_locked_down_kernel_refuses(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.drivers.discard("vfio-pci")
    said = "modprobe: ERROR: could not insert 'vfio': Operation not permitted"
    monkeypatch.setattr(kernel, "run", lambda command: (1, said))
    with pytest.raises(GuestpvError, match="could not insert") as caught:
        bind(NET, system=kernel)
    assert "lockdown" in caught.value.hint
    assert untouched(kernel)


def test_a_missing_modprobe_is_said(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.drivers.discard("vfio-pci")

    def missing(command: list[str]) -> tuple[int, str]:
        raise os_error(errno.ENOENT, command[0])

    monkeypatch.setattr(kernel, "run", missing)
    with pytest.raises(GuestpvError, match=r"cannot be loaded: .*'modprobe'"):
        bind(NET, system=kernel)


def test_the_group_node_goes_to_a_user(kernel: FakeKernel) -> None:
    bind(NET, user="alice", system=kernel)
    assert kernel.nodes["/dev/vfio/7"] == 1000
    kernel.user = 1000
    VfioFunction(NET, system=kernel).close()


def test_an_unknown_user_is_refused_before_anything_happens(kernel: FakeKernel) -> None:
    with pytest.raises(UsageError, match="no such user: bob"):
        bind(NET, user="bob", system=kernel)
    assert untouched(kernel)


def test_a_function_in_use_is_refused_without_force(kernel: FakeKernel) -> None:
    kernel.links["/sys/class/net/eth0"] = f"../../devices/pci0000:00/{NET}/virtio0/net/eth0"
    kernel.files["/proc/net/route"] = "Iface\neth0 00000000 0 1 0 0 0 00000000 0 0 0\n"
    with pytest.raises(Refused, match="eth0 carries the default route") as caught:
        bind(NET, system=kernel)
    assert f"guestpv bind --force {NET}" in caught.value.hint
    assert untouched(kernel)
    assert bind(NET, force=True, system=kernel).changed


def test_force_does_not_make_the_impossible_possible(kernel: FakeKernel) -> None:
    kernel.add("0000:00:05.0", group=None)
    kernel.add("0000:00:06.0", 0x1000, legacy=True)
    with pytest.raises(Refused, match="no IOMMU group"):
        bind("00:05.0", force=True, system=kernel)
    with pytest.raises(Refused, match="legacy-only"):
        bind("00:06.0", force=True, system=kernel)


def test_functions_of_a_group_are_bound_one_after_the_other(kernel: FakeKernel) -> None:
    kernel.add("0000:00:03.1", 0x1044)
    first = bind(NET, system=kernel)
    assert [(m.address, m.command) for m in first.blockers] == [("0000:00:03.1", "guestpv bind 0000:00:03.1")]
    with pytest.raises(Refused, match=r"not viable: the kernel still drives 0000:00:03\.1") as caught:
        VfioFunction(NET, system=kernel)
    assert "`guestpv bind 0000:00:03.1`" in caught.value.hint
    assert bind("00:03.1", system=kernel).blockers == ()
    VfioFunction(NET, system=kernel).close()


def test_an_ordinary_user_is_told_to_be_root(kernel: FakeKernel) -> None:
    kernel.user = 1000
    with pytest.raises(AccessDenied) as caught:
        bind(NET, system=kernel)
    assert caught.value.hint == f"sudo guestpv bind {NET}"
    assert kernel.functions[NET].driver == "virtio-pci"
    kernel.user = 0
    bind(NET, system=kernel)
    kernel.user = 1000
    with pytest.raises(AccessDenied, match="no permission"):
        unbind(NET, system=kernel)
    kernel.drivers.discard("vfio-pci")
    kernel._detach(kernel.functions[NET])
    with pytest.raises(AccessDenied, match="only root may load it"):
        bind(NET, system=kernel)


def test_a_refusing_vfio_leaves_everything_as_it_was(kernel: FakeKernel) -> None:
    kernel.vfio_takes = False
    with pytest.raises(GuestpvError, match="vfio-pci did not take the function"):
        bind(NET, system=kernel)
    assert untouched(kernel)


def test_a_node_that_never_appears_undoes_the_binding(kernel: FakeKernel) -> None:
    real = kernel.exists
    kernel.exists = lambda path: not path.startswith("/dev/vfio/") and real(path)  # type: ignore[method-assign]
    with pytest.raises(TimeLimit, match="node did not appear"):
        bind(NET, system=kernel)
    assert untouched(kernel)


def test_unbind_refuses_while_a_process_drives_it(kernel: FakeKernel) -> None:
    bind(NET, system=kernel)
    lock = FunctionLock(NET, system=kernel)
    with pytest.raises(Refused, match="process 4321 drives this function"):
        unbind(NET, system=kernel)
    assert kernel.functions[NET].driver == "vfio-pci"
    lock.close()
    kernel.links["/proc/77/fd/5"] = "/dev/vfio/7"
    kernel.files["/proc/77/comm"] = "dpdk"
    with pytest.raises(Refused, match=r"in use by 77 \(dpdk\)"):
        unbind(NET, system=kernel)
    assert unbind(NET, force=True, system=kernel).driver == "virtio-pci"


def test_after_kill_9_it_is_bound_and_given_back_as_ever(kernel: FakeKernel) -> None:
    bind(NET, system=kernel)
    process = Faulty(kernel, -1, OSError)
    function = VfioFunction(NET, system=process)  # type: ignore[arg-type]
    function.dma.map(4096)
    function.bar(4)
    function.enable_msix(2)
    kernel.die()
    assert not kernel.command(NET) & 4
    assert not bind(NET, system=kernel).changed
    VfioFunction(NET, system=kernel).close()
    assert unbind(NET, system=kernel).driver == "virtio-pci"
    assert untouched(kernel)


def faults(action: Callable[[Any], object]) -> int:
    """How many calls of the operating system ``action`` makes on a system made from a fresh kernel."""
    kernel = FakeKernel()
    kernel.add(NET)
    system = Faulty(kernel, -1, OSError)
    action(system)
    return len(system.calls)


BIND_CALLS = faults(lambda system: bind(NET, user="alice", system=system))
ERRORS = [lambda: os_error(errno.EIO, "injected"), KeyboardInterrupt]


@pytest.mark.parametrize("error", ERRORS, ids=["EIO", "Ctrl-C"])
@pytest.mark.parametrize("number", range(BIND_CALLS))
def test_whatever_fails_bind_is_done_or_undone(
    kernel: FakeKernel, number: int, error: Callable[[], BaseException]
) -> None:
    system = Faulty(kernel, number, error)
    try:
        bind(NET, user="alice", system=system)  # type: ignore[arg-type]
    except (GuestpvError, OSError, KeyboardInterrupt):
        assert untouched(kernel), f"{system.failed} failed"
    else:
        assert kernel.functions[NET].driver == "vfio-pci"
    assert kernel.leaks() == {"descriptors": [], "mappings": [], "dma": {}}


@pytest.mark.parametrize("error", ERRORS, ids=["EIO", "Ctrl-C"])
@pytest.mark.parametrize("number", range(60))
def test_whatever_fails_unbind_can_be_repeated(
    kernel: FakeKernel, number: int, error: Callable[[], BaseException]
) -> None:
    bind(NET, system=kernel)
    system = Faulty(kernel, number, error)
    try:
        unbind(NET, system=system)  # type: ignore[arg-type]
    except (GuestpvError, OSError, KeyboardInterrupt):
        assert system.failed
    assert unbind(NET, system=kernel).driver == "virtio-pci"
    assert untouched(kernel)
    assert kernel.leaks() == {"descriptors": [], "mappings": [], "dma": {}}
