"""``guestpv conform driver``: check a driver against the standard."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

import click

from ..errors import UsageError
from .report import Report, reporting

if TYPE_CHECKING:
    from ..conformance.driver.run import Run
    from ..conformance.driver.scenarios import Scenario

SCHEMES: Final = ("vfio-user", "vhost-user")
NOTES: Final = {
    "loopback": "Every register access and request was seen, and every store in order (net: ring memory was "
    "sampled).",
    "vfio-user": "Ring memory was sampled when the device looked at it. MSI-X and PCI configuration space "
    "are the hypervisor's own.",
    "vhost-user": "Rings and requests were seen, sampled when the device looked at them. Registers are the "
    "front end's own.",
}

EXAMPLE = """\b
Examples:
  guestpv conform driver loopback:blk --scenario all
  guestpv conform driver --listen vfio-user:/run/x.sock --device net
  guestpv conform driver --listen vhost-user:/run/x.sock --device blk
"""


@click.command(epilog=EXAMPLE)
@click.argument("spec", required=False, metavar="[loopback:TYPE]")
@click.option("--listen", default="", metavar="SCHEME:SOCKET", help="Serve it for other drivers.")
@click.option("--device", "served", default="", metavar="TYPE[?KEY=VALUE&...]", help="What --listen serves.")
@click.option(
    "--scenario", default="", metavar="NAMES", help="What to provoke: names, or all; list shows them."
)
@click.option("--once", is_flag=True, help="With --listen: end when the last scenario is over.")
@click.option("--select", default="", metavar="IDS", help="Only these requirements: DRV-SPLIT,DRV-BLK-0*.")
@click.option("--junit", type=click.Path(dir_okay=False), metavar="FILE", help="Write JUnit XML.")
@click.option(
    "--tap", type=click.Path(dir_okay=False, allow_dash=True), metavar="FILE", help="Write TAP; - prints it."
)
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Write a page for a browser.")
@reporting
def driver(
    report: Report,
    spec: str | None,
    listen: str,
    served: str,
    scenario: str,
    once: bool,
    select: str,
    junit: str | None,
    tap: str | None,
    html: str | None,
) -> None:
    """Put a driver before the strict device and check it against VIRTIO 1.4, requirement by requirement.

    With loopback:TYPE it is guestpv's own driver. With --listen it is any other one: a guest's behind QEMU
    10.1 or later (vfio-user), or what speaks vhost-user; the report comes at Ctrl-C. A scenario begins
    whenever the driver has given the device back: unbind and bind it in the guest. Exit status 0 means that
    no rule was broken.
    """
    from ..conformance import catalogue
    from ..conformance.driver import run as runs
    from ..conformance.driver.scenarios import choose
    from ..conformance.report import Report as Findings
    from ..conformance.report import now, versions
    from .conform_device import save, show

    if bool(spec) == bool(listen):
        raise UsageError("either loopback:TYPE or --listen", hint="guestpv conform driver --help")
    kind, params = device_of(spec or f"loopback:{served}")
    if scenario == "list":
        chosen = choose("all", kind)
        report.done({s.name: s.title for s in chosen}, lambda: names(chosen))
        return
    chosen = choose(scenario or "plain", kind)
    patterns = catalogue.patterns(select)
    areas = ("common", "pci", "split", "packed", kind)
    rows = [row for row in catalogue.observable("driver").values() if row.area in areas]
    wanted = [row.id for row in rows if catalogue.matches(row.id, patterns)]
    if spec:
        scheme, begun = "loopback", now()
        run = runs.loopback(kind, params, chosen, wanted)
    else:
        scheme, begun = listen.partition(":")[0], now()
        run = runs.Run(wanted)
        serve(report, listen, served, [entry for entry in chosen if entry.served], run, once)
    found = Findings(
        "driver", spec or listen, run.outcomes(), versions(), begun, shlex.join(["guestpv", *sys.argv[1:]])
    )
    found.note = NOTES[scheme]
    save(found, junit, tap, html)
    report.done(found.to_dict(), lambda: show(found, report.verbose, tap))
    if not found.ok:
        click.get_current_context().exit(1)


def device_of(spec: str) -> tuple[str, dict[str, str]]:
    """Device type and parameters of ``loopback:TYPE?...``."""
    from ..devices.loopback import MODELS

    scheme, colon, rest = spec.partition(":")
    kind, _, query = rest.partition("?")
    if scheme != "loopback" or not colon or kind not in MODELS:
        raise UsageError(f"{spec!r} names no device", hint=f"there are {' '.join(MODELS)}")
    return kind, dict(parse_qsl(query, keep_blank_values=True))


def serve(report: Report, place: str, served: str, scenarios: list[Scenario], run: Run, once: bool) -> None:
    """Serve until Ctrl-C, or until the last scenario is over."""
    from ..conformance.driver.listen import Lives
    from ..devices.loopback import make_model
    from ..serve.vfio_user import VfioUserServer, make_function
    from ..serve.vhost_user import VhostUserServer
    from ..system import SYSTEM
    from .serve import qemu_options
    from .signals import Stop

    scheme, colon, path = place.partition(":")
    if scheme not in SCHEMES or not colon or not path:
        raise UsageError(f"{place!r} is not {' or '.join(f'{name}:SOCKET' for name in SCHEMES)}")
    tell = report.event if report.as_json else report.say
    path = os.path.abspath(path)
    with Stop() as stop:
        done = stop.wake if once else lambda: None
        server: VfioUserServer | VhostUserServer
        if scheme == "vfio-user":
            server = VfioUserServer(make_function(served), path, tell=tell)
            lives = Lives(server.function.device, server.function, scheme, scenarios, run, tell, done)
            tell(f"QEMU, from 10.1 on: {shlex.join(qemu_options(path))}")
        else:
            server = VhostUserServer(make_model(*device_of(f"loopback:{served}")), path)
            lives = Lives(server.device, None, scheme, scenarios, run, tell, done)
            tell(f"vhost-user front ends connect to {path}")
        try:
            if isinstance(server, VfioUserServer):
                server.run(stop.fd)
            else:
                server.start()
                SYSTEM.poll([stop.fd], None)
        finally:
            lives.finish()
            server.close()


def names(scenarios: list[Scenario]) -> None:
    """One line each."""
    for scenario in scenarios:
        click.echo(f"{scenario.name:<32} {scenario.title}")
