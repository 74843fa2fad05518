"""``guestpv.open``: from a specification to a transport. The only place that knows every scheme.

A specification is ``scheme:body[?key=value&...]``, percent-encoded; a bare PCI address means ``vfio:``.
"""

from __future__ import annotations

import importlib
import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qsl, unquote

from .errors import UsageError
from .pci.function import PciFunction
from .spec import features as feat
from .transport.base import FeatureFilter, Transport
from .transport.pci import PciTransport

if TYPE_CHECKING:
    from .trace.record import Recorder

LOG = logging.getLogger(__name__)
SCHEMES = {
    "vfio": "guestpv.vfio.function",
    "loopback": "guestpv.devices.loopback",
    "qtest": "guestpv.pci.qtest",
    "vhost-user": "guestpv.transport.vhost_user",
    "vfio-user": "guestpv.pci.vfio_user",
}
"""Scheme -> module whose ``open_function(body, params)`` gives the PCI function; one that is no PCI function
has ``open_transport(body, params)``, which gives the transport itself."""

DRIVERS = {
    feat.RNG: ("guestpv.drivers.rng", "Rng"),
    feat.NET: ("guestpv.drivers.net", "Net"),
    feat.BLK: ("guestpv.drivers.blk", "Blk"),
    feat.BALLOON: ("guestpv.drivers.balloon", "Balloon"),
}
"""Virtio device id -> module and class of its driver."""

_ADDRESS = re.compile(r"(?:[0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[0-1][0-9a-fA-F]\.[0-7]\Z")


class Driver(Protocol):
    """A device driver on a transport."""

    transport: Transport

    def close(self) -> None:
        """Reset the device and give everything back."""
        ...


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed specification."""

    scheme: str
    body: str
    params: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parse ``scheme:body?key=value`` or a bare PCI address.

        Raises:
            UsageError: not of this form, or the scheme is unknown.
        """
        head, _, query = text.partition("?")
        if _ADDRESS.match(head):
            head = f"vfio:{head}"
        scheme, colon, body = head.partition(":")
        if not colon or scheme not in SCHEMES:
            raise UsageError(
                f"{text!r} is neither a PCI address nor scheme:body with a known scheme",
                hint="such as 0000:01:00.0, vfio:0000:01:00.0, loopback:net; schemes: " + " ".join(SCHEMES),
            )
        body = unquote(body)
        if scheme == "vfio" and _ADDRESS.match(body):
            body = body.lower() if body.count(":") == 2 else f"0000:{body.lower()}"
        return cls(scheme, body, dict(parse_qsl(query, keep_blank_values=True)))


def open_function(spec: str | Spec) -> PciFunction:
    """The PCI function that a specification names, not yet looked at.

    Raises:
        UsageError: the scheme knows no PCI functions.
    """
    parsed = spec if isinstance(spec, Spec) else Spec.parse(spec)
    module = importlib.import_module(SCHEMES[parsed.scheme])
    if not hasattr(module, "open_function"):
        raise UsageError(f"{parsed.scheme}:{parsed.body} is no PCI function")
    function: PciFunction = module.open_function(parsed.body, parsed.params)
    return function


class Tracing:
    """Where ``open`` tells what happens when it is not told otherwise: ``guestpv trace`` sets it."""

    recorder: Recorder | None = None


def _open_transport(parsed: Spec, spec: str, trace: Recorder | None) -> Transport:
    module = importlib.import_module(SCHEMES[parsed.scheme])
    transport: Transport
    if hasattr(module, "open_transport"):
        if trace is None:
            transport = module.open_transport(parsed.body, parsed.params)
        else:
            from .trace.vhost_user import traced_vhost_user

            transport = module.open_transport(parsed.body, parsed.params, traced_vhost_user(trace))
        return transport
    function = open_function(parsed)
    try:
        if trace is None:
            return PciTransport(function)
        from .trace.function import traced_pci

        return traced_pci(function, trace, spec)
    except BaseException:
        function.close()
        raise


def open(spec: str, *, trace: Recorder | None = None) -> Transport:
    """Open a device: a transport, reset and not negotiated.

    ``features=+a,-b`` and ``mode=msix|intx|poll`` are understood for every scheme, what else there is
    depends on the scheme.

    Args:
        spec: names the device.
        trace: gets every register access, ring operation, notification and decision from here on.

    Raises:
        UsageError: the specification is not well formed.
        GuestpvError: the device could not be opened; nothing is left behind.
    """
    parsed = Spec.parse(spec)
    LOG.info("opening %s", spec)
    wishes = parsed.params.pop("features", "")
    mode = parsed.params.pop("mode", "")
    if mode not in ("", "msix", "intx", "poll"):
        raise UsageError(f"mode is msix, intx or poll, not {mode!r}", where=spec)
    transport = _open_transport(parsed, spec, trace or Tracing.recorder)
    try:
        transport.feature_filter = FeatureFilter.parse(wishes, transport.device_type)
        if mode:
            transport.mode = mode  # type: ignore[assignment]
        transport.reset()
    except BaseException:
        transport.release()
        raise
    return transport


def open_driver(spec: str, *, trace: Recorder | None = None) -> Driver:
    """Open a device and start the driver for its type; closing the driver closes the device.

    Raises:
        UsageError: there is no driver for this device type.
    """
    transport = open(spec, trace=trace)
    try:
        if transport.device_type not in DRIVERS:
            known = ", ".join(feat.DEVICE_NAMES[kind] for kind in DRIVERS)
            name = feat.DEVICE_NAMES.get(transport.device_type, str(transport.device_type))
            raise UsageError(
                f"there is no driver for device type {name}; there is one for {known}", where=spec
            )
        module, name = DRIVERS[transport.device_type]
        driver: Driver = getattr(importlib.import_module(module), name)(transport)
    except BaseException:
        transport.close()
        raise
    return driver
