"""What a network device can be plugged into."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import UsageError
from .net import Net


class Wire:
    """A cable between two network devices: what one transmits the other receives."""

    def __init__(self, one: Net, other: Net) -> None:
        one.peer = other.deliver
        other.peer = one.deliver
        self.ends = (one, other)

    def cut(self) -> None:
        """Unplug both ends: links go down."""
        for end in self.ends:
            end.peer = None
            end.set_link(False)


def echo(model: Net) -> None:
    """Send everything back as it came."""
    model.peer = model.deliver


def tap(model: Net, receiver: Callable[[bytes], None]) -> None:
    """Give complete frames, checksummed, to a function; ``model.deliver`` sends frames to the driver."""
    model.peer = lambda packet: receiver(packet.checksummed().data)


class Sockets:
    """Named wires of this process: the first end waits for the second."""

    def __init__(self) -> None:
        self._waiting: dict[str, Net] = {}

    def plug(self, name: str, model: Net) -> None:
        """Put a device into the socket ``name``."""
        other = self._waiting.pop(name, None)
        if other is None:
            self._waiting[name] = model
            model.unplug = lambda: self.unplug(model)
        elif other is model:
            raise UsageError(f"one device cannot be both ends of wire {name!r}")
        else:
            Wire(other, model)

    def unplug(self, model: Net) -> None:
        """Forget a device that still waited for its other end."""
        self._waiting = {name: end for name, end in self._waiting.items() if end is not model}


SOCKETS = Sockets()
