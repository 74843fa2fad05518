"""Our own driver's rings on the observing build of the core: the strict device sees every store in order."""

from __future__ import annotations

from typing import cast

from ...devices.evidence import Event, Journal
from ...devices.function import SoftwareFunction
from ...memory import DmaPool
from ...pci.function import PciFunction
from ...transport.pci import PciTransport
from ...virtqueue.kick import Kick
from ...virtqueue.observed import Access, ObservedVirtqueue


def observe(function: SoftwareFunction) -> PciTransport:
    """A transport on a software function, whose journal gets each access to ring memory as an event.

    Raises:
        Refused: as for ``PciTransport``.
    """
    transport = PciTransport(cast(PciFunction, function))
    transport.queue_class = _queue_class(function.journal)
    return transport


def _queue_class(journal: Journal) -> type[ObservedVirtqueue]:
    class Observed(ObservedVirtqueue):
        def __init__(
            self, index: int, size: int, features: int, pool: DmaPool, kick: Kick, **rest: object
        ) -> None:
            super().__init__(index, size, features, pool, kick, **rest)  # type: ignore[arg-type]
            self.before_access = self._tell

        def _tell(self, access: Access) -> None:
            self.accesses.clear()
            journal.record(
                Event(access.kind, access.area, access.offset, access.width, access.value, self.index)
            )

    return Observed
