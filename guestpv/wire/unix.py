"""Connecting to somebody's UNIX socket, with a message for each way in which that fails."""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from ..errors import AccessDenied, GuestpvError, UsageError

PATH_MAX: Final = 107
"""Bytes of a socket's path (struct sockaddr_un, without its NUL)."""


def connect(path: str, where: str, timeout: float, *, server: str, start: str = "") -> socket.socket:
    """A connected stream socket.

    Args:
        path: of the socket.
        where: for messages.
        timeout: seconds for connecting, and then for each operation on the socket.
        server: what listens there, for messages: ``the back end``.
        start: command that starts it.

    Raises:
        UsageError: it cannot be a socket's path.
        AccessDenied: the socket's permissions.
        GuestpvError: there is no such socket, or nobody listens.
    """
    if not 1 <= len(os.fsencode(path)) <= PATH_MAX:
        raise UsageError(
            f"a socket's path has 1 to {PATH_MAX} bytes, this one has {len(os.fsencode(path))}", where=where
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        command = f": {start}" if start else ""
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AccessDenied(
                f"no permission to connect ({errno.errorcode[error.errno]})",
                where=where,
                hint=f"connecting needs write permission on the socket: ls -l {path}",
            ) from None
        message, hint = f"cannot connect: {error.strerror or error}", ""
        if error.errno == errno.ENOENT:
            message = "there is no such socket"
            hint = f"start {server} first{command}, or mend the path"
        elif error.errno == errno.ECONNREFUSED:
            message = "nobody listens on it (ECONNREFUSED)"
            hint = f"{server} has ended and left its socket behind; start it again{command}"
        elif error.errno == errno.EPROTOTYPE:
            message = f"it is not a stream socket, so not that of {server}"
        raise GuestpvError(message, where=where, hint=hint) from None
    return sock
