"""Errors of the guest lab."""


class LabError(Exception):
    """The lab could not do what was asked; the message says what, where and what to do next."""


class GuestDied(LabError):
    """The virtual machine ended while something still needed it."""


class GuestTimeout(LabError):
    """A time limit passed. ``stdout`` and ``stderr`` hold what the command had printed until then."""

    def __init__(self, message: str, stdout: str = "", stderr: str = "") -> None:
        super().__init__(message)
        self.stdout = stdout
        self.stderr = stderr
