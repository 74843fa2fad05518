"""The comparison as a table, as sentences and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Final

from .compare_find import BLOCK, PACKET

Row = dict[str, Any]

KINDS: Final = {PACKET: "a packet there and back (ARP)", BLOCK: "a block of 4 KiB read"}

REASONS: Final = {
    (PACKET, "e1000"): (
        "Each step of the hardware has its register. The transmit tail is written to send (1). On the "
        "interrupt the cause is read, all causes are masked, and a read of the status makes sure of it (3). "
        "Afterwards the receive tail gives the buffers back, causes are unmasked, and the status is read (3)."
    ),
    (BLOCK, "ahci"): (
        "A command is announced in two registers, active and issued (2). The interrupt is found in the "
        "controller's and the port's status, the port's is cleared, the finished commands are read, and the "
        "controller's is cleared (5)."
    ),
    (BLOCK, "ata_piix"): (
        "The drive is selected and found ready, and the command is written byte by byte into the task file; "
        "the transfer is set up, started, stopped and acknowledged in the bus master's registers. The data "
        "itself goes by DMA."
    ),
    (BLOCK, "ata_piix PIO"): (
        "As with DMA, but the processor fetches the data itself, 4 bytes at a time: 1024 of the accesses are "
        "the block."
    ),
    (PACKET, "virtio"): (
        "One write, the doorbell: the frame, what became of it, and the answer are in memory that both sides "
        "see, and nothing has to be read to learn who interrupts. The kernel's driver takes an interrupt "
        "also for the frame that was sent; ours takes it back when it needs the room. Polling takes none."
    ),
    (BLOCK, "virtio"): (
        "One write, the doorbell. Request, data and status are in memory; with MSI-X the interrupt itself "
        "says which queue it is about. Polling needs no interrupt."
    ),
}
"""Why it is as many accesses."""

IOMMU_REASON: Final = (
    "The kernel's drivers map a buffer in the IOMMU for each operation and unmap it afterwards, and each "
    "change is announced in a register of the vIOMMU. Ours map their memory once."
)

WIDTH, NAME, BAR, LINE = 980, 220, 110, 22
COLUMNS: Final = {
    "accesses": ("register accesses", "#b5553c"),
    "iommu_accesses": ("vIOMMU accesses", "#c79a3b"),
    "interrupts": ("interrupts", "#5a6f9c"),
    "microseconds": ("microseconds", "#2a7f62"),
}


def label(row: Row) -> str:
    """Device, driver and mode."""
    modes = {
        "": "kernel's driver",
        "msix": f"guestpv, {row['ring']}",
        "poll": f"guestpv, {row['ring']}, polling",
    }
    return f"{row['device']}, {modes[row['mode']]}"


def figure(value: float | None) -> str:
    """A number for people; ``?`` where it is not known."""
    return (
        "?"
        if value is None
        else f"{value:.0f}"
        if float(value).is_integer() or value >= 100
        else f"{value:.1f}"
    )


def reasons(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """A name and a sentence for each kind of device among the rows."""
    for key in dict.fromkeys((row["kind"], row["device"]) for row in rows):
        if REASONS.get(key):
            yield f"{key[1]}, {key[0]}", REASONS[key]


def show(rows: Sequence[Row], left_out: Sequence[tuple[str, str]]) -> None:
    """For a person."""
    from .tables import console, indented, table

    out = console()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = [
            [label(row), row["name"], *(figure(row[column]) for column in COLUMNS)]
            for row in rows
            if row["kind"] == kind
        ]
        out.print(f"\nFor {KINDS[kind]}:")
        heads = ("driver", "name", "accesses", "vIOMMU", "interrupts", "us")
        out.print(indented(table(heads, cells, right="accesses vIOMMU interrupts us")))
    out.print("\nEach access of a register is an exit to the hypervisor under KVM. Times are medians.")
    if any(row["accesses"] is None for row in rows):
        out.print(
            "?: a guest cannot see what its kernel's drivers access; on a host, `./tools/guest compare` can."
        )
    for name, why in reasons(rows):
        out.print(f"\n{name}:")
        out.print(indented(why))
    if any(row["iommu_accesses"] is not None for row in rows):
        out.print("\nvIOMMU:")
        out.print(indented(IOMMU_REASON))
    for where, why in left_out:
        out.print(f"\nLeft out: {where}: {why}")


def picture(rows: Sequence[Row]) -> str:
    """An SVG: a line for each driver, a column of bars on a logarithmic scale for each of the costs."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    height = 60 + sum(34 + LINE * sum(row["kind"] == kind for row in rows) for kind in kinds)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    columns = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    step = (WIDTH - NAME) // len(COLUMNS)
    for number, title in enumerate(COLUMNS[name][0] for name in columns):
        parts.append(f'<text x="{NAME + number * step}" y="22" font-weight="bold">{title}</text>')
    top = 38
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        parts.append(f'<text x="12" y="{top + 14}" fill="#666666">{escape(KINDS[kind])}</text>')
        top += 24
        for row in own:
            parts.append(
                f'<text x="{NAME - 10}" y="{top + 13}" text-anchor="end">{escape(label(row))}</text>'
            )
            for number, column in enumerate(columns):
                x, value, colour = NAME + number * step, row[column], COLUMNS[column][1]
                most = max([r[column] or 0 for r in own] + [1])
                width = BAR * math.log1p(value or 0) / math.log1p(most)
                parts += [
                    f'<rect x="{x}" y="{top + 2}" width="{width:.1f}" height="{LINE - 8}" fill="{colour}"/>',
                    f'<text x="{x + width + 6:.1f}" y="{top + 13}">{figure(value)}</text>',
                ]
            top += LINE
        top += 10
    parts.append(f'<text x="12" y="{height - 8}" fill="#666666">Bars are on a logarithmic scale.</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
