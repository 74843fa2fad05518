"""``guestpv serve``: one of our device models on a socket, for a hypervisor to attach."""

from __future__ import annotations

import json
import os
from typing import Any, Final

import click

from ..errors import UsageError
from .report import Report, reporting

SCHEME: Final = "vfio-user"

EXAMPLE = """\b
Examples:
  guestpv serve vfio-user:/run/disk.sock --device 'blk?file=disk.img'
  guestpv serve vfio-user:/run/net.sock --device 'net?packed=on'
  guestpv info vfio-user:/run/disk.sock
"""


@click.command(epilog=EXAMPLE)
@click.argument("place", metavar="vfio-user:SOCKET")
@click.option(
    "--device",
    required=True,
    metavar="TYPE[?KEY=VALUE&...]",
    help="rng, net, blk or balloon, with the parameters that loopback: has for it.",
)
@reporting
def serve(report: Report, place: str, device: str) -> None:
    """Put a device model on the socket SOCKET as a virtio PCI function.

    QEMU 10.1 and later attach it to a guest; so does `guestpv` with the specification
    vfio-user:SOCKET. One client uses it at a time, and the next one finds it as new. What a client's
    driver does against the standard is told as it happens. Ctrl-C or SIGTERM ends it.
    """
    from ..pci.capabilities import type_name
    from ..serve.vfio_user import VfioUserServer, make_function
    from .signals import Stop

    scheme, colon, path = place.partition(":")
    if not colon or scheme != SCHEME:
        raise UsageError(f"{place!r} is not {SCHEME}:SOCKET", hint="guestpv serve --help")
    tell = report.event if report.as_json else report.say
    with Stop() as stop:
        server = VfioUserServer(make_function(device), path, tell=tell)
        try:
            data = {
                "socket": os.path.abspath(path),
                "device": device,
                "type_name": type_name(server.function.model.device_type),
                "pid": os.getpid(),
                "qemu": qemu_options(os.path.abspath(path)),
            }
            report.done(data, lambda: show(data))
            server.run(stop.fd)
            tell(f"ended by {stop.reason}")
        finally:
            server.close()


def qemu_options(path: str) -> list[str]:
    """What QEMU needs on its command line: memory that can be shared, and the device."""
    device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": path}}
    memory = "memory-backend-memfd,id=ram,size=1G,share=on"
    machine = "q35,memory-backend=ram"
    return ["-object", memory, "-machine", machine, "-m", "1G", "-device", json.dumps(device)]


def show(data: dict[str, Any]) -> None:
    """What is served, and how to use it."""
    memory, machine, size, device = (" ".join(data["qemu"][at : at + 2]) for at in range(0, 8, 2))
    option, _, value = device.partition(" ")
    click.echo(f"Serving a virtio {data['type_name']} device on {data['socket']}. Ctrl-C ends it.")
    click.echo("QEMU, from 10.1 on, attaches it with")
    click.echo(f"  {memory} {machine} {size} {option} '{value}'")
