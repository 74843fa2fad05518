"""The type1 container: opening, address ranges, mapping, and every refusal explained."""

from __future__ import annotations

import errno
import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpv.errors import AccessDenied, GuestpvError, Refused, UsageError
from guestpv.memory import DmaPool
from guestpv.vfio import abi
from guestpv.vfio.container import Type1Container
from guestpv.vfio.context import Attachment
from guestpv.vfio.dma import LOWEST, MSI_WINDOW, IovaAllocator

from .fake_kernel import FakeKernel, os_error

NET = "0000:00:03.0"
RNG = "0000:00:03.1"
NOTHING = {"descriptors": [], "mappings": [], "dma": {}}
MIB = 1 << 20


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    kernel.add(NET, driver="vfio-pci")
    return kernel


def attach(kernel: FakeKernel, address: str = NET) -> Attachment:
    return Attachment(address, 7, Type1Container, system=kernel)


def test_map_gives_zeroed_memory_at_an_allowed_address(kernel: FakeKernel) -> None:
    attachment = attach(kernel)
    region = attachment.dma.map(100)
    (segment,) = region.segments
    assert (region.array.nbytes, segment.length) == (4096, 4096)
    assert not region.array.any()
    assert kernel.dma_maps() == {segment.address: (region.pointer, 4096)}
    assert segment.address > 1 << 38, "above any RAM, as far as the IOMMU reaches"
    region.array[5] = 7
    attachment.dma.unmap(region)
    assert kernel.dma_maps() == {}
    assert region.array[5] == 7, "our view outlives the device's"
    with pytest.raises(UsageError, match="is not mapped"):
        attachment.dma.unmap(region)
    attachment.close()
    del region
    gc.collect()
    assert kernel.leaks() == NOTHING


def test_a_pool_lives_on_it(kernel: FakeKernel) -> None:
    attachment = attach(kernel)
    pool = DmaPool(attachment.dma)
    buffers = [pool.allocate(size) for size in (64, 5000, 3 * MIB)]
    assert all(len(buffer.segments) == 1 for buffer in buffers)
    del buffers
    pool.close()
    attachment.close()
    gc.collect()
    assert kernel.leaks() == NOTHING


def test_huge_pages_are_used_where_there_are_some(kernel: FakeKernel) -> None:
    attachment = attach(kernel)
    kernel.huge_pages = 1
    region = attachment.dma.map(2 * MIB)
    assert region.pointer % (2 * MIB) == 0
    assert region.segments[0].address % (2 * MIB) == 0
    assert kernel.mappings[region.pointer][0] == 2 * MIB
    plain = attachment.dma.map(4 * MIB)
    assert plain.pointer % (2 * MIB) == 0, "aligned, so that the kernel can make it huge"
    attachment.close()


@pytest.mark.parametrize("granule", [4096, 16384, 65536])
def test_the_smallest_page_of_the_iommu_is_honoured(kernel: FakeKernel, granule: int) -> None:
    kernel.page_sizes = granule | 1 << 30
    attachment = attach(kernel)
    region = attachment.dma.map(5)
    assert region.array.nbytes == granule
    assert region.pointer % granule == region.segments[0].address % granule == 0
    attachment.close()


def test_without_ranges_32_bits_are_assumed(kernel: FakeKernel) -> None:
    kernel.ranges = []
    attachment = attach(kernel)
    assert attachment.dma.map(4096).segments[0].address < 1 << 32
    attachment.close()


def test_small_ranges_fill_up_and_say_so(kernel: FakeKernel) -> None:
    kernel.ranges = [(0, LOWEST + 0x2FFF)]
    attachment = attach(kernel)
    regions = [attachment.dma.map(4096) for _ in range(3)]
    with pytest.raises(GuestpvError, match="no room for 4096 bytes in the I/O address space"):
        attachment.dma.map(4096)
    attachment.dma.unmap(regions.pop(1))
    attachment.dma.map(4096)
    attachment.close()


def test_functions_of_one_group_share_the_container(kernel: FakeKernel) -> None:
    kernel.add(RNG, 0x1044, driver="vfio-pci")
    first, second = attach(kernel), attach(kernel, RNG)
    assert len(kernel.containers()) == 1
    one, two = first.dma.map(4096), second.dma.map(4096)
    assert len(kernel.dma_maps()) == 2
    with pytest.raises(UsageError, match="is not mapped"):
        second.dma.unmap(one)
    first.close()
    first.close()
    assert list(kernel.dma_maps()) == [two.segments[0].address]
    third = attach(kernel)
    assert len(kernel.containers()) == 1
    third.close()
    second.close()
    del one, two
    gc.collect()
    assert kernel.leaks() == NOTHING


def test_functions_of_different_groups_do_not(kernel: FakeKernel) -> None:
    kernel.add("0000:00:04.0", 0x1044, group=8, driver="vfio-pci")
    first, second = attach(kernel), Attachment("0000:00:04.0", 8, Type1Container, system=kernel)
    assert len(kernel.containers()) == 2
    first.close()
    second.close()


def test_an_unmap_that_fails_keeps_the_memory_until_the_container_is_gone(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment = attach(kernel)
    region = attachment.dma.map(4096)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "ioctl", lambda *_: (_ for _ in ()).throw(os_error(errno.EIO)))
        with pytest.raises(OSError, match="Input/output"):
            attachment.dma.unmap(region)
        del region
        gc.collect()
        assert len(kernel.mappings) == 1
        with pytest.raises(OSError, match="Input/output"):
            attachment.close()
    gc.collect()
    assert kernel.leaks() == NOTHING


def test_an_unmap_of_nothing_is_noticed(kernel: FakeKernel) -> None:
    attachment = attach(kernel)
    region = attachment.dma.map(4096)
    kernel.containers()[0].maps.clear()
    with pytest.raises(GuestpvError, match="the kernel took 0 of 4096 bytes"):
        attachment.dma.unmap(region)
    with pytest.raises(GuestpvError, match="the kernel took 0 of 4096 bytes"):
        attachment.close()


# Refusals


def test_memlock_is_explained(kernel: FakeKernel) -> None:
    kernel.nodes["/dev/vfio/7"] = kernel.user = 1000
    attachment = attach(kernel)
    regions = [attachment.dma.map(2 * MIB) for _ in range(4)]
    with pytest.raises(GuestpvError) as caught:
        attachment.dma.map(2 * MIB)
    assert "2.0 MiB wanted, 8.0 MiB mapped already, RLIMIT_MEMLOCK is 8.0 MiB" in caught.value.message
    assert "prlimit --memlock=unlimited" in caught.value.hint
    assert len(regions) == len(kernel.dma_maps())
    attachment.close()
    del regions, caught
    gc.collect()
    assert kernel.leaks() == NOTHING


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOMEM, "no memory to pin"),
        (errno.EFAULT, "mapping 0.0 MiB for the device failed: .*Bad address"),
    ],
)
def test_other_failures_to_map_are_explained(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    attachment = attach(kernel)
    kernel.memlock = -1
    monkeypatch.setattr(kernel, "_container_13", lambda *_: (_ for _ in ()).throw(os_error(number)))
    with pytest.raises(GuestpvError, match=message):
        attachment.dma.map(4096)
    attachment.close()


def test_the_limit_of_mappings_is_explained(kernel: FakeKernel) -> None:
    kernel.dma_limit = 1
    attachment = attach(kernel)
    attachment.dma.map(4096)
    with pytest.raises(GuestpvError, match="no more DMA mappings \\(1 at the start\\)") as caught:
        attachment.dma.map(4096)
    assert "dma_entry_limit" in caught.value.hint
    attachment.close()


def test_no_memory_at_all(kernel: FakeKernel) -> None:
    attachment = attach(kernel)
    with pytest.raises(GuestpvError, match="of memory for the device: "):
        attachment.dma.map(1 << 60)
    with pytest.raises(UsageError, match="cannot map 0 bytes"):
        attachment.dma.map(0)
    attachment.close()


def test_a_group_in_use_names_the_process(kernel: FakeKernel) -> None:
    kernel.links["/proc/77/fd/5"] = "/dev/vfio/7"
    kernel.files["/proc/77/comm"] = "dpdk"
    first = Type1Container(7, system=kernel)
    with pytest.raises(Refused, match=r"IOMMU group 7 is in use by 77 \(dpdk\)"):
        Type1Container(7, system=kernel)
    del kernel.links["/proc/77/fd/5"]
    with pytest.raises(Refused, match="in use by a process that only root can see"):
        Type1Container(7, system=kernel)
    first.close()
    assert kernel.leaks() == NOTHING


def test_a_group_that_is_not_viable_names_its_members(kernel: FakeKernel) -> None:
    kernel.add(RNG, 0x1044)
    with pytest.raises(Refused, match=r"0000:00:03\.1 \(virtio-rng, driver virtio-pci\)"):
        attach(kernel)
    assert kernel.leaks() == NOTHING


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY])
def test_a_group_that_lost_its_viability_at_the_last_moment(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(kernel, "_group_4", lambda *_: (_ for _ in ()).throw(os_error(number)))
    with pytest.raises(Refused, match="IOMMU group 7 is not viable"):
        attach(kernel)


def test_permission_for_the_group_names_node_and_command(kernel: FakeKernel) -> None:
    kernel.user = 1000
    with pytest.raises(AccessDenied) as caught:
        attach(kernel)
    assert caught.value.where == "/dev/vfio/7"
    assert f"sudo guestpv bind --user $USER ADDRESS, with one of: {NET}" in caught.value.hint


def test_permission_for_the_container(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "open", lambda *_: (_ for _ in ()).throw(os_error(errno.EACCES)))
    with pytest.raises(AccessDenied) as caught:
        attach(kernel)
    assert caught.value.where == "/dev/vfio/vfio"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
def test_no_vfio_at_all(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(kernel, "open", lambda *_: (_ for _ in ()).throw(os_error(number)))
    with pytest.raises(GuestpvError) as caught:
        attach(kernel)
    assert caught.value.hint == "modprobe vfio-pci"


def test_no_member_bound(kernel: FakeKernel) -> None:
    del kernel.nodes["/dev/vfio/7"]
    with pytest.raises(Refused, match="no function of IOMMU group 7 is bound to vfio-pci"):
        attach(kernel)


def test_a_function_that_is_not_bound_though_its_neighbour_is(kernel: FakeKernel) -> None:
    kernel.add(RNG, 0x1044, driver=None)
    with pytest.raises(Refused, match="not bound to vfio-pci, though IOMMU group 7 is"):
        attach(kernel, RNG)
    assert kernel.leaks() == NOTHING


def test_interrupts_that_are_not_remapped(kernel: FakeKernel) -> None:
    kernel.interrupt_remapping = False
    with pytest.raises(Refused, match="does not remap interrupts") as caught:
        attach(kernel)
    assert "intremap=on" in caught.value.hint


def test_another_version_or_no_type1(kernel: FakeKernel) -> None:
    kernel.api_version = 1
    with pytest.raises(GuestpvError, match="VFIO API version 1, not 0"):
        attach(kernel)
    kernel.api_version = 0
    kernel.extensions = set()
    with pytest.raises(GuestpvError, match="no type1") as caught:
        attach(kernel)
    assert caught.value.hint == "modprobe vfio_iommu_type1"
    assert kernel.leaks() == NOTHING


def test_the_older_type1_will_do(kernel: FakeKernel) -> None:
    kernel.extensions = {abi.TYPE1_IOMMU}
    attachment = attach(kernel)
    assert kernel.containers()[0].kind == abi.TYPE1_IOMMU
    attachment.close()


# Addresses


def test_the_interrupt_window_and_the_first_mib_are_never_handed_out() -> None:
    allocator = IovaAllocator([(0, 0xFFFFFFFF)])
    step = 1 << 24
    seen: list[int] = []

    def exhaust() -> None:
        while True:
            seen.append(allocator.allocate(step, step))

    with pytest.raises(GuestpvError, match="no room"):
        exhaust()
    assert seen[0] == 0xFF000000
    for start in seen:
        assert start >= LOWEST
        assert start > MSI_WINDOW[1] or start + step <= MSI_WINDOW[0]
    assert 0xFE000000 not in seen


@given(
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 1 << 24)), max_size=4),
    st.lists(st.tuples(st.booleans(), st.integers(1, 300), st.sampled_from([1, 2, 512])), max_size=60),
)
def test_addresses_never_overlap_and_come_back_whole(
    pieces: list[tuple[int, int]], steps: list[tuple[bool, int, int]]
) -> None:
    ranges, edge = [], 0
    for gap, length in pieces:
        ranges.append((edge + gap, edge + gap + length))
        edge += gap + length + 2
    allocator = IovaAllocator(ranges)
    before = list(allocator._free)
    out: list[tuple[int, int]] = []
    for give_back, pages, align in steps:
        if give_back and out:
            allocator.free(*out.pop(pages % len(out)))
            continue
        try:
            start = allocator.allocate(pages * 4096, align * 4096)
        except GuestpvError:
            continue
        end = start + pages * 4096
        assert start % (align * 4096) == 0
        assert any(low <= start and end - 1 <= high for low, high in ranges)
        assert all(end <= other or other + size <= start for other, size in out)
        out.append((start, pages * 4096))
    for piece in out:
        allocator.free(*piece)
    assert allocator._free == before


def test_views_of_mapped_memory_are_plain_numpy(kernel: FakeKernel) -> None:
    attachment = attach(kernel)
    region = attachment.dma.map(4096)
    region.array[:8].view(np.uint64)[0] = 0x0102030405060708
    assert region.array[0] == 8
    attachment.close()
