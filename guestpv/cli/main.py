"""The group of verbs. Only the verb that runs is imported, and what it needs only while it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Final

import click

from .. import __version__
from ..errors import UsageError
from .report import Report, from_click, schema_of

VERBS: Final = {
    "list": ("list:list_functions", "Show the virtio functions of this machine."),
    "info": ("info:info", "Show what one device offers."),
    "doctor": ("doctor:doctor", "Check what driving a device needs, and say how to mend it."),
    "bind": ("bind:bind", "Take a function from the kernel's driver."),
    "unbind": ("unbind:unbind", "Give a function back to the kernel's driver."),
    "net": ("net:net", "Drive a network device as a network link."),
    "blk": ("blk:blk", "Drive a disk as a block device, or directly."),
    "balloon": ("balloon:balloon", "Lend memory to the host through a balloon."),
    "serve": ("serve:serve", "Put a device model on a socket for QEMU to attach."),
    "compare": ("compare:compare", "Measure what a packet and a block cost, driver by driver."),
    "ring-picture": ("ring_picture:ring_picture", "Draw a virtqueue in a state worth explaining."),
    "trace": ("trace:trace", "Show what a verb and its device do: registers, rings, notifications."),
    "explain": ("explain:explain", "Explain a step, feature, register or requirement."),
    "vectors": ("vectors:vectors", "Test vectors for drivers in other languages."),
    "conform": ("conform:conform", "Check devices and drivers against the standard."),
    "support-bundle": ("support_bundle:support_bundle", "Collect what a report about a problem needs."),
    "completion": ("completion:completion", "Print the shell's completion script."),
}
"""Verb -> where its command is, and its line of help (so that help imports nothing)."""

EPILOG: Final = """\b
A first session, as root, in a guest with a vIOMMU:
  guestpv list
  guestpv doctor
  guestpv net up --detach
  guestpv net status
  guestpv net down

\b
Wherever SPEC is asked for, write scheme:body, such as
vfio:0000:01:00.0; a bare PCI address means vfio:.

\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused because it
would do harm, 4 no permission, 5 the device broke the standard,
6 something did not happen in time.
"""


class LazyGroup(click.Group):
    """A group whose commands are named in a table and imported when they run."""

    def __init__(self, *args: Any, verbs: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of the table."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name not in self._verbs:
            return None
        module, attribute = self._verbs[cmd_name][0].split(":")
        command = getattr(import_module(f"guestpv.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._verbs.items()])

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run; every end of it is an exit code of ours."""
        words = list(args) if args is not None else sys.argv[1:]
        try:
            code = super().main(words, **(extra | {"prog_name": "guestpv", "standalone_mode": False}))
        except getattr(click.exceptions, "NoArgsIsHelpError", ()) as problem:
            problem.show()
            code = UsageError.exit_status
        except click.ClickException as problem:
            error = from_click(problem)
            context = getattr(problem, "ctx", None)
            Report(schema_of(context), "--json" in words, 0).failed(error)
            code = error.exit_status
        except (click.Abort, KeyboardInterrupt):
            code = 130
        except BrokenPipeError:
            # The reader of a pipe has gone (`guestpv list | head -1`): nobody is left to be told.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        sys.exit(code or 0)


def print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Answer ``--version``."""
    if not wanted:
        return
    click.echo(f"guestpv {__version__}")
    context.exit()


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Drive virtio devices from user space: this guest's half of virtio, out of the kernel.

    guestpv takes a virtio function away from the kernel through VFIO, drives it, and gives it
    back when it is done.
    """
