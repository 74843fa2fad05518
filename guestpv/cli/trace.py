"""``guestpv trace``: any verb that opens a device, with everything that passes between driver and device."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .report import Report, reporting

if TYPE_CHECKING:
    from ..trace.record import Event, Recorder

EXAMPLE = """\b
Examples:
  guestpv trace blk read loopback:blk - --length 4k > /dev/null
  guestpv trace --html trace.html blk verify loopback:blk disk.img
  guestpv trace --jsonl trace.jsonl --pcapng frames.pcapng net up 0000:01:00.0
  guestpv trace replay trace.jsonl
  guestpv trace replay trace.jsonl 0000:01:00.0

\b
In a program:
  from guestpv.trace import Recorder
  recorder = Recorder()
  with guestpv.open("loopback:rng", trace=recorder) as transport: ...
"""
FILE = click.Path(dir_okay=False, path_type=Path)


class WithReplay(click.Command):
    """A command whose words are another verb's, but for one that is its own; documents show both."""

    @property
    def beside(self) -> dict[str, click.Command]:
        """The command of its own."""
        from .trace_replay import replay

        return {"replay": replay}


@click.command(
    "trace",
    cls=WithReplay,
    epilog=EXAMPLE,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "--html", type=FILE, help="Write one page with the sequence, the rings at every step, a search."
)
@click.option("--jsonl", type=FILE, help="Write one JSON object for every event; replay reads it.")
@click.option("--pcapng", type=FILE, help="Write the frames of network devices, for Wireshark.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=100_000,
    show_default=True,
    help="Events that are kept; the verb goes on after them.",
)
@click.option(
    "--live/--quiet",
    default=None,
    help="Print events as they come, on standard error, or do not.  [default: where no file is written]",
)
@click.option("--config-space", is_flag=True, help="Print accesses to PCI configuration space, too.")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="VERB [ARGS]...")
@reporting
@click.pass_context
def trace(
    context: click.Context,
    report: Report,
    html: Path | None,
    jsonl: Path | None,
    pcapng: Path | None,
    limit: int,
    live: bool | None,
    config_space: bool,
    words: tuple[str, ...],
) -> None:
    """Run VERB, and show what its driver and its device do, in order.

    Shown are each register access, each buffer on its way through the rings, each kick and interrupt, and why
    a kick was or was not needed, with the section of VIRTIO 1.4. What would be an exit to the hypervisor is
    marked. The exit code is that of VERB.

    `guestpv trace replay` does again what a record says, and tells where another device answers differently.
    """
    if words[0] == "replay":
        from .trace_replay import replay

        context.exit(replay.main(list(words[1:]), "guestpv trace replay", standalone_mode=False) or 0)
    _check(words)
    for path in filter(None, (html, jsonl, pcapng)):
        # Found out before the verb does anything.
        path.open("ab").close()
    from ..opener import Tracing
    from ..trace.record import Recorder
    from .main import main

    # The relay of interrupts shares the interpreter with the driver: stamp them when they come.
    sys.setswitchinterval(0.0001)
    recorder = Recorder(limit, **({"data": 1 << 17} if pcapng else {}))
    if live or (live is None and not (html or jsonl or pcapng)):
        from rich.console import Console

        from ..trace.live import Live
        from .tables import WIDE

        wide = None if sys.stderr.isatty() else WIDE
        console = Console(stderr=True, highlight=False, emoji=False, markup=False, width=wide)
        recorder.watch(Live(console, space=config_space))
    with ExitStack() as stack:
        if jsonl:
            recorder.watch(stack.enter_context(_lines(jsonl, recorder, words)))
        Tracing.recorder = recorder
        code = 0
        try:
            main.main(list(words), standalone_mode=False)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            Tracing.recorder = None
    data = recorder.summary() | {"verb": list(words), "exit_status": code}
    if html:
        from ..trace.page import page

        html.write_text(page(recorder, list(words), _glossary()), encoding="utf-8")
        data["html"] = str(html)
    if jsonl:
        data["jsonl"] = str(jsonl)
    if pcapng:
        data |= _frames(pcapng, recorder)
    if not recorder.devices and {"-h", "--help"} & set(words):
        context.exit(code)
    if not recorder.devices and not code:
        raise UsageError(
            f"{' '.join(words)} opened no device: there is nothing to trace",
            hint="trace a verb that drives one, such as: guestpv trace info loopback:net",
        )
    report.done(data, lambda: _tell(data))
    context.exit(code)


def _glossary() -> dict[str, tuple[str, str]]:
    """What ``guestpv explain`` says of steps and registers."""
    from ..explain import topics

    return {
        topic.name: (topic.what, topic.breaks)
        for topic in topics().values()
        if topic.kind in ("step", "register")
    }


def _check(words: tuple[str, ...]) -> None:
    from .main import VERBS

    if words[0] == "trace" or words[0] not in VERBS:
        raise UsageError(
            f"{words[0]} is no verb that can be traced", hint="such as: guestpv trace info loopback:net"
        )
    if "--detach" in words:
        raise UsageError("what goes to the background cannot be traced", hint="leave --detach out")


class _lines:
    """Writes events to a file, one JSON object a line."""

    def __init__(self, path: Path, recorder: Recorder, words: tuple[str, ...]) -> None:
        import json

        self._dumps = json.dumps
        self._file = path.open("w", encoding="ascii")
        self._recorder = recorder
        self._line(recorder.head() | {"verb": list(words)})

    def _line(self, data: dict[str, Any]) -> None:
        self._file.write(self._dumps(data, separators=(",", ":")) + "\n")

    def __call__(self, event: Event) -> None:
        self._line(event.to_json())

    def __enter__(self) -> _lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._line({"end": self._recorder.summary()})
        self._file.close()


def _frames(path: Path, recorder: Recorder) -> dict[str, Any]:
    from .. import __version__
    from ..trace.packets import write

    with path.open("wb") as out:
        count = write(out, f"guestpv {__version__}", recorder.began, recorder.events)
    return {"pcapng": str(path), "frames": count}


def _tell(data: dict[str, Any]) -> None:
    """On standard error: standard output may be the verb's data."""
    doorbells = data.get("doorbell", 0)
    words = [
        f"{data['events']} events",
        f"{data['exits']} exits to the hypervisor"
        + (f" ({doorbells} of them doorbells)" if doorbells else ""),
        f"{data.get('interrupt', 0)} interrupts",
    ]
    if data.get("kick"):
        words.append(f"{data['kick']} kicks by eventfd")
    if data["dropped"]:
        words.append(f"{data['dropped']} more events were not kept (--limit)")
    click.echo("; ".join(words), err=True)
    for name in ("html", "jsonl", "pcapng"):
        if name in data:
            frames = f": {data['frames']} frames" if name == "pcapng" else ""
            click.echo(f"{data[name]}{frames}", err=True)
