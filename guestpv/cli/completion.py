"""``guestpv completion``: what a shell needs to complete verbs, options and addresses."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import GuestpvError
from .report import Report, reporting

SYSFS = Path("/sys/bus/pci/devices")


def complete_address(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """Addresses of the machine's virtio functions, for the shell."""
    found = []
    for function in sorted(SYSFS.glob("*")):
        address = function.name
        for text in (address, f"vfio:{address}"):
            if text.startswith(typed) and (typed or text == address):
                try:
                    virtio = (function / "vendor").read_text().strip() == "0x1af4"
                except OSError:
                    continue
                if virtio:
                    found.append(text)
    return found


EXAMPLE = """
Example, for bash:
  guestpv completion bash > ~/.local/share/bash-completion/completions/guestpv
"""


@click.command(epilog=EXAMPLE)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@reporting
def completion(report: Report, shell: str) -> None:
    """Print the completion script of SHELL.

    Put it where the shell looks for completions, or evaluate it in the shell's start-up file:
    eval "$(guestpv completion bash)".
    """
    from click.shell_completion import get_completion_class

    from .main import main

    maker = get_completion_class(shell)
    if maker is None:
        raise GuestpvError(f"click {click.__version__} has no completion for {shell}")
    source = maker(main, {}, "guestpv", "_GUESTPV_COMPLETE").source()
    report.done({"shell": shell, "script": source}, lambda: click.echo(source))
