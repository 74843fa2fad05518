"""Frames of a running link, with their virtio headers, over a socket beside its control socket."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ..core._core import ffi, lib
from ..errors import GuestpvError, UsageError
from ..spec import net as spec

SUFFIX: Final = ".capture"
BUFFER: Final = 8 << 20
"""Bytes that may wait for the reader; the system's limit holds for those who are not root."""
LARGEST: Final = 1 << 18
RECORD: Final = struct.Struct("=QIIII")
SO_SNDBUFFORCE: Final = 32


@dataclass(frozen=True, slots=True)
class Captured:
    """A frame as the device gave or got it.

    Attributes:
        nanoseconds: since the epoch.
        inbound: from the device.
        pair: number of the queue pair.
        header: the virtio header, ``spec.net.header_dtype``.
        frame: Ethernet frame.
    """

    nanoseconds: int
    inbound: bool
    pair: int
    header: np.void
    frame: bytes

    @classmethod
    def parse(cls, message: bytes) -> Captured:
        """A message of the pump."""
        nanoseconds, way, size, total, pair = RECORD.unpack_from(message)
        data = message[RECORD.size :][:total]
        dtype = spec.HEADER_HASH if size == spec.HEADER_HASH.itemsize else spec.HEADER
        header = np.frombuffer(data, dtype, 1)[0]
        return cls(nanoseconds, way == lib.GPV_CAPTURED_RX, pair, header, data[size:])

    @property
    def comment(self) -> str:
        """The virtio header in words; what is 0 is left out."""
        way = "rx" if self.inbound else "tx"
        return " ".join([f"{way} queue pair {self.pair}", *spec.header_words(self.header)])


class CaptureServer:
    """Gives a running link's frames to those who connect to its capture socket, one at a time.

    Args:
        path: where the socket goes; nobody else can write there.
        begin: called in the server's thread with a socket for each pump, which the pumps close.
    """

    def __init__(self, path: Path, begin: Callable[[int], None]) -> None:
        self._path = path
        self._begin = begin
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(str(path))
            path.chmod(0o600)
            self._listener.listen(4)
        except BaseException:
            self._listener.close()
            raise
        threading.Thread(target=self._accept, name="capture", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                for option in (socket.SO_SNDBUF, SO_SNDBUFFORCE):
                    with contextlib.suppress(OSError):
                        client.setsockopt(socket.SOL_SOCKET, option, BUFFER)
                self._begin(client.fileno())

    def close(self) -> None:
        """Accept nobody any more. Idempotent."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def captured(path: Path, stop: Callable[[], bool], look: float = 0.2) -> Iterator[Captured]:
    """Frames of the link that listens at ``path``, until ``stop()`` is true or the link ends.

    Raises:
        UsageError: nobody listens there.
        GuestpvError: the connection failed.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as reader:
        try:
            reader.connect(str(path))
        except FileNotFoundError:
            raise UsageError(
                "the link that is up has no capture socket: it runs an older guestpv", where=str(path)
            ) from None
        except OSError as error:
            raise GuestpvError(f"cannot connect: {os.strerror(error.errno or 0)}", where=str(path)) from error
        reader.settimeout(look)
        while not stop():
            try:
                message = reader.recv(LARGEST)
            except TimeoutError:
                continue
            if not message:
                return
            yield Captured.parse(message)


assert RECORD.size == ffi.sizeof("struct gpv_captured")
