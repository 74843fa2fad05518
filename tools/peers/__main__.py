"""Download the peers, or say where they are: ./tools/get-peers --help"""

import sys
import time

import click

from peers import tree
from peers.errors import PeerError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", type=click.Choice(list(tree.RECIPES)), default="peers")
@click.option("--refresh", is_flag=True, help="Look in the archive for newer packages.")
@click.option("--program", metavar="PROGRAM", help="Print the command that runs PROGRAM from the tree.")
def main(name: str, refresh: bool, program: str | None) -> None:
    """Unpack programs of Debian 13 that guestpv is tested and measured against; print where they are.

    \b
    peers   passt, DPDK's testpmd, libblkio, qemu-storage-daemon 10 (0.2 GB)
    qemu    the newest QEMU in trixie-backports
    qemu-10 the QEMU of Debian 13
    aarch64 a Python for aarch64, to be run by qemu-user

    Nothing is installed and no root is needed. The result is cached: the next run is immediate.
    """
    try:
        started = time.monotonic()
        got = tree.get(name, refresh=refresh)
        if (took := time.monotonic() - started) > 1:
            click.echo(f"built in {took:.0f} s", err=True)
        click.echo(" ".join(got.program(program)) if program else str(got.root))
    except PeerError as error:
        click.echo(f"get-peers: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="tools/get-peers")
