"""The one tree of errors. Each says what happened, where, and what to run or change next."""

from __future__ import annotations


class GuestpvError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: what happened, in the standard's or the kernel's own terms.
        where: the function, register, queue, file or errno it happened at.
        hint: what to run or change next, as an exact command where there is one.
    """

    code = "failed"
    exit_status = 1

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  {self.hint}" if self.hint else text


class UsageError(GuestpvError):
    """The caller asked for something that does not exist or is not well formed."""

    code = "usage"
    exit_status = 2


class Refused(GuestpvError):
    """Carrying on would endanger data, memory or somebody else's use of the function."""

    code = "refused"
    exit_status = 3


class AccessDenied(GuestpvError):
    """The operating system did not permit it."""

    code = "permission"
    exit_status = 4


class DeviceViolation(GuestpvError):
    """The device broke the standard.

    Args:
        requirement: id of the broken requirement in the catalogue, such as ``DEV-SPLIT-07``.
        section: section of VIRTIO 1.4.
    """

    code = "device-violation"
    exit_status = 5

    def __init__(
        self, message: str, *, requirement: str = "", section: str = "", where: str = "", hint: str = ""
    ) -> None:
        tags = ", ".join(tag for tag in (section and f"VIRTIO 1.4 section {section}", requirement) if tag)
        super().__init__(f"{message} ({tags})" if tags else message, where=where, hint=hint)
        self.requirement = requirement
        self.section = section


class TimeLimit(GuestpvError):
    """Something that had to happen did not happen in time."""

    code = "time-limit"
    exit_status = 6


class DeviceGone(GuestpvError):
    """The function was unplugged or its registers no longer answer."""

    code = "device-gone"


class BackEndGone(DeviceGone):
    """The back end at the other end of a socket ended; another one may take its place."""

    code = "back-end-gone"


class QueueFull(GuestpvError):
    """No descriptors are left for the buffer; reap completions first."""

    code = "queue-full"


class FeaturesRefused(GuestpvError):
    """The device did not keep FEATURES_OK for the set that the driver accepted (3.1.1 step 6)."""

    code = "features-refused"
