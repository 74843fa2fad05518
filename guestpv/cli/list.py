"""``guestpv list``: which virtio functions there are, and which of them can be driven."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .report import Report, reporting

if TYPE_CHECKING:
    from ..vfio.survey import Function

EXAMPLE = """\b
Examples:
  guestpv list
  guestpv list --json | jq -r '.data[] | select(.drivable) | .address'
"""


@click.command("list", epilog=EXAMPLE)
@reporting
def list_functions(report: Report) -> None:
    """Show every virtio PCI function of this machine.

    MODE is modern, transitional (also has the legacy interface) or legacy (cannot be driven). A
    function can be driven when it is alone in its IOMMU group, or the others in the group are free,
    and nothing uses it.
    """
    from ..vfio.survey import survey

    functions = survey()
    report.done([describe(function) for function in functions], lambda: show(functions, report.verbose))


def describe(function: Function) -> dict[str, Any]:
    """A function for JSON."""
    from ..vfio.ways import usable

    return {
        "address": function.address,
        "id": f"1af4:{function.device_id:04x}",
        "type": function.type,
        "name": function.name,
        "kind": function.kind,
        "driver": function.driver,
        "group": function.group,
        "backends": usable(function),
        "members": [asdict(member) for member in function.members],
        "uses": [asdict(use) for use in function.uses],
        "drivable": function.drivable,
        "problem": function.problem,
        "hint": function.hint,
    }


def group_name(function: Function) -> str:
    """The IOMMU group, or the one that VFIO made up without an IOMMU."""
    from ..vfio.survey import noiommu_group_of

    if function.group is not None:
        return str(function.group)
    made_up = noiommu_group_of(function.address)
    return "-" if made_up is None else f"noiommu-{made_up}"


def show(functions: list[Function], verbose: int) -> None:
    """The table, and below it what stands in the way."""
    from rich.text import Text

    from .tables import console, indented, table

    out = console()
    if not functions:
        out.print("This machine has no virtio PCI function.")
        out.print(indented("QEMU gives a guest one with, for example, -device virtio-net-pci"))
        return
    rows = [
        (
            function.address,
            function.name,
            function.kind,
            function.driver or "-",
            group_name(function),
            Text("yes", "green") if function.drivable else Text("no", "red"),
        )
        for function in functions
    ]
    out.print(table(("ADDRESS", "TYPE", "MODE", "DRIVER", "GROUP", "DRIVABLE"), rows))
    problems: dict[tuple[str, str], list[str]] = {}
    for function in functions:
        if function.problem:
            problems.setdefault((function.problem, function.hint), []).append(function.address)
    for (problem, hint), addresses in problems.items():
        out.print()
        out.print(f"{' '.join(addresses)}:")
        out.print(indented(problem))
        out.print(indented(f"-> {hint}"))
    shared: dict[int, list[str]] = {}
    for function in functions:
        if function.members and function.group is not None:
            shared[function.group] = [
                f"{member.address} ({member.what}, {member.driver or 'no driver'})"
                for member in function.members
            ] + [f"{function.address} (virtio-{function.name}, {function.driver or 'no driver'})"]
    for group, members in sorted(shared.items()):
        out.print()
        out.print(f"IOMMU group {group}: {', '.join(sorted(members))}")
    if verbose:
        for function in functions:
            for use in function.uses:
                out.print(f"{function.address} is used: {use.detail}")
