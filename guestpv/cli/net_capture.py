"""``guestpv net capture``: write the frames of a link into a file that Wireshark reads."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import BinaryIO

import click

from ..errors import UsageError
from .report import Report, reporting

EXAMPLE = """\b
Examples:
  guestpv net capture -w trace.pcapng
  guestpv net capture pv0 -w - | wireshark -k -i -
  guestpv net capture -w trace.pcapng --count 1000 --seconds 10
"""


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False, metavar="[NAME|ADDRESS]")
@click.option(
    "-w", "--write", "path", required=True, metavar="FILE", help="pcapng file; - for standard output."
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many frames.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Stop after so many seconds.")
@reporting
def capture(report: Report, name: str | None, path: str, count: int | None, seconds: float | None) -> None:
    """Write what the device of the link NAME gives and gets, until Ctrl-C.

    Frames are those between driver and device, before the kernel sees them or behind it, each with its virtio
    header as a comment (`frame.comment` in Wireshark's filters). A checksum that the header leaves open is
    shown as wrong. The link is not slowed down: what cannot be written in time is lost, and counted.
    """
    from .. import __version__
    from ..services.capture import SUFFIX, captured
    from ..services.control import STATUS_TIME_LIMIT, ask, find
    from ..vfio.lock import runtime_directory
    from ..wire import pcapng
    from .signals import Stop

    found = find(runtime_directory(), name)
    if not found:
        raise UsageError("nothing is up", hint="guestpv net up")
    if len(found) > 1:
        names = " ".join(endpoint.name for endpoint in found)
        raise UsageError(f"which one? up are: {names}", hint="guestpv net capture NAME -w FILE")
    (link,) = found
    if path == "-" and (sys.stdout.isatty() or report.as_json):
        raise UsageError("a capture is no text", hint="guestpv net capture -w FILE")
    frames = octets = 0
    before = lost_by(link.status)
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        out: BinaryIO = sys.stdout.buffer if path == "-" else stack.enter_context(open(path, "wb"))
        out.write(pcapng.section(f"guestpv {__version__}"))
        out.write(pcapng.interface(link.name, f"virtio-net {link.status.get('function', '')}"))
        out.flush()
        deadline = None if seconds is None else time.monotonic() + seconds

        def over() -> bool:
            late = deadline is not None and time.monotonic() >= deadline
            return bool(stop.wanted) or late or frames == count

        if path != "-":
            report.say(f"Writing frames of {link.name} to {path}. Ctrl-C ends it.")
        for one in captured(link.path.with_suffix(SUFFIX), over):
            way = pcapng.INBOUND if one.inbound else pcapng.OUTBOUND
            out.write(pcapng.packet(0, one.nanoseconds, one.frame, way, one.comment))
            if path == "-":
                out.flush()
            frames += 1
            octets += len(one.frame)
            if over():
                break
        try:
            lost = lost_by(ask(link.path, "status", STATUS_TIME_LIMIT)) - before
        except (OSError, UsageError):
            lost = 0
        out.write(pcapng.statistics(0, time.time_ns(), lost))
        out.flush()
    if path != "-":
        data = {"name": link.name, "file": path, "frames": frames, "bytes": octets, "lost": lost}
        report.done(data, lambda: click.echo(f"{frames} frames, {octets} bytes; {lost} lost"))


def lost_by(status: dict[str, object]) -> int:
    """Frames that captures of this link have lost so far."""
    queues = status.get("queues")
    return sum(queue.get("capture_lost", 0) for queue in queues) if isinstance(queues, list) else 0
