"""Requests of the device types: what stands in the buffers, and what the device writes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..devices.evidence import Event
from ..devices.function import SoftwareFunction
from ..devices.models.balloon import Balloon as BalloonModel
from ..devices.ring import Chain
from ..drivers.balloon import Balloon
from ..drivers.blk import Blk
from ..drivers.net import RECEIVE_OFFLOADS, SEND_OFFLOADS, Net
from ..system import System
from ..transport.pci import PciTransport
from .recorder import software, vector

FRAME = bytes.fromhex("525400000001 525400000002 88b5") + bytes(range(46))
"""An Ethernet frame of an experimental type: destination, source, type, 46 bytes."""
PATTERN = bytes(range(256)) * 2
PROC = {
    "/proc/meminfo": "MemTotal: 1024 kB\nMemFree: 512 kB\nMemAvailable: 768 kB\nBuffers: 8 kB\nCached: 64 kB",
    "/proc/vmstat": "pswpin 1\npswpout 2\npgfault 1000\npgmajfault 10",
}


class StillSystem(System):
    """A kernel whose statistics never change."""

    def read_text(self, path: str) -> str:
        """One of the two files that statistics come from."""
        return PROC[path]


class Recording:
    """Requests of one function, in the order in which the device took them."""

    def __init__(self, function: SoftwareFunction) -> None:
        self.features = 0
        self._device = function.device
        self.requests: list[dict[str, Any]] = []
        self._out: dict[tuple[int, int], dict[str, Any]] = {}

    def __call__(self, event: Event, subject: object) -> None:
        """An observer of the function."""
        if not isinstance(subject, Chain):
            return
        self.features = self._device.features
        key = event.queue, event.value
        if event.kind == "pop":
            parts = [
                {"address": part.address, "length": part.length, "writable": part.writable}
                for part in subject.elements
            ]
            self._out[key] = {
                "queue": event.queue,
                "elements": parts,
                "readable": subject.read().hex(),
                "used": None,
                "written": "",
            }
            self.requests.append(self._out[key])
        elif event.kind == "push":
            written = b"".join(subject.writable)[: event.extra]
            self._out.pop(key).update(used=event.extra, written=written.hex())


Run = Callable[[PciTransport, SoftwareFunction], None]


def frames(transport: PciTransport, function: SoftwareFunction) -> None:
    """A frame is sent, and comes back into a receive buffer behind a 12-byte header."""
    with Net(transport, offloads=0) as driver:
        driver.send([FRAME])
        assert driver.receive() == [FRAME]


def frames_offloaded(transport: PciTransport, function: SoftwareFunction) -> None:
    """The same with checksum and segmentation features: the header is there, and asks for nothing."""
    with Net(transport, offloads=RECEIVE_OFFLOADS | SEND_OFFLOADS) as driver:
        driver.send([FRAME])
        assert driver.receive() == [FRAME]


def queue_pairs(transport: PciTransport, function: SoftwareFunction) -> None:
    """Two queue pairs are switched on by a command on the control queue."""
    Net(transport, queue_pairs=2, started=False).close()


def disk(transport: PciTransport, function: SoftwareFunction) -> None:
    """Write, read, flush, discard, write zeroes, and the identification of a disk."""
    with Blk(transport) as driver:
        driver.write(4096, PATTERN)
        assert driver.read(4096, len(PATTERN)).tobytes() == PATTERN
        driver.flush()
        driver.discard(8192, 4096)
        driver.write_zeroes(4096, 512, unmap=True)
        driver.get_id()


def balloon(transport: PciTransport, function: SoftwareFunction) -> None:
    """Three pages go into the balloon, two come out, and statistics are asked for once."""
    with Balloon(transport, system=StillSystem()) as driver:
        driver.inflate(3)
        driver.deflate(2)
        assert isinstance(function.model, BalloonModel)
        function.model.ask_statistics()
        driver.answer_statistics()


SESSIONS: tuple[tuple[str, str, dict[str, str], Run, str], ...] = (
    ("net-frames", "net", {"offloads": "off", "queue_size": "4"}, frames, "5.1.9.1, 5.1.9.4"),
    ("net-offloads", "net", {"queue_size": "4"}, frames_offloaded, "5.1.9.1, 5.1.9.4"),
    ("net-queue-pairs", "net", {"pairs": "2", "queue_size": "4"}, queue_pairs, "5.1.9.5.6"),
    ("blk", "blk", {"size": "1M", "queue_size": "8"}, disk, "5.2.6"),
    ("balloon", "balloon", {"queue_size": "8"}, balloon, "5.5.6"),
)
"""Name, device, parameters of ``loopback:``, what happens, sections."""


def vectors() -> list[dict[str, Any]]:
    """All request vectors."""
    found = []
    for name, device, params, run, section in SESSIONS:
        function, transport = software(device, params)
        recording = Recording(function)
        function.observe(recording)
        try:
            run(transport, function)
            assert not function.findings, function.findings
        finally:
            transport.close()
        assert run.__doc__ is not None
        found.append(
            vector(
                f"requests-{name}",
                "requests",
                run.__doc__,
                section,
                recording.features,
                function.model.device_type,
            )
            | {"device": device, "requests": recording.requests}
        )
    return found
