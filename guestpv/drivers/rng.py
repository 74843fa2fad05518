"""The entropy device (5.4): the smallest driver, and the tutorial.

Everything a virtio driver does is here once: negotiate, make a queue, go live, hand buffers to the
device, wait, take them back.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from ..errors import DeviceViolation, TimeLimit
from ..spec.rng import REQUESTQ
from ..transport.base import Transport


class Rng:
    """Reads random bytes from a virtio entropy device.

    >>> import guestpv
    >>> with guestpv.open("vfio:0000:02:00.0") as t, Rng(t) as rng:   # doctest: +SKIP
    ...     rng.read(16)

    Args:
        transport: an opened entropy device; it is negotiated here and closed with the driver.
        buffer_size: bytes asked of the device at a time.
    """

    def __init__(self, transport: Transport, buffer_size: int = 4096) -> None:
        self.transport = transport
        transport.negotiate(supported=0)
        with transport.failing():
            self.queue = transport.make_queue(REQUESTQ)
            self.buffer = transport.pool.allocate(buffer_size)
            self._asked = False
            transport.driver_ok()

    def read(self, nbytes: int, timeout: float = 10.0) -> bytes:
        """``nbytes`` random bytes; a device may answer with less than was asked, so it is asked again.

        Raises:
            TimeLimit: the device did not answer within ``timeout`` seconds.
            DeviceViolation: the device used a buffer without writing a byte (5.4.6.1 forbids it).
        """
        result = bytearray()
        while len(result) < nbytes:
            # A buffer that came too late for an earlier call is still the device's: wait for that one.
            if not self._asked:
                want = min(nbytes - len(result), self.buffer.nbytes)
                self.queue.add(writable=[self.buffer[:want]])
                self.queue.publish()
                self._asked = True
            if not self.queue.wait(timeout):
                raise TimeLimit(f"no entropy within {timeout:g} s", where=self.transport.name)
            for _token, length in self.queue.completions():
                self._asked = False
                if length == 0:
                    raise DeviceViolation("a buffer came back empty", section="5.4.6", where=self.queue.name)
                result += self.buffer.array[:length].tobytes()
        return bytes(result[:nbytes])

    def close(self) -> None:
        """Reset the device and give everything back."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
