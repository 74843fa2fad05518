"""Register sequences: what the driver reads and writes, in order, with what the device answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..devices.evidence import Event
from ..devices.function import SoftwareFunction
from ..errors import Refused
from ..spec import blk, net, pci
from ..spec.rng import REQUESTQ
from ..spec.status import Status
from ..spec.steps import STATUS_STEPS, register_step
from ..transport.base import FeatureFilter
from ..transport.pci import PciTransport
from .recorder import software, vector

CONFIG_SPACE = 256
ACCESSES = {"read", "write"}
Run = Callable[[PciTransport, SoftwareFunction], None]


class Recording:
    """Register accesses of one function, cut into steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._status = 0

    def __call__(self, event: Event, subject: object) -> None:
        """An observer of the function."""
        if event.kind not in ACCESSES:
            return
        name, section = self._meaning(event)
        if not self.steps or self.steps[-1]["step"] != name:
            self.steps.append({"step": name, "section": section, "accesses": []})
        self.steps[-1]["accesses"].append(
            {
                "access": event.kind,
                "structure": self._structure(event.name),
                "register": event.name,
                "offset": event.offset,
                "width": event.width,
                "value": f"{event.value:#0{2 + 2 * event.width}x}",
            }
        )

    def _meaning(self, event: Event) -> tuple[str, str]:
        if event.name == "device_status":
            if event.kind == "write":
                added = event.value & ~self._status
                self._status = event.value
                return STATUS_STEPS[Status(added)]
            return self.steps[-1]["step"], self.steps[-1]["section"]
        if event.name == "queue_notify":
            return "notification", "4.1.5.2"
        return register_step(event.name)

    @staticmethod
    def _structure(register: str) -> str:
        if register in pci.COMMON_CFG:
            return "common"
        return {"isr": "isr", "queue_notify": "notify"}.get(register, "device")


def discovery() -> dict[str, Any]:
    """What configuration space holds, and what a driver finds there."""
    function, transport = software("net", {})
    try:
        space = b"".join(
            function.config_read(at, 4).to_bytes(4, "little") for at in range(0, CONFIG_SPACE, 4)
        )
        found = [
            {
                "position": cap.position,
                "cfg_type": cap.cfg_type,
                "bar": cap.bar,
                "offset": cap.offset,
                "length": cap.length,
                "notify_off_multiplier": cap.extra,
            }
            for cap in transport.capabilities
        ]
        return vector("pci-discovery", "discovery", _line(discovery), "4.1.4", 0) | {
            "device": "net",
            "config_space": space.hex(),
            "structures": found,
        }
    finally:
        transport.close()


def initialize(transport: PciTransport, function: SoftwareFunction) -> None:
    """From reset to DRIVER_OK with one queue, MSI-X vectors mapped."""
    transport.negotiate(0)
    transport.make_queue(REQUESTQ)
    transport.driver_ok()


def initialize_slow(transport: PciTransport, function: SoftwareFunction) -> None:
    """The device stays in reset for three reads of device_status: the driver waits for 0."""
    transport.negotiate(0)
    function.registers.reset_reads = 3
    transport.reset()


def notify(transport: PciTransport, function: SoftwareFunction) -> None:
    """A queue is notified with its number, or with NOTIFICATION_DATA where its ring stands."""
    initialize(transport, function)
    queue = transport.queues[REQUESTQ]
    for _ in range(2):
        queue.add(writable=[transport.pool.allocate(64)])
        queue.publish()


def queues(transport: PciTransport, function: SoftwareFunction) -> None:
    """The three queues of a network device with a control queue."""
    transport.negotiate(1 << net.F_CTRL_VQ)
    for index in range(3):
        transport.make_queue(index, 16)
    transport.driver_ok()


def queue_reset(transport: PciTransport, function: SoftwareFunction) -> None:
    """One queue is reset and set up again with another size."""
    initialize(transport, function)
    transport.reset_queue(REQUESTQ)
    transport.make_queue(REQUESTQ, 4)


def configuration(transport: PciTransport, function: SoftwareFunction) -> None:
    """A 64-bit capacity read as two halves between two reads of config_generation."""
    transport.negotiate(1 << blk.F_SEG_MAX)
    transport.config(blk.CONFIG, "capacity")


def give_up(transport: PciTransport, function: SoftwareFunction) -> None:
    """A device without VERSION_1: the driver sets FAILED, and resets before it tries again."""
    with contextlib.suppress(Refused):
        transport.negotiate(0)
    transport.reset()


SEQUENCES: tuple[tuple[str, str, dict[str, str], str, Run, str], ...] = (
    ("init", "rng", {"queue_size": "8"}, "", initialize, "3.1.1"),
    ("init-packed", "rng", {"queue_size": "8", "packed": "on"}, "", initialize, "3.1.1"),
    ("init-intx", "rng", {"queue_size": "8", "msix": "off"}, "", initialize, "3.1.1, 4.1.5.1.1"),
    ("init-one-vector", "rng", {"queue_size": "8", "msix": "1"}, "", initialize, "3.1.1, 4.1.5.1.2"),
    ("reset-waits", "rng", {"queue_size": "8"}, "", initialize_slow, "2.4.2, 4.1.4.3.2"),
    ("queue-setup", "net", {}, "-mrg_rxbuf", queues, "4.1.5.1.3"),
    ("queue-reset", "rng", {"queue_size": "8"}, "", queue_reset, "2.6.1, 4.1.4.3.2"),
    ("notify", "rng", {"queue_size": "8", "event_idx": "off", "multiplier": "16"}, "", notify, "4.1.5.2"),
    (
        "notify-data",
        "rng",
        {"event_idx": "off", "notification_data": "on"},
        "",
        notify,
        "2.9, 4.1.5.2",
    ),
    (
        "notify-data-packed",
        "rng",
        {"event_idx": "off", "notification_data": "on", "packed": "on", "queue_size": "3"},
        "",
        notify,
        "2.9, 4.1.5.2",
    ),
    ("failed", "rng", {"offer": "-version_1"}, "", give_up, "2.1.1, 3.1.1"),
    ("configuration", "blk", {"queue_size": "8", "size": "8M"}, "", configuration, "2.5.1, 4.1.3.1"),
)
"""Name, device, parameters of ``loopback:``, features, what happens, sections."""


def vectors() -> list[dict[str, Any]]:
    """All register vectors."""
    found = [discovery()]
    for name, device, params, features, run, section in SEQUENCES:
        function, transport = software(device, params)
        transport.feature_filter = FeatureFilter.parse(features, transport.device_type)
        recording = Recording()
        stop = function.observe(recording)
        try:
            run(transport, function)
            stop()
            negotiated = transport.features
            assert not function.findings, function.findings
        finally:
            transport.close()
        found.append(
            vector(
                f"registers-{name}", "registers", _line(run), section, negotiated, function.model.device_type
            )
            | {"device": device, "steps": recording.steps}
        )
    return found


def _line(thing: Callable[..., object]) -> str:
    assert thing.__doc__ is not None
    return thing.__doc__.splitlines()[0]
