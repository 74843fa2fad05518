"""Device register accesses, counted from QEMU's trace between phase marks.

Run the machine with ``trace=(file, TRACE_EVENTS)`` and ``ioeventfd=off`` on the devices (an ioeventfd takes
the doorbell past the trace). ``Machine.mark("a")`` writes a byte to the debug port 0xe9, which QEMU traces
into the same file: what follows, up to the next mark, is phase "a".
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

TRACE_EVENTS = ("memory_region_ops_*", "virtio_queue_notify", "virtio_notify")

_REGION = re.compile(r"memory_region_ops_(read|write) .* value (0x[0-9a-f]+) size \d+ name '(.*)'")
_EVENT = re.compile(r"(?:\d+@[\d.]+:)?(virtio_\w+) (?:vdev (0x[0-9a-f]+) )?")
_DOORBELL = "virtio-pci-notify-"
_DEBUG_PORT = "isa-debugcon"


@dataclass
class Phase:
    """What happened between one mark and the next.

    reads, writes: accesses by memory region. events: other trace events by name, and for a device whose
    doorbell was rung also by name and device ("virtio_notify virtio-net").
    """

    reads: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)

    def accesses(self, prefix: str) -> int:
        """Reads and writes together of all regions whose name begins with `prefix` (`virtio-pci-notify`)."""
        both = self.reads + self.writes
        return sum(count for region, count in both.items() if region.startswith(prefix))

    def add(self, other: "Phase") -> None:
        """Count also what another phase saw."""
        self.reads += other.reads
        self.writes += other.writes
        self.events += other.events


def phases(trace: Path) -> dict[str, Phase]:
    """The phases in a trace file by their letter; the same letter again adds to its phase."""
    found: dict[str, Phase] = {}
    for letter, phase in laps(trace):
        found.setdefault(letter, Phase()).add(phase)
    return found


def laps(trace: Path) -> list[tuple[str, Phase]]:
    """The phases in a trace file with their letters, in their order."""
    found: list[tuple[str, Phase]] = []
    current = Phase()
    names: dict[str, str] = {}
    rung = ""
    with trace.open(errors="replace") as lines:
        for line in lines:
            if region := _REGION.search(line):
                kind, value, name = region.groups()
                if name == _DEBUG_PORT:
                    current = Phase()
                    found.append((chr(int(value, 16)), current))
                else:
                    (current.reads if kind == "read" else current.writes)[name] += 1
                    rung = name.removeprefix(_DOORBELL) if name.startswith(_DOORBELL) else rung
            elif event := _EVENT.match(line):
                kind, device = event.groups()
                if kind == "virtio_queue_notify" and rung:
                    names[device], rung = rung, ""
                current.events[kind] += 1
                if device in names:
                    current.events[f"{kind} {names[device]}"] += 1
    return found
