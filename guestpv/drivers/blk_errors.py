"""How block requests fail, each error with its sector and length (5.2.6)."""

from __future__ import annotations

from ..errors import DeviceViolation, GuestpvError
from ..spec import blk as spec


class BlkError(GuestpvError):
    """A block request that did not succeed.

    Args:
        kind: request type, ``T_*``.
        sector: first 512-byte sector.
        nbytes: bytes of data, or of the range.
        status: status byte of the device, None where there is none.
    """

    code = "blk-error"

    def __init__(
        self,
        message: str,
        *,
        kind: int,
        sector: int,
        nbytes: int,
        status: int | None = None,
        where: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.kind = kind
        self.sector = sector
        self.nbytes = nbytes
        self.status = status


class BlkIoError(BlkError):
    """Status IOERR: the device or its storage failed. Of several ranges in one request any may be done."""

    code = "io-error"


class BlkUnsupported(BlkError):
    """Status UNSUPP: the device does not know the request."""

    code = "unsupported"


class ZoneError(BlkError):
    """One of the statuses of zoned devices: the zone's state or limits do not allow the request."""

    code = "zone-error"


class OutcomeUnknown(BlkError):
    """The request was given to the device and never came back: it may be done, in part, or not at all."""

    code = "outcome-unknown"


def describe(kind: int, sector: int, nbytes: int) -> str:
    """A request in words: ``read of 4096 bytes at sector 8``."""
    text = spec.TYPE_NAMES.get(kind, f"request of type {kind}")
    return f"{text} of {nbytes} bytes at sector {sector}" if nbytes else text


def error_of(status: int, kind: int, sector: int, nbytes: int, where: str) -> GuestpvError:
    """The error that a status byte other than OK stands for; an undefined one is a violation."""
    what = describe(kind, sector, nbytes)
    name = spec.STATUS_NAMES.get(status)
    if name is None:
        said = "left the status byte alone" if status == 0xFF else f"gave status {status}, which is undefined"
        return DeviceViolation(f"{what}: the device {said}", section="5.2.6", where=where)
    classes = {spec.S_IOERR: BlkIoError, spec.S_UNSUPP: BlkUnsupported}
    return classes.get(status, ZoneError)(
        f"{what} failed: the device says {name}",
        kind=kind,
        sector=sector,
        nbytes=nbytes,
        status=status,
        where=where,
    )
