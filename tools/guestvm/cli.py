"""./tools/guest: build the guest, run a command in it, or get a prompt there."""

import json
import os
import select
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from guestvm import bundle as bundles
from guestvm import image
from guestvm import kernel as kernels
from guestvm.errors import GuestTimeout, LabError
from guestvm.line import IOMMUS, MACHINE
from guestvm.link import Process
from guestvm.machine import Machine
from guestvm.progress import Progress

EXIT_LAB = 125
EXIT_TIME_LIMIT = 124


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `run` and `shell` share."""
    options = [
        click.option("--kernel", type=click.Choice(kernels.SERIES), default="6.1", show_default=True,
                     help="6.12+vfio is 6.12 with iommufd, cdev and no-IOMMU."),
        click.option("--qemu-device", "devices", multiple=True, metavar="STRING",
                     help="QEMU's -device value; behind a root port of its own unless it has bus=. May be "
                          "repeated. Without any: net (user network), rng, 64 MiB scratch disk and balloon."),
        click.option("--netdev", "netdevs", multiple=True, metavar="STRING", help="QEMU's -netdev value."),
        click.option("--blockdev", "blockdevs", multiple=True, metavar="STRING",
                     help="QEMU's -blockdev value."),
        click.option("--object", "objects", multiple=True, metavar="STRING", help="QEMU's -object value."),
        click.option("--machine", default=MACHINE, show_default=True, help="QEMU's -machine value."),
        click.option("--iommu", type=click.Choice(list(IOMMUS)), default="intel", show_default=True),
        click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True,
                     help="auto: KVM where a guest was seen to run under it, TCG otherwise."),
        click.option("--memory", type=click.IntRange(256), default=1024, show_default=True, help="MiB."),
        click.option("--cpus", type=click.IntRange(1, 64), default=2, show_default=True),
        click.option("--append", default="", metavar="STRING", help="Further kernel parameters."),
        click.option("--quiet", "-q", is_flag=True, help="No progress on stderr."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A small Linux guest with a vIOMMU, booted under QEMU, that holds this checkout and its Python."""


@main.command()
@click.option("--kernel", "series", type=click.Choice(kernels.SERIES), multiple=True,
              help="Only this kernel; may be repeated. All of Debian's by default.")  # fmt: skip
@click.option("--refresh", is_flag=True, help="Look in Debian's archive for newer kernel packages.")
def build(series: tuple[str, ...], refresh: bool) -> None:
    """Fetch the kernels and build the guest, so that `run` need not."""
    progress = Progress()
    for name in series or tuple(kernels.SUITES):
        source = kernels.get(name, progress, refresh)
        progress.say(f"kernel {name}: {source.package}, {source.image}")
        progress.say(f"root image: {image.root(source, progress)}")
        image.initramfs(source)


@main.command(short_help="Write a kernel and an initramfs that check devices.")
@click.option(
    "--kernel", "series", type=click.Choice(list(kernels.SUITES)), default="6.12", show_default=True
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bundle"),
              show_default=True, metavar="DIRECTORY")  # fmt: skip
def bundle(series: str, out: Path) -> None:
    """Write a kernel and an initramfs that check the virtio devices of any virtual machine monitor.

    They boot from memory alone, run the device suite as the kernel command line says
    (guestpv.conform="device [ADDRESS|all] [--select IDS] [--hostile]", guestpv.format=tap|json), print the
    report on the console between two marked lines and power off. Devices need a virtual IOMMU before them.
    """
    click.echo(bundles.build(series, out, Progress()))


@main.command(context_settings={"ignore_unknown_options": False})
@machine_options
@click.option("--timeout", type=click.FloatRange(min=1), default=300, show_default=True,
              help="Seconds for boot and command together; then the virtual machine is killed.")  # fmt: skip
@click.option("--trace", nargs=2, metavar="FILE EVENTS",
              help="Write QEMU's trace EVENTS (patterns, comma-separated) to FILE.")  # fmt: skip
@click.argument("command", nargs=-1, required=True)
def run(
    command: tuple[str, ...],
    timeout: float,
    trace: tuple[str, str] | None,
    devices: tuple[str, ...],
    quiet: bool,
    **options: Any,
) -> None:
    """Boot, run COMMAND, print its output and return its exit status.

    One argument goes through the guest's shell, several are the program and its arguments. Exit status: the
    command's own (128 + N if signal N ended it); 124 when the time limit passed, 125 when the lab failed.
    """
    traced = (Path(trace[0]).resolve(), trace[1].split(",")) if trace else None
    machine = Machine(
        devices=devices or None,
        trace=traced,
        limit=timeout,
        boot_limit=timeout + 60,
        progress=Progress(quiet),
        **options,
    )
    failed = True
    try:
        machine.start()
        result = machine.run(command[0] if len(command) == 1 else command, timeout + 60, on_output=_print)
        failed = result.status != 0
    finally:
        machine.stop(failed)
    sys.exit(_exit_status(result.status))


@main.command(short_help="Boot and give a prompt in the guest.")
@machine_options
@click.option("--timeout", type=click.FloatRange(min=0), default=0, show_default=True,
              help="Seconds until the virtual machine is killed; 0 is never.")  # fmt: skip
def shell(devices: tuple[str, ...], timeout: float, quiet: bool, **options: Any) -> None:
    """Boot and give a prompt in the guest; the machine ends with it, and its exit status comes back."""
    with Machine(devices=devices or None, limit=timeout, progress=Progress(quiet), **options) as machine:
        size = shutil.get_terminal_size()
        process = machine.spawn(["bash", "-l"], pty=(size.lines, size.columns), on_output=_print)
        if sys.stdin.isatty():
            before = termios.tcgetattr(0)
            tty.setraw(0)
            signal.signal(signal.SIGWINCH, lambda *_: _pass_size(process))
            try:
                _converse(process)
            finally:
                termios.tcsetattr(0, termios.TCSADRAIN, before)
        else:
            _converse(process)
        status = process.wait(60).status
    sys.exit(_exit_status(status))


@main.command(short_help="Count what a packet and a block cost, driver by driver.")
@click.option("--kernel", type=click.Choice(list(kernels.SUITES)), default="6.1", show_default=True)
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True)
@click.option("--count", type=click.IntRange(1), default=500, show_default=True, help="Operations timed.")
@click.option("--lone", type=click.IntRange(1), default=30, show_default=True, help="Operations counted.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Draw the table, as SVG.")  # fmt: skip
@click.option(
    "--json", "as_json", is_flag=True, help="The rows of `guestpv compare --json`, with exact counts."
)
def compare(kernel: str, accel: str, count: int, lone: int, plot: Path | None, as_json: bool) -> None:
    """What a packet and a block cost through e1000, AHCI, IDE and virtio, by the kernel's drivers and ours.

    Boots a guest with all of them, runs `guestpv compare` in it, and counts the register accesses of every
    driver in QEMU's trace: each of them is an exit to the hypervisor where there is KVM.
    """
    from guestpv.cli.compare_view import picture, show
    from guestvm.comparison import compared

    rows, about = compared(kernel, count, lone, Progress(), accel)
    if plot is not None:
        plot.write_text(picture(rows))
    if as_json:
        data = {"rows": rows, "left_out": [], "machine": about}
        click.echo(json.dumps({"schema": "guestpv.compare/1", "ok": True, "data": data, "error": None}))
    else:
        show(rows, [])
        click.echo(f"\nMeasured on {about}.")


def _exit_status(status: int) -> int:
    return status if status >= 0 else 128 - status


def _print(stream: str, data: bytes) -> None:
    out = sys.stdout.buffer if stream == "stdout" else sys.stderr.buffer
    out.write(data)
    out.flush()


def _pass_size(process: Process) -> None:
    size = shutil.get_terminal_size()
    threading.Thread(target=process.resize, args=(size.lines, size.columns)).start()


def _converse(process: Process) -> None:
    """Pass our standard input on until the guest's shell ends."""
    while process.status is None:
        if select.select([0], [], [], 0.1)[0]:
            data = os.read(0, 4096)
            try:
                process.write(data or b"\x04")
            except LabError:
                return
            if not data:
                process.wait(3600)


def entry() -> None:
    """`main` with the lab's errors as one line and an exit status of their own."""
    # Unwind, so that the machine is ended and its files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main.main(prog_name="tools/guest")
    except GuestTimeout as error:
        print(f"guest: {error}", file=sys.stderr)
        sys.exit(EXIT_TIME_LIMIT)
    except LabError as error:
        print(f"guest: {error}", file=sys.stderr)
        sys.exit(EXIT_TIME_LIMIT if "time limit" in str(error) else EXIT_LAB)


if __name__ == "__main__":
    entry()
