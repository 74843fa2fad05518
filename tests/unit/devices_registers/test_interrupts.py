"""MSI-X, INTx and the ISR (4.1.4.5, 4.1.5.3)."""

from __future__ import annotations

import pytest

from guestpv.spec import pci
from guestpv.spec.pci import CfgType

from .kit import V1, Bench, fired


def with_vectors(bench: Bench, vector: int = 1) -> list[int]:
    fds = bench.function.enable_msix(2)
    bench.driver.negotiate(V1)
    bench.queue = bench.driver.queue(0, 8, vector)  # type: ignore[attr-defined]
    bench.driver.driver_ok()
    return fds


def use_one(bench: Bench) -> None:
    queue = bench.queue  # type: ignore[attr-defined]
    queue.add([], [queue.buffer(4)])
    queue.kick()


@pytest.mark.requirement("DEV-PCI-65", "DEV-PCI-67", "DEV-PCI-69", "DEV-PCI-96", "DEV-PCI-73")
def test_used_buffer_interrupt_goes_to_its_vector(rng: Bench) -> None:
    fds = with_vectors(rng, 0)
    use_one(rng)
    assert [fired(fd) for fd in fds] == [1, 0]
    assert rng.driver.read_at(CfgType.ISR, 0, 1) == 0
    with_vectors(rng, pci.NO_VECTOR)
    use_one(rng)
    assert rng.function.interrupts.delivered == [1, 0]


@pytest.mark.requirement("DEV-PCI-72", "DRV-PCI-45")
def test_refused_and_unverified_vectors(rng: Bench) -> None:
    rng.driver.negotiate(V1)
    rng.function.registers.vectors_granted = 1
    rng.driver.write("config_msix_vector", 1)
    assert rng.driver.read("config_msix_vector") == pci.NO_VECTOR
    rng.driver.write("config_msix_vector", 0)
    rng.driver.driver_ok()
    assert rng.rules == ["DRV-PCI-45"]


def test_masked_vector_is_pending_until_unmasked(rng: Bench) -> None:
    fds = with_vectors(rng)
    bar = rng.function.bar(0)
    pending = 16 * 2
    bar.write(16 + 12, 4, 1)
    use_one(rng)
    assert fired(fds[1]) == 0
    assert bar.read(pending, 4) == 2
    bar.write(16 + 12, 4, 0)
    assert fired(fds[1]) == 1
    assert bar.read(pending, 4) == 0
    control = rng.function.config.positions["msix"] + 2
    rng.function.config_write(control, 2, 0xC000)
    use_one(rng)
    assert fired(fds[1]) == 0
    rng.function.config_write(control, 2, 0x8000)
    assert fired(fds[1]) == 1


def test_withheld_interrupts_come_later(rng: Bench) -> None:
    fds = with_vectors(rng)
    rng.function.interrupts.withhold = True
    use_one(rng)
    assert fired(fds[1]) == 0
    assert rng.function.interrupts.deliver_withheld() == 1
    assert fired(fds[1]) == 1


@pytest.mark.requirement("DEV-PCI-46", "DEV-PCI-47", "DEV-PCI-48", "DEV-PCI-94")
def test_intx_follows_the_isr(rng: Bench) -> None:
    fd = rng.function.enable_intx()
    rng.driver.negotiate(V1)
    rng.queue = rng.driver.queue(0, 8)  # type: ignore[attr-defined]
    rng.driver.driver_ok()
    use_one(rng)
    use_one(rng)
    assert fired(fd) == 1
    assert rng.function.config_read(pci.PCI_CONFIG_STATUS, 2) & 8
    rng.function.unmask_intx()
    assert fired(fd) == 1
    assert rng.driver.read_at(CfgType.ISR, 0, 1) == pci.ISR_QUEUE
    assert rng.driver.read_at(CfgType.ISR, 0, 1) == 0
    assert not rng.function.config_read(pci.PCI_CONFIG_STATUS, 2) & 8
    rng.function.unmask_intx()
    assert fired(fd) == 0
    rng.device.config_changed()
    assert fired(fd) == 1
    assert rng.driver.read_at(CfgType.ISR, 0, 1) == pci.ISR_CONFIG


def test_interrupt_disable_of_the_command_register(rng: Bench) -> None:
    fd = rng.function.enable_intx()
    rng.driver.start(V1, {})
    command = rng.function.config_read(pci.PCI_CONFIG_COMMAND, 2)
    rng.function.config_write(pci.PCI_CONFIG_COMMAND, 2, command | pci.COMMAND_INTX_DISABLE)
    rng.device.config_changed()
    assert fired(fd) == 0
    rng.function.config_write(pci.PCI_CONFIG_COMMAND, 2, command)
    assert fired(fd) == 1
