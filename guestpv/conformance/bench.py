"""Where devices come from: opened once, used by one case after the other, opened anew when one is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from .. import opener
from ..errors import GuestpvError
from ..pci.function import PciFunction
from ..transport.base import Transport
from ..transport.pci import PciTransport
from .case import Case
from .rig import Combination, Rig, combinations, require_type
from .watched import WatchedFunction


@dataclass(frozen=True)
class Peer:
    """A device to check.

    Attributes:
        spec: how it is opened.
        name: of a device that was broken on purpose; empty for one as it is.
        prepare: breaks it, before anything looks at it.
        breaks: requirements that it breaks: only their checks are run on it. None for all checks.
    """

    spec: str
    name: str = ""
    prepare: Callable[[PciFunction], None] | None = None
    breaks: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a device before any case.

    Attributes:
        device_type: virtio device id.
        offered: feature mask.
        rings: feature combinations of its rings.
        pci: whether it is a PCI function.
    """

    device_type: int
    offered: int
    rings: list[Combination]
    pci: bool


class Bench:
    """Opens devices. Of each PCI function one is open at a time, and kept while it is in order.

    Args:
        wire: network interface at the other end of a network device's cable.
    """

    def __init__(self, wire: str = "") -> None:
        self._wire = wire
        self._open: tuple[Peer, WatchedFunction] | None = None
        self._facts: dict[str, Facts] = {}

    def facts(self, peer: Peer) -> Facts:
        """Open the device as it is, look, and keep it for the first case.

        Raises:
            GuestpvError: it cannot be opened, or has no checks.
        """
        if peer.spec not in self._facts:
            rig = self.rig(Peer(peer.spec), Case("facts"))
            try:
                transport = rig.transport
                offered = transport.offered
                # Where not even this works, every check would wait for its limit.
                try:
                    rig.works()
                except AssertionError as error:
                    raise GuestpvError(
                        f"a good request does not come back: {error}",
                        where=peer.spec,
                        hint="there is nothing to check yet; see `guestpv info`, and the device's log",
                    ) from error
                self._facts[peer.spec] = Facts(
                    transport.device_type,
                    offered,
                    combinations(offered),
                    isinstance(transport, PciTransport),
                )
            finally:
                self.done(rig)
        return self._facts[peer.spec]

    def rig(self, peer: Peer, case: Case, *, fresh: bool = False, untouched: bool = False) -> Rig:
        """A device for a case, reset.

        Args:
            peer: which.
            case: gets the log.
            fresh: open it anew in any case.
            untouched: leave out the reset, so that the device is as it was opened.
        """
        parsed = opener.Spec.parse(peer.spec)
        synchronous = parsed.scheme == "loopback" and parsed.params.get("threaded") != "on"
        transport: Transport
        if parsed.scheme == "vhost-user":
            transport = opener.open(peer.spec)
        else:
            function = self.function(peer, case, fresh=fresh)
            # Every case begins with the same look at the capabilities; it would hide what matters.
            function.tell = lambda line: None
            transport = PciTransport(function)
            function.tell = case.note
        rig = None
        try:
            require_type(transport)
            # INTx is shared out by a thread.
            synchronous = synchronous and transport.mode != "intx"
            rig = Rig(peer.spec, transport, case, synchronous=synchronous, wire=self._wire)
            if not untouched:
                transport.reset(rig.limit)
        except BaseException:
            with contextlib.suppress(GuestpvError):
                transport.abandon()
            self.lose()
            raise
        return rig

    def function(self, peer: Peer, case: Case, *, fresh: bool = False) -> WatchedFunction:
        """The PCI function alone, for what is to be seen without driving it.

        Raises:
            UsageError: the device is no PCI function.
        """
        if self._open and (fresh or self._open[0] != peer):
            self.lose()
        if self._open is None:
            function = opener.open_function(peer.spec)
            try:
                if peer.prepare:
                    peer.prepare(function)
                self._open = peer, WatchedFunction(function)
            except BaseException:
                function.close()
                raise
        self._open[1].tell = case.note
        return self._open[1]

    def done(self, rig: Rig, *, lost: bool = False) -> None:
        """Take a device back from a case: reset it, or let it go where it is not in order."""
        try:
            if not lost:
                rig.finish()
                rig.transport.close()
        except GuestpvError:
            lost = True
        try:
            rig.transport.abandon()
        except GuestpvError:
            lost = True
        if lost:
            self.lose()

    def lose(self) -> None:
        """Close the function that is open, if there is one; the next case opens another."""
        if self._open is not None:
            function, self._open = self._open[1].inner, None
            with contextlib.suppress(GuestpvError):
                function.close()
