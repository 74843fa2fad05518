"""``guestpv trace replay``: a record done again, against another device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GuestpvError, Refused, UsageError
from .report import Report, reporting

if TYPE_CHECKING:
    from ..trace.replay import Difference

SHOWN = 40
"""Differences that are printed; JSON has all of them."""


@click.command("replay", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("spec", required=False)
@click.option(
    "--device", type=click.IntRange(0), default=0, show_default=True, help="Which of the record's devices."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds that SPEC has for each buffer.",
)
@click.option("--yes", is_flag=True, help="SPEC may be written to where the record wrote to its disk.")
@reporting
def replay(report: Report, file: Path, spec: str | None, device: int, timeout: float, yes: bool) -> None:
    """Do again what the record FILE (from --jsonl) says, and tell where SPEC answers differently.

    The register accesses, the buffers and the notifications are those of the record, in its order; addresses
    and places that are the device's own are translated. Without SPEC: the loopback: device of the record,
    or one that resembles its device. Exit code 1: there were differences.
    """
    from ..opener import Spec, open_function
    from ..trace.record import BadRecord, read
    from ..trace.replay import Replay, check
    from ..trace.resemble import loopback_like

    try:
        with file.open(encoding="utf-8") as lines:
            _, events = read(lines)
    except (BadRecord, UnicodeDecodeError) as error:
        raise UsageError(
            str(error), where=str(file), hint="records are made with: guestpv trace --jsonl FILE VERB ..."
        ) from None
    check(events, device)
    target = spec or loopback_like(events, device)
    scheme = Spec.parse(target).scheme
    if scheme != "loopback":
        _careful(events, device, target, yes)
    function = open_function(target)
    try:
        outcome = Replay(function, timeout=timeout).run(events, device)
    finally:
        function.close()
    then, now = outcome.interrupts

    def listed(differences: list[Difference]) -> list[dict[str, Any]]:
        return [
            {"event": one.number, "what": one.what, "recorded": one.recorded, "now": one.now}
            for one in differences
        ]

    data: dict[str, Any] = {
        "spec": target,
        "register_accesses": outcome.accesses,
        "buffers": outcome.buffers,
        "interrupts": {"recorded": then, "now": now},
        "differences": listed(outcome.differences),
        "decisions": listed(outcome.decisions),
        "stopped": outcome.stopped,
    }

    def show() -> None:
        for one in outcome.differences[:SHOWN]:
            click.echo(str(one))
        if (more := len(outcome.differences) - SHOWN) > 0:
            click.echo(f"and {more} more: --json has them all")
        click.echo(
            f"{target}: {outcome.accesses} register accesses and {outcome.buffers} buffers repeated, "
            f"{len(outcome.differences)} differences; {len(outcome.decisions)} kicks decided otherwise; "
            f"interrupts: {then} then, {now} now"
        )

    if outcome.stopped:
        report.failed(
            GuestpvError(f"the rest of the record could not be repeated: {outcome.stopped}", where=target),
            data,
        )
        if not report.as_json:
            show()
    else:
        report.done(data, show)
    if outcome.stopped or outcome.differences:
        click.get_current_context().exit(1)


def _careful(events: Any, device: int, target: str, yes: bool) -> None:
    """What a record may not do, or not without being asked, to a device that is not ours."""
    from ..spec import blk
    from ..spec import features as feat
    from ..trace.replay import check

    kind = check(events, device).facts["device_type"]
    if kind == feat.BALLOON:
        raise Refused(
            "page numbers in a record of a balloon are of memory that is somebody else's by now",
            where=target,
            hint="replay it against loopback:balloon",
        )
    harmless = {blk.T_IN, blk.T_FLUSH, blk.T_GET_ID, blk.T_GET_LIFETIME, blk.T_ZONE_REPORT}
    writes = kind == feat.BLK and any(
        event.kind == "add"
        and event.device == device
        and int.from_bytes(bytes.fromhex(event.facts["data"][0])[:4], "little") not in harmless
        for event in events
    )
    if writes and not yes:
        raise UsageError(
            "the record writes to its disk, so the replay would write to this one",
            where=target,
            hint="say --yes if nothing on it is needed",
        )
