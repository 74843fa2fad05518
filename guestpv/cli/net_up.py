"""``guestpv net up``: drive a network device as a link of this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .completion import complete_address
from .report import Report, reporting
from .restarts import option as restart_option
from .vfio_option import VFIO_BACKEND
from .views import bring_up, function_rows

if TYPE_CHECKING:
    from ..drivers.net_control import Rss

EXAMPLE = """\b
Examples:
  guestpv net up                          the only network function
  guestpv net up 0000:01:00.0 --detach    in the background
  guestpv net up --address 192.0.2.5/24 --gateway 192.0.2.1
  guestpv net up --features -ring_packed,-event_idx
  guestpv net up 0000:01:00.0 0000:02:00.0 --queues 4
"""


@click.command(epilog=EXAMPLE)
@click.argument("specs", nargs=-1, metavar="[SPEC]...", shell_complete=complete_address)
@click.option(
    "--features",
    default="",
    metavar="LIST",
    help="Insist on features (+a) or leave them out (-b): +mq,-ring_packed.",
)
@click.option("--address", metavar="CIDR", help="Give the link this address instead of asking a DHCP server.")
@click.option("--gateway", metavar="IP", help="With --address: the gateway of a default route.")
@click.option("--dns", metavar="IP", multiple=True, help="With --address: a name server; may be repeated.")
@click.option("--no-address", is_flag=True, help="Leave the link without an address.")
@click.option("--name", metavar="IFNAME", help="Name of the link.  [default: pv0, pv1, ...]")
@click.option("--poll", is_flag=True, help="Spin instead of waiting for interrupts: faster, costs a CPU.")
@click.option("--queues", type=click.IntRange(1, 8), default=1, show_default=True, help="Pairs of queues.")
@click.option(
    "--rss-key", metavar="HEX", help="Steer by receive-side scaling (RSS) with this Toeplitz key, 40 bytes."
)
@click.option("--rss-table", metavar="LIST", help="With --rss-key: receive queues by hash value: 0,1,0,2.")
@restart_option
@click.option("--detach", is_flag=True, help="Return once it is up; `guestpv net down` ends it.")
@click.option(
    "--force", is_flag=True, help="Also when the machine uses it, as its default route for example."
)
@VFIO_BACKEND
@reporting
def up(
    report: Report,
    specs: tuple[str, ...],
    features: str,
    address: str | None,
    gateway: str | None,
    dns: tuple[str, ...],
    no_address: bool,
    name: str | None,
    poll: bool,
    queues: int,
    rss_key: str | None,
    rss_table: str | None,
    restart: bool,
    detach: bool,
    force: bool,
    vfio_backend: str,
) -> None:
    """Drive the network device SPEC, or several of them, each as a link of this machine.

    Takes the function from the kernel's driver if it has to, negotiates, makes a network link with the
    device's MAC address and MTU, gets an address by DHCP, and carries packets until Ctrl-C, SIGTERM or
    `guestpv net down`. Then, or when anything goes wrong, the kernel gets the function back.

    Without SPEC it takes the network function, if there is exactly one that can be driven. Of several all
    come up or none; each has a process of its own.
    """
    from ..services.addressing import static
    from .counters import Counters
    from .kinds import NET
    from .session import Session, Wishes

    if no_address and address:
        raise UsageError("--address and --no-address exclude each other", hint="guestpv net up --help")
    if (gateway or dns) and not address:
        raise UsageError("--gateway and --dns go with --address", hint="guestpv net up --help")
    if rss_table and not rss_key:
        raise UsageError("--rss-table goes with --rss-key", hint="guestpv net up --help")
    if len(specs) > 1 and (address or (name and "%d" not in name)):
        wrong = "--address" if address else "--name"
        raise UsageError(f"several functions cannot have the same {wrong}", hint="--name lan%d numbers them")
    wanted = Wishes(
        spec=specs[0] if specs else None,
        features=",".join(filter(None, (features, "+rss" if rss_key else ""))),
        settings=static(address, gateway, dns) if address else None,
        addressed=not no_address,
        ifname=name,
        poll=poll,
        queue_pairs=queues,
        rss=steering(rss_key, rss_table, queues) if rss_key else None,
        force=force,
        restart=restart,
        vfio_backend=vfio_backend,
    )
    if len(specs) > 1:
        from .net_several import up_together

        up_together([replace(wanted, spec=spec) for spec in specs], report, detach)
        return
    bring_up(
        NET,
        Session,
        wanted,
        report,
        detach=detach,
        describe=describe,
        ending="Ctrl-C gives the function back.",
        line=Counters,
    )


def steering(key: str, table: str | None, queues: int) -> Rss:
    """RSS by a key in hexadecimal and a list of queues, evenly over all of them where none is given.

    Raises:
        UsageError: one of them is not well formed.
    """
    from ..drivers.net_control import Rss

    try:
        toeplitz = bytes.fromhex(key.replace(":", ""))
        numbers = [int(word) for word in table.split(",")] if table else None
    except ValueError as error:
        raise UsageError(f"{error}", hint="--rss-key 6d5a:56da:255b:... --rss-table 0,1,0,1") from None
    return Rss(toeplitz, numbers) if numbers else Rss.even(toeplitz, queues)


def describe(status: dict[str, Any]) -> list[tuple[str, str]]:
    """What is up, as names and values."""
    address = status["address"]
    rows = [
        *function_rows(status),
        ("link", f"{status['name']}, MAC {status['mac']}, MTU {status['mtu']}, carrier {status['link']}"),
    ]
    if address is None:
        return [*rows, ("address", "none")]
    lease = ""
    if address["by"] == "dhcp":
        seconds = address["lease_seconds"]
        lease = f" by DHCP from {address['server']}, " + (
            "for ever" if seconds is None else f"for {seconds} s"
        )
    rows.append(("address", address["address"] + lease))
    rows += [("gateway", address["gateway"])] if address["gateway"] else []
    rows += [("DNS", " ".join(address["dns"]))] if address["dns"] else []
    return rows
