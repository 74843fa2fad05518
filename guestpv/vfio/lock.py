"""One owner per function: the runtime directory, locks in it, and who holds what."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from ..errors import AccessDenied, GuestpvError, Refused
from ..system import SYSTEM, System


def runtime_directory(system: System = SYSTEM) -> str:
    """The directory for locks, records and sockets, made where it is missing, closed to other users.

    ``$RUNTIME_DIRECTORY`` (systemd sets it), ``/run/guestpv`` for root, else ``$XDG_RUNTIME_DIR/guestpv`` or
    a directory of the user's own in ``/tmp``.

    Raises:
        AccessDenied: it cannot be made, or somebody else owns it.
    """
    environ, user = system.environ(), system.geteuid()
    if environ.get("RUNTIME_DIRECTORY"):
        path = environ["RUNTIME_DIRECTORY"].split(":")[0]
    elif user == 0:
        path = "/run/guestpv"
    elif environ.get("XDG_RUNTIME_DIR"):
        path = environ["XDG_RUNTIME_DIR"] + "/guestpv"
    else:
        path = f"/tmp/guestpv-{user}"
    hint = "set RUNTIME_DIRECTORY to a directory of your own with mode 0700"
    try:
        with suppress(FileExistsError):
            system.mkdir(path, 0o700)
        status = system.stat(path)
    except OSError as error:
        raise AccessDenied(f"cannot make the runtime directory: {error}", where=path, hint=hint) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (user, 0) or status.st_mode & 0o022:
        raise AccessDenied(
            "the runtime directory must be a directory of yours that nobody else can write to",
            where=path,
            hint=hint,
        )
    return path


class FunctionLock:
    """Held while this process drives the function; the kernel releases it when the process dies.

    Args:
        name: address of the function.

    Raises:
        Refused: another process (or another open in this one) drives it; names its process id.
    """

    def __init__(self, name: str, *, system: System = SYSTEM) -> None:
        self._system = system
        self.path = f"{runtime_directory(system)}/{name}.lock"
        self._fd = -1
        try:
            fd = system.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise GuestpvError(f"cannot open the lock: {error}", where=self.path) from error
        try:
            system.flock(fd)
            system.pwrite(fd, f"{system.getpid():<10}\n".encode(), 0)
        except BaseException as error:
            owner = system.pread(fd, 16, 0).decode(errors="replace").strip()
            system.close(fd)
            if isinstance(error, BlockingIOError):
                raise Refused(
                    f"process {owner or '(just starting)'} drives this function already",
                    where=name,
                    hint="`guestpv net|blk|balloon status` asks it how it is; `down`, or `kill`, ends it",
                ) from error
            raise
        self._fd = fd

    def close(self) -> None:
        """Release it. The file stays: removing it would race with the next owner. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._system.close(fd)


def holders(path: str, system: System = SYSTEM) -> list[str]:
    """Processes that hold ``path`` open, as ``1234 (name)``, as far as we may look into them."""
    found = []
    for pid in filter(str.isdigit, system.listdir("/proc")):
        with suppress(OSError):
            if any(
                _points_to(f"/proc/{pid}/fd/{fd}", path, system) for fd in system.listdir(f"/proc/{pid}/fd")
            ):
                found.append(f"{pid} ({system.read_text(f'/proc/{pid}/comm')})")
    return found


def _points_to(link: str, path: str, system: System) -> bool:
    try:
        return system.readlink(link) == path
    except OSError:
        return False
