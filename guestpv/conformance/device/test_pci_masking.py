"""Masked MSI-X messages wait as pending bits (4.1.5.1.2, 4.1.5.3; PCI's own rules for MSI-X)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.rig import Rig
from guestpv.conformance.stimulus import change_config
from guestpv.pci.capabilities import walk
from guestpv.spec import features as ft
from guestpv.spec import net, pci
from guestpv.vfio.function import VfioFunction

ENTRY = 16
CONTROL = 12
FUNCTION_MASK = 1 << 14


@dataclass(frozen=True)
class Masks:
    """The mask bits and the pending bits of a function with MSI-X."""

    rig: Rig
    at: int

    @classmethod
    def of(cls, rig: Rig) -> Masks:
        """Those of the device under test; the case ends where nobody here can reach them."""
        if isinstance(rig.function.inner, VfioFunction):
            rig.case.not_observable("the kernel keeps the MSI-X table to itself")
        if rig.function.msix_vectors < 2:
            pytest.skip(f"the function has {rig.function.msix_vectors} MSI-X vectors")
        return cls(rig, next(at for at, id in walk(rig.function.config_read) if id == pci.PCI_CAP_MSIX))

    def mask_vector(self, vector: int, masked: bool) -> None:
        """The mask bit of one vector."""
        where = self.rig.function.config_read(self.at + 4, 4)
        self.rig.function.bar(where & 7).write((where & ~7) + ENTRY * vector + CONTROL, 4, int(masked))

    def mask_function(self, masked: bool) -> None:
        """The mask bit of all vectors."""
        control = self.rig.function.config_read(self.at + 2, 2)
        control = control | FUNCTION_MASK if masked else control & ~FUNCTION_MASK
        self.rig.function.config_write(self.at + 2, 2, control)

    def pending(self, vector: int) -> bool:
        """The pending bit of a vector."""
        where = self.rig.function.config_read(self.at + 8, 4)
        word = self.rig.function.bar(where & 7).read((where & ~7) + vector // 32 * 4, 4)
        return bool(word >> vector % 32 & 1)


QUEUE_VECTOR, CONFIG_VECTOR = 0, 1


@pytest.mark.requirement("DEV-PCI-96", "DEV-PCI-97")
@pytest.mark.parametrize("event", ["used", "change"])
@pytest.mark.parametrize("how", ["vector", "function"])
def test_a_masked_message_waits(rig: Rig, case: Case, event: str, how: str) -> None:
    """A masked message is not sent but pending; it is sent, once, when the mask is taken away."""
    masks = Masks.of(rig)
    # Nobody else may wait for the vectors.
    rig.transport.mode = "poll"
    extra = 1 << net.F_STATUS if rig.transport.device_type == ft.NET else 0
    rig.negotiate(rig.features_for() | extra & rig.transport.offered)
    rig.function.disable_interrupts()
    rig.function.enable_msix(2)
    rig.pci.common.write("config_msix_vector", CONFIG_VECTOR)
    queues = {
        index: rig.queue_with_vector(index, QUEUE_VECTOR if index == rig.work.main else pci.NO_VECTOR)
        for index in rig.work.queues
    }
    rig.transport.driver_ok()
    for vector in (QUEUE_VECTOR, CONFIG_VECTOR):
        rig.vector_events(vector)
    vector = QUEUE_VECTOR if event == "used" else CONFIG_VECTOR

    def mask(masked: bool) -> None:
        if how == "vector":
            masks.mask_vector(vector, masked)
        else:
            masks.mask_function(masked)

    case.sent(f"an event while its {how} is masked")
    mask(True)
    assert not masks.pending(vector), "a pending bit is set before there was an event"
    if event == "used":
        request = rig.work.request()
        queues[rig.work.main].run(request.readable, request.writable)
    else:
        change_config(rig)
    rig.wait(lambda: masks.pending(vector), f"pending bit of vector {vector}, whose message is masked")
    rig.settle()
    assert rig.vector_events(vector) == 0, f"vector {vector} fired while it was masked"
    mask(False)
    rig.wait(lambda: rig.vector_events(vector) > 0, f"message of vector {vector} after it was unmasked")
    assert not masks.pending(vector), "the pending bit stays set after the message was sent"
    rig.settle()
    assert rig.vector_events(vector) == 0, "the message came twice"


@pytest.mark.requirement("DEV-PCI-96")
def test_unmasking_sends_nothing_by_itself(rig: Rig) -> None:
    """Taking a mask away sends nothing where nothing is pending."""
    masks = Masks.of(rig)
    rig.transport.mode = "poll"
    rig.start()
    rig.function.disable_interrupts()
    rig.function.enable_msix(2)
    for masked in (True, False):
        masks.mask_vector(QUEUE_VECTOR, masked)
        masks.mask_function(masked)
    rig.settle()
    assert rig.vector_events(QUEUE_VECTOR) == 0, "a message was sent though nothing had happened"
