"""Bytes and file descriptors over a UNIX stream socket, for vfio-user and vhost-user connections."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence

from ..errors import DeviceGone, GuestpvError, TimeLimit


class ProtocolError(GuestpvError):
    """The peer sent what its protocol does not allow."""

    code = "protocol"


def close_all(fds: Iterable[int]) -> None:
    """Close file descriptors."""
    for fd in fds:
        os.close(fd)


class Stream:
    """One end of a connection.

    Args:
        sock: a connected stream socket, owned and closed by the stream.
        name: how messages call the connection.
        timeout: seconds that the peer has for each step; None: for ever.
        max_fds: descriptors that may come with one message.
    """

    def __init__(self, sock: socket.socket, name: str, timeout: float | None, max_fds: int) -> None:
        self._socket = sock
        self.name = name
        self.timeout = timeout
        self._max_fds = max_fds
        sock.settimeout(timeout)

    def fileno(self) -> int:
        """Descriptor of the socket, to poll."""
        return self._socket.fileno()

    def write(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of ``data``; the descriptors go with its first byte.

        Raises:
            DeviceGone: the peer closed the connection.
            TimeLimit: the peer reads nothing.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            if sent < len(data):
                self._socket.sendall(data[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise TimeLimit(f"the peer read nothing for {self.timeout:g} s", where=self.name) from None
        except OSError as error:
            raise DeviceGone(f"the peer closed the connection ({error.strerror})", where=self.name) from None

    def read(self, size: int, fds: list[int]) -> bytes:
        """Exactly ``size`` bytes; the descriptors that came with them are appended to ``fds``.

        On an error the caller closes what is in ``fds``.

        Raises:
            DeviceGone: the peer closed the connection.
            ProtocolError: more descriptors came than a message may have.
            TimeLimit: not all of it came in time.
        """
        data = b""
        while len(data) < size:
            try:
                part, ancillary, flags, _peer = self._socket.recvmsg(
                    size - len(data), socket.CMSG_SPACE(4 * self._max_fds), socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                raise TimeLimit(f"the peer sent nothing for {self.timeout:g} s", where=self.name) from None
            except OSError as error:
                raise DeviceGone(
                    f"the peer closed the connection ({error.strerror})", where=self.name
                ) from None
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += [fd for (fd,) in struct.iter_unpack("=i", content[: len(content) // 4 * 4])]
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(f"more than {self._max_fds} descriptors in one message", where=self.name)
            if not part:
                raise DeviceGone("the peer closed the connection", where=self.name)
            data += part
        return data

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()
